"""The report: its numbers are those on the disk, nothing is fetched, hostile text stays text; and it is looked at."""

import json
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from tests.workflows.alignment import TRAIN, log_of, question, write
from workflows import dpo, evaluate, grpo, lora
from workflows.__main__ import main
from workflows.evaluation.compare import wilson_interval
from workflows.files import read_json, write_json
from workflows.report import render
from workflows.reporting.charts import MOST_POINTS, charts, kinds_for, score_charts
from workflows.reporting.gather import Run, read_run
from workflows.reporting.tables import answers, gains_table, headline, quantisations, scores_table
from workflows.training.rewards import WeightedReward

pytestmark = pytest.mark.long

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)> & \u2028"
VERIFIED = {
    "version": "0.9.3",
    "prompts": 50,
    "prompt_ids_equal": True,
    "chat_prompts_equal": None,
    "file_bytes": {"tiny-q8_0.gguf": 145e6, "tiny-f16.gguf": 271e6},
    "models": {
        "q8_0": {
            "prompts": 50,
            "greedy_agreement": 0.96,
            "differences": [{"near_tie": True}, {"near_tie": False}],
            "examples": [{"question": "Which one?", "litgpt": "this", "ollama": "that", "equal": False}],
        },
        "f16": {"prompts": 50, "greedy_agreement": 1.0, "differences": [], "examples": []},
    },
}


