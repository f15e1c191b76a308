"""Many questions to one model: several at a time, each answer a line of a file as soon as it is there.

What is in the file is not asked again: a batch that was stopped, or whose server ended, goes on when it is run again. A
server that comes back in the middle is waited for. A line counts for a question if everything that decides its answer
is the same (the model's weights, the conversation, the options, the schema); the hash of that is its `key`. The limits
on an answer's length are not in it: one that ended by itself is the same under another limit that leaves it room.
"""

import json
import math
import sys
import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from data_prep.rows import parse_line
from workflows.errors import UserError
from workflows.evaluation.cache import request_key
from workflows.files import no_room_explained, write_text
from workflows.ollama.client import ContextFull, ServerGone, free_slot, installed, rough_tokens, stream_chat
from workflows.ollama.schema import InvalidAnswer, validated
from workflows.ollama.server import Endpoint, OllamaServer, probe
from workflows.ollama.thoughts import Answer, Facts, ThoughtParser, answer_at_once, facts, without_thoughts
from workflows.progress import Bar

PATIENCE = 120.0
"""Seconds to wait for a server that has gone."""
_ATTEMPTS = 3
"""How often a question may be in the air when a server goes; then it is taken for the cause."""
_GOODBYE_SECONDS = 0.5
"""How long a batch that ends before its time waits for the server to take that in."""
_LIMITS = ("num_predict", "num_ctx")
_NOT_IN_KEY = (*_LIMITS, "num_thread")
"""Options that do not decide what an answer says: its line names the limits it was given."""

Record = dict[str, Any]


@dataclass(frozen=True)
class Question:
    """One conversation to be answered.

    Attributes:
        messages: The conversation; the last message is the user's.
        about: What its line in the file begins with.
        schema: A JSON schema that the answer must follow.
    """

    messages: list[dict[str, str]]
    about: Record = field(default_factory=dict)
    schema: dict[str, Any] | None = None


class _Stopped(Exception):
    """Another question's answer has ended the batch."""


