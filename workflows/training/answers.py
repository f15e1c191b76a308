"""Rows of preferences as trees: prompts with answers, each known to be wanted or not."""

from collections import Counter
from dataclasses import dataclass

from data_prep.rows import Row
from workflows.chat_spans import concerns_prompt
from workflows.chat_template import ChatTemplate
from workflows.errors import UserError
from workflows.training.batch import Tree

SIDES = {"chosen": True, "rejected": False}


@dataclass(frozen=True)
class Labelled:
    """A prompt with answers, and whether each is a wanted one; a pair has the chosen answer first."""

    tree: Tree
    desirable: list[bool]
    row: Row


def encode_answers(
    rows: list[Row], template: ChatTemplate, max_seq_length: int, name: str
) -> tuple[list[Labelled], str]:
    """Encode preference or labelled rows.

    An answer that does not fit loses its end, which is counted. A row is dropped, and counted, whose prompt leaves no
    room, or whose two answers are the same as far as they fit.

    Args:
        rows: `preference` rows, or `labelled` ones.
        template: The checkpoint's.
        max_seq_length: The most tokens of a prompt with one of its answers.
        name: What the rows are, for messages.

    Returns:
        The trees in the order of their rows, and what became of the rows, in words.

    Raises:
        UserError: If the template refuses a conversation, or no row is left.
    """
    answers: list[Labelled] = []
    dropped: Counter[str] = Counter()
    notes: Counter[str] = Counter()
    truncated, lost_by_length = 0, False
    for number, row in enumerate(rows, start=1):
        sides = [(row["completion"], row["label"])] if "label" in row else [(row[k], v) for k, v in SIDES.items()]
        try:
            chats = [
                template.encode_chat([*row["prompt"], *turns], len(row["prompt"]), row.get("tools"))
                for turns, _ in sides
            ]
        except UserError as e:
            raise UserError(f"{name}, row {number} ({row['prompt'][0]['content'][:60]!r}): {e}") from None
        prompt = chats[0].prompt
        room = max(0, max_seq_length - len(prompt))
        completions = [chat.completion[:room] for chat in chats]
        masks = [chat.loss_mask[:room] for chat in chats]
        is_cut = any(len(chat.completion) > room for chat in chats)
        reason = ""
        if any(chat.prompt != prompt for chat in chats):
            reason = "the answers do not follow the same prompt"
        elif room == 0:
            reason = f"the prompt alone fills {max_seq_length} tokens"
        elif not all(map(any, masks)):
            reason = "nothing to learn from is left of an answer"
        elif len(completions) == 2 and completions[0] == completions[1]:
            reason = "chosen and rejected answer are the same after truncation"
        if reason:
            dropped[reason] += 1
            lost_by_length |= is_cut
            continue
        truncated += sum(len(chat.completion) > room for chat in chats)
        notes.update(chats[0].notes)
        notes.update(note for chat in chats[1:] for note in chat.notes if not concerns_prompt(note))
        answers.append(Labelled(Tree(prompt, completions, masks), [label for _, label in sides], row))
    told = f"{name}: {len(answers):,} of {len(rows):,} rows; {truncated:,} answers truncated"
    told += "".join(f"\n  {count:,} dropped: {reason}" for reason, count in dropped.items())
    told += "".join(f"\n  {count:,} {note}" for note, count in notes.items())
    if not answers:
        cure = "Raise --train.max_seq_length." if lost_by_length else "Correct the rows for the reasons above."
        raise UserError(f"No row is left to use. {told}\n{cure}")
    return answers, told
