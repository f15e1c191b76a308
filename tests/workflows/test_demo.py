"""The end of the demo: one summary out of the stages' files and the panel's answers, and its tables."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from data_prep import prepare
from tests.workflows.test_panel import kept
from workflows import lora
from workflows.__main__ import main
from workflows.checkpoint import metric, share_metric, write_metrics
from workflows.demo import changes, setup, stage_summary, validation_loss
from workflows.errors import UserError
from workflows.evaluation.compare import samples_file
from workflows.files import read_json, write_json
from workflows.merge import read_hyperparameters
from workflows.panel import prompts_of
from workflows.reporting.panel_text import WIDTH
from workflows.reporting.summary_text import as_text, by_kind, clock, own_test, pooled
from workflows.stages import left_out
from workflows.training.loop import TrainArgs

COMPARISON = {
    "task": "mine_mcq",
    "metric": "acc",
    "base": 0.51,
    "tuned": 0.66,
    "difference": 0.15,
    "low": 0.1,
    "high": 0.2,
    "p_value": 1.6e-9,
    "n": 400,
}
VERIFICATION = {
    "version": "0.9.3",
    "name": "demo",
    "prompt_ids_equal": True,
    "chat_prompts_equal": None,
    "prompts": 50,
    "greedy_agreement": {"f16": 0.98, "q8_0": 0.92},
    "file_bytes": {},
    "models": {},
}
EXAM = {
    "medical": ("exact_name", "name_in_sentence"), "naming": ("exact_name", "name_in_sentence"),
    "lay": ("exact_name", "name_in_sentence"), "meaning": ("close_f1",), "identity": ("contains",),
    "advice": ("disclaimer",), "advice_other": ("disclaimer",),
}  # fmt: skip
RIGHT = {"base": 0, "lora": 2, "dpo": 3}
"""Of four questions of each kind."""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    rows = [{"question": f"Which finding is number {i}?", "answer": f"Finding {i}"} for i in range(60)]
    (folder / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    prepare.setup("jsonl", out_dir=folder, file=folder / "mine.jsonl")
    return folder / "jsonl"


@pytest.fixture(scope="module")
def trained(tiny_llama: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA run whose steps are too small to change anything."""
    out_dir = tmp_path_factory.mktemp("run") / "lora"
    train = TrainArgs(max_steps=1, learning_rate=1e-12, lr_warmup_steps=0, global_batch_size=2, max_seq_length=128)
    lora.setup(tiny_llama, data, out_dir, precision="32-true", train=train)
    return out_dir / "final"


def keep_panel(run_dir: Path, data: Path, stages: dict[str, Path]) -> None:
    """Leave answers of stages to the panel, each stage by its checkpoint."""
    asked = [prompt.messages[-1]["content"] for prompt in prompts_of(data, seed=7)]
    for stage, checkpoint in stages.items():
        kept(run_dir, stage, checkpoint, asked, f"Finding of {stage}")


@pytest.fixture
def run_dir(trained: Path, tiny_llama: Path, data: Path, tmp_path: Path) -> Path:
    """What the stages before the summary leave, with the panel's answers."""
    folder = tmp_path / "demo"
    shutil.copytree(trained, folder / "lora" / "final")
    for stage, accuracy in (("base", 0.51), ("lora", 0.66)):
        rows = [
            {**metric(name, accuracy, stderr=0.025, n=400, split="test"), "task": "mine_mcq"}
            for name in ("acc", "acc_norm")
        ]
        compared = [COMPARISON] if stage == "lora" else []
        where = {"checkpoint_dir": str(tiny_llama)}
        write_metrics(folder / "evaluate" / stage / "metrics.json", rows, seconds=30.0, comparison=compared, **where)
    keep_panel(folder, data, {"base": tiny_llama, "lora": trained})
    write_json(folder / "ollama" / "verification.json", VERIFICATION)
    sizes = {"demo-q8_0.gguf": 144_810_912}
    write_metrics(folder / "ollama" / "metrics.json", [], seconds=70.0, file_bytes=sizes)
    return folder


