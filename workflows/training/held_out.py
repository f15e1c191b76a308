"""Held-out prompts, answered by the model as it was before a training step and as it is after it."""

from collections.abc import Callable
from typing import Any

from data_prep.rows import Row
from workflows.chat_spans import split_reasoning
from workflows.chat_template import ChatTemplate
from workflows.training.model import GPT, adapters_off
from workflows.training.rollouts import Rollout
from workflows.training.whole import whole

SHOWN = 3
"""Prompts that are answered to be read."""


def answered(row: Row, before: Rollout | None, after: Rollout, template: ChatTemplate) -> dict[str, str]:
    """A question with its answers and, where the row says so, the wanted one, as text."""
    found = {"question": row["prompt"][-1]["content"]}
    if before is not None:
        found["before"] = text_of(before, template)
    found["after"] = text_of(after, template)
    if wanted := right_answer(row):
        found["wanted"] = split_reasoning(wanted)[1] if template.removes_reasoning else wanted
    return found


def right_turns(row: Row) -> list[dict[str, Any]]:
    """The right answer of a row of any shape as turns of a conversation; none if the row has no right answer."""
    for name in ("chosen", "messages", "completion"):
        turns = row.get(name)
        if name == "completion" and not row.get("label"):
            continue
        # a step that needs only prompts has not checked the rest of its rows
        if isinstance(turns, list) and turns and all(isinstance(turn, dict) and turn.get("role") for turn in turns):
            return turns[-1:] if name == "messages" else turns
    text = str(row["choices"][row["answer"]]) if "choices" in row else str((row.get("answers") or [""])[0])
    return [{"role": "assistant", "content": text}] if text else []


def right_answer(row: Row) -> str:
    """The text of the answer that a row of any shape holds to be right, or nothing."""
    turns = right_turns(row)
    return str(turns[-1].get("content") or "") if turns else ""


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
