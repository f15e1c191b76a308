"""The objective of GRPO: groups of answers sampled from the policy itself, of which the better ones become likelier.

A step samples G answers to each of its prompts, rewards them, and takes one or several updates on them. A group is one
tree: its prompt is computed once, in sampling as in training. Log-probabilities are those of the untruncated policy at
the sampling temperature, on both sides of every ratio; the old ones are those that sampling recorded.
"""

import math
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch

from data_prep.rows import Row
from workflows.chat_template import ChatTemplate
from workflows.checkpoint import metric
from workflows.evaluation.compare import compare
from workflows.training import losses
from workflows.training.answer_log import AnswerLog
from workflows.training.batch import PackedBatch, Tree, pack
from workflows.training.group_settings import GroupSettings
from workflows.training.held_out import SHOWN, answered, before_and_after, text_of
from workflows.training.loop import Objective, Report, TrainArgs, step_indices
from workflows.training.model import GPT, adapters_off
from workflows.training.questions import Question
from workflows.training.rewards import Rewards, Sample
from workflows.training.rollouts import Rollout, generate
from workflows.training.whole import whole


@dataclass(frozen=True)
class GroupBatch:
    """A packed row of groups. N learned tokens.

    Attributes:
        rows: The row.
        old: log pi_old of its learned tokens as sampling recorded them, shape (N,).
        advantages: Of each token's answer, shape (N,).
        weights: What each token counts, before the step's sum is divided by its units, shape (N,).
        units: The row's units.
        reference: log pi_ref of the tokens, shape (N,), or None where no KL is asked for.
    """

    rows: PackedBatch
    old: torch.Tensor
    advantages: torch.Tensor
    weights: torch.Tensor
    units: int
    reference: torch.Tensor | None

    @property
    def real_tokens(self) -> int:
        """Tokens of the samples, a prompt counted for each of its answers."""
        return self.rows.real_tokens

    def to(self, device: torch.device) -> "GroupBatch":
        """The same batch on a device."""
        moved: dict[str, Any] = {
            k: v.to(device) if isinstance(v, torch.Tensor | PackedBatch) else v for k, v in vars(self).items()
        }
        return type(self)(**moved)


Judged = list[tuple[Question, list[tuple[Rollout, float]]]]
"""Questions with answers to learn from, each with its advantage."""


