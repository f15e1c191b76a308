"""What a preference or reward step must not break, measured before and after it on the same held-out rows.

A step's own measure can be perfect on a ruined model: the accuracy of pairs is 1 where both answers have become
unlikely and the chosen one less so. So every such step also reports the log-probability of right answers and the share
of greedy answers that are right, end, and repeat no phrase, and warns where one of them gets worse.

The model before training is measured when the run begins, and kept in `OUT_DIR/before.json`: with all weights trained
it does not exist any more at the end.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import lightning as L
import torch

from data_prep.normalisation import normalise
from data_prep.rows import Row
from workflows.chat_template import ChatTemplate
from workflows.checkpoint import metric, share_metric
from workflows.errors import UserError
from workflows.evaluation.compare import Comparison, compare
from workflows.files import read_json, write_json
from workflows.training.answer_rules import final_answer, token_f1
from workflows.training.answers import Labelled
from workflows.training.batch import Tree, pack
from workflows.training.held_out import SHOWN, answered, right_answer, right_turns, text_of
from workflows.training.loop import Report
from workflows.training.losses import per_completion
from workflows.training.model import GPT
from workflows.training.questions import Question
from workflows.training.rewards import BUILT_IN, Rewards, Sample
from workflows.training.rollouts import Rollout, generate
from workflows.training.step import model_identity
from workflows.training.whole import whole

WATCHED = 100
"""Maximum number of held-out rows."""
ASKED = 50
"""Maximum number of these that are answered greedily, which takes most of the time; a loss of six is noticed."""
LARGEST_FALL = 0.2
"""Largest fall of the right answers' log-probability without a warning, in nats a token: each token is then 18% less
likely on average. docs/alignment.md has the runs that the figure separates."""
RIGHT_F1 = 0.8
REPEATED = 12
"""Minimum number of tokens of a repeated phrase, all its repetitions together: "1000" and "---" repeat, too."""
LARGEST_P = 0.05

Item = TypeVar("Item")
Judge = Callable[[Row, str], bool | None]
"""Whether an answer to a row is right; None if the row does not say."""


@dataclass(frozen=True)
class Probe:
    """A held-out row that is measured.

    Attributes:
        row: The row.
        prompt: Its prompt's ids.
        right: The prompt with the row's right answer; None if it has none.
    """

    row: Row
    prompt: list[int]
    right: Tree | None


@dataclass(frozen=True)
class Measured:
    """What one model does with the probes.

    Attributes:
        logprobs: Log-probability of each right answer, the mean over its tokens, in nats.
        answers: Greedy answers to the prompts that leave room for one.
    """

    logprobs: list[float] = field(default_factory=list)
    answers: list[Rollout] = field(default_factory=list)


class DriftCheck:
    """Held-out rows, and the model before training on them."""

    def __init__(
        self,
        probes: Sequence[Probe],
        template: ChatTemplate,
        identity: dict[str, Any],
        *,
        max_new_tokens: int,
        max_seq_length: int,
        row_tokens: int,
        cure: str,
        judge: Judge | None = None,
        batch_size: int = 16,
    ) -> None:
        """Keep what is measured.

        Args:
            probes: The rows, from `probes_of_answers` or `probes_of_questions`; perhaps none.
            template: The checkpoint's.
            identity: What the model before training is made from.
            max_new_tokens: Maximum number of tokens of a greedy answer.
            max_seq_length: Maximum number of tokens of a prompt with its answer.
            row_tokens: Capacity of a packed row.
            cure: What to do where the model got worse, as a sentence.
            judge: Decides whether an answer is right; `says_right_answer` if None.
            batch_size: Number of answers that are generated side by side.
        """
        self.probes, self.template, self.identity, self.cure = probes, template, identity, cure
        self.max_new_tokens, self.row_tokens, self.batch_size = max_new_tokens, row_tokens, batch_size
        self.asked = _spread([probe for probe in probes if len(probe.prompt) + max_new_tokens <= max_seq_length], ASKED)
        self.judge = judge or says_right_answer
        self.before = Measured()

    def begin(self, fabric: L.Fabric, model: Any, out_dir: Path) -> None:
        """Measure the model before training, or read what an earlier start of the run measured.

        All processes must call it together.
        """
        if not self.probes:
            fabric.print("no test rows (test.jsonl, --max_test_rows): what this step breaks is not measured")
            return
        file, key = out_dir / "before.json", self._key()
        kept = fabric.broadcast(_read(file, key) if fabric.global_rank == 0 else None)
        if kept is None:
            kept = self._measure(model)
            if fabric.global_rank == 0:
                answers = [{"ids": answer.ids, "ended": answer.stopped} for answer in kept.answers]
                write_json(file, {"key": key, "logprobs": kept.logprobs, "answers": answers})
        self.before = kept

    def report(self, model: Any) -> Report:
        """Compare the trained model with the one before training; all processes must call it together."""
        if not self.probes:
            return Report()
        return self.compared(self._measure(model))

    def compared(self, after: Measured) -> Report:
        """The measures before and after, their paired differences, the first answers, and warnings."""
        found, before = Report(), self.before
        by_name: dict[str, Comparison] = {}
        if after.logprobs:
            by_name["chosen_logprob"] = compared = compare("test", "chosen_logprob", before.logprobs, after.logprobs)
            for name, mean, spread in (
                ("chosen_logprob_before", compared.base, compared.base_stderr),
                ("chosen_logprob", compared.tuned, compared.tuned_stderr),
            ):
                found.metrics.append(metric(name, mean, stderr=spread or None, n=compared.n, split="test"))
        right = zip(self._right(before), self._right(after), strict=True)
        judged = [(float(was), float(now)) for was, now in right if was is not None and now is not None]
        pairs = {"greedy_right": judged}
        asked = list(zip(before.answers, after.answers, strict=True))
        pairs["greedy_ended"] = [(float(was.stopped), float(now.stopped)) for was, now in asked]
        pairs["greedy_repeats"] = [(float(repeats(was.ids)), float(repeats(now.ids))) for was, now in asked]
        for name, scores in pairs.items():
            if not scores:
                continue
            was, now = (list(side) for side in zip(*scores, strict=True))
            by_name[name] = compared = compare("test", name, was, now)
            if name == "greedy_right":
                found.metrics.append(share_metric(f"{name}_before", compared.base, compared.n))
                found.metrics.append(share_metric(name, compared.tuned, compared.n))
        found.gain = [compared.row() for compared in by_name.values()]
        for probe, (earlier, later) in list(zip(self.asked, asked, strict=True))[:SHOWN]:
            found.shown.append(answered(probe.row, earlier, later, self.template))
        if worse := losses_of(by_name):
            found.warnings = [*worse, self.cure]
        return found

    def _right(self, measured: Measured) -> list[bool | None]:
        answers = zip(self.asked, measured.answers, strict=True)
        return [self.judge(probe.row, text_of(answer, self.template)) for probe, answer in answers]

    @torch.no_grad()
    def _measure(self, model: Any) -> Measured:
        trees = [probe.right for probe in self.probes if probe.right is not None]
        with whole(model) as policy:
            answers = generate(
                policy,
                [probe.prompt for probe in self.asked],
                max_new_tokens=self.max_new_tokens,
                stop_ids=self.template.stop_ids,
                batch_size=self.batch_size,
            )
            return Measured(mean_logprobs(policy, trees, self.row_tokens), answers)

    def _key(self) -> str:
        rights = [probe.right and [probe.right.completions, probe.right.loss_masks] for probe in self.probes]
        parts = [self.identity, self.max_new_tokens, [probe.prompt for probe in self.probes], rights, len(self.asked)]
        return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def mean_logprobs(policy: GPT, trees: Sequence[Tree], row_tokens: int) -> list[float]:
    """Log-probability of each tree's one completion, the mean over its learned tokens, in nats."""
    found = [0.0] * len(trees)
    device = policy.transformer.wte.weight.device
    was_training = policy.training
    policy.eval()
    for indices, row in pack(trees, row_tokens):
        logprobs, _ = policy.score(row.to(device))  # (N,)
        owners = row.owners.to(device)
        lengths = per_completion(torch.ones_like(logprobs), owners, row.completions)
        means = per_completion(logprobs, owners, row.completions) / lengths  # (completions,)
        for index, mean in zip(indices, means.tolist(), strict=True):
            found[index] = mean
    policy.train(was_training)
    return found