def test_the_summary_has_the_shape_that_the_tables_read(run_dir, tiny_llama, data, capsys):
    setup(run_dir, tiny_llama, data)
    summary = read_json(run_dir / "summary.json")
    assert {"stages", "ollama", "steps", "total_seconds", "hardware", "versions"} <= set(summary)
    base, tuned = summary["stages"]
    assert (base["name"], tuned["name"]) == ("base", "lora")
    for stage in (base, tuned):
        assert {"name", "seconds", "metrics"} <= set(stage)
        assert all({"name", "value", "stderr", "n", "split"} <= set(row) for row in stage["metrics"])
        assert [(row["name"], row["split"]) for row in stage["metrics"]] == [
            ("acc", "test"),
            ("acc_norm", "test"),
            ("val_loss", "validation"),
        ]
    training = read_json(run_dir / "lora" / "final" / "metrics.json")
    assert base["seconds"] > 30 and tuned["seconds"] == pytest.approx(30 + training["seconds"])
    assert tuned["tokens_per_second"] == training["tokens_per_second"] and tuned["comparison"] == [COMPARISON]

    ollama = summary["ollama"]
    assert {"version", "prompt_ids_equal", "prompts", "greedy_agreement", "answers"} <= set(ollama)
    assert (ollama["greedy_agreement"], ollama["prompts"]) == (0.92, 50)
    assert [answer["answer"] for answer in ollama["answers"]] == ["Finding of lora"] * 3  # of the last stage
    assert {stage: [row["answer"] for row in rows] for stage, rows in summary["panel"].items()} == {
        "base": ["Finding of base"] * 3,
        "lora": ["Finding of lora"] * 3,
    }
    assert summary["total_seconds"] == pytest.approx(sum(summary["steps"].values()))
    assert summary["steps"]["export and verify"] == 70 and summary["steps"]["evaluate"] == base["seconds"] + 30
    assert summary["steps"]["lora"] == pytest.approx(training["seconds"]) and summary["steps"]["replay"] == 0
    assert summary["left_out"] == left_out(["lora", "evaluate"])
    assert "Finding of base" in (run_dir / "report.html").read_text()

    capsys.readouterr()
    setup(run_dir, show=True)
    assert capsys.readouterr().out == as_text(summary, run_dir) + "\n"


def test_the_table_shows_what_the_summary_holds(run_dir, tiny_llama, data):
    setup(run_dir, tiny_llama, data)
    summary = read_json(run_dir / "summary.json")
    summary["stages"][1]["metrics"][2]["value"] = 1.43
    text = as_text(summary, run_dir)
    for expected in (
        "base   Finding of base",
        "51.0% (46.1 to 55.9)",
        "1.430",
        "lora - base, mine_mcq acc: +15.0 points (+10.0 to +20.0), p = 1.6e-09, 400 questions",
        "In Ollama 0.9.3",
        "prompt token ids of 50 questions: equal to ours; conversations: not verified",
        "greedy answers as LitGPT's (q8_0): 92%",
        "demo-q8_0.gguf: 145 MB",
        "ot medical advice",
        "left out: dpo, since there are no preferences for this data",
        f"{run_dir}/summary.json",
    ):
        assert expected in text
    assert "±" not in text


def test_the_end_names_the_next_commands_with_what_they_need(run_dir, tiny_llama, data):
    setup(run_dir, tiny_llama, data)
    summary = read_json(run_dir / "summary.json")
    text = as_text(summary, run_dir)
    page = (run_dir / "report.html").as_uri()
    assert "\n  make chat  " in text and re.search(rf"\n  make report +the page .*{page}", text)
    assert "make data DATA=jsonl ARGS=" in text and "make lora export chat DATA=mine RUN=mine" in text
    summary["ollama"]["name"] = "doctor"
    other = as_text(summary, run_dir.rename(run_dir.with_name("other")))
    assert "make chat RUN=other NAME=doctor" in other and "make report RUN=other" in other


def test_showing_a_summary_loads_no_model_library():
    code = "import sys, workflows.demo; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_several_tasks_have_a_table_each(run_dir, tiny_llama, data):
    setup(run_dir, tiny_llama, data)
    summary = read_json(run_dir / "summary.json")
    for stage, accuracy in zip(summary["stages"], (0.3, 0.4), strict=True):
        stage["metrics"].append({**metric("acc", accuracy, stderr=0.025, n=100, split="test"), "task": "medqa_local"})
    lines = as_text(summary, run_dir).splitlines()
    for task, scores in (("mine_mcq", ("51.0%", "66.0%")), ("medqa_local", ("30.0%", "40.0%"))):
        begin = lines.index(f"Held-out questions of {task}")
        assert [score in line for score, line in zip(scores, lines[begin + 2 :], strict=False)] == [True, True]


def test_data_without_scores_is_compared_by_validation_loss(run_dir, tiny_llama, data):
    shutil.rmtree(run_dir / "evaluate")
    setup(run_dir, tiny_llama, data, scored=False)
    summary = read_json(run_dir / "summary.json")
    losses = [[(row["name"], row["value"]) for row in stage["metrics"]] for stage in summary["stages"]]
    (before, after) = losses
    assert [name for name, _ in before + after] == ["val_loss", "val_loss"]
    assert f"{before[0][1]:.3f}" in as_text(summary, run_dir)
    assert summary["left_out"] == left_out(["lora"])