class Batch:
    """Questions to one model, and the file of their answers.

    Attributes:
        records: For each question its line as an object; None where it has none yet.
        kept: How many were in the file already.
        aside: The file beside it for lines of other questions, such as were left out or mended since: they are no part
            of this batch's results, and still there when they are asked again.
    """

    def __init__(
        self,
        server: OllamaServer,
        model: str,
        questions: Sequence[Question],
        file: Path,
        options: dict[str, Any],
        parallel: int = 1,
        resume: bool = True,
        patience: float | None = None,
    ) -> None:
        """Read what the file holds.

        Args:
            server: The server.
            model: The model's name.
            questions: What to ask.
            file: Where the answers go, a JSON line each.
            options: Ollama's parameters.
            parallel: Questions in the air at a time.
            resume: Whether to keep what the file holds; false deletes it.
            patience: Seconds to wait for a server that has gone; `PATIENCE` if None.

        Raises:
            UserError: If the server does not know the model, or the file holds answers to other questions only.
        """
        self.server, self.model, self.questions, self.file = server, model, questions, file
        self.options, self.parallel = options, parallel
        self.patience = PATIENCE if patience is None else patience
        self.facts: Facts = facts(server, model, options.get("num_ctx"))
        # The log of a server does not say which of several questions a line is about.
        quiet = OllamaServer(Endpoint(server.url, server.version))
        self._ask_from = server if parallel == 1 else quiet
        self._limits = {name: options[name] for name in _LIMITS if name in options}
        deciding = {name: value for name, value in options.items() if name not in _NOT_IN_KEY}
        digest, seen = installed(server, model).digest, Counter[str]()
        self.keys = []
        for question in questions:
            key = request_key("ask", digest, question.messages, deciding, question.schema)
            seen[key] += 1  # a file may hold the same question several times
            self.keys.append(key[:32] if seen[key] == 1 else f"{key[:32]}-{seen[key]}")
        self.aside = file.with_suffix(".others.jsonl")
        if not resume:
            file.unlink(missing_ok=True)
            self.aside.unlink(missing_ok=True)
        answered, self._others = self._read()
        self.records: list[Record | None] = [answered.get(key) for key in self.keys]
        self.kept = sum(record is not None for record in self.records)
        self._attempts = Counter[int]()
        self._stop = threading.Event()

    def _read(self) -> tuple[dict[str, Record], list[str]]:
        """The answers in the files by key, but for those that are to be asked again; and the lines of other questions.

        A half-written last line, as a kill leaves behind, is cut off.

        Raises:
            UserError: If a line is not JSON, or the file holds no line of these questions.
        """
        keys, answers, others = set(self.keys), dict[str, Record](), dict[str, None]()
        for file in (self.aside, self.file):  # what the file says goes before what was laid aside
            lines, own = _whole_lines(file), 0
            for number, line in enumerate(lines, start=1):
                record = parse_line(file, number, line)
                if not isinstance(record, dict) or record.get("key") not in keys:
                    others[line.decode() + "\n"] = None
                    continue
                own += 1
                if self._holds(record):
                    answers[record["key"]] = record
            if file == self.file and lines and not own:
                raise UserError(
                    f"{file} holds no answer to one of these questions by this model with these settings. "
                    "Move that file away, or begin anew with --resume false."
                )
        return answers, list(others)

    def _holds(self, record: Record) -> bool:
        """Whether this is what the limits of now would give, too."""
        if "error" in record:
            return False
        if all(record.get(name) == self._limits.get(name) for name in _LIMITS):
            return True
        written = record.get("eval_count", math.inf)
        in_all = written + record.get("prompt_eval_count", math.inf)
        room = [self._limits.get(name, math.inf) for name in _LIMITS]
        return record.get("done_reason") == "stop" and written <= room[0] and in_all <= room[1]

    def run(self) -> list[Record]:
        """Ask what has no answer yet.

        Returns:
            A record for each question, in their order; one that could not be answered has `error`.

        Raises:
            UserError: If the server is gone and does not come back in time, or refuses a request.
        """
        with Bar(total=len(self.questions), initial=self.kept, unit="answer", desc=self.model) as bar:
            while gone := self._round(bar):
                self._wait(gone)
        finished = [record for record in self.records if record is not None]
        if self._others:
            write_text(self.aside, "".join(self._others))
            print(f"{self.aside}: {len(self._others)} lines of other questions, for when they are asked again")
        write_text(self.file, "".join(map(_line, finished)))  # in the order of the questions
        if not self._others:
            self.aside.unlink(missing_ok=True)  # all that it held is in the file now
        return finished

    def require_answers(self, failed: list[Record], source: Path | str) -> None:
        """Do not go on with questions that have no answer.

        Args:
            failed: Their records.
            source: What their `line` is a line of.

        Raises:
            UserError: If there is one.
        """
        if failed:
            raise UserError(
                f"{len(failed)} of {len(self.questions)} questions have no answer; their lines in {self.file} say why, "
                f"and the same command asks them again. The first, line {failed[0]['line']} of {source}: "
                f"{failed[0]['error']}"
            )

    def _round(self, bar: Any) -> ServerGone | None:
        """Ask all that is left; ends early if the server goes."""
        self._stop.clear()
        left = [i for i, record in enumerate(self.records) if record is None]
        shared, outcomes = iter(left), SimpleQueue[tuple[int, Record | Exception]]()

        def work() -> None:
            for i in shared:  # each thread takes the next
                try:
                    outcomes.put((i, self._ask(i)))
                except Exception as e:
                    outcomes.put((i, e))

        gone: ServerGone | None = None
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with no_room_explained(self.file), open(self.file, "ab") as f:
            try:
                for _ in left[: self.parallel]:
                    # A daemon, which nobody waits for: at Ctrl-C it may be waiting itself, for a server that is silent.
                    threading.Thread(target=work, daemon=True).start()
                for _ in left:
                    i, record = outcomes.get()
                    if isinstance(record, _Stopped):
                        continue
                    if isinstance(record, ServerGone):
                        self._attempts[i] += 1
                        gone = record
                        if self._attempts[i] < _ATTEMPTS:
                            continue
                        record = self._record(i, error=str(gone))
                    if isinstance(record, Exception):
                        raise record
                    self.records[i] = record
                    f.write(_line(record).encode())
                    f.flush()
                    bar.update()
            except BaseException:  # Ctrl-C, a full disk, a request that is refused: no more is begun
                self._stop.set()
                free_slot(self.server, self.model, _GOODBYE_SECONDS)
                raise
        return gone

    def _ask(self, i: int) -> Record:
        if self._stop.is_set():
            raise _Stopped
        question = self.questions[i]
        messages = without_thoughts(question.messages)
        closed = self.facts.begins_in_thoughts and question.schema is not None
        answer = Answer(ThoughtParser(self.facts.begins_in_thoughts and not closed))
        try:
            if len(messages) > 2 and sum(rough_tokens(m["content"]) for m in messages) > (self.facts.context or 1e9):
                raise ContextFull(self.facts.context)  # Ollama would leave out the first messages without a word
            stream = stream_chat(
                self._ask_from,
                self.model,
                answer_at_once(messages) if closed else messages,
                self.options,
                self.facts.context,
                question.schema,
            )
            try:
                for part in stream:
                    for _ in answer.take(part):
                        pass
                    if self._stop.is_set():
                        raise _Stopped
            finally:
                stream.close()  # type: ignore[attr-defined]
            value = answer.text if question.schema is None else validated(answer.text, question.schema)
        except ServerGone:
            self._stop.set()  # here, before this thread takes up the next question
            raise
        except ContextFull as e:
            return self._record(i, error=str(e))
        except InvalidAnswer as e:
            return self._record(i, answer=answer.text, error=str(e))
        if answer.cut_in_thoughts:
            cut = "It was cut while it was thinking: raise --num_predict, and --num_ctx with it."
            return self._record(i, thought=answer.thoughts, answer="", error=cut)
        rate = answer.tokens_per_second
        return self._record(
            i,
            **({"thought": answer.thoughts} if answer.thoughts else {}),
            answer=value,
            seconds=round(answer.seconds, 3),
            **({"thought_seconds": round(answer.thought_seconds, 3)} if answer.thoughts else {}),
            tokens_per_second=rate and round(rate, 2),
            **answer.counts,
        )

    def _record(self, i: int, **result: Any) -> Record:
        return {**self.questions[i].about, "model": self.model, **result, **self._limits, "key": self.keys[i]}

    def _wait(self, gone: ServerGone) -> None:
        """Wait until the server answers again.

        Raises:
            UserError: If it is one of ours, which nobody else starts again, or the time is over.
        """
        answered = sum(record is not None for record in self.records)
        kept = f"{answered} of {len(self.questions)} answers are in {self.file}; the same command goes on from there."
        if not (self.server.is_ours and not self.server.is_running):
            print(f"\n{gone}\nWaiting up to {self.patience:.0f} s for it to come back.", file=sys.stderr)
            deadline = time.monotonic() + self.patience
            while time.monotonic() < deadline:
                if probe(self.server.url, timeout=2.0) is not None:
                    return
                time.sleep(0.5)
        raise UserError(f"{gone}\n{kept}")


def _line(record: Record) -> str:
    return json.dumps(record, ensure_ascii=False) + "\n"


def _whole_lines(file: Path) -> list[bytes]:
    """A file's lines; what stands after the last line break is cut off."""
    data = file.read_bytes() if file.is_file() else b""
    whole = data.rfind(b"\n") + 1
    if whole < len(data):
        with open(file, "r+b") as f:
            f.truncate(whole)
    return data[:whole].splitlines()