def probes_of_answers(labelled: Sequence[Labelled]) -> list[Probe]:
    """Rows of preferences to measure: those with a wanted answer, if there are any."""
    wanted = [answer for answer in labelled if answer.desirable[0]] or list(labelled)
    found = []
    different: dict[tuple[int, ...], Labelled] = {}
    for answer in wanted:
        different.setdefault(tuple(answer.tree.prompt), answer)
    for answer in _spread(list(different.values()), WATCHED):
        tree = answer.tree
        masks = tree.loss_masks and tree.loss_masks[:1]
        right = Tree(tree.prompt, tree.completions[:1], masks) if answer.desirable[0] else None
        found.append(Probe(answer.row, tree.prompt, right))
    return found


def probes_of_questions(questions: Sequence[Question], template: ChatTemplate, max_seq_length: int) -> list[Probe]:
    """Questions to measure, each with the answer that its row holds to be right, cut to the length that fits."""
    found = []
    different: dict[tuple[int, ...], Question] = {}
    for question in questions:
        different.setdefault(tuple(question.prompt), question)
    for question in _spread(list(different.values()), WATCHED):
        right = _right_tree(question.row, template, max_seq_length)
        found.append(Probe(question.row, question.prompt, right))
    return found


def _right_tree(row: Row, template: ChatTemplate, max_seq_length: int) -> Tree | None:
    """The prompt with the right answer; None if the row has none, or the template cannot write it."""
    if not (turns := right_turns(row)):
        return None
    try:
        chat = template.encode_chat([*row["prompt"], *turns], len(row["prompt"]), row.get("tools"))
    except UserError:  # such a question can be asked all the same; the number of rows is reported
        return None
    room = max(0, max_seq_length - len(chat.prompt))
    completion, mask = chat.completion[:room], chat.loss_mask[:room]
    return Tree(chat.prompt, [completion], [mask]) if any(mask) else None