@pytest.fixture(scope="module")
def out(tiny_llama: Path, pairs: Path, questions: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs in a folder of runs: "tiny" with all stages, "again" with a LoRA step alone."""
    folder = tmp_path_factory.mktemp("report")
    chats = [
        {"messages": [*question(n)["prompt"], {"role": "assistant", "content": f"finding {n}"}]} for n in range(16)
    ]
    data = write(folder / "chats", train=chats, validation=chats[:3])
    write_json(data / "manifest.json", {"title": "Made up", "licence": "none needed", "attribution": "By a test."})
    rows = [{**question(n), "choices": ["finding", "fever", "rash"], "answer": n % 3} for n in range(20)]
    rows[0]["prompt"] = [{"role": "user", "content": HOSTILE}]
    write(folder / "data" / "toy_mcq", test=rows)
    run = folder / "out" / "tiny"
    common: dict[str, Any] = {"train": TRAIN, "precision": "32-true", "lora_r": 2}
    lora.setup(tiny_llama, data, run / "lora", **common)
    lora.setup(tiny_llama, data, folder / "out" / "again" / "lora", **common, seed=5)
    dpo.setup(run / "lora" / "final", pairs, run / "dpo", **common, max_new_tokens=8)
    rewarded: Any = {"rewards": [WeightedReward("tests.workflows.alignment.early_letters")], "group_size": 3}
    grpo.setup(run / "dpo" / "final", questions, run / "grpo", **common, **rewarded, max_new_tokens=8)
    base: dict[str, Path] = {}
    for stage, checkpoint in (("base", tiny_llama), *((s, run / s / "final") for s in ("lora", "dpo", "grpo"))):
        where = run / "evaluate" / stage
        scored: Any = {"data_dir": folder / "data", "out_dir": where, "precision": "32-true", "max_new_tokens": 8}
        evaluate.setup(checkpoint, ["toy_mcq"], **scored, **base)
        base = {"baseline": run / "evaluate" / "base"}
    write_json(run / "ollama" / "verification.json", VERIFIED)
    write(run / "panel", **{stage: panel_rows(stage) for stage in ("lora", "base")})
    return folder / "out"


def panel_rows(stage: str) -> list[dict[str, Any]]:
    """A stage's answers to the demo's prompts."""
    return [
        {"question": "Which term?", "kind": "medical", "wanted": "Epistaxis", "answer": f"{stage} {HOSTILE}"},
        {"question": "Hello?", "kind": "chat", "wanted": "Hello.", "answer": "and " * 99, "done_reason": "length"},
        {"question": "Why?", "kind": "chat", "wanted": "So.", "error": "It was cut while it was thinking."},
    ]


@pytest.fixture(scope="module")
def run(out: Path) -> Run:
    return read_run(out / "tiny")


@pytest.fixture(scope="module")
def page(out: Path) -> Path:
    assert main(["report", "--runs", "[tiny]", "--out_dir", str(out)]) == 0
    return out / "tiny" / "report.html"


class Tags(HTMLParser):
    """Every element with its attributes, and the text of script elements."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        if tag == "script":
            self.scripts.append("")

    def handle_data(self, data: str) -> None:
        if self.found and self.found[-1][0] == "script" and self.cdata_elem == "script":
            self.scripts[-1] += data
        else:
            self.text += data


def data_of(page: Path) -> dict[str, Any]:
    return json.loads(Tags(page.read_text()).scripts[1])


# ---- without a browser ----


def test_the_panel_comes_first_with_the_whole_answers_of_each_stage(page):
    text = " ".join(Tags(page.read_text().replace("><", "> <")).text.split())
    found = text.index("Side by side The same prompts")
    assert found < text.index("What was run step state")
    shown = text[found : text.index("What was run step state")]
    assert f"base base {' '.join(HOSTILE.split())} lora lora" in shown and "right answer Epistaxis" in shown
    assert "and " * 98 + "and …" in shown and "(no answer: It was cut while it was thinking.)" in shown
    assert shown.count("Chat") == 1 and "Hello." not in shown  # many answers to small talk are as good


def test_curves_are_the_numbers_of_the_logs(page, out):
    groups = {group["step"]: group["charts"] for group in data_of(page)["groups"]}
    assert list(groups) == ["lora", "dpo", "grpo"]
    for step, drawn in groups.items():
        log = log_of(out / "tiny" / step)
        shown = {}
        for chart in drawn:
            kind = next(kind for kind in kinds_for(list(log[-1])) if kind.title == chart["title"])
            by_name = {called: column for column, called in kind.columns.items()}
            for series in chart["series"]:
                shown[by_name[series["name"]]] = (dict(zip(series["x"], series["y"], strict=True)), kind.scale)
        assert set(shown) == {name for row in log for name in row} - {"step"}
        for column, (points, scale) in shown.items():
            expected = {int(row["step"]): row[column] * scale for row in log if column in row}
            assert points == pytest.approx(expected)
    titles = {step: [chart["title"] for chart in drawn if chart["first"]] for step, drawn in groups.items()}
    assert titles["lora"] == ["Loss", "Throughput", "Peak memory"]
    assert {"Margin", "KL to the reference", "Pairs the right way round"} <= set(titles["dpo"])
    assert {"Reward", "KL to the reference", "Throughput", "Peak memory"} <= set(titles["grpo"])


def test_scores_and_gains_are_those_of_the_evaluations(run, out):
    table = scores_table(run)
    assert table[0] == ["", "base", "lora", "dpo", "grpo"]
    made = {row["name"]: row for row in read_json(out / "tiny" / "evaluate" / "dpo" / "metrics.json")["metrics"]}
    acc = made["acc"]
    assert table[1][0] == "toy_mcq, acc, 20 questions"
    low, high = (100 * end for end in wilson_interval(acc["value"], 20))
    assert table[1][3] == f"{100 * acc['value']:.1f}% ({low:.1f} to {high:.1f})"
    (chart, _) = score_charts([run])
    assert chart["stages"] == ["base", "lora", "dpo", "grpo"] and chart["unit"] == "%"
    point = next(p for p in chart["points"] if p["stage"] == "dpo")
    assert [point["value"], *point["interval"]] == pytest.approx([100 * acc["value"], low, high])
    compared = read_json(out / "tiny" / "evaluate" / "grpo" / "metrics.json")["comparison"][0]
    gains = {(row[0], row[1]): row for row in gains_table(run)}
    gain = gains[("grpo − base", "toy_mcq, acc")][2].replace("−", "-")
    assert float(gain) == pytest.approx(100 * compared["difference"], abs=0.06)
    assert ("grpo − its start", "reward, 6 held-out rows") in gains
    assert f"{100 * compared['tuned']:.1f}% (grpo)" in headline(run)


def test_a_step_that_made_the_model_worse_is_named(run):
    texts = {"dpo": ["Greedy answers that are right fell from 91% to 29%.", HOSTILE], "grpo": [], "lora": []}
    steps = [replace(step, metrics={**step.metrics, "warnings": texts[step.name]}) for step in run.steps]
    said = Tags(render([replace(run, steps=steps)]))
    assert "dpo has made the model worse" in said.text and texts["dpo"][0] in said.text and HOSTILE in said.text
    assert said.text.count("has made the model worse") == 1


def test_every_stage_answers_the_same_questions(run, out):
    (first, *_) = found = answers([run])
    assert len(found) == 4 and first["question"] == HOSTILE and first["wanted"] == "finding"
    for number, entry in enumerate(found):
        for stage, text in entry["answers"]:
            lines = (out / "tiny" / "evaluate" / stage / "answers.jsonl").read_text().split("\n")
            assert json.loads(lines[number])["answer"] == text
        assert [stage for stage, _ in entry["answers"]] == ["base", "lora", "dpo", "grpo"]


def test_what_ollama_serves_is_in_the_page(run, page):
    assert quantisations(run) == [
        ["q8_0", "145 MB", "96%", "2 of 50", "1"],
        ["f16", "271 MB", "100%", "0 of 50", "0"],
    ]
    text = " ".join(Tags(page.read_text()).text.split())
    assert "prompt token ids of 50 held-out questions: equal to ours" in text
    assert "with and without a system message: not verified" in text
    for told in ("Made up", "By a test.", "torch", "threads", "train.learning_rate", "sha256 of lit_model.pth"):
        assert told in text


def test_nothing_is_fetched_and_text_stays_text(page):
    text = page.read_text()
    tags = Tags(text)
    assert [tag for tag, _ in tags.found if tag == "script"] == ["script"] * 3  # plotly.js, the numbers, ours
    for tag, attributes in tags.found:
        assert tag not in ("img", "iframe", "object") and not any(name.startswith("on") for name in attributes)
        for name in ("src", "href"):
            assert (attributes.get(name) or "#").startswith(("#", "data:"))
    policy = next(a["content"] for tag, a in tags.found if a.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'") and "http" not in policy
    assert HOSTILE in tags.text
    assert text.count("plotly.js v") == 1 and len(text) < 6_000_000


def test_several_runs_share_a_page(out):
    assert main(["report", "--runs", "[tiny,again,tiny]", "--out_dir", str(out)]) == 0
    found = data_of(out / "report-tiny-again.html")
    assert found["runs"] == ["tiny", "again"]
    (loss, *_) = found["groups"][0]["charts"]
    assert [(series["run"], series["name"]) for series in loss["series"]] == [
        (run, name) for run in ("tiny", "again") for name in ("training", "validation")
    ]
    assert loss["series"][0]["y"] != loss["series"][2]["y"]


def test_runs_that_share_a_last_name_are_named_by_their_paths(tmp_path):
    for name, log in (("a/x", "step,loss\n1,2\n"), ("b/x", "step,loss\n1,3\n"), ("b/y", "step,loss\n1,4\n")):
        (step := tmp_path / name / "lora").mkdir(parents=True)
        (step / "metrics.csv").write_text(log)
    assert main(["report", "--runs", "[a/x,b/x,b/y,./a/x/]", "--out_dir", str(tmp_path)]) == 0
    found = data_of(tmp_path / "report-a-x-b-x-y.html")
    assert found["runs"] == ["a/x", "b/x", "y"]
    drawn = {series["run"]: series["y"] for series in found["groups"][0]["charts"][0]["series"]}
    assert drawn == {"a/x": [2], "b/x": [3], "y": [4]}


def test_a_run_that_goes_on_has_a_report_too(out, tmp_path):
    step = tmp_path / "new" / "lora"
    step.mkdir(parents=True)
    shutil.copy(out / "tiny" / "lora" / "metrics.csv", step / "metrics.csv")
    with open(step / "metrics.csv", "a") as f:
        f.write("7,1.")  # being written
    assert main(["report", "--runs", "[new]", "--out_dir", str(tmp_path)]) == 0
    text = Tags((tmp_path / "new" / "report.html").read_text()).text
    assert "stopped" in text and "Not exported yet" in text and "No stage was asked" in text
    assert "Settings" not in text


def test_values_that_are_no_numbers_are_gaps(tmp_path):
    (step := tmp_path / "odd" / "dpo").mkdir(parents=True)
    (step / "metrics.csv").write_text("step,loss,kl\n1,2,nan\n2,1e308,0.5\n3,1,-inf\n")
    assert main(["report", "--runs", "[odd]", "--out_dir", str(tmp_path)]) == 0
    drawn = data_of(tmp_path / "odd" / "report.html")["groups"][0]["charts"]
    assert {chart["title"]: (chart["series"][0]["y"], chart["gaps"]) for chart in drawn} == {
        "Loss": ([2, 1e308, 1], 0),
        "KL to the reference": ([None, 0.5, None], 2),
    }


def test_long_logs_are_thinned_and_new_columns_get_a_chart(run):
    step = run.steps[0]
    log = [{"step": i, "loss": 1.0, "some_thing": 2.0} for i in range(1, 3 * MOST_POINTS + 2)]
    (group,) = charts([Run("long", [type(step)("lora", step.status, log, {}, {}, [])])])
    assert group["thinned"] == 4
    assert len(group["charts"][0]["series"][0]["x"]) == -(-len(log) // 4) <= MOST_POINTS
    assert group["charts"][-1]["title"] == "Some thing" and not group["charts"][-1]["first"]


def test_a_page_is_the_same_however_often_it_is_made(run):
    first, second = (re.sub(r"\d+ (s|min) ago", "", render([run])) for _ in range(2))
    assert first == second


@pytest.mark.parametrize(
    ("runs", "told"),
    [
        ("[tny]", r"There is no run in .*tny\. Did you mean tiny\? In .* there are: again, tiny\."),
        ("[]", "--runs names no run"),
    ],
)
def test_a_run_that_is_not_there_is_one_message(out, capsys, runs, told):
    assert main(["report", "--runs", runs, "--out_dir", str(out)]) == 1
    assert re.search(told, capsys.readouterr().err)


@pytest.mark.parametrize(
    ("file", "text", "told"),
    [
        ("lora/metrics.csv", "step,loss\nx,1\n", "is not a log of training steps"),
        ("lora/metrics.csv", "step,loss\nnan,1\n", "is not a log of training steps"),
        ("lora/final/metrics.json", '{"metrics": [], "seconds": 1e999}', ": not valid JSON (it has no 1e999)"),
        ("lora/final/provenance.json", '{"sources": {}, "versions": {}, "files": {}}', "(settings: field required)"),
        ("grpo/completions.jsonl", "nonsense\n", ", line 1: not valid JSON"),
        ("grpo/completions.jsonl", "{}\n", ", line 1 is not what a step writes (step: field required)"),
        ("grpo/completions.jsonl", '{"step": 1}\n', ", line 1 is not what a step writes (question: field required)"),
        ("grpo/completions.jsonl", '"\\ud800"\n', ", line 1: not valid JSON"),
        ("evaluate/base/metrics.json", "{}", "(metrics: field required)"),
        ("evaluate/dpo/answers.jsonl", "[]\n", ", line 1 is not what a step writes (the whole: "),
        ("panel/base.jsonl", "{}\n", ", line 1 is not what a step writes (question: field required)"),
        ("ollama/provenance.json", "{}", "(sources: field required)"),
        ("ollama/verification.json", "{}", "(version: field required)"),
        ("ollama/verification.json", "{", "not valid JSON"),
    ],
)
def test_a_damaged_file_is_named_and_the_old_page_stays(out, tmp_path, capsys, file, text, told):
    names = shutil.ignore_patterns("*.pth*")
    shutil.copytree(out / "tiny", tmp_path / "tiny", ignore=names)
    (tmp_path / "tiny" / "report.html").write_text("old")
    (tmp_path / "tiny" / file).write_text(text)
    assert main(["report", "--runs", "[tiny]", "--out_dir", str(tmp_path)]) == 1
    err = capsys.readouterr().err
    assert str(tmp_path / "tiny" / file) in err and told in err
    assert (tmp_path / "tiny" / "report.html").read_text() == "old"


def test_an_empty_run_is_one_message(tmp_path, capsys):
    (tmp_path / "none").mkdir()
    assert main(["report", "--runs", "[none]", "--out_dir", str(tmp_path)]) == 1
    assert "holds no step of a run yet. `make lora RUN=none` makes one." in capsys.readouterr().err


# ---- in a browser ----

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A headless Chromium: the one that CHROMIUM names, or the system's."""
    sync_api = pytest.importorskip("playwright.sync_api")
    path = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, BROWSERS)), None)
    if path is None:
        pytest.skip("no Chromium found to look at the page with: install it (Debian: `apt install chromium`)")
    options = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
    with sync_api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=path, args=options, timeout=120_000)
        yield chromium
        chromium.close()


