"""The end of the demo: one summary out of the stages' files, and held-out questions put to a stand-in for Ollama."""

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from data_prep import prepare
from tests.workflows.fake_ollama import fake_ollama, show, speak
from workflows import lora
from workflows.__main__ import main
from workflows.checkpoint import metric, write_metrics
from workflows.demo import _own_test, as_text, ask, setup, stage_summary, validation_loss
from workflows.errors import UserError
from workflows.files import read_json, write_json
from workflows.merge import read_hyperparameters
from workflows.training.loop import TrainArgs

COMPARISON = {
    "task": "mine_mcq",
    "metric": "acc",
    "difference": 0.15,
    "low": 0.1,
    "high": 0.2,
    "p_value": 1.6e-9,
    "n": 400,
}
VERIFICATION = {
    "version": "0.9.3",
    "prompt_ids_equal": True,
    "chat_prompts_equal": None,
    "prompts": 50,
    "greedy_agreement": {"f16": 0.98, "q8_0": 0.92},
}


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


@pytest.fixture
def run_dir(trained: Path, tmp_path: Path) -> Path:
    """What the stages before the summary leave."""
    shutil.copytree(trained, tmp_path / "lora" / "final")
    for stage, accuracy in (("base", 0.51), ("lora", 0.66)):
        rows = [
            {**metric(name, accuracy, stderr=0.025, n=400, split="test"), "task": "mine_mcq"}
            for name in ("acc", "acc_norm")
        ]
        compared = [COMPARISON] if stage == "lora" else []
        write_metrics(tmp_path / "evaluate" / stage / "metrics.json", rows, seconds=30.0, comparison=compared)
    write_json(tmp_path / "ollama" / "verification.json", VERIFICATION)
    sizes = {"demo-q8_0.gguf": 144_810_912}
    write_metrics(tmp_path / "ollama" / "metrics.json", [], seconds=70.0, file_bytes=sizes)
    return tmp_path


@pytest.fixture
def requests(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[str, dict[str, Any]]]]:
    with fake_ollama({"/api/show": show(), "/api/chat": speak("Finding ", "7")}) as (url, requests):
        monkeypatch.setenv("OLLAMA_HOST", url)
        yield requests


def test_the_summary_has_the_shape_that_the_tables_read(run_dir, tiny_llama, data, requests, capsys):
    setup(run_dir, tiny_llama, data, name="known")
    summary = read_json(run_dir / "summary.json")
    assert set(summary) == {"stages", "ollama", "steps", "total_seconds", "hardware", "versions"}
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
    assert [answer["answer"] for answer in ollama["answers"]] == ["Finding 7"] * 3
    asked = {message["content"] for path, body in requests if path == "/api/chat" for message in body["messages"]}
    assert asked == {answer["question"] for answer in ollama["answers"]} and len(asked) == 3
    assert summary["total_seconds"] == pytest.approx(sum(summary["steps"].values()))
    assert summary["steps"]["export and verify"] == 70 and summary["steps"]["evaluate base"] == base["seconds"]

    capsys.readouterr()
    setup(run_dir, show=True)
    assert capsys.readouterr().out == as_text(summary, run_dir) + "\n"


def test_the_table_shows_what_the_summary_holds(run_dir, tiny_llama, data, requests):
    setup(run_dir, tiny_llama, data, name="known")
    summary = read_json(run_dir / "summary.json")
    summary["stages"][1]["metrics"][2]["value"] = 1.43
    summary["ollama"]["answers"][0]["question"] = "Abstract: " + "word " * 500 + "\n\nQuestion: does it help?"
    text = as_text(summary, run_dir)
    for expected in (
        "51.0% (46.1 to 55.9)",
        "1.430",
        "lora - base, acc: +15.0 points, 95% interval +10.0 to +20.0, p = 1.6e-09, 400 questions",
        "In Ollama 0.9.3",
        "prompt token ids of 50 questions: equal to ours; conversations: not verified",
        "greedy answers as LitGPT's (q8_0): 92%",
        "demo-q8_0.gguf: 145 MB",
        "not medical advice",
        "A: Finding 7",
        "Question: does it help?",
        f"{run_dir}/summary.json",
    ):
        assert expected in text
    assert max(map(len, text.splitlines())) < 400


def test_several_tasks_have_a_line_each(run_dir, tiny_llama, data, requests):
    setup(run_dir, tiny_llama, data, name="known")
    summary = read_json(run_dir / "summary.json")
    for stage, accuracy in zip(summary["stages"], (0.3, 0.4), strict=True):
        stage["metrics"].append({**metric("acc", accuracy, stderr=0.025, n=100, split="test"), "task": "medqa_local"})
    summary["stages"][1]["comparison"].append({**COMPARISON, "task": "medqa_local", "difference": 0.1})
    lines = as_text(summary, run_dir).splitlines()
    for label, score in (("base mine_mcq", "51.0%"), ("base medqa_local", "30.0%"), ("lora medqa_local", "40.0%")):
        assert [score in line for line in lines if line.startswith(f"  {label} ")] == [True]
    assert sum("lora - base, medqa_local acc: +10.0 points" in line for line in lines) == 1
    assert sum("lora - base, mine_mcq acc: +15.0 points" in line for line in lines) == 1


def test_data_without_scores_is_compared_by_validation_loss(run_dir, tiny_llama, data, requests):
    shutil.rmtree(run_dir / "evaluate")
    setup(run_dir, tiny_llama, data, name="known", scored=False)
    summary = read_json(run_dir / "summary.json")
    losses = [[(row["name"], row["value"]) for row in stage["metrics"]] for stage in summary["stages"]]
    (before, after) = losses
    assert [name for name, _ in before + after] == ["val_loss", "val_loss"]
    assert f"{before[0][1]:.3f}" in as_text(summary, run_dir)


