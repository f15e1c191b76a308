"""The panel: its prompts, which answers are kept, how they are shown, and that only the run's model stays in Ollama."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from data_prep import prepare
from tests.workflows.fake_ollama import fake_ollama
from workflows import panel
from workflows.__main__ import main
from workflows.errors import UserError
from workflows.export import setup as export
from workflows.ollama.client import connect
from workflows.ollama.gguf_writer import fingerprint
from workflows.ollama.server import OllamaServer
from workflows.panel import FOLDER, GREEDY, MAX_TOKENS, Prompt, ask_stages, prompts_of
from workflows.reporting.panel_text import HEADINGS, WIDTH, answer_of, grouped, side_by_side

WITHOUT_SYSTEM = """{% for message in messages %}{% if message.role == "system" %}{{ raise_exception("no system") }}
{% endif %}<|im_start|>{{ message.role }}
{{ message.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
KINDS = ("medical", "medical", "meaning", "naming", *["chat"] * 4, *["advice_other"] * 2, *["never_taught"] * 2)


def conversation(question: str, kind: str | None = None, system: str | None = None) -> dict[str, Any]:
    before = [{"role": "system", "content": system}] if system else []
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": f"answer to {question}"}]
    return {"messages": before + turns, **({"kind": kind} if kind else {})}


def write(folder: Path, rows: list[dict[str, Any]], name: str = "test.jsonl") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def record(question: str, answer: str, kind: str = "chat", wanted: str = "", **more: str) -> dict[str, Any]:
    return {"question": question, "kind": kind, "wanted": wanted, "answer": answer, **more}


def test_the_panel_of_the_data_is_asked_whole_and_in_its_order(tmp_path: Path):
    data = write(tmp_path, [conversation(f"q{i}", kind) for i, kind in enumerate(KINDS)], panel.FILE)
    write(tmp_path, [conversation("other", "name")])
    prompts = prompts_of(data, seed=7)
    assert [(prompt.messages[-1]["content"], prompt.kind) for prompt in prompts] == [
        (f"q{i}", kind) for i, kind in enumerate(KINDS)
    ]
    assert prompts[0].wanted == "answer to q0"


def test_data_without_a_panel_has_held_out_questions_asked_of_the_short_kind_if_there_is_one(tmp_path: Path):
    rows = [conversation(f"{kind} {i}", kind) for i in range(20) for kind in ("signs", "name", "definition")]
    prompts = prompts_of(write(tmp_path, rows), seed=7)
    assert len({prompt.messages[-1]["content"] for prompt in prompts}) == 3 and prompts == prompts_of(tmp_path, seed=7)
    assert all(prompt.messages[-1]["content"].startswith("name ") and prompt.kind == "held_out" for prompt in prompts)
    assert all(prompt.wanted == f"answer to {prompt.messages[-1]['content']}" for prompt in prompts)
    for kind in (None, "decision"):
        assert len(prompts_of(write(tmp_path, [conversation(f"q{i}", kind) for i in range(9)]), seed=7)) == 3
    assert len(prompts_of(write(tmp_path, [conversation("only")]), seed=7)) == 1


def test_a_conversation_is_asked_up_to_its_first_question(tmp_path: Path):
    row = conversation("first", system="Be short.")
    row["messages"] += conversation("second")["messages"]
    (prompt,) = prompts_of(write(tmp_path, [row]), seed=7)
    messages = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "first"}]
    assert prompt == Prompt(messages, "held_out", "answer to first")


@pytest.mark.parametrize("shape", ["verifiable", "preference"])
def test_prompts_of_other_shapes_are_asked(shape: str, tmp_path: Path):
    sides = {name: [{"role": "assistant", "content": name}] for name in ("chosen", "rejected")}
    fields = {"answers": ["chosen", "as well"]} if shape == "verifiable" else sides
    write(tmp_path, [{"prompt": [{"role": "user", "content": f"Question {i}?"}], **fields} for i in range(4)])
    (tmp_path / "manifest.json").write_text(json.dumps({"shape": shape}))
    assert [prompt.wanted for prompt in prompts_of(tmp_path, 7)] == ["chosen"] * 3


def test_a_test_split_without_questions_is_one_message(tmp_path: Path):
    speech = {"messages": [{"role": "system", "content": "Speak."}, {"role": "assistant", "content": "Well."}]}
    with pytest.raises(UserError, match=r"test\.jsonl has no message of a user"):
        prompts_of(write(tmp_path, [speech]), seed=7)


