"""The fields of a row of the user's file: which are read, which are harmless, and which must not be dropped.

A field that changes what a row means is read or refused, by name. A harmless one (an id, a source) is left out. Any
other is left out too, counted and reported, for nobody knows what its author meant by it.
"""

import re
from typing import Any

from data_prep.rows import type_name

PROMPTS = ("prompt", "instruction", "question", "query", "problem", "input")
"""Names of a question in common use; beside "instruction", an "input" is appended to it as in Alpaca."""
COMPLETIONS = ("completion", "response", "output", "solution", "answer")
"""Names of its answer; an "answer" beside a "solution" is the solution's result."""
CONVERSATIONS = ("messages", "conversations", "conversation")
SYSTEMS = ("system", "system_prompt", "system_message")
CONTEXTS = ("context", "contexts", "passage", "passages", "paragraph", "document", "documents", "article")
"""Names of a text that a question is about; it goes before the question."""
REASONING = (
    "reasoning_content", "reasoning", "thinking", "thoughts", "thought", "cot", "complex_cot", "chain_of_thought"
)  # fmt: skip
LABELS = ("label", "kto_tag")
REFERENCES = ("answers", "final_answer", "expected_answer", "ground_truth")
"""Names of what counts as right, for rewards (`data_prep.answers.answers_of`)."""
CHOICES = ("choices", "options")
CHOSEN = ("answer", "answer_key")
"""Names of the right one of the choices."""
TOOLS = ("tools", "functions")
FLAGS = (
    "weight", "train", "loss", "learn", "trainable", "training", "loss_mask", "loss_weight", "loss_scale",
    "train_detail", "train_on_turn",
)  # fmt: skip
"""Names of a flag that says whether something is learned."""
_FLAG_WORDS = frozenset({
    "train", "trained", "trainable", "training", "loss", "losses", "learn", "learned", "learnable", "mask", "masked",
    "masks", "weight", "weights", "supervised", "ignore", "ignored",
})  # fmt: skip
"""Words in other names of such a flag; nobody knows which of its values says yes."""
VERDICTS = frozenset({
    "correct", "is_correct", "good", "is_good", "desirable", "is_desirable", "accepted", "is_accepted", "thumbs_up",
    "upvoted",
})  # fmt: skip
"""Names of a flag that says whether an answer is good, besides `LABELS`."""
MEDIA = ("image", "images", "audio", "audios", "video", "videos", "pixel_values", "files")

HARMLESS = frozenset({
    "id", "ids", "idx", "index", "uuid", "uid", "row_id", "prompt_id", "question_id", "message_id", "conversation_id",
    "chat_id", "thread_id", "example_id", "sample_id", "hash", "sha", "md5", "version", "split", "kind", "type",
    "source", "sources", "dataset", "data_source", "origin", "url", "link", "title", "author", "license", "licence",
    "category", "categories", "subcategory", "topic", "topics", "subject", "domain", "task", "task_type", "task_name",
    "tag", "tags", "lang", "language", "difficulty", "level", "model", "model_name", "generator", "metadata", "meta",
    "date", "time", "timestamp", "created", "created_at", "updated_at", "tokens", "token_count", "num_tokens",
    "n_tokens", "length", "n_turns", "num_turns",
})  # fmt: skip
"""Fields about a row, or a message, which say nothing to the model."""

_MEANINGFUL = {
    **dict.fromkeys((*CONVERSATIONS, *PROMPTS, *COMPLETIONS), "a question, an answer or a conversation"),
    **dict.fromkeys((*SYSTEMS, "history", *CONTEXTS), "part of what the model is shown"),
    **dict.fromkeys(REASONING, "the answer's reasoning, which belongs in the answer's message"),
    **dict.fromkeys(LABELS, "whether an answer is good"),
    **dict.fromkeys(
        (
            "chosen",
            "rejected",
            "chosen_response",
            "rejected_response",
            "chosen_messages",
            "rejected_messages",
            "preferred_output",
            "non_preferred_output",
        ),
        "a preference",
    ),
    **dict.fromkeys((*REFERENCES, *CHOICES, "answer_key"), "what counts as right"),
    **dict.fromkeys((*TOOLS, "tool_calls", "function_call"), "tools and their calls"),
    **dict.fromkeys((*FLAGS, "mask", "mask_history"), "what is learned"),
    **dict.fromkeys(MEDIA, "images, sound or files, which a language model is not shown"),
}
"""Fields that change what a row means, and what they say."""
_KNOWN = {name.replace("_", ""): name for name in (*HARMLESS, *_MEANINGFUL, *VERDICTS)}
_SEPARATORS = re.compile(r"[\s_-]+")
_WORD = re.compile(r"[A-Z]?[a-z]+|[A-Z]+")
_NAMELESS = "(a column without a name)"


