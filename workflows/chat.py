"""`make chat`: talk to a model in Ollama, in the terminal."""

import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, TextIO

from workflows.errors import UserError, report_all
from workflows.files import write_json
from workflows.lifetime import is_terminated
from workflows.ollama.client import NOT_TEXT, ContextFull, rough_tokens, stream_chat
from workflows.ollama.options import chosen, option_problems
from workflows.ollama.schema import InvalidAnswer, read_schema, validated
from workflows.ollama.server import OllamaServer, open_server
from workflows.ollama.thoughts import Answer, ThoughtParser, answer_at_once, facts

_HELP = (
    "/system TEXT sets the system message, /reset forgets the conversation, /save FILE writes it, "
    "/think shows the last thoughts, /exit ends"
)
_DIM, _PLAIN, _CLEAR_LINE = "\033[2m", "\033[0m", "\r\033[K"

Think = Literal["show", "fold", "hide"]


def setup(
    model: str = "medical",
    prompt: str | None = None,
    system: str | None = None,
    think: Think = "show",
    json: bool = False,
    schema: Path | None = None,
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
        think: Show a model's reasoning (dim, where the terminal can), fold them into one line that says how long they
            took (/think unfolds it), or hide them.
        json: Print each answer as one JSON object, with its reasoning, token counts and seconds.
        schema: A JSON schema that answers must follow, as a file. Such answers have no reasoning before them.
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
    options = chosen(
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        repeat_penalty=repeat_penalty,
        num_predict=num_predict,
        num_ctx=num_ctx,
        num_thread=num_thread,
        seed=seed,
    )
    problems = option_problems(options, port, model)
    if prompt is not None and not prompt.strip():
        problems.append("--prompt is empty.")
    report_all(problems)
    answer_schema = None if schema is None else read_schema(schema)
    with open_server(port) as server:
        known = facts(server, model, num_ctx)
        chat = Chat(
            server,
            model,
            options,
            think,
            json,
            known.begins_in_thoughts,
            system,
            context=known.context,
            schema=answer_schema,
        )
        if prompt is not None:
            if not chat.ask(prompt).finished:
                raise SystemExit(130)  # Ctrl-C; the answer ends with "[stopped]"
        else:
            chat.loop()


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
        schema: dict[str, Any] | None = None,
    ) -> None:
        self.server, self.model, self.options = server, model, options
        self.think, self.as_json, self.begins_in_thoughts = think, as_json, begins_in_thoughts
        self.system, self.context, self.schema = system, context, schema
        self.history: list[dict[str, str]] = []
        self.out = out or sys.stdout
        self.last = Answer(ThoughtParser())
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
            InvalidAnswer: If the answer does not follow the schema.
            UserError: If the server fails. Either way the conversation is left as it was before the question.
        """
        # Another's server leaves out the oldest messages without a word, so that they have to be counted beforehand.
        if self.server.log is None and self._used and self._used + rough_tokens(question) > (self.context or math.inf):
            raise ContextFull(self.context)
        self.history.append({"role": "user", "content": question})
        self.last = answer = Answer(ThoughtParser(self.begins_in_thoughts and self.schema is None))
        messages = answer_at_once(self.messages) if self.begins_in_thoughts and self.schema else self.messages
        stream = stream_chat(self.server, self.model, messages, self.options, self.context, self.schema)
        try:
            for part in stream:
                self._show(answer, answer.take(part))
            if answer.finished and self.schema is not None:
                validated(answer.text, self.schema)
        except KeyboardInterrupt:
            if is_terminated():
                raise
            self._show(answer, answer.close())
            self._print("\n[stopped]" if not self.as_json else "")
        except UserError:
            self.history.pop()
            if not self.as_json:
                self._print("\n")
            raise
        finally:
            stream.close()  # type: ignore[attr-defined]
        self.history.append({"role": "assistant", "content": answer.spoken})
        self._used = answer.counts.get("prompt_eval_count") or (self._used and self._used + rough_tokens(question))
        self._used += rough_tokens(answer.text) if self._used else 0
        self._end(question, answer)
        return answer

    def _show(self, answer: Answer, pieces: Iterator[tuple[bool, str]]) -> None:
        thinking = not answer.text
        for is_thought, text in pieces:
            if self.as_json:
                continue
            if is_thought:
                self._show_thought(answer, text)
                continue
            if thinking and answer.thoughts:
                self._end_thoughts(answer)
            thinking = False
            self._print(text)

    def _show_thought(self, answer: Answer, text: str) -> None:
        dim = self.out.isatty()
        if self.think == "show":
            self._print(f"{_DIM}{text}{_PLAIN}" if dim else text)
        elif self.think == "fold" and dim:
            self._print(f"{_CLEAR_LINE}{_DIM}thinking … {answer.seconds:.0f} s{_PLAIN}")

    def _end_thoughts(self, answer: Answer) -> None:
        if self.think == "show":
            self._print("\n\n")
        elif self.think == "fold":
            line = f"[thought for {answer.thought_seconds:.1f} s: {len(answer.thoughts.split())} words]"
            self._print(f"{_CLEAR_LINE}{_DIM}{line}{_PLAIN}\n" if self.out.isatty() else f"{line}\n")

    def _end(self, question: str, answer: Answer) -> None:
        rate = answer.tokens_per_second
        if not self.as_json:
            if answer.never_left_thoughts and self.think != "show":
                self._print((_CLEAR_LINE if self.out.isatty() else "") + answer.text)
            self._print("\n")
            if answer.cut_in_thoughts:
                print("[cut while it was thinking: raise --num_predict, and --num_ctx with it]", file=sys.stderr)
            if rate is not None:
                told = f"[{answer.seconds:.1f} s, {answer.counts['eval_count']} tokens, {rate:.1f} tokens/s]"
                print(f"{_DIM}{told}{_PLAIN}" if sys.stderr.isatty() else told, file=sys.stderr)
            return
        record = {"model": self.model, "question": question, "answer": answer.text, "finished": answer.finished}
        if answer.thoughts and self.think != "hide":
            record["thoughts"] = answer.thoughts
        timing = {"seconds": round(answer.seconds, 3), "tokens_per_second": rate and round(rate, 2)}
        self._print(json.dumps({**record, **answer.counts, **timing}, ensure_ascii=False) + "\n")

    def _print(self, text: str) -> None:
        self.out.write(text)
        self.out.flush()

    def loop(self) -> None:
        """Read questions and commands until /exit or the end of the input.

        An error ends the chat, but for a full context, or an answer that does not follow its schema, where somebody is
        there to mend it.

        Raises:
            UserError: If the server fails, or the input is not UTF-8.
        """
        interactive = sys.stdin.isatty() and not self.as_json
        if interactive:
            print(f"{self.model} in Ollama. Not medical advice. {_HELP}; Ctrl-C stops an answer.", file=sys.stderr)
        while True:
            try:
                line = input(">>> " if interactive else "").strip()
            except EOFError:
                return
            except UnicodeDecodeError:
                raise UserError(NOT_TEXT) from None
            except KeyboardInterrupt:
                if is_terminated():
                    raise
                print(f"\n{_HELP}", file=sys.stderr)
                continue
            if line == "/exit":
                return
            if line.startswith("/"):
                self.command(line)
            elif line:
                try:
                    self.ask(line)
                except (ContextFull, InvalidAnswer) as e:
                    if not interactive:
                        raise
                    print(e, file=sys.stderr)

    def command(self, line: str) -> None:
        """Carry out a line that begins with a slash; what is wrong with it is said, and the chat goes on."""
        name, _, argument = line.partition(" ")
        argument = argument.strip()
        if name == "/system":
            self.system = argument or None
            self._used += rough_tokens(argument) if self._used else 0
            print(f"system message: {argument or 'the model’s own'}", file=sys.stderr)
        elif name == "/reset":
            self.history.clear()
            self._used = 0
            print("the conversation is forgotten", file=sys.stderr)
        elif name == "/save":
            self._save(argument)
        elif name == "/think":
            print(self.last.thoughts or "the last answer has no thoughts", file=sys.stderr)
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
