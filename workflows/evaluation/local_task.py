"""A local task: multiple choice over rows of `{"prompt": [messages], "choices": [...], "answer": INDEX}`.

A choice's score is the log-likelihood of its text as the assistant's answer: `acc` takes the choice of the highest
score, `acc_norm` that of the highest score per character, as lm-eval defines them. The prompt is rendered by the
checkpoint's chat template, the one source of our prompts, or as plain text where the checkpoint has none.
"""

import json
from pathlib import Path
from typing import Any

import datasets
from lm_eval.api.task import ConfigurableTask

from data_prep.rows import Row, read_rows
from workflows.chat_template import ChatTemplate, Message
from workflows.errors import UserError

METRICS = [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in ("acc", "acc_norm")]
EXAMPLE_FILES = ("train.jsonl", "validation.jsonl")
"""Where few-shot examples come from, beside the questions that are scored: the first of these that exists."""
_FIELDS = ("prompt", "choices", "answer")


class LocalTask(ConfigurableTask):
    """Multiple choice over one local JSONL file.

    Attributes:
        shared_examples: Number of rows among the few-shot examples that are left out because they are scored.
    """

    def __init__(self, name: str, file: Path, template: ChatTemplate | None, num_fewshot: int = 0) -> None:
        """Read the rows.

        Args:
            name: The task's name in results.
            file: The JSONL file.
            template: Renders each row's messages; None writes them as plain text, as lm-eval does without a template.
            num_fewshot: Number of solved examples before each question.

        Raises:
            UserError: If the file is missing, empty or has a bad row, or there are fewer examples than asked for.
        """
        self._file, self._template = file, template
        self.shared_examples = 0
        self._examples: dict[str, list[Row]] = {}  # by system message
        config = {
            "task": name,
            "test_split": "test",
            "output_type": "multiple_choice",
            "doc_to_text": "prompt",  # a field; `doc_to_text` below renders it
            "doc_to_choice": "choices",
            "doc_to_target": "answer",
            "target_delimiter": " " if template is None else "",
            "num_fewshot": num_fewshot,
            "metric_list": METRICS,
            "metadata": {"version": 1.0, "file": str(file), "scored_split": file.stem},
        }
        super().__init__(config=config)
        if num_fewshot:
            self._read_examples(num_fewshot)

    def download(self, dataset_kwargs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Read the file; nothing is downloaded."""
        rows = read_rows(self._file, "scoring")
        if any("tool_calls" in message for row in rows for message in row["prompt"]):
            raise UserError(f"{self._file}: questions with options cannot have tool calls.")
        docs = [{name: row[name] for name in _FIELDS} for row in rows]
        if any("tools" in row for row in rows):  # as JSON: a table would give each schema the fields of all of them
            docs = [{**doc, "tools": json.dumps(row.get("tools"))} for doc, row in zip(docs, rows, strict=True)]
        self.dataset = {"test": datasets.Dataset.from_list(docs)}

    def _read_examples(self, number: int) -> None:
        file = next((file for name in EXAMPLE_FILES if (file := self._file.with_name(name)).is_file()), None)
        if file is None:
            raise UserError(
                f"--num_fewshot {number}: {self.config.task} has no questions to take examples from. Put solved ones "
                f"into {' or '.join(str(self._file.with_name(name)) for name in EXAMPLE_FILES)}, or leave the option "
                "out."
            )
        scored = {json.dumps(messages_of(doc)) for doc in self.test_docs()}
        for row in read_rows(file, "scoring"):
            if json.dumps(row["prompt"]) in scored:
                self.shared_examples += 1
            else:
                self._examples.setdefault(_system(row["prompt"]), []).append(row)
        for system in sorted({_system(messages_of(doc)) for doc in self.test_docs()}):
            if (there := len(self._examples.get(system, []))) < number:
                same = f" with the system message {system[:60]!r}" if system else ""
                raise UserError(
                    f"--num_fewshot {number}: {file} has {there} examples for {self.config.task}{same} that are not "
                    f"scored themselves. Ask for at most {there}, or add examples."
                )

    def fewshot_docs(self) -> list[Row]:
        """No documents for lm-eval's own sampler, which would take the questions that are scored."""
        return []

    def doc_to_text(self, doc: dict[str, Any], doc_to_text: Any = None) -> str:
        """The prompt's text without examples, up to where the assistant answers."""
        return self._text(messages_of(doc), tools_of(doc))

    def fewshot_context(
        self, doc: dict[str, Any], num_fewshot: int = 0, *, fewshot_as_multiturn: bool = True, **kwargs: Any
    ) -> str:
        """The prompt's text after its examples, whose answers are the right choices.

        Args:
            doc: The question.
            num_fewshot: Number of examples, drawn by the seed of `set_fewshot_seed`.
            fewshot_as_multiturn: Whether an example is a turn of its own in the conversation, or text in front of the
                question; as in lm-eval.
            **kwargs: lm-eval's further settings; the template was decided when the task was made.
        """
        messages = messages_of(doc)
        if not num_fewshot:
            return self._text(messages, tools_of(doc))
        system = _system(messages)
        first = 1 if system else 0
        turns: list[Message] = []
        for row in self.fewshot_rnd.sample(self._examples[system], num_fewshot):
            answer = {"role": "assistant", "content": row["choices"][row["answer"]]}
            turns += [*row["prompt"][first:], answer]
        if self._template is None or fewshot_as_multiturn:
            return self._text([*messages[:first], *turns, *messages[first:]], tools_of(doc))
        question = {**messages[first], "content": as_plain_text(turns) + "\n\n" + messages[first]["content"]}
        return self._text([*messages[:first], question, *messages[first + 1 :]], tools_of(doc))

    def _text(self, messages: list[Message], tools: list[Any] | None) -> str:
        """Messages as the model is shown them, up to where the answer's content begins: opened reasoning is closed."""
        return rendered(self._template, messages, tools, self._file)


def rendered(template: ChatTemplate | None, messages: list[Message], tools: list[Any] | None, file: Path) -> str:
    """A prompt's text up to where the answer's content begins; reasoning that the template opens is closed.

    Args:
        template: The checkpoint's; None gives plain text.
        messages: The prompt.
        tools: What may be called.
        file: Where the prompt is from, for messages.

    Raises:
        UserError: If the template refuses the messages.
    """
    if template is None:
        return as_plain_text(messages)
    try:
        return template.answer_prompt(messages, tools)
    except UserError as e:
        raise UserError(f"{file}, question {messages[-1]['content'][:60]!r}: {e}") from None


def messages_of(doc: dict[str, Any]) -> list[Message]:
    """A row's messages without the fields that `datasets` fills in where another message has them."""
    return [{name: value for name, value in message.items() if value is not None} for message in doc["prompt"]]


def tools_of(doc: dict[str, Any]) -> list[Any] | None:
    tools: list[Any] | None = json.loads(doc.get("tools", "null"))
    return tools


def _system(messages: list[Message]) -> str:
    return messages[0]["content"] if messages[0]["role"] == "system" else ""


def as_plain_text(messages: list[Message]) -> str:
    """A conversation without a template: a blank before an answer, an empty line after other messages."""
    pieces = []
    for message, following in zip(messages, [*messages[1:], None], strict=True):
        answered = following is not None and following["role"] == "assistant" and message["role"] == "user"
        pieces += [message["content"], "" if following is None else " " if answered else "\n\n"]
    return "".join(pieces)