def opened(browser: Any, file: Path, width: int = 1280, scheme: str = "light", touch: bool = False) -> Any:
    """The file's page, drawn; `complaints` of it are collected."""
    size = {"width": width, "height": 900}
    context = browser.new_context(viewport=size, color_scheme=scheme, has_touch=touch, is_mobile=touch)
    page = context.new_page()
    page.set_default_timeout(300_000)  # a busy machine
    page.complaints = []
    page.on("console", lambda message: page.complaints.append(message.text))
    page.on("pageerror", lambda error: page.complaints.append(str(error)))
    page.on("dialog", lambda dialog: (page.complaints.append("a dialog"), dialog.dismiss()))
    page.on("request", lambda request: page.complaints.append(request.url) if request.url[:5] != "data:" else None)
    page.goto(file.as_uri())
    page.wait_for_selector("html[data-ready]", state="attached")
    assert page.complaints.pop(0) == file.as_uri()  # the one request
    return page


def until(page: Any, condition: str) -> None:
    """Wait for it; Playwright's own waiting needs `eval`, which the page's policy forbids."""
    for _ in range(600):
        if page.evaluate(condition):
            return
        page.wait_for_timeout(50)
    raise AssertionError(f"never: {condition}")


DRAWN = """() => [...document.querySelectorAll('figure')].filter(f => f.childElementCount).map(figure => ({
  lines: [...figure.querySelectorAll('.scatterlayer path.js-line, .scatterlayer .point')]
    .filter(path => path.getAttribute('d').length > 10).length,
  ticks: figure.querySelectorAll('.xtick, .ytick').length,
  font: Math.min(...[...figure.querySelectorAll('.xtick text, .ytick text')]
    .map(text => parseFloat(getComputedStyle(text).fontSize))),
  width: figure.getBoundingClientRect().width,
  title: figure.querySelector('figcaption b').textContent,
}))"""
CONTRAST = """() => {
  const light = c => { const [r, g, b] = c.match(/[\\d.]+/g).slice(0, 3).map(v => v / 255)
    .map(v => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4); return .2126 * r + .7152 * g + .0722 * b; };
  const paper = light(getComputedStyle(document.body).backgroundColor);
  const ratio = c => (Math.max(light(c), paper) + .05) / (Math.min(light(c), paper) + .05);
  const texts = [...document.querySelectorAll('p, td, th, dd, dt, h1, h2, figcaption b, figcaption span')];
  return { paper, text: Math.min(...texts.map(e => ratio(getComputedStyle(e).color))),
    ticks: Math.min(...[...document.querySelectorAll('.xtick text')].map(e => ratio(getComputedStyle(e).fill))),
    lines: Math.min(...[...document.querySelectorAll('path.js-line')].map(e => ratio(getComputedStyle(e).stroke))) };
}"""


