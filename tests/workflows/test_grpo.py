"""The GRPO step on a tiny model: rewards rise, ratios begin at one, resume, TRL's advantages, bad input."""

import csv
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from workflows import grpo
from workflows.checkpoint import check_checkpoint_dir
from workflows.errors import UserError
from workflows.training.groups import GRPO
from workflows.training.loop import TrainArgs
from workflows.training.losses import group_advantages
from workflows.training.rewards import Sample, WeightedReward

TRAIN = TrainArgs(
    max_steps=8,
    global_batch_size=4,
    row_tokens=256,
    max_seq_length=128,
    lr_warmup_steps=0,
    lr_schedule="constant",
    learning_rate=1e-2,
    eval_interval=4,
    save_interval=2,
)


def early_letters(sample: Sample) -> float:
    """More for letters of the alphabet's first half: something that a random model can learn."""
    letters = [c for c in sample.text.lower() if c.isalpha() and c.isascii()]
    return sum(c <= "m" for c in letters) / max(1, len(letters))


def indifferent(sample: Sample) -> float:
    return 1.0


LETTERS = [WeightedReward(f"{__name__}.early_letters")]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("data") / "questions"
    directory.mkdir()
    for split, numbers in (("train", range(12)), ("validation", range(50, 54))):
        rows = [
            {
                "prompt": [{"role": "user", "content": f"Which is {n}{'?' * (n % 5)}"}],
                "answers": [f"finding {n}"],
            }
            for n in numbers
        ]
        (directory / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (directory / "manifest.json").write_text("{}")
    return directory


def align(checkpoint: Path, data: Path, out_dir: Path, **changes: Any) -> list[dict[str, float]]:
    """Run the step; returns the rows of its log."""
    settings = {
        "precision": "32-true", "train": TRAIN, "lora_r": 4, "group_size": 6, "max_new_tokens": 12, "rewards": LETTERS,
        **changes,
    }  # fmt: skip
    grpo.setup(checkpoint_dir=checkpoint, data=data, out_dir=out_dir, **settings)
    rows = csv.DictReader((out_dir / "metrics.csv").read_text().splitlines())
    return [{name: float(value) for name, value in row.items() if value} for row in rows]


def test_the_reward_rises_and_everything_is_logged(tiny_llama, data, tmp_path):
    log = align(tiny_llama, data, tmp_path, train=replace(TRAIN, max_steps=20))
    first, last = (sum(row["reward"] for row in part) / 4 for part in (log[:4], log[-4:]))
    assert last > first + 0.1
    assert log[-1]["val_reward"] > log[3]["val_reward"]
    for row in log:
        assert row["log_ratio"] < 1e-4  # one update on each batch: the policy is still the one that sampled
        assert row["clipped"] == 0 and 0 <= row["no_signal"] <= 1 and row["sampled_per_second"] > 0
    assert log[0]["kl"] == pytest.approx(0, abs=1e-5) and log[-1]["kl"] > 1e-3
    assert {"reward_std", "answer_tokens", "truncated", "entropy", "grad_norm"} <= set(log[0])
    shown = [json.loads(line) for line in (tmp_path / "completions.jsonl").read_text().splitlines()]
    assert len(shown) == 3 * 20 and {"question", "answer", "total"} <= set(shown[0])
    assert check_checkpoint_dir(tmp_path / "final") == tmp_path / "final"


@pytest.mark.parametrize(
    "changes",
    [
        {"normalisation": "sequence"},
        {"normalisation": "constant", "scale": "none"},
        {"sequence_ratio": True},
        {"updates": 2, "clip_high": 0.28},
        {"temperature": 0.7, "top_k": 50, "top_p": 0.9},
        {"mask_truncated": True},
        {"lora_r": 0, "beta": 0.0, "train": replace(TRAIN, learning_rate=1e-3)},
    ],
    ids=lambda changes: "-".join(map(str, changes))[:30],
)
def test_every_variant_trains(tiny_llama, data, tmp_path, changes):
    log = align(tiny_llama, data, tmp_path, **changes)
    assert len(log) == TRAIN.max_steps and all(row["grad_norm"] >= 0 for row in log)
    assert any(row["grad_norm"] > 0 for row in log)
    if changes.get("updates") == 2:
        assert log[0]["log_ratio"] < 1e-4 < log[1]["log_ratio"]
        assert log[0]["reward"] == log[1]["reward"]
    else:
        assert max(row["log_ratio"] for row in log) < 1e-4


def test_groups_without_signal_teach_nothing_and_are_counted(tiny_llama, data, tmp_path):
    log = align(tiny_llama, data, tmp_path, rewards=[WeightedReward(f"{__name__}.indifferent")], beta=0.0)
    assert all(row["no_signal"] == 1 and row["grad_norm"] == 0 for row in log)


def test_a_stopped_run_goes_on_to_the_same_end(tiny_llama, data, tmp_path, monkeypatch):
    align(tiny_llama, data, tmp_path / "whole", updates=2)
    original = GRPO.batches

    def stopping(self: GRPO, step: int, rank: int, world_size: int) -> Any:
        if step == 5:
            raise KeyboardInterrupt
        return original(self, step, rank, world_size)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(GRPO, "batches", stopping)
        align(tiny_llama, data, tmp_path / "stopped", updates=2)
    align(tiny_llama, data, tmp_path / "stopped", updates=2)
    files = [tmp_path / run / "final" / "lit_model.pth.lora" for run in ("whole", "stopped")]
    whole, stopped = (torch.load(file, weights_only=True)["model"] for file in files)
    assert all(torch.equal(whole[name], stopped[name]) for name in whole)


@pytest.mark.parametrize("scale", ["group", "none"])
def test_advantages_are_trls(tiny_llama_hf, tmp_path, scale):
    import datasets
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import GRPOConfig, GRPOTrainer

    rewards = torch.tensor([[0.1, 0.9, 0.4, 0.4], [0.7, 0.7, 0.7, 0.7], [0.0, 0.0, 1.0, 0.2]])
    config = GRPOConfig(
        output_dir=str(tmp_path), per_device_train_batch_size=12, num_generations=4, max_completion_length=2,
        scale_rewards=scale, use_cpu=True, bf16=False, gradient_checkpointing=False, report_to=[], disable_tqdm=True,
    )  # fmt: skip
    rows = [{"prompt": f"Which {n}?"} for n in range(3)]
    trainer = GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(tiny_llama_hf, dtype=torch.float32),
        reward_funcs=lambda completions, **_: rewards.flatten().tolist(), args=config,
        train_dataset=datasets.Dataset.from_list(rows), processing_class=AutoTokenizer.from_pretrained(tiny_llama_hf),
    )  # fmt: skip
    found = trainer._generate_and_score_completions([row for row in rows for _ in range(4)])
    torch.testing.assert_close(found["advantages"], group_advantages(rewards, scale).flatten(), atol=1e-5, rtol=0)


def test_all_problems_are_told_at_once(tiny_llama, data, tmp_path):
    with pytest.raises(UserError, match="6 problems") as e:
        align(
            tiny_llama, data, tmp_path, group_size=1, max_new_tokens=128, temperature=0.0, beta=-1.0, updates=3,
            max_val_rows=0,
        )  # fmt: skip
    for option in ("--group_size", "--max_new_tokens", "--temperature", "--beta", "--updates", "--max_val_rows"):
        assert option in str(e.value)


def test_rows_without_what_the_rewards_read_are_refused(tiny_llama, data, tmp_path):
    with pytest.raises(UserError, match=r"train.jsonl has no rows with \"answer\""):
        align(tiny_llama, data, tmp_path, rewards=[WeightedReward("letter")])
    with pytest.raises(UserError, match=r"of kind name"):
        align(tiny_llama, data, tmp_path, kinds=["name"])


def test_prompts_that_leave_no_room_are_counted(tiny_llama, data, tmp_path, capsys):
    with pytest.raises(UserError, match="No question is left to ask"):
        align(tiny_llama, data, tmp_path, train=replace(TRAIN, max_seq_length=20), max_new_tokens=15)