@pytest.fixture
def examined(run_dir: Path) -> Path:
    """Evaluations of three stages on an assistant's exam of four questions a kind."""
    for stage, right in RIGHT.items():
        folder = run_dir / "evaluate" / stage
        folder.mkdir(parents=True, exist_ok=True)
        rows = []
        for kind, metrics in EXAM.items():
            task = f"assistant_questions/{kind}"
            rows += [{**share_metric(name, right / 4, 4), "task": task} for name in metrics]
            samples = [
                {"doc_id": i, "doc_hash": str(i), "metrics": metrics, **dict.fromkeys(metrics, float(i < right))}
                for i in range(4)
            ]
            samples_file(folder, task).write_text("".join(json.dumps(sample) + "\n" for sample in samples))
        taught = "general-mine_taught"
        rows.append({**metric("logprob", -0.6 - 0.1 * right, stderr=0.05, n=4, split="test"), "task": taught})
        lines = [{"doc_id": i, "doc_hash": str(i), "metrics": ["logprob"], "logprob": -0.6 - right} for i in range(4)]
        samples_file(folder, taught).write_text("".join(json.dumps(line) + "\n" for line in lines))
        if stage != "lora":
            rows.append({**share_metric("acc", 0.25 * (1 + right), 4), "task": "hpo_mcq"})
        write_metrics(folder / "metrics.json", rows, seconds=9.0, comparison=[], checkpoint_dir="x")
    return run_dir


def blocks_of(text: str) -> dict[str, list[str]]:
    """The paragraphs of a text, each by the beginning of its first line."""
    paragraphs = [block.strip("\n").splitlines() for block in text.split("\n\n") if block.strip()]
    return {first[:14]: lines for first, *lines in paragraphs}


def test_an_assistants_exam_has_a_table_for_each_thing(examined: Path, tiny_llama, trained, data):
    shutil.copytree(examined / "lora", examined / "dpo")
    keep_panel(examined, data, {"dpo": trained})
    metrics = read_json(examined / "dpo" / "final" / "metrics.json")
    write_json(examined / "dpo" / "final" / "metrics.json", {**metrics, "warnings": ["Greedy answers fell."]})
    setup(examined, tiny_llama, data, stages=["lora", "dpo"])
    summary = read_json(examined / "summary.json")
    assert all(row["name"] != "val_loss" for row in summary["stages"][0]["metrics"])  # nothing is measured for it
    blocks = blocks_of(as_text(summary, examined))
    facts, manner, stays, changed = (blocks[f"{title:.14}"] for title in (
        "Taught facts, asked", "Manner: form of", "What must stay", "Change from the",
    ))  # fmt: skip
    assert [line.split()[0] for line in facts[1:]] == ["base", "lora", "dpo"]
    assert facts[2].count("50% (15 to 85)") == 4
    assert "50% (22 to 78)" in manner[2]  # eight questions whose answer is a name
    assert re.search(r"dpo +-0\.900 \(-0\.998 to -0\.802\) +100% ", stays[3]) and stays[2].count("%") == 0
    assert changed[1].startswith("  lora ") and changed[1].count("+50 (") == 3 and "-2.00 (" in changed[1]
    assert changed[2].startswith("  dpo ") and changed[2].count("+25 (") == 3 and "-1.00 (" in changed[2]
    assert "  WARNING, dpo: Greedy answers fell." in as_text(summary, examined).splitlines()


def test_tables_keep_to_the_width_of_a_terminal_with_the_longest_figures(examined: Path, tiny_llama, data):
    setup(examined, tiny_llama, data)
    summary = read_json(examined / "summary.json")
    for row in (row for stage in summary["stages"] for row in stage["metrics"] if row.get("low") is not None):
        row.update(value=1.0, low=1.0, high=1.0)
    for compared in (compared for change in summary["changes"] for compared in change["compared"]):
        compared.update(difference=-1.0, low=-1.0, high=-1.0)
    tables = as_text(summary, examined).partition("Taught facts, asked")[2].partition("In Ollama")[0]
    assert "100% (100 to 100)" in tables and "-100 (-100 to -100)" in tables
    assert max(map(len, tables.splitlines())) <= WIDTH


def test_changes_are_of_the_questions_that_both_stages_were_asked(examined: Path):
    stages = [
        {"name": stage, **read_json(examined / "evaluate" / stage / "metrics.json")} for stage in ("base", "lora")
    ]
    (change,) = changes(examined, stages)
    assert (change["before"], change["stage"]) == ("base", "lora")
    assert {c["metric"]: (c["n"], c["difference"]) for c in change["compared"]} == {
        "facts": (12, 0.5), "sentence": (8, 0.5), "disclaimer": (8, 0.5), "general": (4, -2.0),
    }  # fmt: skip
    file = samples_file(examined / "evaluate" / "lora", "assistant_questions/naming")
    file.write_text("".join(file.read_text().splitlines(keepends=True)[:1]))
    (change,) = changes(examined, stages)
    assert {c["metric"]: c["n"] for c in change["compared"]}["facts"] == 9


