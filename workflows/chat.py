"""`make chat`: talk to a model in Ollama, in the terminal."""

import json
import math
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TextIO

from workflows.errors import UserError, report_all
from workflows.files import write_json
from workflows.ollama.client import ContextFull, connect, explained, stream_chat
from workflows.ollama.server import OllamaServer, open_server

_HELP = "/system TEXT sets the system message, /reset forgets the conversation, /save FILE writes it, /exit ends"
_DIM, _PLAIN = "\033[2m", "\033[0m"
_OPEN, _CLOSE = "<think>", "</think>"

Think = Literal["show", "hide"]


def setup(
    model: str = "medical",
    prompt: str | None = None,
    system: str | None = None,
    think: Think = "show",
    json: bool = False,
    temperature: float | None = None,
    top_p: float | None = None,
    top_k: int | None = None,
    repeat_penalty: float | None = None,
    num_predict: int | None = None,
    num_ctx: int | None = None,
    num_thread: int | None = None,
    seed: int | None = None,
    port: int | None = None,
) -> None:
    """Chat with a model in Ollama. Not medical advice.

    Args:
        model: The model's name in Ollama, as given to `make export`.
        prompt: Ask only this and print the answer; a chat if null.
        system: System message; the model's own by default.
        think: Show a model's thoughts (dim, where the terminal can) or hide them.
        json: Print each answer as one JSON object, with its thoughts and token counts.
        temperature: Sampling temperature; the model's own by default, as for all that follow. 0 is greedy.
        top_p: Sample from the fewest tokens whose probabilities reach this.
        top_k: Sample from this many most likely tokens.
        repeat_penalty: Penalty on repeated tokens; 1.0 is none.
        num_predict: Most tokens of an answer.
        num_ctx: Context length in tokens.
        num_thread: CPU threads.
        seed: Seed of the sampling.
        port: Port for an Ollama server of ours; by default a free one, and only if no other Ollama is found.

    Raises:
        UserError: If an argument is out of range, no Ollama can be had, it does not know the model, or it dies.
    """
    options = {
        name: value
        for name, value in {
            "temperature": temperature,
            "top_p": top_p,
            "top_k": top_k,
            "repeat_penalty": repeat_penalty,
            "num_predict": num_predict,
            "num_ctx": num_ctx,
            "num_thread": num_thread,
            "seed": seed,
        }.items()
        if value is not None
    }
    report_all(_problems(options, prompt, port))
    with open_server(port) as server:
        begins_in_thoughts, context = facts(server, model, num_ctx)
        chat = Chat(server, model, options, think, json, begins_in_thoughts, system, context=context)
        if prompt is not None:
            if not chat.ask(prompt).finished:
                raise SystemExit(130)  # Ctrl-C; the answer ends with "[stopped]"
        else:
            chat.loop()


def _problems(options: dict[str, Any], prompt: str | None, port: int | None) -> list[str]:
    ranges = {
        "temperature": (0, 10),
        "top_p": (0, 1),
        "top_k": (0, 10**6),
        "repeat_penalty": (0, 10),
        "num_predict": (1, 10**6),
        "num_ctx": (1, 10**7),
        "num_thread": (1, 4096),
    }
    found = [
        f"--{name} must be from {low} to {high}, not {options[name]}."
        for name, (low, high) in ranges.items()
        if name in options and not low <= options[name] <= high
    ]
    if prompt is not None and not prompt.strip():
        found.append("--prompt is empty.")
    if port is not None and not 0 < port < 65536:
        found.append(f"--port must be between 1 and 65535, not {port}.")
    return found