def test_the_loss_before_training_is_measured_as_training_does(trained, tiny_llama, data):
    reported = read_json(trained / "metrics.json")["metrics"][0]
    assert reported["name"] == "val_loss"
    loss = validation_loss(tiny_llama, data, read_hyperparameters(trained))
    assert loss == pytest.approx(reported["value"], abs=1e-5)


def test_a_run_of_litgpts_own_command_reports_no_loss_to_compare_with(run_dir, tiny_llama, data, requests):
    write_metrics(run_dir / "lora" / "final" / "metrics.json", [], seconds=9.0)
    setup(run_dir, tiny_llama, data, name="known")
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
def test_a_stage_that_has_not_run_is_named(run_dir, tiny_llama, data, requests, missing: str, target: str):
    (run_dir / missing).unlink()
    with pytest.raises(UserError, match=f"{missing} does not exist: `make {target}`"):
        setup(run_dir, tiny_llama, data, name="known")
    assert not (run_dir / "summary.json").exists()


def test_a_stage_that_was_to_be_scored_is_not_taken_for_one_that_was_not(run_dir):
    (run_dir / "evaluate" / "lora" / "metrics.json").unlink()
    with pytest.raises(UserError):
        stage_summary(run_dir, "lora", scored=True)
    assert [row["name"] for row in stage_summary(run_dir, "lora", scored=False)["metrics"]] == ["val_loss"]


def test_nothing_to_show_is_one_message(tmp_path: Path, capsys):
    assert main(["demo", "--run_dir", str(tmp_path), "--show", "true"]) == 1
    assert capsys.readouterr().err.startswith(f"error: {tmp_path}/summary.json does not exist: `make demo`")


def conversation(question: str, kind: str | None = None, system: str | None = None) -> dict[str, Any]:
    before = [{"role": "system", "content": system}] if system else []
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": f"answer to {question}"}]
    return {"messages": before + turns, **({"kind": kind} if kind else {})}


def ask_of(folder: Path, rows: list[dict[str, Any]]) -> list[dict[str, str]]:
    (folder / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return ask(folder, "known", seed=7)


def test_questions_with_a_short_answer_are_preferred(tmp_path: Path, requests):
    rows = [conversation(f"{kind} {i}", kind) for i in range(20) for kind in ("signs", "name", "definition")]
    asked = ask_of(tmp_path, rows)
    assert len({answer["question"] for answer in asked}) == 3
    assert all(answer["question"].startswith("name ") for answer in asked)
    assert all(answer["expected"] == f"answer to {answer['question']}" for answer in asked)


@pytest.mark.parametrize("kind", [None, "decision", "answer"])
def test_rows_of_other_kinds_are_asked_where_there_are_no_such(tmp_path: Path, requests, kind: str | None):
    assert len(ask_of(tmp_path, [conversation(f"q{i}", kind) for i in range(9)])) == 3


def test_a_small_test_split_is_asked_whole(tmp_path: Path, requests):
    assert [answer["question"] for answer in ask_of(tmp_path, [conversation("only")])] == ["only"]


def test_a_conversation_is_asked_up_to_its_first_question(tmp_path: Path, requests):
    row = conversation("first", system="Be short.")
    row["messages"] += conversation("second")["messages"]
    (answer,) = ask_of(tmp_path, [row])
    assert (answer["question"], answer["expected"]) == ("first", "answer to first")
    (sent,) = [body for path, body in requests if path == "/api/chat"]
    assert sent["messages"] == [{"role": "system", "content": "Be short."}, {"role": "user", "content": "first"}]
    assert sent["options"] == {"num_predict": 256}  # a model that never stops does not hold up the demo


def test_a_test_split_without_questions_is_one_message(tmp_path: Path, requests):
    speech = {"messages": [{"role": "system", "content": "Speak."}, {"role": "assistant", "content": "Well."}]}
    with pytest.raises(UserError, match=r"test\.jsonl has no message of a user"):
        ask_of(tmp_path, [speech])


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
    told = "\n".join(_own_test(found))
    assert re.search(r"grpo, 200 held-out rows\n  reward +0\.560 \(0\.521 to 0\.599\)\n", told)
    assert re.search(r"reward, change +\+0\.060, 95% interval \+0\.040 to \+0\.080", told)
    assert "before:   This" in told and "after:    That" in told
    assert told.endswith("".join(f"\n  WARNING: {text}" for text in warnings))
    assert _own_test({"name": "lora", "metrics": [metric("val_loss", 1.0, split="validation")]}) == []


@pytest.mark.parametrize(
    "fields",
    [{"answers": ["right", "as well"]}, {"chosen": [{"role": "assistant", "content": "right"}], "rejected": [
        {"role": "assistant", "content": "wrong"}]}],
    ids=["verifiable", "preference"],
)  # fmt: skip
def test_prompts_of_other_shapes_are_asked(fields, tmp_path: Path, requests):
    rows = [{"prompt": [{"role": "user", "content": f"Question {i}?"}], **fields} for i in range(4)]
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    shape = "verifiable" if "answers" in fields else "preference"
    (tmp_path / "manifest.json").write_text(json.dumps({"shape": shape}))
    answers = ask(tmp_path, "known", 7)
    assert [answer["expected"] for answer in answers] == ["right"] * 3
    assert {answer["question"] for answer in answers} <= {f"Question {i}?" for i in range(4)}