class Fields:
    """The fields of a row or a message, each of which is taken once.

    Args:
        raw: The row.
        ignored: Names of fields that the user leaves out knowingly.
        place: Goes before the names of fields that are not used, such as "messages".

    Raises:
        ValueError: If it is no object, or has a field twice.
    """

    def __init__(self, raw: Any, ignored: frozenset[str] = frozenset(), place: str = "") -> None:
        if not isinstance(raw, dict):
            raise ValueError(f"is {type_name(raw)}, not an object")
        self.ignored = ignored
        self.notes: list[str] = []
        self.unused: list[str] = []
        self.names: dict[str, str] = {}
        self.nulls: list[str] = []
        self._place = place
        self._values: dict[str, Any] = {}
        for name, value in raw.items():
            plain = plain_name(str(name))
            if value is None:
                self.nulls.append(str(name))
                continue
            if plain in ignored:
                self.unused.append(f"{place}: {name}" if place else str(name))
                continue
            if plain in self._values:
                raise ValueError(f"it has the field {plain!r} twice, as {self.names[plain]!r} and {name!r}")
            self.names[plain], self._values[plain] = str(name), value
        self._left = set(self._values)

    def __contains__(self, name: object) -> bool:
        return name in self._values

    def plain(self) -> dict[str, Any]:
        """All fields by their names in lower case, those without a value left out."""
        return dict(self._values)

    def filled(self, *names: str) -> list[str]:
        """Those of the names under which there is something."""
        return [name for name in names if name in self._values and not is_blank(self._values[name])]

    def take(self, *names: str) -> tuple[str, Any]:
        """Take the one value that is there under any of these names.

        Returns:
            Its name and the value; the first name and None if there is none.

        Raises:
            ValueError: If several of them have values that differ.
        """
        there = [name for name in names if name in self._values]
        filled = self.filled(*names)
        if differing := [name for name in filled if self._values[name] != self._values[filled[0]]]:
            raise ValueError(
                f"it has both {self.names[filled[0]]!r} and {self.names[differing[0]]!r}, which differ, for the same "
                f"thing; leave one of them out: --ignore_fields+={differing[0]}"
            )
        self._left.difference_update(there)
        name = next(iter([*filled, *there]), names[0])
        return name, self._values.get(name)

    def finish(self) -> None:
        """Judge the fields that nobody has taken; `unused` has those to report.

        Raises:
            ValueError: If one of them changes what the row means.
        """
        for name in self._values:
            value = self._values[name]
            if name not in self._left or is_blank(value):
                continue
            if name in FLAGS and parse_flag(value) is True:
                continue
            if meaning := _meaning(name, self.names[name], value):
                raise ValueError(
                    f'it has the field "{self.names[name]}" ({meaning}), which is not read in a row of this '
                    f"form; rewrite the row, or leave the field out: --ignore_fields+={name}"
                )
            if name not in HARMLESS:
                label = self.names[name] or _NAMELESS
                self.unused.append(f"{self._place}: {label}" if self._place else label)


def plain_name(name: str) -> str:
    """A field's name as it is written here: "systemPrompt" and "System-Prompt" are "system_prompt"."""
    plain = name.strip().lower()
    return _KNOWN.get(_SEPARATORS.sub("", plain), plain)


def _meaning(name: str, written: str, value: Any) -> str | None:
    """Return what a field says of a row that is not what it seems without it; None if it says nothing of the kind.

    Args:
        name: Its name as `plain_name` has it.
        written: Its name in the row.
        value: Its value.
    """
    if name in _MEANINGFUL:
        return _MEANINGFUL[name]
    if name in VERDICTS and parse_flag(value) is False:
        return 'the answer is not good; to learn from good and bad ones, call the field "label"'
    words = {word.lower() for word in _WORD.findall(written)}
    flags = isinstance(value, bool | int | float | list) or parse_flag(value) is not None
    return "what is learned" if flags and name not in HARMLESS and _FLAG_WORDS & words else None


def is_blank(value: Any) -> bool:
    """Return whether a value says nothing: null, an empty list or object, or a text of white space."""
    return value is None or value in ([], {}) or (isinstance(value, str) and not value.strip())


def parse_flag(value: Any) -> bool | None:
    """The truth that a value says as JSON, as a number or as a text (true, 1, "true", "1"); None if it is none."""
    if isinstance(value, str):
        return {"true": True, "false": False, "1": True, "0": False}.get(value.strip().lower())
    return bool(value) if isinstance(value, bool | int | float) and value in (0, 1) else None