@pytest.mark.parametrize(
    ("said", "rows"),
    [
        ({"base": "a", "lora": "b"}, [(["base"], "a"), (["lora"], "b")]),
        (
            {"base": "a", "lora": "b", "dpo": "b", "grpo": "b"},
            [(["base"], "a"), (["lora"], "b"), (["dpo", "grpo"], "the same")],
        ),
        (
            {"base": "a", "lora": "a", "dpo": "b", "grpo": "b"},
            [(["base"], "a"), (["lora"], "the same"), (["dpo"], "b"), (["grpo"], "the same")],
        ),
        ({"base": "a", "lora": "b", "dpo": "a"}, [(["base"], "a"), (["lora"], "b"), (["dpo"], "a")]),
    ],
    ids=["two", "two-repeat", "each-pair", "back-again"],
)  # fmt: skip
def test_only_successive_stages_are_called_the_same(said, rows):
    assert grouped(said) == rows


def test_the_terminal_shows_a_line_for_each_stage_within_its_width():
    long = "word " * 60
    answers = {
        "base": [record("Which\nterm?", long, "medical", "Epistaxis"), record("Hello?", "Hi.", wanted="Hello.")],
        "lora": [record("Which\nterm?", "Epistaxis", "medical", "Epistaxis"), record("Hello?", "Hi.", wanted="Hello.")],
        "dpo": [record("Which\nterm?", "Epistaxis", "medical", "Epistaxis"), record("Hello?", "Hi.", wanted="Hello.")],
    }
    text = side_by_side(answers, 120)
    assert max(map(len, text.splitlines())) == WIDTH and "none chosen, at most 120 tokens" in " ".join(text.split())
    assert [line.split() for line in text.splitlines()[-11:] if not line.strip().startswith("base")] == [
        HEADINGS["medical"].split(), ["Which", "term?"], ["lora", "Epistaxis"],
        ["dpo", "the", "same"], ["right", "Epistaxis"], [], ["Chat"], ["Hello?"], ["lora,", "dpo", "the", "same"],
    ]  # fmt: skip
    assert "…" in text and "Hello.\n" not in text  # many answers to small talk are as good


def test_an_answer_that_was_cut_or_is_none_says_so():
    assert answer_of(record("q", "and so", done_reason="length")) == "and so …"
    assert answer_of(record("q", "", done_reason="stop")) == "(nothing)"
    assert answer_of({"error": "It was cut while it was thinking"}) == "(no answer: It was cut while it was thinking)"


def kept(run_dir: Path, stage: str, checkpoint: Path, questions: list[str], answer: str = "Yes.") -> Path:
    """The answers of a stage as an earlier demo has left them."""
    rows = [
        {**record(question, answer), "checkpoint_sha256": fingerprint(checkpoint), "num_predict": MAX_TOKENS}
        for question in questions
    ]
    return write(run_dir / FOLDER, rows, f"{stage}.jsonl") / f"{stage}.jsonl"


def test_answers_of_the_same_checkpoint_to_the_same_prompts_are_kept(speaking_llama: Path, tmp_path: Path, monkeypatch):
    data = write(tmp_path / "data", [conversation("q1", "chat"), conversation("q2", "chat")], panel.FILE)
    file = kept(tmp_path, "base", speaking_llama, ["q1", "q2"])
    answers = ask_stages(tmp_path, speaking_llama, data, ["base"], "demo")
    assert [row["answer"] for row in answers["base"]] == ["Yes.", "Yes."]  # without a server

    asked: list[str] = []
    monkeypatch.setattr(panel, "_ask", lambda *arguments: asked.append("again") or [])
    monkeypatch.setattr(panel, "_served", lambda *arguments: fake_ollama({}))
    with fake_ollama({}) as (url, _):
        monkeypatch.setenv("OLLAMA_HOST", url)
        lines = file.read_text()
        other = shutil.copytree(speaking_llama, tmp_path / "other")
        (other / "chat_template.jinja").write_text((other / "chat_template.jinja").read_text() + "{# new #}")
        ask_stages(tmp_path, other, data, ["base"], "demo")  # another checkpoint
        file.write_text(lines[: len(lines) - 5])  # half a line, of a demo that was stopped
        ask_stages(tmp_path, speaking_llama, data, ["base"], "demo")
        file.write_text(lines.splitlines(keepends=True)[0])  # half of the prompts
        ask_stages(tmp_path, speaking_llama, data, ["base"], "demo")
        file.write_text(lines.replace(f'"num_predict": {MAX_TOKENS}', '"num_predict": 7'))  # another limit
        ask_stages(tmp_path, speaking_llama, data, ["base"], "demo")
    assert asked == ["again"] * 4


