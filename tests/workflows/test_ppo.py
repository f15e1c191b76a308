"""PPO on a tiny model: the reward rises, the value head learns, and a reward model can be the reward."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.workflows.alignment import TRAIN, early_letters, log_of
from workflows import grpo, ppo
from workflows.checkpoint import check_checkpoint_dir
from workflows.errors import UserError
from workflows.training.actor_critic import PPO
from workflows.training.losses import gae
from workflows.training.rewards import Sample, WeightedReward

pytestmark = pytest.mark.long


def align(checkpoint: Path, data: Path, out_dir: Path, **changes: Any) -> list[dict[str, float]]:
    settings = {
        "precision": "32-true", "lora_r": 4, "max_new_tokens": 12,
        "rewards": [WeightedReward(f"{early_letters.__module__}.early_letters")],
        "train": replace(TRAIN, max_steps=30, max_seq_length=128, global_batch_size=48, eval_interval=30),
        **changes,
    }  # fmt: skip
    ppo.setup(checkpoint_dir=checkpoint, data=data, out_dir=out_dir, **settings)
    return log_of(out_dir)


def test_ppo_raises_the_reward_and_its_critic_learns(tiny_llama, questions, tmp_path):
    # In ten steps it rises from 0.58 to 0.69; later, sampling makes of a processor's rounding a run of its own.
    train = replace(TRAIN, max_steps=10, max_seq_length=128, global_batch_size=48, eval_interval=10)
    log = align(tiny_llama, questions, tmp_path, beta=0.001, updates=1, train=train)
    first, last = (sum(row["reward"] for row in part) / 3 for part in (log[:3], log[-3:]))
    assert last > first + 0.05
    assert log[-1]["value_loss"] < log[0]["value_loss"]
    assert log[0]["log_ratio_max"] == 0 and log[0]["kl"] == pytest.approx(0, abs=1e-5) and log[-1]["kl"] > 0.01
    final = tmp_path / "final"
    assert check_checkpoint_dir(final) == final
    assert not any(
        "value_head" in name for name in torch.load(final / "lit_model.pth.lora", weights_only=True)["model"]
    )


def test_a_reward_model_can_be_the_reward_of_both(tiny_llama, judge, questions, tmp_path):
    rewards = [WeightedReward(str(judge))]
    log = align(tiny_llama, questions, tmp_path / "ppo", rewards=rewards, train=replace(TRAIN, max_steps=2))
    assert f"reward_{judge}" in log[0]
    grpo.setup(
        tiny_llama, questions, tmp_path / "grpo", rewards=rewards, group_size=4, max_new_tokens=12, precision="32-true",
        train=replace(TRAIN, max_steps=2), lora_r=4,
    )  # fmt: skip
    assert log_of(tmp_path / "grpo")[0]["reward_std"] > 0


def test_an_answer_that_did_not_end_pays_for_it(tiny_llama, questions, tmp_path):
    rewards = [WeightedReward(f"{__name__}.indifferent")]
    train = replace(TRAIN, max_steps=3, max_seq_length=128, global_batch_size=16)
    log = align(
        tiny_llama, questions, tmp_path, rewards=rewards, missing_eos_penalty=0.5, max_new_tokens=48, train=train,
        updates=1,
    )  # fmt: skip
    assert any(0 < row["truncated"] < 1 for row in log)
    for row in log:
        assert row["reward"] == pytest.approx(1 - 0.5 * row["truncated"], abs=1e-5)
        assert row["no_signal"] == (row["truncated"] in (0, 1))


def indifferent(sample: Sample) -> float:
    return 1.0


def test_truncated_answers_teach_neither_policy_nor_critic(tiny_llama, questions, tmp_path, monkeypatch):
    seen: list[Any] = []
    original = PPO._evaluated

    def watched(self: PPO, packed: Any) -> Any:
        batches = original(self, packed)
        seen.append(batches)
        return batches

    monkeypatch.setattr(PPO, "_evaluated", watched)
    train = replace(TRAIN, max_steps=2, max_seq_length=128, global_batch_size=16)
    settings: Any = {"max_new_tokens": 48, "train": train, "updates": 1}
    log = align(tiny_llama, questions, tmp_path / "masked", mask_truncated=True, **settings)
    assert 0 < log[0]["truncated"] < 1
    counted = sum(batch.rows.completions for batch in seen[0])
    assert counted == round(16 * (1 - log[0]["truncated"]))
    advantages = torch.cat([batch.advantages for batch in seen[0]])  # whitened over the answers that count
    assert float(advantages.mean()) == pytest.approx(0, abs=1e-4)
    assert float(advantages.std(correction=0)) == pytest.approx(1, abs=1e-3)
    settings["max_new_tokens"] = 1  # none of them ends
    log = align(tiny_llama, questions, tmp_path / "none", mask_truncated=True, **settings)
    assert all(row["truncated"] < 1 or row["grad_norm"] == 0 for row in log)


def test_one_token_has_the_whole_reward_as_its_advantage():
    assert gae(torch.tensor([2.0]), torch.tensor([0.5]), 1.0, 0.95).tolist() == [1.5]


def test_all_problems_are_told_at_once(tiny_llama, questions, tmp_path):
    with pytest.raises(UserError, match="3 problems") as e:
        align(tiny_llama, questions, tmp_path, gamma=2.0, value_clip=0.0, temperature=0.0)
    assert all(option in str(e.value) for option in ("--gamma", "--value_clip", "--temperature"))


def test_another_reward_model_in_its_place_makes_another_run(tiny_llama, judge, questions, tmp_path):
    other = shutil.copytree(judge, tmp_path / "judge")
    train = replace(TRAIN, max_steps=2)
    align(tiny_llama, questions, tmp_path / "out", rewards=[WeightedReward(str(other))], train=train)
    final = tmp_path / "out" / "final" / "provenance.json"
    assert str(other) in json.loads(final.read_text())["sources"]
    written = (tmp_path / "out" / "final" / "lit_model.pth").stat().st_mtime_ns
    align(tiny_llama, questions, tmp_path / "out", rewards=[WeightedReward(str(other))], train=train)
    assert (tmp_path / "out" / "final" / "lit_model.pth").stat().st_mtime_ns == written
    provenance = json.loads((other / "provenance.json").read_text())
    provenance["files"]["lit_model.pth"] = "of another one"
    (other / "provenance.json").write_text(json.dumps(provenance))
    align(tiny_llama, questions, tmp_path / "out", rewards=[WeightedReward(str(other))], train=train)
    assert (tmp_path / "out" / "final" / "lit_model.pth").stat().st_mtime_ns > written


def test_a_token_earns_its_kl_and_the_last_one_the_reward(tiny_llama, questions, tmp_path, monkeypatch):
    """What PPO makes of a batch, by the definitions: r_t = -beta log(pi / pi_ref), and the reward at the end."""
    seen: list[Any] = []
    original = PPO._evaluated

    def watched(self: PPO, packed: Any) -> Any:
        batches = original(self, packed)
        seen.append((packed, batches))
        return batches

    monkeypatch.setattr(PPO, "_evaluated", watched)
    align(
        tiny_llama, questions, tmp_path, beta=0.3, gamma=0.9, lam=0.8, updates=1,
        train=replace(TRAIN, max_steps=3, row_tokens=64, max_seq_length=128),
    )  # fmt: skip
    packed, batches = seen[-1]  # adapters and critic have moved by now
    raw, whitened, returns, values = [], [], [], []
    for before, batch in zip(packed, batches, strict=True):
        assert batch.reference.sub(batch.old).abs().max() > 1e-3
        for number in range(batch.rows.completions):
            mine = batch.rows.owners == number
            earned = -0.3 * (batch.old - batch.reference)[mine]
            earned[-1] += before.advantages[mine][-1]  # the answer's reward is kept there until now
            value = batch.old_values[mine]
            following = torch.cat([value[1:], torch.zeros(1)])
            advantage, found = torch.zeros(()), []
            for delta in reversed(earned + 0.9 * following - value):
                advantage = delta + 0.9 * 0.8 * advantage
                found.insert(0, advantage)
            raw += found
            whitened += batch.advantages[mine].tolist()
            returns += batch.returns[mine].tolist()
            values += value.tolist()
    expected = torch.stack(raw)
    assert whitened == pytest.approx(((expected - expected.mean()) / expected.std(correction=0)).tolist(), abs=1e-3)
    assert returns == pytest.approx((expected + torch.tensor(values)).tolist(), abs=1e-4)
