"""Held-out prompts, answered by the model as it was before a training step and as it is after it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from data_prep.rows import Row
from workflows.chat_spans import split_reasoning
from workflows.chat_template import ChatTemplate
from workflows.training.answers import Labelled
from workflows.training.model import GPT, adapters_off
from workflows.training.rollouts import Rollout, generate
from workflows.training.whole import whole

SHOWN = 3
"""Prompts that are answered to be read."""


@dataclass(frozen=True)
class HeldOut:
    """Pairs that a step is tested on; the prompts of the first are answered.

    Attributes:
        labelled: The pairs.
        template: The checkpoint's; needed where a prompt is answered.
        room: The most tokens of a prompt that is answered.
        max_new_tokens: The most tokens of an answer.
    """

    labelled: Sequence[Labelled] = ()
    template: ChatTemplate | None = None
    room: int = 0
    max_new_tokens: int = 64

    def answers(self, model: Any) -> list[dict[str, str]]:
        """The prompts, answered before and after."""
        chosen = [pair for pair in self.labelled if len(pair.tree.prompt) <= self.room][:SHOWN]
        if self.template is None or not chosen:
            return []
        prompts = [pair.tree.prompt for pair in chosen]
        limits: Any = {"max_new_tokens": self.max_new_tokens, "stop_ids": self.template.stop_ids}
        before, after = before_and_after(model, partial(generate, prompts=prompts, **limits))
        pairs = enumerate(chosen)
        return [answered(pair.row, before[i] if before else None, after[i], self.template) for i, pair in pairs]


def answered(row: Row, before: Rollout | None, after: Rollout, template: ChatTemplate) -> dict[str, str]:
    """A question with its answers and, where the row says so, the wanted one, as text."""
    found = {"question": row["prompt"][-1]["content"]}
    if before is not None:
        found["before"] = text_of(before, template)
    found["after"] = text_of(after, template)
    if wanted := right_answer(row):
        found["wanted"] = split_reasoning(wanted)[1] if template.removes_reasoning else wanted
    return found


def right_answer(row: Row) -> str:
    """The answer that a row of any shape holds to be right, or nothing."""
    turns = row.get("chosen") or row.get("messages") or (row.get("completion") if row.get("label") else None)
    if turns:
        return str(turns[-1]["content"])
    if "choices" in row:
        return str(row["choices"][row["answer"]])
    return str(row["answers"][0]) if row.get("answers") else ""


def text_of(rollout: Rollout, template: ChatTemplate) -> str:
    """An answer without the token that ended it."""
    return template.decode(rollout.ids[:-1] if rollout.ids[-1] in template.stop_ids else rollout.ids)


def before_and_after(
    model: Any, answer: Callable[[GPT], list[Rollout]], frozen: GPT | None = None
) -> tuple[list[Rollout] | None, list[Rollout]]:
    """What a model answers as it was before training and as it is.

    Args:
        model: A model, bare or as Fabric set it up.
        answer: Lets a policy answer some prompts.
        frozen: The model as it was; without it, it is the model without its adapters.

    Returns:
        One for each prompt, before and after; before is None where all weights were trained and no copy is kept.
    """
    with whole(model) as policy:
        after = answer(policy)
        if frozen is not None:
            return answer(frozen), after
        if not policy.has_adapters:
            return None, after
        with adapters_off(policy):
            return answer(policy), after