def facts(server: OllamaServer, model: str, num_ctx: int | None = None) -> tuple[bool, int | None]:
    """What Ollama says about a model.

    Args:
        server: The server.
        model: The model's name.
        num_ctx: The context length asked for, in tokens; the one in the model's Modelfile if None.

    Returns:
        Whether the model's template itself writes `<think>`, so that its answers begin inside the thoughts, and the
        context length that its runner will have; None if only the server knows its default.

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
    return begins, min(num_ctx, trained) if num_ctx and isinstance(trained, int) else num_ctx


class ThoughtParser:
    """Splits an answer that comes in pieces into thoughts and speech; a tag may be cut anywhere."""

    def __init__(self, inside: bool = False) -> None:
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
                if stripped.startswith(_OPEN):
                    self._inside, self._at_start, self._skip_space = True, False, True
                    self._held = stripped[len(_OPEN) :]
                    continue
                if _OPEN.startswith(stripped):
                    return  # not enough to tell
                self._at_start = False
            if self._skip_space:
                self._held = self._held.lstrip()
                if not self._held:
                    return
                self._skip_space = False
            if not self._inside:
                yield False, self._held
                self._held = ""
                return
            before, found, after = self._held.partition(_CLOSE)
            if found:
                if before:
                    yield True, before
                self._inside, self._skip_space, self._held = False, True, after
                continue
            keep = next((n for n in range(len(_CLOSE) - 1, 0, -1) if before.endswith(_CLOSE[:n])), 0)
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


@dataclass
class Answer:
    """One answer.

    Attributes:
        thoughts: What the model thought, without the tags.
        text: What it said.
        finished: Whether it came to its end, rather than being stopped by Ctrl-C.
        counts: Ollama's numbers of tokens and nanoseconds.
    """

    thoughts: str = ""
    text: str = ""
    finished: bool = False
    counts: dict[str, Any] = field(default_factory=dict)


class Chat:
    """A conversation with one model."""

    def __init__(
        self,
        server: OllamaServer,
        model: str,
        options: dict[str, Any],
        think: Think = "show",
        as_json: bool = False,
        begins_in_thoughts: bool = False,
        system: str | None = None,
        out: TextIO | None = None,
        context: int | None = None,
    ) -> None:
        self.server, self.model, self.options = server, model, options
        self.think, self.as_json, self.begins_in_thoughts = think, as_json, begins_in_thoughts
        self.system, self.context = system, context
        self.history: list[dict[str, str]] = []
        self.out = out or sys.stdout
        self._used = 0  # tokens of the conversation, about; 0 until the server has counted some

    @property
    def messages(self) -> list[dict[str, str]]:
        """The conversation with its system message, as it is sent and saved."""
        system = [] if self.system is None else [{"role": "system", "content": self.system}]
        return system + self.history

    def ask(self, question: str) -> Answer:
        """Send a question, print the answer as it comes, and keep both.

        Ctrl-C stops the answer; what came until then stays in the conversation. An answer's thoughts are not sent
        again with later questions: models that think were trained without their earlier thoughts.

        Raises:
            ContextFull: If the conversation does not fit into the context.
            UserError: If the server fails. Either way the conversation is left as it was before the question.
        """
        # Another's server leaves out the oldest messages without a word, so that they have to be counted beforehand.
        if self.server.log is None and self._used and self._used + _tokens(question) > (self.context or math.inf):
            raise ContextFull(self.context)
        self.history.append({"role": "user", "content": question})
        answer, parser = Answer(), ThoughtParser(self.begins_in_thoughts)
        stream = stream_chat(self.server, self.model, self.messages, self.options, self.context)
        try:
            for part in stream:
                if part.message.thinking:
                    parser = ThoughtParser()
                    self._show(answer, iter([(True, part.message.thinking)]))
                self._show(answer, parser.feed(part.message.content or ""))
                if part.done:
                    self._show(answer, parser.close())
                    answer.finished = True
                    answer.counts = {
                        name: value
                        for name in ("prompt_eval_count", "eval_count", "total_duration", "done_reason")
                        if (value := getattr(part, name)) is not None
                    }
                    if answer.thoughts and not answer.text:
                        self._end_in_thoughts(answer, was_cut=part.done_reason == "length")
        except KeyboardInterrupt:
            self._show(answer, parser.close())
            self._print("\n[stopped]" if not self.as_json else "")
        except UserError:
            self.history.pop()
            if not self.as_json:
                self._print("\n")
            raise
        finally:
            stream.close()  # type: ignore[attr-defined]
        self.history.append({"role": "assistant", "content": answer.text})
        self._used = answer.counts.get("prompt_eval_count") or (self._used and self._used + _tokens(question))
        self._used += _tokens(answer.text) if self._used else 0
        self._end(question, answer)
        return answer

    def _end_in_thoughts(self, answer: Answer, was_cut: bool) -> None:
        if was_cut:
            print("[cut while it was thinking: raise --num_predict, and --num_ctx with it]", file=sys.stderr)
            return
        # It came to its end without ever leaving its thoughts: its answer is what it said in them.
        if self.think == "hide" and not self.as_json:
            self._print(answer.thoughts)
        answer.thoughts, answer.text = "", answer.thoughts

    def _show(self, answer: Answer, pieces: Iterator[tuple[bool, str]]) -> None:
        for is_thought, text in pieces:
            if is_thought:
                answer.thoughts += text
            else:
                if not answer.text and answer.thoughts and self.think == "show" and not self.as_json:
                    self._print("\n\n")
                answer.text += text
            if self.as_json or (is_thought and self.think == "hide"):
                continue
            dim = is_thought and self.out.isatty()
            self._print(f"{_DIM}{text}{_PLAIN}" if dim else text)

    def _end(self, question: str, answer: Answer) -> None:
        if not self.as_json:
            self._print("\n")
            return
        record = {"model": self.model, "question": question, "answer": answer.text, "finished": answer.finished}
        if answer.thoughts and self.think == "show":
            record["thoughts"] = answer.thoughts
        self._print(json.dumps({**record, **answer.counts}, ensure_ascii=False) + "\n")

    def _print(self, text: str) -> None:
        self.out.write(text)
        self.out.flush()

    def loop(self) -> None:
        """Read questions and commands until /exit or the end of the input.

        An error ends the chat, but for a full context where somebody is there to mend it.

        Raises:
            UserError: If the server fails.
        """
        interactive = sys.stdin.isatty() and not self.as_json
        if interactive:
            print(f"{self.model} in Ollama. Not medical advice. {_HELP}; Ctrl-C stops an answer.", file=sys.stderr)
        while True:
            try:
                line = input(">>> " if interactive else "").strip()
            except EOFError:
                return
            except KeyboardInterrupt:
                print(f"\n{_HELP}", file=sys.stderr)
                continue
            if line == "/exit":
                return
            if line.startswith("/"):
                self.command(line)
            elif line:
                try:
                    self.ask(line)
                except ContextFull as e:
                    if not interactive:
                        raise
                    print(e, file=sys.stderr)

    def command(self, line: str) -> None:
        """Carry out a line that begins with a slash; what is wrong with it is said, and the chat goes on."""
        name, _, argument = line.partition(" ")
        argument = argument.strip()
        if name == "/system":
            self.system = argument or None
            self._used += _tokens(argument) if self._used else 0
            print(f"system message: {argument or 'the model’s own'}", file=sys.stderr)
        elif name == "/reset":
            self.history.clear()
            self._used = 0
            print("the conversation is forgotten", file=sys.stderr)
        elif name == "/save":
            self._save(argument)
        else:
            print(f"There is no command {name}. {_HELP}", file=sys.stderr)

    def _save(self, file: str) -> None:
        if not file:
            print("/save needs a file name", file=sys.stderr)
            return
        try:
            write_json(Path(file).expanduser(), {"model": self.model, "messages": self.messages})
        except (UserError, OSError) as e:
            print(f"not saved: {e}", file=sys.stderr)
        else:
            print(f"saved: {file}", file=sys.stderr)


def _tokens(text: str) -> int:
    """About how many tokens a message has, its role's marks included; rather too many than too few."""
    return len(text.encode()) // 3 + 8