@pytest.mark.parametrize(("width", "touch"), [(1280, False), (390, True)])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_is_drawn_and_readable(browser, page, width, touch, scheme):
    shown = opened(browser, page, width, scheme, touch)
    figures = shown.evaluate(DRAWN)
    found = data_of(page)
    expected = [chart["title"] for group in found["groups"] for chart in group["charts"] if chart["first"]]
    assert [figure["title"] for figure in figures] == [*expected, "toy_mcq, acc", "toy_mcq, acc_norm"]
    for figure in figures:
        assert figure["lines"] >= 1 and figure["ticks"] >= 4 and figure["font"] >= 11, figure
        assert 280 <= figure["width"] <= width
    assert shown.evaluate("document.documentElement.scrollWidth") == width  # nothing sticks out
    contrast = shown.evaluate(CONTRAST)
    assert (contrast["paper"] > 0.9) if scheme == "light" else (contrast["paper"] < 0.05)
    assert contrast["text"] > 4.5 and contrast["ticks"] > 4.5 and contrast["lines"] > 3  # WCAG 2.2, AA
    shown.evaluate("document.querySelectorAll('details').forEach(d => { d.open = true; })")
    until(shown, "[...document.querySelectorAll('figure')].every(figure => figure.querySelector('.main-svg'))")
    assert all(figure["lines"] >= 1 for figure in shown.evaluate(DRAWN))
    assert shown.evaluate("document.documentElement.scrollWidth") == width
    assert shown.complaints == []
    shown.context.close()


