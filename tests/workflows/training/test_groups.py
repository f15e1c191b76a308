"""A step of GRPO through the real loop has the gradient of TRL's GRPOTrainer on the same answers and rewards."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from tests.workflows import alignment
from tests.workflows.alignment import TRAIN, log_of
from tests.workflows.peft_twin import peft_twin, to_peft
from workflows import grpo
from workflows.chat_template import ChatTemplate
from workflows.errors import UserError
from workflows.training.group_settings import GroupSettings, ratio_defaults
from workflows.training.groups import GRPO
from workflows.training.loop import fit, step_indices
from workflows.training.model import LoRAArgs, load_model
from workflows.training.processes import make_fabric
from workflows.training.questions import Question
from workflows.training.rewards import Rewards, Sample, WeightedReward
from workflows.training.rollouts import Rollout

pytestmark = pytest.mark.long

LORA = LoRAArgs(r=4, alpha=8)
GROUP, LONGEST = 4, 9
LENGTHS = [3, 9, 5, 9, 2, 9, 7, 4, 9, 6, 9, 8]
STOPPED = [True, False, True, True, True, False, True, True, False, True, False, True]
REWARDS = [0.1, 0.9, 0.4, 0.4, 0.7, 0.7, 0.7, 0.7, 0.0, 0.0, 1.0, 0.2]  # the second group is flat
TRL_NAMES = {"token": "dapo", "sequence": "grpo", "constant": "dr_grpo"}


def made_up_rollouts(eos: int) -> list[Rollout]:
    """Answers of different lengths, some of which did not end."""
    generator = torch.Generator().manual_seed(1)
    rollouts = []
    for length, stopped in zip(LENGTHS, STOPPED, strict=True):
        ids = torch.randint(3, 300, (length,), generator=generator).tolist()
        rollouts.append(Rollout([*ids[:-1], eos] if stopped else ids, [-1.0] * length, stopped))
    return rollouts


class GivenRewards(Rewards):
    """Rewards that do not depend on the answers."""

    def __call__(self, samples: Sequence[Sample]) -> list[dict[str, float]]:
        return [{"brevity": reward, "total": reward} for reward in REWARDS]


class Given(GRPO):
    """GRPO whose answers are given; keeps each update's adapters and gradients."""

    rollouts: list[Rollout]
    updates: list[tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]]

    def _sample_answers(self, prompts: Any, draws: Any, policy: Any) -> list[Rollout]:
        assert len(prompts) == len(self.rollouts)
        return self.rollouts

    def step_metrics(self) -> dict[str, float]:
        trained = {name: p for name, p in self._model.module.named_parameters() if p.requires_grad}
        adapters = {name: p.detach().clone() for name, p in trained.items()}
        self.updates.append((adapters, {name: p.grad.clone() for name, p in trained.items()}))
        return super().step_metrics()

    def validate(self, model: Any) -> dict[str, float]:
        return {}


def ours(checkpoint: Path, out_dir: Path, settings: GroupSettings, steps: int, row_tokens: int) -> Given:
    """Run the real loop on the given answers."""
    template = ChatTemplate.from_checkpoint(checkpoint)
    torch.manual_seed(5)
    model = load_model(checkpoint, LORA)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # so that policy and reference differ from the beginning
            torch.nn.init.normal_(parameter, std=0.05)
    prompts = [template.prompt_ids([{"role": "user", "content": text}]) for text in ("A", "Which one?", "B or C?")]
    questions = [Question({"prompt": [{"content": ""}]}, prompt) for prompt in prompts]
    train = replace(
        TRAIN, max_steps=steps, save_interval=steps, global_batch_size=3, row_tokens=row_tokens, max_norm=None
    )
    objective = Given(
        questions, questions, template, GivenRewards([WeightedReward("brevity")]), train, 0, settings,
    )  # fmt: skip
    objective.rollouts = made_up_rollouts(template.stop_ids[0])
    objective.updates = []
    fit(make_fabric(), model, objective, train, out_dir, seed=0, identity={})
    return objective