def _spread(items: Sequence[Item], most: int) -> list[Item]:
    """At most so many of the items, evenly spaced."""
    count = min(most, len(items))
    return [items[i * len(items) // count] for i in range(count)]


def says_right_answer(row: Row, text: str) -> bool | None:
    """Return whether an answer says a right answer of its row; None if the row has none.

    The right ones are the row's "answers", else its chosen answer. An answer says one of them if it has its words in
    a row (a step may change the form of answers: "The medical term is Rib fusion."), or if the F1 of their words is at
    least `RIGHT_F1` (long answers). Case, punctuation, layout and reasoning do not count.
    """
    given = row.get("answers") or [right_answer(row)]
    wanted = [words for answer in given if (words := normalise(final_answer(str(answer))).split())]
    if not wanted:
        return None
    said = normalise(final_answer(text)).split()
    return any(f" {' '.join(words)} " in f" {' '.join(said)} " or token_f1(said, words) >= RIGHT_F1 for words in wanted)


def judge_of(rewards: Rewards) -> Judge | None:
    """The first reward of a step that says right or wrong by what the row holds; None if it has none of these."""
    for name in ("exact", "letter", "math_answer"):
        if name in rewards.functions:
            return lambda row, text: bool(BUILT_IN[name](Sample(row, text, 0, False, 0)))
    return None


def drift_of_questions(
    questions: Sequence[Question], template: ChatTemplate, rewards: Rewards, settings: dict[str, Any]
) -> DriftCheck:
    """The check of a step that samples answers.

    Args:
        questions: Its test questions; perhaps none.
        template: The checkpoint's.
        rewards: Its rewards.
        settings: Its arguments.
    """
    train = settings["train"]
    return DriftCheck(
        probes_of_questions(questions, template, train.max_seq_length),
        template,
        model_identity(settings),
        max_new_tokens=settings["max_new_tokens"],
        max_seq_length=train.max_seq_length,
        row_tokens=train.row_tokens,
        cure=(
            f"Use a lower --train.learning_rate (it was {train.learning_rate:g}), a larger --beta, fewer "
            "--train.max_steps, or rewards that what must stay counts in, too."
        ),
        judge=judge_of(rewards),
        batch_size=settings["sampling_batch"],
    )


def repeats(ids: Sequence[int]) -> bool:
    """Return whether a phrase is said at least three times in succession, in at least `REPEATED` tokens in all."""
    for period in range(1, len(ids) // 3 + 1):
        equal = 0
        for here, earlier in zip(ids[period:], ids, strict=False):
            equal = equal + 1 if here == earlier else 0
            if equal >= max(2 * period, REPEATED - period):
                return True
    return False


def losses_of(compared: dict[str, Comparison]) -> list[str]:
    """What got worse by more than chance, a sentence each; see the constants for the limits."""
    found = []
    chosen = compared.get("chosen_logprob")
    if chosen and not chosen.difference >= -LARGEST_FALL and not chosen.high >= 0:  # not a number is a fall, too
        found.append(
            f"The log-probability of right answers fell by {-chosen.difference:.2f} nats a token (95% interval "
            f"{-chosen.high:.2f} to {-chosen.low:.2f}), from {chosen.base:.2f} to {chosen.tuned:.2f}; "
            f"{LARGEST_FALL} is the limit; {chosen.n} held-out rows."
        )
    for name, what, verb in (
        ("greedy_right", "Greedy answers that are right", "fell"),
        ("greedy_ended", "Greedy answers that end before the limit on new tokens", "fell"),
        ("greedy_repeats", "Greedy answers that repeat a phrase", "rose"),
    ):
        share = compared.get(name)
        sign = -1 if verb == "fell" else 1
        if share and min(sign * share.low, sign * share.high) > 0 and share.p_value < LARGEST_P:
            found.append(
                f"{what} {verb} from {100 * share.base:.0f}% to {100 * share.tuned:.0f}%: "
                f"{100 * share.difference:+.0f} points (95% interval {100 * share.low:+.0f} to "
                f"{100 * share.high:+.0f}; {share.n} held-out rows)."
            )
    return found


def _read(file: Path, key: str) -> Measured | None:
    """What an earlier start of the run measured, if it is there, whole, and of this key."""
    if not file.is_file():
        return None
    try:
        kept = read_json(file)
        if kept["key"] != key:
            return None
        answers = [Rollout(list(map(int, answer["ids"])), [], bool(answer["ended"])) for answer in kept["answers"]]
        return Measured([float(value) for value in kept["logprobs"]], answers)
    except (UserError, KeyError, TypeError, ValueError):  # damaged: measured again
        return None
