"""A step of GRPO through the real loop has the gradient of TRL's GRPOTrainer on the same answers and rewards."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.workflows.alignment import TRAIN
from tests.workflows.peft_twin import peft_twin, to_peft
from workflows.chat_template import ChatTemplate
from workflows.training.group_settings import GroupSettings, ratio_defaults
from workflows.training.groups import GRPO
from workflows.training.loop import fit, step_indices
from workflows.training.model import LoRAArgs, load_model
from workflows.training.processes import make_fabric
from workflows.training.questions import Question
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
        questions, questions, template, lambda samples: [{"total": reward} for reward in REWARDS],  # type: ignore[arg-type]
        train, 0, settings,
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
