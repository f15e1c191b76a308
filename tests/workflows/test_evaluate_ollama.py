"""Scores of what is served: equal to LitGPT's where the weights are, on a real server; and what goes wrong."""

import json
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from data_prep.rows import read_rows
from tests.rounding import near_tie_of_8_bits
from tests.workflows.fake_ollama import Handler, Reply, fake_ollama, show, speak
from workflows.__main__ import main
from workflows.chat_template import ChatTemplate
from workflows.errors import UserError
from workflows.evaluate_ollama import setup
from workflows.evaluation import constrained
from workflows.ollama.client import connect, create_model
from workflows.ollama.gguf_writer import fingerprint, write_gguf
from workflows.ollama.modelfile import make_modelfile
from workflows.ollama.server import OllamaServer
from workflows.ollama.verify import NEAR_TIE
from workflows.training.model import GPT, load_model

NAMES = (
    *("Tachypnea", "Tachypnea of the uterus", 'A "leiomyoma"', "Anémie 漢", "blood", "density of hemoglobin"),
    *("rate", "increased rate", "Uterus", "clinical finding", "presence", "reduction"),
)
OPTIONS = [[NAMES[(i * 5 + j * (1 + i % 3)) % 12] for j in range(4)] for i in range(16)]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    (folder / "tiny_mcq").mkdir()
    rows = [
        {"prompt": [{"role": "user", "content": f"Which finding is {i}?"}], "choices": OPTIONS[i], "answer": i % 4}
        for i in range(16)
    ]
    (folder / "tiny_mcq" / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def served(speaking_llama: Path, ollama_server: OllamaServer, tmp_path: Path, monkeypatch) -> Iterator[str]:
    """The tiny model in two types under one name."""
    modelfile = make_modelfile(ChatTemplate.from_checkpoint(speaking_llama), {}, num_ctx=256, num_thread=1)
    for tag, kind in (("choose", "f32"), ("choose:q8_0", "q8_0")):
        write_gguf(speaking_llama, tmp_path / "m.gguf", kind, "choose", fingerprint(speaking_llama))
        create_model(ollama_server, tag, tmp_path / "m.gguf", modelfile)

    @contextmanager
    def shared(port: int | None = None, parallel: int = 1) -> Iterator[OllamaServer]:
        yield ollama_server

    monkeypatch.setattr("workflows.evaluate_ollama.open_server", shared)
    yield "choose"
    for tag in ("choose", "choose:q8_0"):
        connect(ollama_server).delete(tag)


def margins(model: GPT, template: ChatTemplate, prompts: list[str], monkeypatch) -> list[float]:
    """For each question the smallest difference of the two highest allowed logits on the way to a choice."""
    allowed: list[dict[int, bytes]] = []
    logits: list[torch.Tensor] = []
    real = constrained._allowed

    def noted(*args: Any) -> dict[int, bytes]:
        allowed.append(real(*args))
        return allowed[-1]

    monkeypatch.setattr(constrained, "_allowed", noted)
    handle = model.register_forward_hook(lambda _, __, output: logits.append(output[0, -1]))
    found = []
    for prompt, options in zip(prompts, OPTIONS, strict=True):
        allowed.clear()
        logits.clear()
        constrained.choose_options(model, template, [prompt], [options], progress=False)
        steps = [list(tokens) for tokens in allowed if len(tokens) > 1]
        tops = [row[tokens].topk(2).values for row, tokens in zip(logits, steps, strict=True)]
        found.append(min(float(first - second) for first, second in tops))
    handle.remove()
    return found


@pytest.mark.ollama
def test_a_served_model_chooses_what_litgpt_chooses(
    served: str, data: Path, speaking_llama, tmp_path, capsys, monkeypatch
) -> None:
    out = tmp_path / "out"
    setup(served, ["tiny_mcq"], checkpoint_dir=speaking_llama, out_dir=out, data_dir=data)
    metrics = json.loads((out / "metrics.json").read_text())
    values = {(row["model"], row["name"]): row["value"] for row in metrics["metrics"]}
    rows = [json.loads(line) for line in (out / "choices_tiny_mcq.jsonl").read_text().splitlines()]
    assert len({row["LitGPT"] for row in rows}) > 1  # it does not always say the same
    for name in ("LitGPT", "choose:latest", "choose:q8_0"):
        assert values[name, "acc"] == sum(row[name] == row["answer"] for row in rows) / len(rows)
    template, model = ChatTemplate.from_checkpoint(speaking_llama), load_model(speaking_llama)
    questions = [row["prompt"] for row in read_rows(data / "tiny_mcq" / "test.jsonl", "scoring")]
    gaps = margins(model, template, [template.render(question, True) for question in questions], monkeypatch)
    near_tie, _ = near_tie_of_8_bits(model, [template.prompt_ids(question) for question in questions])
    for name, bound in (("choose:latest", NEAR_TIE), ("choose:q8_0", near_tie)):
        assert values[name, "agreement"] == sum(row[name] == row["LitGPT"] for row in rows) / len(rows)
        decided = [row for row, gap in zip(rows, gaps, strict=True) if gap > bound]
        assert len(decided) >= 4 and all(row[name] == row["LitGPT"] for row in decided), (name, gaps, bound)
    assert not list(out.glob("unfinished*")) and [m["unanswered"] for m in metrics["models"]] == [0, 0, 0]
    table = capsys.readouterr().out
    assert "choose:q8_0" in table and "agreement" in table


@pytest.mark.ollama
def test_a_model_of_another_checkpoint_is_told(served: str, data: Path, tiny_llama: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"2 problems(.|\n)*choose:latest in Ollama was not made from"):
        setup(served, ["tiny_mcq"], checkpoint_dir=tiny_llama, out_dir=tmp_path, data_dir=data)


def chats(requests: list) -> int:
    return sum(path == "/api/chat" for path, _ in requests)


def test_a_model_from_elsewhere_is_scored_and_goes_on_where_it_stopped(
    one_model: None, data: Path, tmp_path, monkeypatch, capsys
) -> None:
    def choose(handler: Handler, body: dict) -> None:
        options = OPTIONS[int(body["messages"][-1]["content"].split()[-1].rstrip("?"))]
        assert body["format"] == {"type": "string", "enum": [option.replace('"', "'") for option in options]}
        assert body["options"]["temperature"] == 0.0
        said = json.dumps(body["format"]["enum"][0])
        speak(said, prompt_eval_count=9)(handler, body)

    def dies(handler: Handler, body: dict) -> None:
        if body["messages"][-1]["content"] == "Which finding is 9?":
            handler.send_json({"error": "out of something"}, 400)
        else:
            choose(handler, body)

    out = tmp_path / "out"
    command = [
        "evaluate-ollama",
        "--model",
        "m",
        "--tasks",
        "[tiny_mcq]",
        "--data_dir",
        str(data),
        "--out_dir",
        str(out),
    ]
    with fake_ollama({"/api/show": show(), "/api/chat": dies}) as (url, _):
        monkeypatch.setenv("OLLAMA_HOST", url)
        assert main(command) == 1
    assert "reports: out of something" in capsys.readouterr().err and not (out / "metrics.json").exists()
    with fake_ollama({"/api/show": show(), "/api/chat": choose}) as (url, requests):
        monkeypatch.setenv("OLLAMA_HOST", url)
        assert main([*command, "--limit", "1"]) == 0  # its answers may be shorter, and this one is
        assert chats(requests) == 0
        assert main(command) == 0
    assert chats(requests) == 8  # eight of the first nine are kept: the finished run has used up its one
    assert not list(out.glob("unfinished*"))
    (row,) = json.loads((out / "metrics.json").read_text())["metrics"]
    assert (row["name"], row["value"], row["n"], row["model"]) == ("acc", 0.25, 16, "m:latest")


@pytest.fixture
def one_model(monkeypatch) -> None:
    listed = {"models": [{"model": "m:latest", "digest": "d"}]}
    monkeypatch.setattr(
        Handler,
        "do_GET",
        lambda handler: handler.send_json({"version": "0"} if handler.path == "/api/version" else listed),
    )


def answer_with(option: int, broken: Collection[int] = ()) -> Reply:
    """Chooses that option; the broken questions end the model's runner."""

    def reply(handler: Handler, body: dict) -> None:
        if int(body["messages"][-1]["content"].split()[-1].rstrip("?")) in broken:
            handler.send_json({"error": "llama runner process has terminated: signal: killed"}, 500)
        else:
            speak(json.dumps([*body["format"]["enum"], "none of them"][option]))(handler, body)

    return reply


def test_a_request_that_failed_is_no_wrong_answer(one_model: None, data: Path, tmp_path, monkeypatch, capsys) -> None:
    out = tmp_path / "out"
    command = ["evaluate-ollama", "--model", "m", "--tasks", "[tiny_mcq]", "--data_dir", str(data)]
    command += ["--out_dir", str(out)]
    monkeypatch.setattr("workflows.status.lives", lambda *_: False)  # the process is this one, which goes on
    for broken, n in ((range(3), 3), ((3, 7), 16)):
        with fake_ollama({"/api/show": show(), "/api/chat": answer_with(0, broken)}) as (url, _):
            monkeypatch.setenv("OLLAMA_HOST", url)
            assert main([*command, "--limit", str(n)]) == 1
        captured = capsys.readouterr()
        assert f"{len(broken)} of {n} questions have no answer" in captured.err and "signal: killed" in captured.err
        assert f"line {broken[0] + 1} of the questions of tiny_mcq" in captured.err
        assert "acc" not in captured.out and not (out / "metrics.json").exists()
        assert len((out / "unfinished-tiny_mcq-m-latest.jsonl").read_text().splitlines()) == n
        assert main(["status", "--out_dir", str(tmp_path)]) == 0
        assert f"stopped (m:latest)  {n} of {n} answers" in (told := capsys.readouterr().out)
        assert "out keeps what is answered:" in told
    with fake_ollama({"/api/show": show(), "/api/chat": answer_with(0)}) as (url, requests):
        monkeypatch.setenv("OLLAMA_HOST", url)
        assert main(command) == 0
    assert not (out / "progress.json").exists()
    assert chats(requests) == 2 and json.loads((out / "metrics.json").read_text())["metrics"][0]["value"] == 0.25


def test_a_model_from_elsewhere_is_none_of_a_checkpoints(
    one_model: None, data: Path, tiny_llama: Path, tmp_path, monkeypatch
) -> None:
    with fake_ollama({"/api/show": show()}) as (url, _):
        monkeypatch.setenv("OLLAMA_HOST", url)
        with pytest.raises(UserError, match=r"^m:latest in Ollama was not made from .* score Ollama alone\.$"):
            setup("m", ["tiny_mcq"], checkpoint_dir=tiny_llama, out_dir=tmp_path, data_dir=data)


def test_answers_that_are_no_option_count_as_wrong_and_are_told(
    one_model: None, data: Path, tmp_path, monkeypatch, capsys
) -> None:
    with fake_ollama({"/api/show": show(), "/api/chat": answer_with(4)}) as (url, _):
        monkeypatch.setenv("OLLAMA_HOST", url)
        setup("m", ["tiny_mcq"], out_dir=tmp_path / "out", data_dir=data)
    told = capsys.readouterr().out
    assert "m:latest, tiny_mcq: 16 of 16 answers are none of the options. The first, line 1:" in told
    assert "'none of them' is not one of" in told
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert metrics["metrics"][0]["value"] == 0.0 and metrics["models"][0]["unanswered"] == 16


def test_wrong_arguments_are_all_reported(tmp_path: Path, capsys) -> None:
    command = ["evaluate-ollama", "--tasks", "[arc_easy, absent_mcq, absent_mcq]", "--limit", "0", "--parallel", "0"]
    command += ["--data_dir", str(tmp_path), "--device", "cpu", "--precision", "bf16-true"]  # and no --checkpoint_dir
    assert main(command) == 1
    error = capsys.readouterr().err
    for part in (
        "7 problems",
        "absent_mcq more than once",
        "--device is for LitGPT",
        "--precision is for LitGPT",
        "'arc_easy' is not a local one",
        "absent_mcq/test.jsonl, which does not exist",
        "--limit",
    ):
        assert part in error
