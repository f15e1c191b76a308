"""Forms in which people write rows, and what each becomes: one record a form (`FORMATS`), in order of precedence."""

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from data_prep.fields import CHOICES, CHOSEN, COMPLETIONS, CONVERSATIONS, LABELS, PROMPTS, Fields
from data_prep.readers import (
    ANSWERED,
    DOCUMENTS,
    SUMMARIES,
    read_conversation,
    read_labelled,
    read_labelled_conversation,
    read_options,
    read_pair,
    read_preference,
    read_spans,
    read_summary,
    read_translation,
    read_verifiable,
)
from data_prep.rows import SHAPES, Row, row_problem, type_name

Shape = Literal["messages", "preference", "labelled", "scoring", "verifiable", "translated", "summarised", "spans"]
_RENDERED = re.compile(
    r"<\|(?:im_start|im_end|start_header_id|eot_id|user|assistant)\|>|<(?:start|end)_of_turn>|\[/?INST\]|"
    r"### (?:Instruction|Response):"
)
"""What chat templates write; a text that has it was probably rendered before."""
_ASKED, _SAID = (*PROMPTS, "user"), (*COMPLETIONS, "assistant")
"""Names of a question and its answer; "user" and "assistant" are so where there is no other."""


@dataclass(frozen=True)
class Format:
    """A form of rows.

    Attributes:
        name: What it is called in reports.
        shape: What it becomes (a key of `data_prep.rows.SHAPES`).
        needs: Groups of names, of each of which a row has at least one.
        read: Reads a row.
        example: A row, for messages.
        when: What else must hold of a row's fields, by their names in lower case, for a file to have this form.
        whole: Whether `read` returns a row of the shape; others are checked, or left out and counted, by their module.
    """

    name: str
    shape: Shape
    needs: tuple[tuple[str, ...], ...]
    read: Callable[[Fields], Row]
    example: str
    when: Callable[[dict[str, Any]], bool] = lambda values: True
    whole: bool = True

    def fits(self, fields: Fields, shape: Shape | None) -> bool:
        """Return whether a row of a file of the given shape (None: not known yet) has the fields of this form."""
        if shape not in (None, self.shape) or not all(any(name in fields for name in names) for names in self.needs):
            return False
        return shape is not None or self.when(fields.plain())


@dataclass
class Intake:
    """Rows as they are read, and what became of their fields.

    Attributes:
        shape: The shape of all rows; None takes that of the first row whose form is known.
        ignored: Names of fields that are left out knowingly.
        forms: Numbers of rows by form.
        notes: Numbers of what was read as something else or left out, by what it was.
        unused: Numbers of rows and messages by the name of a field that is not used.
    """

    shape: Shape | None = None
    ignored: frozenset[str] = frozenset()
    forms: Counter[str] = field(default_factory=Counter)
    notes: Counter[str] = field(default_factory=Counter)
    unused: Counter[str] = field(default_factory=Counter)

    def read(self, raw: Any) -> Row:
        """Bring a row into its shape.

        Raises:
            ValueError: If it has no known form, or one of another shape; the message says what is wrong.
        """
        if not isinstance(raw, dict):
            raise ValueError(f"it is {type_name(raw)}, not an object")
        fields = Fields(raw, self.ignored)
        found = next((f for f in FORMATS if f.fits(fields, self.shape)), None)
        if found is None:
            raise ValueError(_unknown(fields, self.shape))
        self.shape = found.shape
        row = {**found.read(fields), **_identity(fields)}
        fields.finish()
        if _RENDERED.search(str(row)):
            fields.notes.append("rows with the marks of a chat template in their texts, which are kept as they are")
        if found.whole and (problem := row_problem(row, found.shape)):
            raise ValueError(problem)
        names = (next(iter(fields.filled(*group)), group[0]) for group in found.needs)
        self.forms[f"{found.name}: {', '.join(names)}"] += 1
        self.notes.update(fields.notes)
        self.unused.update(set(fields.unused))
        return row

    def accepted(self) -> str:
        """The forms that a row may have, in words."""
        examples = [f.example for f in FORMATS if f.shape == (self.shape or "messages")]
        return f"{examples[0]}" if len(examples) == 1 else f"one of {', '.join(examples)}"

    def read_as(self) -> str:
        """The shape, and the forms with their numbers."""
        forms = "; ".join(f"{count:,} {name}" for name, count in self.forms.most_common())
        return f"{self.shape} ({forms})"