class GRPO(Objective):
    """Group-relative policy optimisation (Shao et al. 2024, arXiv 2402.03300) and its later variants."""

    may_rest = True
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
        """
        self.questions, self.validation, self.test = train_questions, validation_questions, test_questions
        self.template, self.rewards = template, rewards
        self.train, self.seed, self.settings, self.frozen = train, seed, settings, frozen
        self.epoch_rows, self.updates = len(train_questions), settings.updates
        self._current: list[GroupBatch] = []
        self._metrics: dict[str, float] = {}
        self._largest = 0.0

    def begin(self, fabric: L.Fabric, model: Any, out_dir: Path) -> None:
        """Keep the model: a step samples from it."""
        self._fabric, self._model, self._device = fabric, model, fabric.device
        self._policy: Any = None  # all of the model in this process, while answers are sampled and scored
        self._log = AnswerLog(out_dir / "completions.jsonl") if fabric.global_rank == 0 else None

    def may_pause(self, steps: int) -> bool:
        """Between updates on the same answers a run may not: checkpoints do not keep them."""
        return steps % self.settings.updates == 0

    def batches(self, step: int, rank: int, world_size: int) -> list[GroupBatch]:
        """The rows of one step: sampled anew where the updates on the last ones are done."""
        self._largest = 0.0
        if step % self.settings.updates == 0:
            indices = step_indices(
                step // self.settings.updates, len(self.questions), self.train.global_batch_size, self.seed
            )
            draws = self._draws(len(indices) * self.settings.group_size, step)
            mine = draws.view(len(indices), self.settings.group_size, -1)[rank::world_size].flatten(0, 1)
            with self._whole(self._model):
                self._current = self._sampled([self.questions[i] for i in indices[rank::world_size]], step, mine)
        return self._current

    @contextmanager
    def _whole(self, model: Any) -> Iterator[None]:
        with whole(model) as self._policy:
            yield
        self._policy = None

    def _draws(self, answers: int, step: int) -> torch.Tensor:
        """The numbers that decide a step's samples, (answers, max_new_tokens): the same for any number of processes."""
        generator = torch.Generator().manual_seed(hash((self.seed, step)) % 2**63)
        return torch.rand(answers, self.settings.max_new_tokens, generator=generator, dtype=torch.float64)

    def _sampled(self, questions: Sequence[Question], step: int, draws: torch.Tensor) -> list[GroupBatch]:
        """Sample a group for each question, reward it, and pack what can be learned from."""
        size = self.settings.group_size
        began = time.perf_counter()
        prompts = [question.prompt for question in questions for _ in range(size)]
        rollouts = self._sample_answers(prompts, draws, self._policy)
        seconds = time.perf_counter() - began
        rows = [question.row for question in questions for _ in range(size)]
        given = self.rewards([self._sample(row, rollout) for row, rollout in zip(rows, rollouts, strict=True)])
        totals = torch.tensor([found["total"] for found in given]).view(-1, size)  # (questions, G)
        self._describe(step, rollouts, given, totals, rows, seconds)
        if judged := self._judged(questions, rollouts, totals):
            return self._packed(judged)
        # Nothing to learn from: an answer that weighs nothing keeps the step, and its processes, together.
        rest = self._packed([(questions[0], [(rollouts[0], 0.0)])])
        return [replace(batch, weights=torch.zeros_like(batch.weights), units=0) for batch in rest]

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

    def _judged(self, questions: Sequence[Question], rollouts: list[Rollout], totals: torch.Tensor) -> Judged:
        """Questions with their answers and these answers' advantages; groups without signal are left out.

        Args:
            questions: What was asked.
            rollouts: Group by group.
            totals: Their rewards, (questions, G).
        """
        size = totals.size(1)
        advantages = losses.group_advantages(totals, self.settings.scale)
        signal = _signal(totals).tolist()
        groups: Judged = []
        for g, question in enumerate(questions):
            answers = zip(rollouts[g * size : (g + 1) * size], advantages[g].tolist(), strict=True)
            learned = [(rollout, advantage) for rollout, advantage in answers if self._learns(rollout)]
            if signal[g] and learned:
                groups.append((question, learned))
        return groups

    def _learns(self, rollout: Rollout) -> bool:
        return rollout.stopped or not self.settings.mask_truncated

    def _sample(self, row: Row, rollout: Rollout) -> Sample:
        text = text_of(rollout, self.template)
        return Sample(row, text, len(rollout.ids), not rollout.stopped, self.settings.max_new_tokens)

    def _packed(self, groups: Judged) -> list[GroupBatch]:
        """Pack questions with answers and advantages into rows; of a large group some answers to a tree."""
        settings = self.settings
        groups = [part for group in groups for part in _parts(*group, self.train.row_tokens)]
        trees = [Tree(question.prompt, [rollout.ids for rollout, _ in answers]) for question, answers in groups]
        batches = []
        for row, packed in pack(trees, self.train.row_tokens):
            answers = [answer for i in row for answer in groups[i][1]]
            lengths = torch.tensor([len(rollout.ids) for rollout, _ in answers])
            weights, units = losses.token_weights(lengths, settings.normalisation, settings.max_new_tokens)
            batches.append(
                GroupBatch(
                    rows=packed,
                    old=torch.tensor([logprob for rollout, _ in answers for logprob in rollout.logprobs]),
                    advantages=torch.tensor([advantage for _, advantage in answers])[packed.owners],
                    weights=weights[packed.owners],
                    units=units,
                    reference=self._reference(packed) if settings.beta else None,
                )
            )
        return batches

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
        loss, told = self.policy_loss(logprobs, batch)
        if batch.reference is not None:
            kl = losses.k3(logprobs, batch.reference)
            loss = loss + self.settings.beta * (batch.weights * kl).sum()
        return loss, told

    def policy_loss(self, logprobs: torch.Tensor, batch: GroupBatch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The weighted sum over a row's tokens of the clipped policy loss, from their log-probabilities (N,)."""
        settings, rows = self.settings, batch.rows
        log_ratio = logprobs - batch.old
        gap = log_ratio.detach().abs()
        self._largest = max(self._largest, float(gap.max()))
        if settings.sequence_ratio:
            log_ratio = losses.sequence_log_ratio(log_ratio, rows.owners, rows.completions)
        clip = (settings.clip_low, settings.clip_high)
        loss = losses.clipped_policy_loss(log_ratio, batch.advantages, *clip)  # (N,)
        share = batch.units / len(logprobs)  # what is a mean over tokens is logged as one
        told = {
            "clipped": losses.is_clipped(log_ratio.detach(), batch.advantages, *clip).float().sum() * share,
            "log_ratio": gap.sum() * share,
        }
        if batch.reference is not None:
            told["kl"] = losses.k3(logprobs.detach(), batch.reference).sum() * share
        return (batch.weights * loss).sum(), told

    def step_metrics(self) -> dict[str, float]:
        """What sampling found, and the largest log-ratio of a token to what sampling recorded."""
        return {**self._metrics, "log_ratio_max": self._largest}

    def _describe(
        self,
        step: int,
        rollouts: list[Rollout],
        given: list[dict[str, float]],
        totals: torch.Tensor,
        rows: list[Row],
        seconds: float,
    ) -> None:
        """Keep a step's numbers for the log, and three of its answers."""
        count = len(rollouts)
        tokens = sum(len(rollout.ids) for rollout in rollouts)
        parts = {f"reward_{name}": sum(found[name] for found in given) / count for name in given[0] if name != "total"}
        groups = {"no_signal": 1 - float(_signal(totals).float().mean())} if totals.size(1) > 1 else {}
        self._metrics = {
            "reward": float(totals.mean()),
            "reward_std": float((totals if groups else totals.T).std(dim=1, correction=0).mean()),
            **parts,
            **groups,
            "answer_tokens": tokens / count,
            "truncated": sum(not rollout.stopped for rollout in rollouts) / count,
            # of the untruncated policy at the sampling temperature, by its own samples
            "entropy": -sum(sum(rollout.logprobs) for rollout in rollouts) / tokens,
            "sampled_per_second": tokens / seconds * self._fabric.world_size,  # the mean over processes is logged
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
        samples = [self._sample(question.row, rollout) for question, rollout in zip(questions, rollouts, strict=True)]
        return [found["total"] for found in self.rewards(samples)]

    @torch.no_grad()
    def report(self, model: Any) -> Report:
        """The mean reward of greedy and of sampled answers to the test questions, before and after; how far the policy
        is from the reference; and the first greedy answers."""
        if not self.test:
            return Report()
        with self._whole(model):
            return self._report()

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
        for name, (before, after) in answers.items():
            now = self._worth(self.test, after)
            if before is not None:
                was = self._worth(self.test, before)
                found.metrics.append(_mean_row(f"{name}_before", was))
                found.gain.append(compare("test", name, was, now).row())
            found.metrics.append(_mean_row(name, now))
        if self.frozen is not None or self._policy.has_adapters:
            found.metrics.append(_mean_row("kl_per_answer", self._distances(answers["sampled_reward"][1])))
        before, after = answers["reward"]
        for i, question in enumerate(self.test[:SHOWN]):
            found.shown.append(answered(question.row, before[i] if before else None, after[i], self.template))
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


def _parts(question: Question, answers: list[tuple[Rollout, float]], room: int) -> Judged:
    """A group's answers in parts that fit, each with the prompt, into so many tokens (one answer may exceed them)."""
    parts: Judged = []
    used = 0
    for answer in answers:
        length = len(answer[0].ids)
        if not parts or used + length > room:
            parts.append((question, []))
            used = len(question.prompt)
        parts[-1][1].append(answer)
        used += length
    return parts


def _mean_row(name: str, values: list[float]) -> dict[str, Any]:
    spread = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    return metric(name, statistics.fmean(values), stderr=spread, n=len(values), split="test")


def _signal(totals: torch.Tensor) -> torch.Tensor:
    """Whether a group's rewards differ, (groups,), from rewards (groups, G)."""
    return totals.amax(dim=1) > totals.amin(dim=1)