def test_dragging_zooms_the_charts_of_a_step_and_no_others(browser, page):
    shown = opened(browser, page)
    ranges = "() => [...document.querySelectorAll('.plot')].map(plot => [...plot.layout.xaxis.range])"
    before = shown.evaluate(ranges)
    area = shown.locator("figure .nsewdrag").first
    area.scroll_into_view_if_needed()
    box = area.bounding_box()
    y = box["y"] + box["height"] / 2
    shown.mouse.move(box["x"] + box["width"] * 0.3, y)
    shown.mouse.down()
    shown.mouse.move(box["x"] + box["width"] * 0.7, y, steps=5)
    shown.mouse.up()
    until(shown, "document.querySelectorAll('.plot')[2].layout.xaxis.range[0] > 2")
    after = shown.evaluate(ranges)
    changed = [old != new for old, new in zip(before, after, strict=True)]
    assert changed == [True] * 3 + [False] * (len(before) - 3)  # lora has three
    assert after[1] == after[2] == pytest.approx(after[0])
    shown.mouse.dblclick(box["x"] + box["width"] / 2, y)
    until(shown, "document.querySelectorAll('.plot')[2].layout.xaxis.range[0] < 2")
    assert shown.evaluate(ranges)[0] == pytest.approx(before[0])
    assert shown.complaints == []
    shown.context.close()


