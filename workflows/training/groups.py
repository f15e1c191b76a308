"""The objective of GRPO: sample several completions per prompt and reinforce the better ones.

A step samples G answers to each of its prompts, rewards them, and takes one or several updates on them. A group is one
tree: its prompt is computed once, in sampling as in training. Log-probabilities are those of the untruncated policy at
the sampling temperature, on both sides of every ratio. The old ones are computed as training computes them (with one
update they are the policy's own, without gradient), so that the first update's ratio is 1 in any precision; their
distance from those that sampling recorded is logged. The model is in evaluation mode: dropout would make ratios noise.
"""

import math
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch

from data_prep.rows import Row
from workflows.chat_template import ChatTemplate
from workflows.checkpoint import metric, share_metric
from workflows.evaluation.compare import compare
from workflows.training import losses
from workflows.training.answer_log import AnswerLog
from workflows.training.batch import PackedBatch, Tree, pack
from workflows.training.drift import DriftCheck
from workflows.training.group_batch import Asked, GroupBatch, Judged, has_signal, judged_groups, pack_groups
from workflows.training.group_settings import SAMPLING_ROUNDS, GroupSettings
from workflows.training.held_out import SHOWN, before_and_after, text_of
from workflows.training.loop import Objective, Report, TrainArgs, step_indices
from workflows.training.model import GPT, adapters_off
from workflows.training.questions import Question
from workflows.training.rewards import Rewards, Sample
from workflows.training.rollouts import Rollout, generate
from workflows.training.whole import whole