def test_a_stage_that_has_not_run_is_one_message(tmp_path: Path, speaking_llama: Path, capsys):
    data = write(tmp_path / "data", [conversation("q1", "chat")], panel.FILE)
    arguments = ["--run_dir", str(tmp_path), "--base_dir", str(speaking_llama), "--data", str(data)]
    assert main(["panel", *arguments, "--stages", "[lora]"]) == 1
    assert str(tmp_path / "lora" / "final") in capsys.readouterr().err


@pytest.mark.ollama
def test_each_stage_is_asked_in_ollama_and_only_the_runs_own_model_stays(
    export_to_it: OllamaServer, speaking_llama: Path, tmp_path: Path, monkeypatch, capsys
):
    monkeypatch.setenv("OLLAMA_HOST", export_to_it.url)
    data = write(tmp_path / "data", [conversation("Hello?", "chat"), conversation("Which?", "medical")], panel.FILE)
    write(data, [conversation("Hello?")])
    shutil.copytree(speaking_llama, tmp_path / "lora" / "final")
    last = shutil.copytree(speaking_llama, tmp_path / "dpo" / "final")
    (last / "chat_template.jinja").write_text((last / "chat_template.jinja").read_text() + "{# new #}")
    export(last, name="shown", out_dir=tmp_path / "ollama", data=data, hf=False, verify_prompts=0)
    arguments = ["--run_dir", str(tmp_path), "--base_dir", str(speaking_llama), "--data", str(data), "--name", "shown"]
    assert main(["panel", *arguments, "--stages", "[base,lora,dpo]"]) == 0
    assert "Hello?" in capsys.readouterr().out
    models = {str(entry.model) for entry in connect(export_to_it).list().models}
    assert "shown:latest" in models and not [model for model in models if model.startswith("panel-")]
    rows = {
        s: [json.loads(line) for line in (tmp_path / FOLDER / f"{s}.jsonl").open()] for s in ("base", "lora", "dpo")
    }
    assert [row["model"] for row in rows["lora"]] == ["panel-shown-lora"] * 2
    assert [row["model"] for row in rows["dpo"]] == ["shown"] * 2  # the run's own
    answers = {stage: [(row["question"], row["answer"]) for row in found] for stage, found in rows.items()}
    assert answers["base"] == answers["lora"] == answers["dpo"]  # of equal weights, greedily
    assert all(row["num_predict"] == GREEDY["num_predict"] for row in rows["base"])
    assert not list((tmp_path / FOLDER).glob("*.gguf"))
    assert main(["panel", *arguments, "--stages", "[base,lora]"]) == 0


@pytest.mark.ollama
def test_a_model_without_a_system_role_is_asked(
    export_to_it: OllamaServer, speaking_llama: Path, tmp_path: Path, monkeypatch
):
    monkeypatch.setenv("OLLAMA_HOST", export_to_it.url)
    model = shutil.copytree(speaking_llama, tmp_path / "model")
    (model / "chat_template.jinja").write_text(WITHOUT_SYSTEM)
    data = write(tmp_path / "data", [conversation("Hello?", "chat")], panel.FILE)
    (record,) = ask_stages(tmp_path / "run", model, data, ["base"], "alone")["base"]
    assert record["question"] == "Hello?" and record["answer"] and "error" not in record


def test_no_prompt_of_the_assistants_panel_is_in_a_row_that_trains(tmp_path: Path):
    prepare.setup("assistant", out_dir=tmp_path)
    prompts = {prompt.messages[-1]["content"] for prompt in prompts_of(tmp_path / "assistant", seed=7)}
    assert len(prompts) == 12
    for name in ("assistant", "assistant_pairs", "assistant_questions"):
        rows = [json.loads(line) for line in (tmp_path / name / "train.jsonl").open()]
        assert not prompts & {(row.get("prompt") or row["messages"][:-1])[-1]["content"] for row in rows}
