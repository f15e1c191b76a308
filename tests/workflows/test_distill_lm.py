"""Distillation on tiny models: chunks, equal models, the baseline, learning, resuming, teachers that do not fit."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import convert, make_llama, write_tokenizer
from tests.workflows.alignment import TRAIN, WORDS, log_of, write
from workflows import distill_lm, lora, shrink
from workflows.checkpoint import check_checkpoint_dir, load_weights
from workflows.errors import UserError
from workflows.training import student as student_module
from workflows.training.batch import PackedBatch, Tree, pack_row
from workflows.training.losses import forward_kl, reverse_kl
from workflows.training.model import GPT, load_model
from workflows.training.student import Student

pytestmark = pytest.mark.long

FULL = replace(TRAIN, learning_rate=1e-3)


def chat(number: int) -> dict[str, Any]:
    question, answer = f"What is {WORDS[number % 8]} number {number}?", f"It is {WORDS[number * 3 % 8]} {number % 5}."
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "chats"
    return write(folder, train=[chat(n) for n in range(24)], validation=[chat(n) for n in range(50, 56)])


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """A Llama of four layers."""
    folder = tmp_path_factory.mktemp("teacher")
    return convert(make_llama(folder / "four", num_hidden_layers=4), folder / "lit")


@pytest.fixture(scope="module")
def student(teacher, tmp_path_factory):
    """Two of its layers."""
    folder = tmp_path_factory.mktemp("student")
    shrink.setup(teacher, folder, layers=2)
    return folder / "final"


def learn(checkpoint: Path, data: Path, out_dir: Path, **changes: Any) -> list[dict[str, float]]:
    """Run the step; returns the rows of its log."""
    settings = {"precision": "32-true", "train": FULL, **changes}
    distill_lm.setup(checkpoint_dir=checkpoint, data=data, out_dir=out_dir, **settings)
    return log_of(out_dir)


def as_student(folder: Path) -> Student:
    model: Any = load_model(folder)
    model.__class__ = Student
    return model


def row() -> PackedBatch:
    ids = torch.randint(0, 300, (40,), generator=torch.Generator().manual_seed(1)).tolist()
    return pack_row([Tree(ids[:5], [ids[5:18]]), Tree(ids[18:24], [ids[24:]], [[True, False] * 8])])


def gradients(model: GPT) -> dict[str, torch.Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(("divergence", "function"), [("forward", forward_kl), ("reverse", reverse_kl)])
def test_in_chunks_it_is_what_whole_logits_give(teacher, student, monkeypatch, divergence, function):
    monkeypatch.setattr(student_module, "CHUNK", 4)
    batch, guide = row(), load_model(teacher).requires_grad_(False)
    chunked = as_student(student)
    logprobs, divergences = chunked(batch, teacher=guide, divergence=divergence, temperature=2.0)
    (divergences.sum() - logprobs.sum()).backward()

    whole = load_model(student)
    logits = whole.head_logits(whole.hidden(batch)[0, batch.predictors])
    expected = function(logits, guide.head_logits(guide.hidden(batch)[0, batch.predictors]), 2.0)
    likely = logits.log_softmax(-1).gather(1, batch.targets[:, None])[:, 0]
    (expected.sum() - likely.sum()).backward()
    assert len(batch.targets) == 21  # no multiple of a chunk
    torch.testing.assert_close(divergences, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(logprobs, likely, atol=1e-5, rtol=1e-5)
    assert gradients(chunked).keys() == gradients(whole).keys()
    for name, gradient in gradients(chunked).items():
        torch.testing.assert_close(gradient, gradients(whole)[name], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("divergence", ["forward", "reverse"])
def test_beside_itself_a_model_has_nothing_to_learn(teacher, divergence):
    same = as_student(teacher)
    _, divergences = same(row(), teacher=load_model(teacher).requires_grad_(False), divergence=divergence)
    divergences.sum().backward()
    assert divergences.abs().max() < 1e-6
    assert max(gradient.abs().max() for gradient in gradients(same).values()) < 1e-4


def test_a_students_plain_forward_is_the_models(student):
    assert torch.equal(as_student(student)(row()), load_model(student)(row()))


def test_without_its_teacher_it_is_full_fine_tuning(teacher, student, data, tmp_path):
    alone = learn(student, data, tmp_path / "alone", teacher_dir=teacher, divergence="none")
    lora.setup(student, data, tmp_path / "lora", train=FULL, precision="32-true", lora_r=0)
    plain = log_of(tmp_path / "lora")
    assert [r["loss"] for r in alone] == [r["loss"] for r in plain]
    assert alone[-1]["val_loss"] == plain[-1]["val_loss"]
    assert "teacher" not in json.loads((tmp_path / "alone" / "final" / "provenance.json").read_text())["sources"]
    # alpha 0 is that loss too, measured beside a teacher
    measured = learn(student, data, tmp_path / "measured", teacher_dir=teacher, alpha=0.0)
    assert [r["loss"] for r in measured] == pytest.approx([r["loss"] for r in plain], abs=1e-4)
    assert measured[-1]["val_loss"] == pytest.approx(plain[-1]["val_loss"], abs=1e-4)


@pytest.mark.parametrize(
    "changes",
    [
        {"divergence": "forward"},
        {"divergence": "reverse", "temperature": 2.0},
        {"divergence": "forward", "lora_r": 4, "train": TRAIN},
    ],
    ids=["forward", "reverse", "lora"],
)
def test_a_student_comes_nearer_to_its_teacher(teacher, student, data, tmp_path, changes):
    log = learn(student, data, tmp_path, teacher_dir=teacher, alpha=1.0, **changes)
    assert log[0]["loss"] == pytest.approx(log[0]["divergence"]) and log[0]["divergence"] > 0.05
    validated = [r["val_divergence"] for r in log if "val_divergence" in r]
    assert validated[-1] < validated[0] and log[-1]["divergence"] < 0.9 * log[0]["divergence"]
    final = tmp_path / "final"
    assert check_checkpoint_dir(final) == final
    provenance = json.loads((final / "provenance.json").read_text())
    assert provenance["sources"]["teacher"]["path"] == str(teacher) and provenance["sources"]["teacher"]["files"]
    names = {r["name"] for r in json.loads((final / "metrics.json").read_text())["metrics"]}
    assert names == {"val_loss", "val_divergence"}


def test_a_stopped_run_goes_on_to_the_same_end(teacher, student, data, tmp_path, monkeypatch):
    learn(student, data, tmp_path / "whole", teacher_dir=teacher)
    original = distill_lm.Distillation.batches

    def stopping(self: Any, step: int, rank: int, world_size: int) -> Any:
        if step == 3:
            raise KeyboardInterrupt
        return original(self, step, rank, world_size)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(distill_lm.Distillation, "batches", stopping)
        learn(student, data, tmp_path / "stopped", teacher_dir=teacher)
    shrink.setup(teacher, tmp_path, layers=3)
    with pytest.raises(UserError, match="teacher"):  # another one: not the same run
        learn(student, data, tmp_path / "stopped", teacher_dir=tmp_path / "final")
    learn(student, data, tmp_path / "stopped", teacher_dir=teacher)
    whole, stopped = (load_weights(tmp_path / run / "final") for run in ("whole", "stopped"))
    assert all(torch.equal(whole[name], stopped[name]) for name in whole)


@pytest.mark.slow  # the loop is the one of training/test_processes.py
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_processes_follow_one(teacher, student, data, tmp_path, strategy):
    train = replace(FULL, row_tokens=64)  # several rows a step
    one = learn(student, data, tmp_path / "one", teacher_dir=teacher, train=train)
    command = [sys.executable, "-m", "workflows", "distill-lm", "--devices", "2", "--strategy", strategy]
    given = {"checkpoint_dir": student, "teacher_dir": teacher, "data": data, "out_dir": tmp_path / "two"}
    command += [part for name, value in given.items() for part in (f"--{name}", str(value))]
    command += ["--precision", "32-true", "--train", json.dumps(vars(train))]
    run = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert run.returncode == 0, run.stderr
    two = log_of(tmp_path / "two")
    for name in ("loss", "divergence", "cross_entropy", "val_loss", "val_divergence"):
        assert [r[name] for r in two if name in r] == pytest.approx([r[name] for r in one if name in r], abs=1e-4)


def test_a_finished_run_is_made_anew_only_by_another_teacher(teacher, student, data, tmp_path, capsys):
    one = replace(FULL, max_steps=1)
    learn(student, data, tmp_path, teacher_dir=teacher, train=one)
    learn(student, data, tmp_path, teacher_dir=teacher, train=one)
    assert "is already there" in capsys.readouterr().out
    shrink.setup(teacher, tmp_path / "other", layers=3)
    learn(student, data, tmp_path, teacher_dir=tmp_path / "other" / "final", train=one)
    assert "is already there" not in capsys.readouterr().out


def test_teachers_that_do_not_fit_are_refused(teacher, student, data, tmp_path):
    with pytest.raises(UserError, match=r"has 4 layers, more than the 2 of its teacher"):
        learn(teacher, data, tmp_path / "out", teacher_dir=student)
    other = make_llama(tmp_path / "other", vocab_size=300)
    write_tokenizer(other, vocab_size=300)
    with pytest.raises(UserError, match=r"another vocabulary .300 tokens.*tokens differ, such as '.*`teach`"):
        learn(student, data, tmp_path / "out", teacher_dir=convert(other, tmp_path / "lit"))
    with pytest.raises(UserError, match=r"There is no checkpoint at nowhere"):
        learn(student, data, tmp_path / "out", teacher_dir=Path("nowhere"))
    assert not (tmp_path / "out").exists()


def test_all_problems_are_told_at_once(student, data, tmp_path):
    with pytest.raises(UserError, match="4 problems") as e:
        learn(student, data, tmp_path / "out", alpha=1.5, temperature=0.0, max_val_rows=0)
    for option in ("--alpha", "--temperature", "--max_val_rows", "--teacher_dir"):
        assert option in str(e.value)