def test_a_gap_parts_a_curve_and_its_mean(browser, tmp_path):
    (step := tmp_path / "odd" / "dpo").mkdir(parents=True)
    rows = (f"{n},{'nan' if n == 40 else n / 80},1.7e9\n" for n in range(1, 81))
    (step / "metrics.csv").write_text("".join(["step,kl,peak_bytes\n", *rows]))
    main(["report", "--runs", "[odd]", "--out_dir", str(tmp_path)])
    shown = opened(browser, tmp_path / "odd" / "report.html")
    title = shown.evaluate("document.querySelector('figcaption').textContent")
    assert title == "KL to the referencenatsgaps: 1 infinite or not a number"
    assert shown.evaluate("document.querySelector('.plot').querySelectorAll('path.js-line').length") == 4
    mean = shown.evaluate("document.querySelector('.plot').data[1].y")
    assert mean[39] is None and mean[38] == pytest.approx((37 + 38 + 39 + 41) / 4 / 80)
    flat = shown.evaluate("document.querySelectorAll('.plot')[1].data.map((drawn) => drawn.y)")
    assert flat[0] == flat[1]  # what does not change is drawn so, without rounding errors
    assert shown.complaints == []
    shown.context.close()


def test_charts_follow_when_the_system_turns_dark(browser, page):
    shown = opened(browser, page)
    light = shown.evaluate(CONTRAST)
    shown.emulate_media(color_scheme="dark")
    shown.wait_for_timeout(500)
    dark = shown.evaluate(CONTRAST)
    assert dark["paper"] < light["paper"] and dark["ticks"] > 4.5 and dark["lines"] > 3
    assert shown.complaints == []
    shown.context.close()


def test_runs_side_by_side_have_colours_of_their_own(browser, out):
    main(["report", "--runs", "[again,tiny]", "--out_dir", str(out)])
    shown = opened(browser, out / "report-again-tiny.html", 390, touch=True)
    of = "([where, what]) => [...document.querySelectorAll(where)].map(e => getComputedStyle(e)[what])"
    names = shown.evaluate(of, ["h1 .key", "backgroundColor"])
    drawn = shown.evaluate(of, ["figure[data-chart='0,0'] path.js-line", "stroke"])
    assert len(set(names)) == 2 and set(drawn) == set(names)
    assert shown.evaluate(of, ["#scores .run .key", "backgroundColor"]) == names[1:]  # the other one has no scores
    assert shown.evaluate(of, ["figure[data-score='0'] figcaption .dots", "backgroundColor"]) == names[1:]
    kinds = "[...document.querySelector('.plot').data].map(({ name, line }) => [name, line.dash])"
    assert shown.evaluate(kinds) == [
        [f"{run}, {name}", dash]
        for run in ("again", "tiny")
        for name, dash in (("training", "solid"), ("validation", "dot"))
    ]
    titles = shown.evaluate("[...document.querySelectorAll('figcaption')].map(e => e.textContent)")
    assert titles[0] == "Lossagaintinytrainingvalidation"
    assert shown.evaluate("document.documentElement.scrollWidth") == 390
    assert shown.complaints == []
    shown.context.close()
