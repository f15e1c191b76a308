"""Models that think first: which do, where their thoughts end, and what of an answer is sent again.

DeepSeek-R1's rules (its chat template): the generation prompt opens the thoughts, `</think>` ends them, and of an
earlier answer only what follows that is part of the prompt, to the letter.
"""

import re
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import ollama

from workflows.ollama.client import connect, explained
from workflows.ollama.server import OllamaServer

OPEN, CLOSE = "<think>", "</think>"


@dataclass(frozen=True)
class Facts:
    """What Ollama says about a model.

    Attributes:
        begins_in_thoughts: Whether its template itself writes `<think>`, so that answers begin inside the thoughts.
        context: The context length that its runner will have, in tokens; None if only the server knows its default.
    """

    begins_in_thoughts: bool = False
    context: int | None = None


def facts(server: OllamaServer, model: str, num_ctx: int | None = None) -> Facts:
    """Ask Ollama about a model.

    Args:
        server: The server.
        model: The model's name.
        num_ctx: The context length asked for, in tokens; the one in the model's Modelfile if None.

    Raises:
        UserError: If Ollama does not know the model.
    """
    with explained(server, model):
        shown = connect(server).show(model)
    template, info = shown.template or "", shown.modelinfo or {}
    # Where a template names .Thinking, Ollama parts thoughts and speech itself.
    begins = ".Thinking" not in template and re.search(r"<think>\s*\{\{-?\s*(end|else)", template) is not None
    if num_ctx is None and (line := re.search(r"^num_ctx\s+(\d+)$", shown.parameters or "", flags=re.MULTILINE)):
        num_ctx = int(line[1])
    trained = info.get(f"{info.get('general.architecture')}.context_length")
    return Facts(begins, min(num_ctx, trained) if num_ctx and isinstance(trained, int) else num_ctx)


class ThoughtParser:
    """Splits an answer that comes in pieces into thoughts and speech; a tag may be cut anywhere.

    Attributes:
        gap: The white space between thoughts and speech, which is not shown but sent again with later questions.
    """

    def __init__(self, inside: bool = False) -> None:
        self.gap = ""
        self._inside = inside
        self._held = ""  # the beginning of what may become a tag
        self._at_start = not inside  # only an answer that begins with <think> has thoughts: later it is just text
        self._skip_space = inside

    def feed(self, piece: str) -> Iterator[tuple[bool, str]]:
        """Yield (whether it is a thought, text) for what is certain so far."""
        self._held += piece
        while self._held:
            if self._at_start:
                stripped = self._held.lstrip()
                if stripped.startswith(OPEN):
                    self._inside, self._at_start, self._skip_space = True, False, True
                    self._held = stripped[len(OPEN) :]
                    continue
                if OPEN.startswith(stripped):
                    return  # not enough to tell
                self._at_start = False
            if self._skip_space:
                begin = self._held.lstrip()
                if not self._inside:
                    self.gap += self._held[: len(self._held) - len(begin)]
                self._held = begin
                if not begin:
                    return
                self._skip_space = False
            if not self._inside:
                yield False, self._held
                self._held = ""
                return
            before, found, after = self._held.partition(CLOSE)
            if found:
                if before:
                    yield True, before
                self._inside, self._skip_space, self._held = False, True, after
                continue
            keep = next((n for n in range(len(CLOSE) - 1, 0, -1) if before.endswith(CLOSE[:n])), 0)
            certain = before[: len(before) - keep]
            self._held = before[len(certain) :]
            if certain:
                yield True, certain
            return

    def close(self) -> Iterator[tuple[bool, str]]:
        """Yield what was held back when the answer has ended."""
        if self._held and not self._skip_space:
            yield self._inside, self._held
        self._held = ""


_COUNTS = (
    "prompt_eval_count",
    "prompt_eval_duration",
    "eval_count",
    "eval_duration",
    "total_duration",
    "done_reason",
)


@dataclass
class Answer:
    """One answer, taken in as it comes.

    Attributes:
        parser: Parts its thoughts from its speech.
        thoughts: What the model thought, without the tags.
        text: What it said.
        finished: Whether it came to its end, rather than being stopped by Ctrl-C.
        cut_in_thoughts: Whether the limit on tokens ended it before it had said anything.
        never_left_thoughts: Whether it came to its end without `</think>`; what it thought is its `text` then.
        counts: Ollama's numbers of tokens and nanoseconds.
        thought_seconds: Wall time from the question to the end of the thoughts, waiting included; 0 without thoughts.
        seconds: Wall time from the question to the last piece.
    """

    parser: ThoughtParser
    thoughts: str = ""
    text: str = ""
    finished: bool = False
    cut_in_thoughts: bool = False
    never_left_thoughts: bool = False
    counts: dict[str, Any] = field(default_factory=dict)
    thought_seconds: float = 0.0
    seconds: float = 0.0
    _began: float = field(default_factory=time.monotonic, repr=False)

    def take(self, part: ollama.ChatResponse) -> Iterator[tuple[bool, str]]:
        """Take in a part of the stream; yields (whether it is a thought, text) for what is certain so far."""
        if part.message.thinking:
            self.parser = ThoughtParser()
            yield from self._kept([(True, part.message.thinking)])
        yield from self._kept(self.parser.feed(part.message.content or ""))
        if part.done:
            yield from self.close()
            self.finished = True
            self.counts = {name: value for name in _COUNTS if (value := getattr(part, name)) is not None}
            if self.thoughts and not self.text:
                self.cut_in_thoughts = part.done_reason == "length"
                self.never_left_thoughts = not self.cut_in_thoughts
                if self.never_left_thoughts:
                    self.thoughts, self.text = "", self.thoughts

    def close(self) -> Iterator[tuple[bool, str]]:
        """What was held back when the answer has ended."""
        yield from self._kept(self.parser.close())

    def _kept(self, pieces: Iterable[tuple[bool, str]]) -> Iterator[tuple[bool, str]]:
        for is_thought, text in pieces:
            self.seconds = time.monotonic() - self._began
            if is_thought:
                self.thoughts += text
                self.thought_seconds = self.seconds
            else:
                self.text += text
            yield is_thought, text

    @property
    def spoken(self) -> str:
        """What is sent again with later questions: all that followed the thoughts, to the letter."""
        return self.parser.gap + self.text

    @property
    def tokens_per_second(self) -> float | None:
        """Tokens that the model wrote in a second, thoughts included; None where the server does not count."""
        tokens, nanoseconds = self.counts.get("eval_count"), self.counts.get("eval_duration")
        return tokens / nanoseconds * 1e9 if tokens and nanoseconds else None


def without_thoughts(messages: list[dict[str, str]]) -> list[dict[str, str]]:
    """A conversation as it is sent: earlier answers begin after their thoughts."""
    return [
        {**message, "content": message["content"].rpartition(CLOSE)[2]} if message["role"] == "assistant" else message
        for message in messages
    ]


def answer_at_once(messages: list[dict[str, str]]) -> list[dict[str, str]]:
    """A conversation whose next answer has no thoughts, for a model that would begin in them: they are closed for it.

    It is what `ChatTemplate.empty_thoughts` is to a prompt of ours: Ollama writes a last message of the assistant's
    without its end, and the model goes on from there.
    """
    return [*messages, {"role": "assistant", "content": f"{OPEN}\n\n{CLOSE}\n\n"}]