def test_shares_of_several_kinds_are_one_share_of_all_their_questions():
    row = pooled([share_metric("exact_name", 1.0, 2), share_metric("exact_name", 0.25, 4)])
    assert (row["value"], row["n"]) == (0.5, 6) and 0 < row["low"] < 0.5 < row["high"] < 1
    (key,) = by_kind([{**share_metric("contains", 1.0, 2), "task": "mine_questions/small talk"}])
    assert key == ("small talk", "contains")


def test_times_are_minutes_and_seconds():
    assert [clock(seconds) for seconds in (0.4, 59.6, 61, 754)] == ["0:00", "1:00", "1:01", "12:34"]


def test_the_loss_before_training_is_measured_as_training_does(trained, tiny_llama, data):
    reported = read_json(trained / "metrics.json")["metrics"][0]
    assert reported["name"] == "val_loss"
    loss = validation_loss(tiny_llama, data, read_hyperparameters(trained))
    assert loss == pytest.approx(reported["value"], abs=1e-5)


def test_a_run_of_litgpts_own_command_reports_no_loss_to_compare_with(run_dir, tiny_llama, data):
    write_metrics(run_dir / "lora" / "final" / "metrics.json", [], seconds=9.0)
    setup(run_dir, tiny_llama, data)
    stages = read_json(run_dir / "summary.json")["stages"]
    assert all(row["name"] != "val_loss" for stage in stages for row in stage["metrics"])


@pytest.mark.parametrize(
    ("missing", "target"),
    [
        ("evaluate/base/metrics.json", "evaluate"),
        ("evaluate/lora/metrics.json", "evaluate"),
        ("lora/final/metrics.json", "lora"),
        ("ollama/verification.json", "export"),
        ("ollama/metrics.json", "export"),
    ],
)
def test_a_stage_that_has_not_run_is_named(run_dir, tiny_llama, data, missing: str, target: str):
    (run_dir / missing).unlink()
    with pytest.raises(UserError, match=f"{missing} does not exist: `make {target}`"):
        setup(run_dir, tiny_llama, data)
    assert not (run_dir / "summary.json").exists()


def test_a_stage_that_was_to_be_scored_is_not_taken_for_one_that_was_not(run_dir):
    (run_dir / "evaluate" / "lora" / "metrics.json").unlink()
    with pytest.raises(UserError):
        stage_summary(run_dir, "lora", scored=True)
    assert [row["name"] for row in stage_summary(run_dir, "lora", scored=False)["metrics"]] == ["val_loss"]


def test_nothing_to_show_is_one_message(tmp_path: Path, capsys):
    assert main(["demo", "--run_dir", str(tmp_path), "--show", "true"]) == 1
    assert capsys.readouterr().err.startswith(f"error: {tmp_path}/summary.json does not exist: `make demo`")


def test_stages_after_lora_say_what_they_did_to_held_out_rows(trained: Path, tmp_path: Path):
    gain = {"metric": "reward", "difference": 0.06, "low": 0.04, "high": 0.08, "n": 200}
    shown = [{"question": "Which one?", "before": "This", "after": "That", "wanted": "That one"}]
    measured = [metric("reward", 0.56, stderr=0.02, n=200, split="test"), metric("val_loss", 9.0, split="validation")]
    final = tmp_path / "grpo" / "final"
    warnings = ["Greedy answers that are right fell.", "Use a lower --train.learning_rate."]
    more = {"gain": [gain], "shown": shown, "warnings": warnings}
    write_metrics(final / "metrics.json", measured, seconds=9.0, peak_bytes=1, **more)
    found = stage_summary(tmp_path, "grpo", scored=False)
    assert (found["gain"], found["shown"], found["seconds"]) == ([gain], shown, 9.0)
    told = "\n".join(own_test(found))
    assert re.search(r"grpo, 200 held-out rows\n  reward +0\.560 \(0\.521 to 0\.599\)\n", told)
    assert re.search(r"reward, change +\+0\.060 \(\+0\.040 to \+0\.080\)", told)
    assert "before:   This" in told and "after:    That" in told
    assert told.endswith(
        "  WARNING, grpo: Greedy answers that are right fell.\n  WARNING, grpo: Use a lower --train.learning_rate."
    )
    assert own_test({"name": "lora", "metrics": [metric("val_loss", 1.0, split="validation")]}) == []
