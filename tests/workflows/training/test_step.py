"""Around the loss of every training step: longer runs, the best step, epochs, what is printed and what is refused."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.workflows import alignment
from tests.workflows.test_lora import write_rows
from workflows import distill_lm, dpo, grpo, lora, ppo, reward
from workflows.checkpoint import load_weights
from workflows.errors import UserError
from workflows.status import status_of
from workflows.training.identity import resume_changes
from workflows.training.loop import TrainArgs
from workflows.training.rewards import Sample, WeightedReward
from workflows.training.step import run_identity

pytestmark = pytest.mark.long

TRAIN = replace(alignment.TRAIN, max_seq_length=128, max_steps=4, eval_interval=2, save_interval=2)


@pytest.fixture(scope="module")
def chats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("data") / "chats"
    directory.mkdir()
    write_rows(directory / "train.jsonl", 12)
    write_rows(directory / "validation.jsonl", 4, offset=100)
    (directory / "manifest.json").write_text("{}")
    return directory


def huge(sample: Sample) -> float:
    return 1e300 * (1 + len(sample.text))


def run(step: str, checkpoint: Path, data: Path, out_dir: Path, **changes: Any) -> dict[str, Any]:
    settings: dict[str, Any] = {"precision": "32-true", "lora_r": 4, "train": TRAIN, "max_val_rows": 4}
    if step in ("grpo", "ppo"):
        settings |= {"rewards": [WeightedReward(f"{alignment.__name__}.early_letters")], "max_new_tokens": 8}
    if step in ("grpo", "ppo", "dpo", "reward"):
        settings["max_test_rows"] = 0
    if step == "distill_lm":
        settings["teacher_dir"] = checkpoint
    module = {"lora": lora, "dpo": dpo, "reward": reward, "grpo": grpo, "ppo": ppo, "distill_lm": distill_lm}[step]
    places: dict[str, Any] = {"checkpoint_dir": checkpoint, "data": data, "out_dir": out_dir}
    module.setup(**places, **{**settings, **changes})
    found: dict[str, Any] = json.loads((out_dir / "final" / "metrics.json").read_text())
    return found


def adapters(out_dir: Path) -> dict[str, torch.Tensor]:
    return load_weights(out_dir / "final", "lit_model.pth.lora")


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("step", ["lora", "dpo", "reward", "grpo", "ppo", "distill_lm"])
def test_a_finished_run_is_made_longer(step, tiny_llama, chats, pairs, questions, tmp_path, capfd):
    data = {"dpo": pairs, "reward": pairs, "grpo": questions, "ppo": questions}.get(step, chats)
    expected = run(step, tiny_llama, data, tmp_path / "whole", train=replace(TRAIN, max_steps=6))
    run(step, tiny_llama, data, tmp_path / "grown")
    assert "checkpoints is kept (" in capfd.readouterr().out
    assert status_of(tmp_path / "grown", tmp_path).state == "finished"
    run(step, tiny_llama, data, tmp_path / "grown")
    assert "is already there" in capfd.readouterr().out
    found = run(step, tiny_llama, data, tmp_path / "grown", train=replace(TRAIN, max_steps=6))
    said = capfd.readouterr().out
    assert "train.max_steps: 4, now 6" in said and "resuming from" in said
    assert (found["steps"], found["kept_step"]) == (6, expected["kept_step"])
    assert found["metrics"] == expected["metrics"]
    assert equal(adapters(tmp_path / "grown"), adapters(tmp_path / "whole"))


def test_a_cosine_schedule_is_trained_again_and_that_is_said(tiny_llama, chats, tmp_path, capfd):
    cosine = replace(TRAIN, lr_schedule="cosine")
    run("lora", tiny_llama, chats, tmp_path, train=cosine)
    assert not (tmp_path / "checkpoints").exists()  # nothing goes on from them
    capfd.readouterr()
    assert run("lora", tiny_llama, chats, tmp_path, train=replace(cosine, max_steps=6))["steps"] == 6
    said = capfd.readouterr().out
    assert "was made with other settings, and is replaced at the end:\n" in said
    assert "  - train.max_steps: 4, now 6; a cosine schedule depends on it\n" in said
    assert "steps 0 to 6" in said


def test_the_result_is_that_of_the_best_step(tiny_llama, chats, tmp_path, monkeypatch, capfd):
    losses = {2: 0.5, 4: 0.25, 6: 0.75}
    validate, batches = lora.SFT.validate, lora.SFT.batches

    def counted(self: Any, step: int, rank: int, world_size: int) -> Any:
        self.step = step + 1
        return batches(self, step, rank, world_size)

    def judged(self: Any, model: Any) -> dict[str, float]:
        return {**validate(self, model), "val_loss": losses[self.step]}

    monkeypatch.setattr(lora.SFT, "batches", counted)
    monkeypatch.setattr(lora.SFT, "validate", judged)
    six = replace(TRAIN, max_steps=6)
    found = run("lora", tiny_llama, chats, tmp_path / "best", train=six)
    assert (found["steps"], found["kept_step"], found["metrics"][0]["value"]) == (6, 4, 0.25)
    assert "step 4 is kept, with the best val_loss: 0.2500" in capfd.readouterr().out
    run("lora", tiny_llama, chats, tmp_path / "four")
    assert equal(adapters(tmp_path / "best"), adapters(tmp_path / "four"))
    found = run("lora", tiny_llama, chats, tmp_path / "last", train=replace(six, keep="last"))
    assert (found["kept_step"], found["metrics"][0]["value"]) == (6, 0.75)


def test_epochs_decide_the_number_of_steps(tiny_llama, chats, tmp_path, capfd):
    train = replace(TRAIN, max_steps=500, epochs=1.5)
    assert run("lora", tiny_llama, chats, tmp_path, train=train)["steps"] == 5  # 18 of 12 rows, four a step
    assert "5 steps of 4 = 1.7 epochs of 12 rows" in capfd.readouterr().out
    longer = replace(TRAIN, max_steps=0, epochs=2)
    assert run("lora", tiny_llama, chats, tmp_path, train=longer)["steps"] == 6
    said = capfd.readouterr().out
    assert "train.epochs: 1.5, now 2" in said and "resuming from" in said


def test_fewer_tokens_a_row_go_on_after_the_memory_was_too_little(tiny_llama, chats, tmp_path, monkeypatch, capfd):
    batches = lora.SFT.batches

    def failing(self: Any, step: int, rank: int, world_size: int) -> Any:
        if step == 3:
            raise MemoryError
        return batches(self, step, rank, world_size)

    cosine = replace(TRAIN, lr_schedule="cosine")
    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr(lora.SFT, "batches", failing)
        run("lora", tiny_llama, chats, tmp_path, train=cosine)
    assert run("lora", tiny_llama, chats, tmp_path, train=replace(cosine, row_tokens=64))["steps"] == 4
    said = capfd.readouterr().out
    assert "train.row_tokens: 256, now 64; sums may differ in their last bits" in said and "resuming from" in said


def test_a_reward_model_is_known_by_its_contents(tiny_llama, questions, judge, tmp_path):
    def identity(folder: Path) -> dict[str, Any]:
        rewards = [WeightedReward(str(folder)), WeightedReward("finding")]
        return run_identity({"checkpoint_dir": tiny_llama, "data": questions, "rewards": rewards, "train": TRAIN})

    moved = shutil.copytree(judge, tmp_path / "moved")
    assert identity(moved) == identity(judge)
    assert identity(judge)["rewards"][1]["reward"] == "finding"
    provenance = json.loads((moved / "provenance.json").read_text())
    provenance["files"]["lit_model.pth"] = "0" * 64
    (moved / "provenance.json").write_text(json.dumps(provenance))
    forbidding, _ = resume_changes(identity(judge), identity(moved))
    assert len(forbidding) == 1 and forbidding[0].startswith("reward_files: ")


def test_rewards_that_cannot_be_summed_up_end_the_run_at_once(tiny_llama, questions, tmp_path):
    rewards = [WeightedReward(f"{__name__}.huge")]
    with pytest.raises(UserError, match=r"an answer sum to .*e\+30\d.*smaller weight in --rewards.*The question"):
        run("grpo", tiny_llama, questions, tmp_path, rewards=rewards)
    assert not (tmp_path / "final").exists()


def test_a_loss_that_is_no_number_names_no_checkpoint_that_is_not_there(tiny_llama, chats, tmp_path):
    wild = TrainArgs(**{**vars(TRAIN), "learning_rate": 1e30, "max_norm": None, "save_interval": 9, "keep": "last"})
    with pytest.raises(UserError, match=r"(nan|inf) at step 1\. Lower --train\.learning_rate.*No checkpoint was"):
        run("lora", tiny_llama, chats, tmp_path, train=wild)