def both_gradients(
    hf_dir: Path, out_dir: Path, run: Given, settings: GroupSettings, micro_batches: int, loss_type: str
) -> list[tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]]:
    """Our gradients and those of TRL's trainer for the same updates, by PEFT's names."""
    import datasets
    from transformers import AutoTokenizer
    from trl import GRPOConfig, GRPOTrainer
    from trl.trainer.utils import split_tensor_dict

    in_order = step_indices(0, len(run.questions), len(run.questions), run.seed)
    prompts = [run.questions[i].prompt for i in in_order for _ in range(GROUP)]
    config = GRPOConfig(
        output_dir=str(out_dir), per_device_train_batch_size=12 // micro_batches, num_generations=GROUP,
        gradient_accumulation_steps=micro_batches, num_iterations=settings.updates, max_completion_length=LONGEST,
        beta=settings.beta, epsilon=settings.clip_low, epsilon_high=settings.clip_high, loss_type=loss_type,
        importance_sampling_level="sequence" if settings.sequence_ratio else "token", scale_rewards="group",
        use_bias_correction_kl=settings.kl_correction, mask_truncated_completions=settings.mask_truncated,
        use_cpu=True, bf16=False, gradient_checkpointing=False,
        report_to=[], disable_tqdm=True, temperature=settings.temperature,
    )  # fmt: skip

    class Given(GRPOTrainer):
        def _tokenize_prompts(self, _: Any) -> Any:
            return prompts, None, {}

        def _generate_single_turn(self, *_: Any) -> Any:
            return [rollout.ids for rollout in run.rollouts], None

    rows = [{"prompt": f"Which {n}?"} for n in range(3)]
    trainer = Given(
        model=peft_twin(hf_dir, run.updates[0][0], LORA), reward_funcs=lambda completions, **_: REWARDS, args=config,
        train_dataset=datasets.Dataset.from_list(rows), processing_class=AutoTokenizer.from_pretrained(hf_dir),
    )  # fmt: skip
    with torch.no_grad():  # TRL's reference is the adapter that it is given; ours is the model without one
        for name, parameter in trainer.model.named_parameters():
            if "lora_B.ref." in name:
                parameter.zero_()
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = micro_batches
    inputs = trainer._generate_and_score_completions([row for row in rows for _ in range(GROUP)])
    assert ("old_per_token_logps" in inputs) == (settings.updates > 1)
    found = []
    for adapters, gradients in run.updates:
        trainer.model.load_state_dict(to_peft(adapters, LORA, trainer.model.config), strict=False)
        trainer.model.zero_grad()
        for part in split_tensor_dict(inputs, micro_batches):
            trainer.compute_loss(trainer.model, part).backward()
        theirs = {name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
        found.append((to_peft(gradients, LORA, trainer.model.config), theirs))
    return found


@pytest.mark.parametrize(
    ("settings", "loss_type"),
    [
        ({}, "dapo"),
        ({}, "bnpo"),
        ({"kl_correction": False, "updates": 2}, "dapo"),
        ({"beta": 0.0}, "dapo"),
        ({"normalisation": "sequence", "updates": 3}, "grpo"),
        ({"normalisation": "sequence", "beta": 0.0}, "grpo"),
        ({"normalisation": "constant", "updates": 2}, "dr_grpo"),
        ({"normalisation": "constant", "beta": 0.0}, "dr_grpo"),
        ({"mask_truncated": True, "updates": 3}, "dapo"),
        ({"mask_truncated": True, "beta": 0.0}, "bnpo"),
        ({"mask_truncated": True, "normalisation": "sequence"}, "grpo"),
        ({"mask_truncated": True, "normalisation": "sequence", "beta": 0.0, "updates": 2}, "grpo"),
        ({"mask_truncated": True, "normalisation": "constant", "beta": 0.0}, "dr_grpo"),
        ({"sequence_ratio": True, "updates": 3}, "grpo"),
        ({"updates": 3, "clip_low": 0.02, "clip_high": 0.03, "temperature": 0.7}, "dapo"),
    ],
    ids=str,
)
def test_a_steps_gradient_is_trls(tiny_llama, tiny_llama_hf, tmp_path, settings, loss_type):
    given = {"group_size": GROUP, "max_new_tokens": LONGEST, "beta": 0.3, **settings}
    level = given.get("sequence_ratio", False)
    defaults = ratio_defaults(level, *(given.get(name) for name in ("normalisation", "clip_low", "clip_high")))
    given |= dict(zip(("normalisation", "clip_low", "clip_high"), defaults, strict=True))
    chosen = GroupSettings(**given)
    steps = chosen.updates
    run = ours(tiny_llama, tmp_path / "ours", chosen, steps, row_tokens=40)
    assert len(run._current) > 1 and len(run.updates) == steps  # the rows are accumulated
    micro_batches = 1 if loss_type == "bnpo" else 3
    for found, expected in both_gradients(tiny_llama_hf, tmp_path / "trl", run, chosen, micro_batches, loss_type):
        assert found.keys() == expected.keys()
        largest = max(float(value.abs().max()) for value in expected.values())
        assert largest > 1e-3
        for name, value in expected.items():
            assert float((found[name] - value).abs().max()) < 1e-4 * largest, name


def settings_of(**changes: Any) -> GroupSettings:
    return GroupSettings(**{"group_size": GROUP, "max_new_tokens": LONGEST, "beta": 0.3, **changes})


def gradient(run: Given) -> torch.Tensor:
    """The first update's gradient as one vector."""
    return torch.cat([value.flatten() for value in run.updates[0][1].values()])


@pytest.mark.parametrize("normalisation", ["token", "sequence", "constant"])
def test_dropped_flat_groups_leave_the_denominator_and_kept_ones_do_not(tiny_llama, tmp_path, normalisation):
    """A flat group is one of three: without KL, dropping it makes the step larger by all units over the others'."""
    kept, dropped = (
        ours(
            tiny_llama, tmp_path / way,
            settings_of(beta=0.0, normalisation=normalisation, flat_groups=way), 1, row_tokens=400,
        )
        for way in ("keep", "drop")
    )  # fmt: skip
    flat = sum(LENGTHS[4:8])
    factor = sum(LENGTHS) / (sum(LENGTHS) - flat) if normalisation == "token" else 12 / 8
    torch.testing.assert_close(gradient(dropped), factor * gradient(kept), atol=1e-6, rtol=1e-4)
    tokens = [sum(len(batch.rows.targets) for batch in run._current) for run in (kept, dropped)]
    assert tokens == [sum(LENGTHS) - flat] * 2  # a group without gradient costs no forward pass


def test_flat_groups_are_held_to_the_reference(tiny_llama, tmp_path, monkeypatch):
    monkeypatch.setattr(f"{__name__}.REWARDS", [0.5] * 12)
    kept, dropped = (
        ours(tiny_llama, tmp_path / way, settings_of(flat_groups=way), 1, row_tokens=400) for way in ("keep", "drop")
    )
    assert gradient(kept).abs().max() > 1e-3 and gradient(dropped).abs().max() == 0
    assert all(batch.advantages.abs().max() == 0 for batch in kept._current)


@pytest.mark.parametrize("updates", [1, 2])
@pytest.mark.parametrize("precision", ["bf16-true", "32-true"])
def test_the_first_updates_ratio_is_one_in_any_precision(tiny_llama, questions, tmp_path, updates, precision):
    log = grpo_log(tiny_llama, questions, tmp_path, updates=updates, precision=precision, lora_dropout=0.3)
    firsts = log[::updates]
    assert all(row["log_ratio_max"] == 0 and row["clipped"] == 0 for row in firsts)
    assert all(row["sampling_logp_diff_max"] < 1e-4 for row in firsts) or precision == "bf16-true"
    if updates == 2:
        assert any(row["log_ratio_max"] > 0 for row in log[1::2])
        for first, second in zip(firsts, log[1::2], strict=True):  # of the same answers and the same old policy
            assert first["sampling_logp_diff_max"] == second["sampling_logp_diff_max"]


def grpo_log(checkpoint: Path, data: Path, out_dir: Path, **changes: Any) -> list[dict[str, float]]:
    """Run the step; returns the rows of its log."""
    settings = {
        "precision": "32-true", "train": replace(TRAIN, max_steps=4, max_seq_length=128), "lora_r": 4, "group_size": 4,
        "max_new_tokens": 12, "rewards": [WeightedReward(f"{alignment.__name__}.early_letters")], "max_test_rows": 0,
        **changes,
    }  # fmt: skip
    grpo.setup(checkpoint_dir=checkpoint, data=data, out_dir=out_dir, **settings)
    return log_of(out_dir)


def test_dropout_is_off_and_that_is_said(tiny_llama, questions, tmp_path, capsys):
    without = grpo_log(tiny_llama, questions, tmp_path / "without")
    assert "lora_dropout" not in capsys.readouterr().out
    dropped = grpo_log(tiny_llama, questions, tmp_path / "with", lora_dropout=0.5)
    assert "lora_dropout is off in this step" in capsys.readouterr().out
    for name in ("loss", "grad_norm", "reward", "kl"):
        assert [row[name] for row in dropped] == [row[name] for row in without]


def only_two(sample: Sample) -> float:
    """A reward that differs for answers to two of the questions only."""
    number = int(sample.row["answers"][0].split()[-1])
    return alignment.early_letters(sample) if number in (3, 7) else 1.0


def test_resampling_asks_further_questions_until_the_groups_have_a_signal(tiny_llama, questions, tmp_path, capsys):
    rewards = [WeightedReward(f"{__name__}.only_two")]
    train = replace(TRAIN, max_steps=4, max_seq_length=128, global_batch_size=2)
    log = grpo_log(tiny_llama, questions, tmp_path, rewards=rewards, flat_groups="resample", train=train)
    assert all(row["missing_groups"] == 0 for row in log) or "rounds of sampling" in capsys.readouterr().out
    assert sum(row["resampled"] for row in log) > 4 and any(row["missing_groups"] == 0 for row in log)
    for row in log:
        asked = round(2 * (1 + row["resampled"]))
        assert row["no_signal"] == pytest.approx((asked - (2 - row["missing_groups"])) / asked, abs=1e-5)


def test_resampling_ends_where_the_questions_do_and_says_so(tiny_llama, questions, tmp_path, capsys):
    log = grpo_log(
        tiny_llama, questions, tmp_path, rewards=[WeightedReward(f"{__name__}.indifferent")], flat_groups="resample"
    )
    said = capsys.readouterr().out
    assert all(row["missing_groups"] == 4 and row["resampled"] == 3 and row["grad_norm"] == 0 for row in log)
    assert said.count("only 0 of 4 groups have answers with different rewards") == 1
    assert "4 of 4 steps had nothing to learn from (all answers to a question got the same reward)" in said


def indifferent(sample: Sample) -> float:
    return 1.0


@pytest.mark.parametrize("beta", [0.0, 0.5])
def test_a_run_without_anything_to_learn_says_so(tiny_llama, questions, tmp_path, beta, capsys):
    rewards = [WeightedReward(f"{__name__}.indifferent")]
    grpo_log(tiny_llama, questions, tmp_path, beta=beta, rewards=rewards)
    said = capsys.readouterr().out
    assert "4 of 4 steps had nothing to learn from" in said and "the model has learned nothing in this run" in said
    metrics = json.loads((tmp_path / "final" / "metrics.json").read_text())
    assert metrics["steps_without_signal"] == 4


def test_an_answer_that_did_not_end_pays_for_it(tiny_llama, questions, tmp_path):
    """The penalty is taken off each truncated answer, in training as in validation, and makes a signal of its own."""
    rewards = [WeightedReward(f"{__name__}.indifferent")]
    log = grpo_log(
        tiny_llama, questions, tmp_path, rewards=rewards, missing_eos_penalty=0.5, group_size=8, max_new_tokens=48
    )
    assert any(0 < row["truncated"] < 1 for row in log)
    for row in log:
        assert row["reward"] == pytest.approx(1 - 0.5 * row["truncated"], abs=1e-5)
    assert log[-1]["val_reward"] in [pytest.approx(1 - 0.5 * cut / 4, abs=1e-5) for cut in range(5)]
    for line in (tmp_path / "completions.jsonl").read_text().splitlines():
        assert json.loads(line)["total"] in (1.0, 0.5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sequence_ratio": True, "normalisation": "token"}, "--sequence_ratio true with --normalisation token"),
        ({"sequence_ratio": True, "normalisation": "constant"}, "--sequence_ratio true with --normalisation constant"),
        ({"missing_eos_penalty": -1.0}, "--missing_eos_penalty must be 0 or more"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(tiny_llama, questions, tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        grpo_log(tiny_llama, questions, tmp_path, **changes)


def test_sequence_ratios_bring_their_own_aggregation_and_clip_range(tiny_llama, questions, tmp_path):
    assert ratio_defaults(False, None, None, None) == ("token", 0.2, 0.2)
    assert ratio_defaults(True, None, None, None) == ("sequence", 3e-4, 4e-4)
    assert ratio_defaults(True, "token", 0.1, None) == ("token", 0.1, 4e-4)
    grpo_log(tiny_llama, questions, tmp_path, sequence_ratio=True)
    written = yaml.safe_load((tmp_path / "final" / "hyperparameters.yaml").read_text())
    assert (written["normalisation"], written["clip_low"], written["clip_high"]) == ("sequence", 3e-4, 4e-4)
