"""The GRPO step on a tiny model: rewards rise, ratios begin at one, resume, TRL's advantages, bad input."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.workflows import alignment
from tests.workflows.alignment import log_of, on_test_split, question, write
from workflows import grpo
from workflows.checkpoint import check_checkpoint_dir
from workflows.errors import UserError
from workflows.training.groups import GRPO
from workflows.training.held_out import right_answer
from workflows.training.losses import group_advantages
from workflows.training.questions import read_and_count
from workflows.training.rewards import Sample, WeightedReward

pytestmark = pytest.mark.long

TRAIN = replace(alignment.TRAIN, max_steps=8, max_seq_length=128, eval_interval=4)
STEPS = 40


def indifferent(sample: Sample) -> float:
    return 1.0


LETTERS = [WeightedReward(f"{alignment.__name__}.early_letters")]


def align(checkpoint: Path, data: Path, out_dir: Path, **changes: Any) -> list[dict[str, float]]:
    """Run the step; returns the rows of its log."""
    settings = {
        "precision": "32-true", "train": TRAIN, "lora_r": 4, "group_size": 6, "max_new_tokens": 12, "rewards": LETTERS,
        **changes,
    }  # fmt: skip
    grpo.setup(checkpoint_dir=checkpoint, data=data, out_dir=out_dir, **settings)
    return log_of(out_dir)


def test_the_reward_rises_and_everything_is_logged(tiny_llama, questions, tmp_path):
    log = align(tiny_llama, questions, tmp_path, train=replace(TRAIN, max_steps=STEPS))
    first, last = (sum(row["reward"] for row in part) / 4 for part in (log[:4], log[-4:]))
    assert last > first + 0.1
    assert log[-1]["val_reward"] > log[3]["val_reward"]
    for row in log:
        assert row["log_ratio_max"] == 0 and row["sampling_logp_diff_max"] < 1e-4  # one update on each batch
        assert row["clipped"] == 0 and 0 <= row["no_signal"] <= 1 and row["sampled_per_second"] > 0
    assert log[0]["kl"] == pytest.approx(0, abs=1e-5) and log[-1]["kl"] > 1e-3
    assert {"reward_std", "answer_tokens", "truncated", "entropy", "grad_norm"} <= set(log[0])
    shown = [json.loads(line) for line in (tmp_path / "completions.jsonl").read_text().splitlines()]
    test, metrics = on_test_split(tmp_path), json.loads((tmp_path / "final" / "metrics.json").read_text())
    assert test["reward"]["n"] == 6 and test["reward"]["value"] > test["reward_before"]["value"]
    assert test["kl_per_answer"]["value"] > 0.05
    gain, sampled, *others = metrics["gain"]
    assert [row["metric"] for row in others] == ["chosen_logprob", "greedy_right", "greedy_ended", "greedy_repeats"]
    assert test["chosen_logprob"]["n"] == test["greedy_right"]["n"] == 6
    assert sampled["metric"] == "sampled_reward" and sampled["difference"] > 0
    assert gain["difference"] == pytest.approx(test["reward"]["value"] - test["reward_before"]["value"])
    assert gain["low"] < gain["difference"] < gain["high"]
    assert len(metrics["shown"]) == 3 and metrics["shown"][0]["wanted"] == "finding 60"
    assert len(shown) == 3 * STEPS and {"question", "answer", "total"} <= set(shown[0])
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
def test_every_variant_trains(tiny_llama, questions, tmp_path, changes):
    log = align(tiny_llama, questions, tmp_path, **changes)
    assert len(log) == TRAIN.max_steps and all(row["grad_norm"] >= 0 for row in log)
    assert any(row["grad_norm"] > 0 for row in log)
    if changes.get("updates") == 2:
        assert log[0]["log_ratio_max"] == 0 and log[1]["log_ratio"] > 1e-4
        assert log[0]["reward"] == log[1]["reward"]
    else:
        assert max(row["log_ratio_max"] for row in log) == 0


def test_full_weights_keep_a_frozen_copy_as_the_reference(tiny_llama, questions, tmp_path):
    train = replace(TRAIN, learning_rate=1e-3)
    log = align(tiny_llama, questions, tmp_path, lora_r=0, beta=0.1, frozen_reference=True, train=train)
    assert log[0]["kl"] == pytest.approx(0, abs=1e-5) and log[-1]["kl"] > 1e-3
    test = on_test_split(tmp_path)
    assert test["sampled_reward"]["value"] != test["sampled_reward_before"]["value"] and test["kl_per_answer"]["value"]
    with pytest.raises(UserError, match="frozen_reference is for full weights"):
        align(tiny_llama, questions, tmp_path / "other", frozen_reference=True)


@pytest.mark.parametrize("beta", [0.0, 0.5])
def test_groups_without_signal_teach_nothing_and_are_counted(tiny_llama, questions, tmp_path, beta):
    log = align(tiny_llama, questions, tmp_path, rewards=[WeightedReward(f"{__name__}.indifferent")], beta=beta)
    assert all(row["no_signal"] == 1 for row in log)
    assert beta or all(row["grad_norm"] == 0 for row in log)  # else the KL has a gradient


@pytest.mark.parametrize(
    ("rewards", "penalty", "is_share"),
    [
        ([WeightedReward("exact")], 0.0, True),
        ([WeightedReward("exact")], 0.5, False),
        ([WeightedReward("exact", 2.0)], 0.0, False),
        ([WeightedReward("exact"), WeightedReward("format")], 0.0, False),
        ([WeightedReward("finding")], 0.0, False),
    ],
)
def test_a_share_of_right_answers_has_wilsons_interval(
    tiny_llama, questions, tmp_path, capsys, rewards, penalty, is_share
):
    train = replace(TRAIN, max_steps=1)
    align(tiny_llama, questions, tmp_path, rewards=rewards, missing_eos_penalty=penalty, train=train)
    row = on_test_split(tmp_path)["reward"]
    assert ("low" in row) == is_share
    if is_share:  # none of six answers is right
        assert (row["value"], row["low"], row["high"]) == (0, 0, pytest.approx(0.3903, abs=1e-4))
        said = capsys.readouterr().out
        assert "test reward: 0.0000 (0.0000 to 0.3903)" in said
        assert "after - before: +0.0000, the same in each row, n = 6" in said


def test_a_large_group_is_learned_from_in_rows_that_are_not_larger_than_asked_for(tiny_llama, questions, tmp_path):
    logs = [
        align(tiny_llama, questions, tmp_path / str(room), train=replace(TRAIN, row_tokens=room, max_steps=2))
        for room in (64, 1024)
    ]
    for small, large in zip(*logs, strict=True):
        assert small["loss"] == pytest.approx(large["loss"], abs=1e-5)
        assert small["grad_norm"] == pytest.approx(large["grad_norm"], rel=1e-3)


def test_rows_of_any_shape_are_shown_with_what_is_right():
    turns = [{"role": "assistant", "content": "b"}]
    assert right_answer({"choices": ["a", "b"], "answer": 1}) == right_answer({"chosen": turns}) == "b"
    assert right_answer({"answers": ["b", "c"]}) == right_answer({"messages": turns}) == "b"
    assert right_answer({"prompt": [], "answer": "72"}) == right_answer({"completion": turns, "label": False}) == ""


def test_a_stopped_run_goes_on_to_the_same_end(tiny_llama, questions, tmp_path, monkeypatch):
    align(tiny_llama, questions, tmp_path / "whole", updates=2)
    original = GRPO.batches

    def stopping(self: GRPO, step: int, rank: int, world_size: int) -> Any:
        if step == 5:
            raise KeyboardInterrupt
        return original(self, step, rank, world_size)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(GRPO, "batches", stopping)
        align(tiny_llama, questions, tmp_path / "stopped", updates=2)
    align(tiny_llama, questions, tmp_path / "stopped", updates=2)
    files = [tmp_path / run / "final" / "lit_model.pth.lora" for run in ("whole", "stopped")]
    whole, stopped = (torch.load(file, weights_only=True)["model"] for file in files)
    assert all(torch.equal(whole[name], stopped[name]) for name in whole)
    texts = [(tmp_path / run / "completions.jsonl").read_text() for run in ("whole", "stopped")]
    assert texts[0] == texts[1]


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


def test_all_problems_are_told_at_once(tiny_llama, questions, tmp_path):
    with pytest.raises(UserError, match="6 problems") as e:
        align(
            tiny_llama, questions, tmp_path, group_size=1, max_new_tokens=128, temperature=0.0, beta=-1.0, updates=3,
            max_val_rows=0,
        )  # fmt: skip
    for option in ("--group_size", "--max_new_tokens", "--temperature", "--beta", "--updates", "--max_val_rows"):
        assert option in str(e.value)
    with pytest.raises(UserError, match="2 problems") as e:
        align(tiny_llama, questions, tmp_path, updates=0, lora_r=0)
    for option in ("--updates", "--beta"):
        assert option in str(e.value)


def test_rows_without_what_the_rewards_read_are_refused(tiny_llama, questions, tmp_path):
    with pytest.raises(UserError, match=r"train.jsonl has no rows with \"answer\""):
        align(tiny_llama, questions, tmp_path, rewards=[WeightedReward("letter")])
    with pytest.raises(UserError, match=r"no rows of kind name. Its kinds are None \(16\). Choose by --kinds"):
        align(tiny_llama, questions, tmp_path, kinds=["name"])
    unanswered = [{"prompt": question(i)["prompt"]} for i in range(8)]
    bare = write(tmp_path / "bare", train=unanswered, validation=unanswered)
    with pytest.raises(UserError, match=r'no rows with "answers".*\["18"\].*"solution".*run `make data` again'):
        align(tiny_llama, bare, tmp_path, rewards=[WeightedReward("math_answer")])


def test_rows_without_answers_are_counted_among_others(tmp_path):
    rows = [question(0), question(1), {"prompt": question(2)["prompt"]}]
    path = write(tmp_path / "mixed", train=rows) / "train.jsonl"
    assert read_and_count(path, ["answers"], None) == (rows[:2], '\n  1 more rows have no "answers" and are not asked')
    assert read_and_count(path, [], None) == (rows, "")


def only_long(sample: Sample) -> float | None:
    return len(sample.text) / 10 if len(sample.text) > 30 else None


def test_a_reward_that_does_not_always_apply_trains_and_is_counted(tiny_llama, questions, tmp_path):
    name = f"{__name__}.only_long"
    log = align(tiny_llama, questions, tmp_path, rewards=[WeightedReward(name)])
    assert len(log) == TRAIN.max_steps
    assert any(0 < row["no_reward"] < 1 for row in log)
    for row in log:
        applied = 1 - row["no_reward"]
        mean = row[f"reward_{name}"] * applied if applied else 0.0
        assert row["reward"] == pytest.approx(mean, rel=1e-4, abs=1e-6)


def test_kinds_of_rows_are_rewarded_each_by_its_own_rules(tiny_llama, tmp_path):
    rules = ("exact_name", "disclaimer")
    rows = [{**question(n), "kind": rules[n % 2], "rules": [rules[n % 2]]} for n in range(8)]
    data = write(tmp_path / "ruled_questions", train=rows, validation=rows[:4], test=rows[:4])
    rewards = [WeightedReward(rule) for rule in rules]
    log = align(tiny_llama, data, tmp_path / "run", rewards=rewards, train=replace(TRAIN, max_steps=2))
    assert len(log) == 2
    assert {f"reward_{rule}" for rule in rules} <= set(log[0])
    with pytest.raises(UserError, match=r"4 by disclaimer. Add these rewards, or leave out the kinds disclaimer"):
        align(tiny_llama, data, tmp_path / "refused", rewards=rewards[:1])
    align(
        tiny_llama, data, tmp_path / "one", rewards=rewards[:1], kinds=["exact_name"], train=replace(TRAIN, max_steps=1)
    )


def test_prompts_that_leave_no_room_are_counted(tiny_llama, questions, tmp_path):
    with pytest.raises(UserError, match=r"0 of 16 questions; 16 dropped: over 5 tokens\nRaise"):
        align(tiny_llama, questions, tmp_path, train=replace(TRAIN, max_seq_length=20), max_new_tokens=15)
