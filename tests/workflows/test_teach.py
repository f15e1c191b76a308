"""A teacher's answers as data: its own greedy ones, those that a reward accepts, thoughts as they are; what is lost."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from data_prep.rows import read_rows
from tests.workflows.alignment import TRAIN, early_letters, log_of, question, write
from workflows import lora, teach
from workflows.chat_template import ChatTemplate
from workflows.errors import UserError
from workflows.progress import PROGRESS
from workflows.training.model import load_model
from workflows.training.rewards import Sample, WeightedReward
from workflows.training.rollouts import Rollout, generate

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def teacher(tiny_llama, questions, tmp_path_factory):
    """A model that has learned to end its answers."""
    chats = [
        {"messages": [*question(n)["prompt"], {"role": "assistant", "content": f"finding {n}"}]} for n in range(16)
    ]
    folder = tmp_path_factory.mktemp("teacher")
    data = write(folder / "chats", train=chats, validation=chats)
    lora.setup(tiny_llama, data, folder, train=TRAIN, precision="32-true", lora_r=8)
    return folder / "final"


def taught(teacher: Path, data: Path, out_dir: Path, **changes: Any) -> dict[str, Any]:
    """Run the step; returns the manifest."""
    settings = {"max_new_tokens": 24, "precision": "32-true", **changes}
    teach.setup(teacher, data, out_dir, **settings)
    manifest: dict[str, Any] = json.loads((out_dir / "manifest.json").read_text())
    return manifest


def test_its_rows_are_the_teachers_greedy_answers(teacher, questions, tmp_path):
    manifest = taught(teacher, questions, tmp_path / "taught", batch_size=3)
    rows = read_rows(tmp_path / "taught" / "train.jsonl")
    assert 0 < len(rows) == manifest["splits"]["train.jsonl"]["rows"]
    asked = sum(split["asked"] for split in manifest["splits"].values())
    kept = sum(split["rows"] for split in manifest["splits"].values())
    assert asked == 20 == kept + sum(manifest["dropped"].values())
    assert manifest["sources"]["teacher"]["files"].keys() == {"lit_model.pth", "lit_model.pth.lora"}

    template, model = ChatTemplate.from_checkpoint(teacher), load_model(teacher)
    for row in rows[:4]:
        prompt = template.prompt_ids(row["messages"][:-1])
        (answer,) = generate(model, [prompt], max_new_tokens=24, stop_ids=template.stop_ids)
        assert template.decode(answer.ids[:-1]) == row["messages"][-1]["content"]
    assert rows[0]["answers"][0].startswith("finding")  # the question's facts stay with it


def test_a_stopped_teacher_keeps_its_answers(teacher, questions, tmp_path, monkeypatch, capsys):
    sampled = {"temperature": 0.8, "samples": 3}
    monkeypatch.setattr(teach, "SLICE", 20)
    whole = taught(teacher, questions, tmp_path / "whole", **sampled)
    calls: list[int] = []

    def stopped_in_the_third(*args: Any, **options: Any) -> list[Rollout]:
        calls.append(len(args[1]))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return generate(*args, **options)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(teach, "generate", stopped_in_the_third)
        taught(teacher, questions, tmp_path / "stopped", **sampled)
    working = tmp_path / "stopped.unfinished"
    assert not (tmp_path / "stopped").exists()
    assert sorted(path.name for path in working.iterdir()) == ["answers.jsonl", PROGRESS]
    capsys.readouterr()
    calls.clear()
    monkeypatch.setattr(teach, "generate", lambda *a, **o: calls.append(len(a[1])) or generate(*a, **o))
    resumed = taught(teacher, questions, tmp_path / "stopped", **sampled)
    assert "resuming with 40 finished answers" in capsys.readouterr().out
    assert calls == [8, 12]  # the rest of training's 48, then validation's
    assert resumed["splits"] == whole["splits"] and resumed["dropped"] == whole["dropped"]
    assert not working.exists()


def test_answers_of_another_seed_are_not_kept(teacher, questions, tmp_path, monkeypatch, capsys):
    def stops(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(teach, "_worth", stops)
        taught(teacher, questions, tmp_path / "taught")
    taught(teacher, questions, tmp_path / "taught", seed=5)
    assert "resuming with" not in capsys.readouterr().out


def test_a_student_trains_on_them(teacher, questions, tiny_llama, tmp_path):
    taught(teacher, questions, tmp_path / "taught")
    lora.setup(tiny_llama, tmp_path / "taught", tmp_path / "student", train=TRAIN, precision="32-true", lora_r=4)
    log = log_of(tmp_path / "student")
    assert log[-1]["loss"] < log[0]["loss"]


def test_samples_are_the_seeds_and_come_once_each(teacher, questions, tmp_path):
    sampled = {"temperature": 0.7, "samples": 3}
    first = taught(teacher, questions, tmp_path / "a", **sampled, batch_size=5)
    again = taught(teacher, questions, tmp_path / "b", **sampled)
    other = taught(teacher, questions, tmp_path / "c", **sampled, seed=1)
    assert first["splits"] == again["splits"] != other["splits"]
    assert first["splits"]["train.jsonl"]["asked"] == 48
    texts = [str(row["messages"]) for row in read_rows(tmp_path / "a" / "train.jsonl")]
    assert len(set(texts)) == len(texts)


def test_only_answers_that_a_reward_accepts_are_kept(teacher, questions, tmp_path):
    early = {"rewards": [WeightedReward("tests.workflows.alignment.early_letters")]}
    strict = taught(teacher, questions, tmp_path / "strict", **early, threshold=0.6)
    texts = [row["messages"][-1]["content"] for row in read_rows(tmp_path / "strict" / "train.jsonl")]
    assert all(early_letters(Sample({}, text, 1, False, 24)) >= 0.6 for text in texts)
    assert strict["dropped"]["rewards below 0.6"] > 0
    with pytest.raises(UserError, match=r"No answer to .*train.jsonl is left: .* rewards below 2.0"):
        taught(teacher, questions, tmp_path / "none", **early, threshold=2.0)
    assert not (tmp_path / "none").exists()


def test_answers_without_an_end_are_dropped_and_counted(tiny_llama, questions, tmp_path):
    with pytest.raises(UserError, match=r"16 cut at --max_new_tokens"):
        taught(tiny_llama, questions, tmp_path / "taught", max_new_tokens=2)


@pytest.mark.parametrize("opened", [False, True])
def test_thoughts_pass_through(tiny_llama, opened):
    """What training reads of the row is what the teacher wrote, whoever opened its thoughts."""
    template = ChatTemplate.from_checkpoint(tiny_llama)
    if opened:
        source = template.source.replace("assistant\n' }}", "assistant\n<think>\n' }}")
        assert source != template.source
        template = ChatTemplate(source, template.tokenizer, template.bos_token, template.eos_token, template.stop_ids)
    said = ("" if opened else "<think>\n") + "A rash.</think>\nIt is a finding."
    ids = [*template.encode(said), template.encode("<|im_end|>")[0]]
    asked = teach.Question({"prompt": [{"role": "user", "content": "What is it?"}]}, [1])
    (row,) = teach._kept([asked], [Rollout(ids, [0.0] * len(ids), True)], template, [1.0], 1.0, teach.Counter())
    assert row["messages"][-1]["content"] == "<think>\nA rash.</think>\nIt is a finding."
    assert template.encode_chat(row["messages"]).completion == ids


def test_a_test_split_is_answered_on_demand(teacher, questions, tmp_path):
    rows = (questions / "validation.jsonl").read_text().splitlines(keepends=True)
    data = tmp_path / "general"
    shutil.copytree(questions, data)
    (data / "test.jsonl").write_text("".join(rows[:3]))
    without = taught(teacher, data, tmp_path / "without")
    manifest = taught(teacher, data, tmp_path / "with", max_test_rows=2)
    assert "test.jsonl" not in without["splits"] and not (tmp_path / "without" / "test.jsonl").exists()
    assert manifest["splits"]["test.jsonl"]["asked"] == 2
    asked = [json.loads(row)["prompt"] for row in rows[:2]]
    assert all(row["messages"][:-1] in asked for row in read_rows(tmp_path / "with" / "test.jsonl"))
    with pytest.raises(UserError, match="--max_test_rows must be at least 0, not -1"):
        taught(teacher, data, tmp_path / "none", max_test_rows=-1)


def test_all_problems_are_told_at_once(tiny_llama, questions):
    with pytest.raises(UserError, match="5 problems") as e:
        taught(tiny_llama, questions, questions, max_rows=0, max_new_tokens=600, samples=2, top_p=0.0)
    for option in ("--max_rows", "--max_new_tokens", "--samples", "--top_p", "--out_dir"):
        assert option in str(e.value)