def _identity(fields: Fields) -> Row:
    plain = fields.plain()
    found = {name: plain[name] for name in ("kind", "id") if isinstance(plain.get(name), str | int)}
    if "kind" in found:
        found["kind"] = str(found["kind"])  # kinds are named on the command line
    return found


def _unknown(fields: Fields, shape: Shape | None) -> str:
    """Return why no form fits a row."""
    if not fields.plain() and not fields.nulls:
        return "it is an empty object"
    if other := next((f for f in FORMATS if f.fits(fields, None)), None):
        return f"it is one of {other.name} ({other.shape}), not of the shape {shape}"
    for names, reason in _REFUSED:
        if shape in (None, "messages") and all(name in fields for name in names):
            return reason
    nulls = f"; null: {', '.join(map(repr, fields.nulls))}" if fields.nulls else ""
    if not fields.names:
        return f"it has no field with a value{nulls}"
    return f"it has the fields {', '.join(map(repr, fields.names.values()))}, which match no known form{nulls}"


FORMATS = (
    Format("pairs of answers", "preference", (("chosen",), ("rejected",)), read_preference,
           '{"prompt": TEXT or [...], "chosen": TEXT or [...], "rejected": TEXT or [...]}'),
    Format("conversations with a label", "labelled", (CONVERSATIONS, LABELS), read_labelled_conversation,
           '{"messages": [...], "label": true}'),
    Format("conversations", "messages", (CONVERSATIONS,), read_conversation, '{"messages": [...]}'),
    Format("questions about a context", "spans", (("question",), ("context",), ("answers",)), read_spans,
           SHAPES["spans"], lambda values: isinstance(values["answers"], dict), whole=False),
    Format("questions with options", "scoring", (_ASKED, CHOICES, CHOSEN), read_options,
           '{"prompt": TEXT, "choices": [TEXT, ...], "answer": INDEX}'),
    Format("labelled answers", "labelled", (_ASKED, _SAID, LABELS), read_labelled,
           '{"prompt": TEXT, "completion": TEXT, "label": true}'),
    Format("questions with answers", "messages", (_ASKED, _SAID), read_pair,
           '{"prompt": ..., "completion": ...}, {"instruction": ..., "output": ...}, {"question": ..., "answer": ...}'),
    Format("questions with what counts as right", "verifiable", (_ASKED, ANSWERED), read_verifiable,
           '{"prompt": TEXT, "answers": [TEXT, ...]}'),
    Format("translations", "translated", (("source",), ("target",)), read_translation, SHAPES["translated"],
           lambda values: isinstance(values["source"], str) and isinstance(values["target"], str), whole=False),
    Format("documents with summaries", "summarised", (DOCUMENTS, SUMMARIES), read_summary,
           '{"document": TEXT, "summary": TEXT}, {"sentences": [TEXT, ...], "summaries": [TEXT, ...]}', whole=False),
)  # fmt: skip
"""All forms; a row that several fit has the first one's."""

_REFUSED = (
    (("text", "label"), 'it is a text with a label; --data jsonl reads no classification data'),
    (("tokens", "tags"), "it is a sentence with tags; write a word and its tag a line and give --data iob"),
    (("chosen",), 'it has "chosen" without "rejected"'),
    (("rejected",), 'it has "rejected" without "chosen"'),
    (("preferred_output", "non_preferred_output"), 'it is a preference in OpenAI\'s form; write {"prompt": [...], '
                                                   '"chosen": [...], "rejected": [...]}'),
    (("reward_model",), 'it has its right answer in "reward_model"; write it as "answers": [TEXT]'),
    (("prompt", "label"), 'it has a "label" without an answer; if it is what counts as right, call it "answers"'),
    (("contents",), 'it is a conversation in Gemini\'s form; write "messages" of {"role": ..., "content": TEXT}'),
    (("paragraphs",), 'it is an article in SQuAD\'s nested form; write a row for each question: ' + SHAPES["spans"]),
    (("translation",), 'it is a "translation" by language; write {"source": TEXT, "target": TEXT}'),
    (("text",), 'it has only a "text": continued pretraining on raw text is not available; give a question with an '
                'answer, or a "summary" of the text'),
)  # fmt: skip
"""Fields of rows that are known and cannot be read, and why."""