class GRPO(Objective):
    """Group-relative policy optimisation (Shao et al. 2024, arXiv 2402.03300) and its later variants."""

    may_rest = True
    without_signal = "all answers to a question got the same reward"
    best_by = ("val_reward", "max")

    def __init__(
        self,
        train_questions: list[Question],
        validation_questions: list[Question],
        template: ChatTemplate,
        rewards: Rewards,
        train: TrainArgs,
        seed: int,
        settings: GroupSettings,
        test_questions: Sequence[Question] = (),
        frozen: GPT | None = None,
        drift: DriftCheck | None = None,
    ) -> None:
        """Keep what a run needs.

        Args:
            train_questions: What is asked.
            validation_questions: What is asked to validate, greedily.
            template: Decodes answers; its stop ids end them.
            rewards: What an answer is worth.
            train: Training settings; a sample is a question.
            seed: Of the order of questions and of sampling.
            settings: The rest.
            test_questions: What the trained model and the one it was are asked at the end, greedily and by sampling.
            frozen: The reference, where it is not the trained model without its adapters.
            drift: What the step must not break, measured before and after; None for a run that is not tested.
        """
        self.questions, self.validation, self.test = train_questions, validation_questions, test_questions
        self.template, self.rewards = template, rewards
        self.train, self.seed, self.settings, self.frozen = train, seed, settings, frozen
        self.drift = drift
        self.epoch_rows, self.updates = len(train_questions), settings.updates
        if settings.mask_truncated:
            self.without_signal += ", or no answer ended (--mask_truncated)"
        self._current: list[GroupBatch] = []
        self._metrics: dict[str, float] = {}
        self._largest: dict[str, float] = {}
        self._missing = 0

    def begin(self, fabric: L.Fabric, model: Any, out_dir: Path) -> None:
        """Keep the model, which steps sample from, switch its dropout off, and measure it as it is."""
        if any(isinstance(module, torch.nn.Dropout) and module.p > 0 for module in model.modules()):
            fabric.print("lora_dropout is off in this step: with it the ratios of its updates would be noise")
        model.eval()
        if self.drift is not None:
            self.drift.begin(fabric, model, out_dir)
        self._fabric, self._model, self._device = fabric, model, fabric.device
        self._policy: Any = None  # all of the model in this process, while answers are sampled and scored
        self._log = AnswerLog(out_dir / "completions.jsonl") if fabric.global_rank == 0 else None

    def may_pause(self, steps: int) -> bool:
        """Between updates on the same answers a run may not: checkpoints do not keep them."""
        return steps % self.settings.updates == 0

    def batches(self, step: int, rank: int, world_size: int) -> list[GroupBatch]:
        """The rows of one step: sampled again where the updates on the last ones are done."""
        self._largest = {"log_ratio_max": 0.0, "sampling_logp_diff_max": 0.0}
        if step % self.settings.updates == 0:
            indices = step_indices(
                step // self.settings.updates, len(self.questions), self.train.global_batch_size, self.seed
            )
            with self._whole(self._model):
                rows = self._learned(self._answers(indices, step, rank, world_size), step)
            self._current = self._evaluated(rows)
        return self._current

    @contextmanager
    def _whole(self, model: Any) -> Iterator[None]:
        with whole(model) as self._policy:
            yield
        self._policy = None

    def _draws(self, answers: int, *step: int) -> torch.Tensor:
        """The numbers that decide a step's samples, (answers, max_new_tokens): the same for any number of processes."""
        generator = torch.Generator().manual_seed(hash((self.seed, *step)) % 2**63)
        return torch.rand(answers, self.settings.max_new_tokens, generator=generator, dtype=torch.float64)

    def _answers(self, indices: Sequence[int], step: int, rank: int, world_size: int) -> Asked:
        """This process's share of a step's questions, answered.

        With `--flat_groups resample` further questions are asked while groups with a signal are missing (DAPO, Yu et
        al. 2025, arXiv 2503.14476, sec. 3.2): as many as are missing in all processes, in at most `SAMPLING_ROUNDS`.
        """
        size, wanted = self.settings.group_size, len(indices)
        asked = Asked(size)
        further = self._further(indices, step)
        for number in range(SAMPLING_ROUNDS if further else 1):
            draws = self._draws(len(indices) * size, step, *([number] if number else []))
            mine = draws.view(len(indices), size, -1)[rank::world_size].flatten(0, 1)
            if questions := [self.questions[i] for i in indices[rank::world_size]]:
                self._ask(asked, questions, mine)
            found: Any = has_signal(asked.totals).sum().to(self._device)
            if self._fabric.world_size > 1:
                found = self._fabric.all_reduce(found, reduce_op="sum")
            self._missing = wanted - int(found)
            indices, further = further[: self._missing], further[self._missing :]
            if not indices:
                break
        return asked

    def _further(self, indices: Sequence[int], step: int) -> list[int]:
        """The other questions, in the order in which this step asks them if it needs more."""
        if self.settings.flat_groups != "resample":
            return []
        generator = torch.Generator().manual_seed(hash((self.seed, step, len(self.questions))) % 2**63)
        order = torch.randperm(len(self.questions), generator=generator).tolist()
        first = set(indices)
        return [i for i in order if i not in first]

    def _ask(self, asked: Asked, questions: Sequence[Question], draws: torch.Tensor) -> None:
        """Sample a group for each question and reward it."""
        began = time.perf_counter()
        repeated = [question for question in questions for _ in range(asked.group_size)]
        rollouts = self._sample_answers([question.prompt for question in repeated], draws, self._policy)
        asked.seconds += time.perf_counter() - began
        asked.given += self._judge(repeated, rollouts)
        asked.questions += questions
        asked.rollouts += rollouts

    def _judge(self, questions: Sequence[Question], rollouts: Sequence[Rollout]) -> list[dict[str, float]]:
        """The rewards of one answer to each question; the total is less the penalty where an answer did not end."""
        samples = [self._sample(question.row, rollout) for question, rollout in zip(questions, rollouts, strict=True)]
        return [
            {**found, "total": found["total"] - self.settings.missing_eos_penalty * sample.truncated}
            for found, sample in zip(self.rewards(samples), samples, strict=True)
        ]

    def _learned(self, asked: Asked, step: int) -> list[GroupBatch]:
        """Log what sampling found, and pack what can be learned from."""
        self._describe(step, asked)
        judged, others = self._judged(asked)
        limits = (self.train.row_tokens, self.settings.normalisation, self.settings.max_new_tokens)
        if judged:
            batches = pack_groups(judged, others, *limits)
        else:  # nothing to learn from: an answer that weighs nothing keeps the step, and its processes, together
            (rest,) = pack_groups([(asked.questions[0], [(asked.rollouts[0], 0.0)])], 0, *limits)
            batches = [replace(rest, weights=torch.zeros_like(rest.weights), units=others, units_per_token=0.0)]
        if not self.settings.beta:
            return batches
        return [replace(batch, reference=self._reference(batch.rows)) for batch in batches]

    def _sample_answers(self, prompts: Sequence[Sequence[int]], draws: torch.Tensor, policy: GPT) -> list[Rollout]:
        """An answer to each prompt, decided by draws of (prompts, max_new_tokens)."""
        settings = self.settings
        return generate(
            policy,
            prompts,
            max_new_tokens=settings.max_new_tokens,
            stop_ids=self.template.stop_ids,
            temperature=settings.temperature,
            top_k=settings.top_k,
            top_p=settings.top_p,
            draws=draws,
            batch_size=settings.sampling_batch,
        )

    def _greedy_answers(self, prompts: Sequence[Sequence[int]], policy: GPT) -> list[Rollout]:
        """The likeliest answer to each prompt, token by token."""
        settings = self.settings
        return generate(
            policy,
            prompts,
            max_new_tokens=settings.max_new_tokens,
            stop_ids=self.template.stop_ids,
            batch_size=settings.sampling_batch,
        )

    def _judged(self, asked: Asked) -> tuple[Judged, int]:
        return judged_groups(asked, self.settings)

    def _sample(self, row: Row, rollout: Rollout) -> Sample:
        text = text_of(rollout, self.template)
        return Sample(row, text, len(rollout.ids), not rollout.stopped, self.settings.max_new_tokens)

    def _evaluated(self, batches: list[GroupBatch]) -> list[GroupBatch]:
        """The rows with the old policy's log-probabilities, where there is more than one update on them."""
        if self.settings.updates == 1:
            return batches
        return [replace(batch, old=old.cpu()) for batch, old in zip(batches, self._outputs(batches), strict=True)]

    @torch.no_grad()
    def _outputs(self, batches: list[GroupBatch]) -> list[Any]:
        """The model's outputs for each row, as the updates compute them; processes go row by row together."""
        rounds = len(batches)
        if self._fabric.world_size > 1:  # sharded models gather their weights for each row
            gathered: Any = self._fabric.all_gather(torch.tensor(rounds, device=self._device))
            rounds = int(gathered.max())
        outputs = []
        for number in range(rounds):
            row = batches[min(number, len(batches) - 1)].rows.to(self._device)
            outputs.append(self._model(row, temperature=self.settings.temperature))
        return outputs[: len(batches)]

    @torch.no_grad()
    def _reference(self, rows: PackedBatch) -> torch.Tensor:
        """log pi_ref of a row's learned tokens, (N,)."""
        if self.frozen is not None:
            logprobs: torch.Tensor = self.frozen(rows.to(self._device), temperature=self.settings.temperature)
            return logprobs.cpu()
        with adapters_off(self._policy):
            return self._logprobs(rows)

    def _logprobs(self, rows: PackedBatch) -> torch.Tensor:
        logprobs: torch.Tensor = self._policy(rows.to(self._device), temperature=self.settings.temperature)
        return logprobs.cpu()

    def units(self, batch: GroupBatch) -> int:
        """Tokens, or answers, by `normalisation`."""
        return batch.units

    def loss(self, model: Any, batch: GroupBatch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The row's weighted sum over tokens of the clipped policy loss and the KL to the reference."""
        logprobs = model(batch.rows, temperature=self.settings.temperature)  # (N,)
        log_ratio, loss, told = self.policy_loss(logprobs, batch)
        if batch.reference is not None:
            kl = losses.k3(logprobs, batch.reference)  # (N,)
            told["kl"] = kl.detach().sum() * batch.units_per_token
            kl = kl * log_ratio.exp() if self.settings.kl_correction else kl
            loss = loss + self.settings.beta * (batch.weights * kl).sum()
        return loss, told

    def policy_loss(
        self, logprobs: torch.Tensor, batch: GroupBatch
    ) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
        """The clipped policy loss of a row, from its tokens' log-probabilities (N,).

        Returns:
            The tokens' log-ratios (N,), the weighted sum of their losses, and sums to log.
        """
        settings, rows = self.settings, batch.rows
        old = logprobs.detach() if batch.old is None else batch.old
        log_ratio = logprobs - old
        told = {"log_ratio": log_ratio.detach().abs(), "sampling_logp_diff": (old - batch.sampled).abs()}
        for name, values in told.items():
            self._largest[f"{name}_max"] = max(self._largest[f"{name}_max"], float(values.max()))
        if settings.sequence_ratio:
            log_ratio = losses.sequence_log_ratio(log_ratio, rows.owners, rows.completions)
        clip = (settings.clip_low, settings.clip_high)
        loss = losses.clipped_policy_loss(log_ratio, batch.advantages, *clip)  # (N,)
        told["clipped"] = losses.is_clipped(log_ratio.detach(), batch.advantages, *clip).float()
        means = {name: values.sum() * batch.units_per_token for name, values in told.items()}
        return log_ratio, (batch.weights * loss).sum(), means

    def step_metrics(self) -> dict[str, float]:
        """Numbers of the sampling, and the largest distances of a token from the old policy and from sampling."""
        return {**self._metrics, **self._largest}

    def _describe(self, step: int, asked: Asked) -> None:
        """Keep a step's numbers for the log, and three of its answers."""
        rollouts, given, totals, size = asked.rollouts, asked.given, asked.totals, asked.group_size
        rows = [question.row for question in asked.questions for _ in range(size)]
        count = len(rollouts)
        tokens = sum(len(rollout.ids) for rollout in rollouts)
        parts = self.rewards.means(given)
        compared = totals if size > 1 else totals.T  # one answer to each question is compared with the others' answers
        groups = {"no_signal": 1 - float(has_signal(compared).float().mean())}
        if self.settings.flat_groups == "resample":
            extra = len(asked.questions) * self._fabric.world_size / self.train.global_batch_size - 1
            groups |= {"resampled": extra, "missing_groups": self._missing}
            if self._missing and not self._metrics.get("missing_groups"):
                self._fabric.print(
                    f"step {step + 1}: only {self.train.global_batch_size - self._missing} of "
                    f"{self.train.global_batch_size} groups have answers with different rewards after "
                    f"{SAMPLING_ROUNDS} rounds of sampling (or all questions); the step uses these "
                    "(missing_groups in metrics.csv)"
                )
        self._metrics = {
            "reward": float(totals.mean()),
            "reward_std": float(compared.std(dim=1, correction=0).mean()),
            **parts,
            **groups,
            "answer_tokens": tokens / count,
            "truncated": sum(not rollout.stopped for rollout in rollouts) / count,
            # of the untruncated policy at the sampling temperature, by its own samples
            "entropy": -sum(sum(rollout.logprobs) for rollout in rollouts) / tokens,
            "sampled_per_second": tokens / asked.seconds * self._fabric.world_size,  # the mean over processes is logged
        }
        number = step + 1  # as in metrics.csv
        if self._log is not None and number % self.train.log_interval == 0:
            shown = list(zip(rows, rollouts, given, strict=True))[:SHOWN]
            self._log.write(
                number,
                [
                    {
                        "question": row["prompt"][-1]["content"],
                        "answer": self.template.decode(rollout.ids, skip_special_tokens=False),
                        **found,
                    }
                    for row, rollout, found in shown
                ],
            )

    @torch.no_grad()
    def validate(self, model: Any) -> dict[str, float]:
        """Mean reward of greedy answers to the validation questions; every process asks all of them."""
        with self._whole(model):
            rollouts = self._greedy_answers([question.prompt for question in self.validation], self._policy)
        return {"val_reward": statistics.fmean(self._worth(self.validation, rollouts))}

    def _worth(self, questions: Sequence[Question], rollouts: Sequence[Rollout]) -> list[float]:
        """The reward of one answer to each question."""
        return [found["total"] for found in self._judge(questions, rollouts)]

    @torch.no_grad()
    def report(self, model: Any) -> Report:
        """The mean reward of greedy and of sampled answers to the test questions, before and after; how far the policy
        is from the reference; and what the step must not break."""
        if not self.test:
            return Report()
        with self._whole(model):
            found = self._report()
        return found.add(self.drift.report(model) if self.drift is not None else Report())

    def _report(self) -> Report:
        prompts = [question.prompt for question in self.test]
        draws = self._draws(len(prompts), 0)  # the same before and after
        answers = {
            "reward": before_and_after(self._policy, partial(self._greedy_answers, prompts), self.frozen),
            "sampled_reward": before_and_after(
                self._policy, partial(self._sample_answers, prompts, draws), self.frozen
            ),
        }
        found = Report()
        is_share = self.rewards.is_share and not self.settings.missing_eos_penalty
        for name, (before, after) in answers.items():
            now = self._worth(self.test, after)
            if before is not None:
                was = self._worth(self.test, before)
                found.metrics.append(_mean_row(f"{name}_before", was, is_share))
                found.gain.append(compare("test", name, was, now).row())
            found.metrics.append(_mean_row(name, now, is_share))
        if self.frozen is not None or self._policy.has_adapters:
            found.metrics.append(_mean_row("kl_per_answer", self._distances(answers["sampled_reward"][1])))
        return found

    def _distances(self, rollouts: list[Rollout]) -> list[float]:
        """log pi - log pi_ref of sampled answers to the test questions, in nats; their mean is the KL."""
        trees = [Tree(question.prompt, [rollout.ids]) for question, rollout in zip(self.test, rollouts, strict=True)]
        found = [sum(rollout.logprobs) for rollout in rollouts]
        for indices, packed in pack(trees, self.train.row_tokens):
            reference = losses.per_completion(self._reference(packed), packed.owners, packed.completions)
            for i, value in zip(indices, reference.tolist(), strict=True):
                found[i] -= value
        return found


def _mean_row(name: str, values: list[float], is_share: bool = False) -> dict[str, Any]:
    if is_share:
        return share_metric(name, statistics.fmean(values), len(values))
    spread = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    return metric(name, statistics.fmean(values), stderr=spread, n=len(values), split="test")
