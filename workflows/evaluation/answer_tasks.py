"""Two tasks over prepared data beside those with options: answers judged by rules, and the likelihood of answers.

`NAME_questions` holds `{"prompt", "answers", "kind", "rules"}` rows. Each kind is a task: the questions are answered
greedily, and every rule of the kind (a reward of `workflows.training.answer_rules`) is a metric. Rows without `rules`
are judged by `exact`. The answers are kept in the task's samples file.

`NAME_taught` holds `messages` rows, as `teach` writes them: the mean log-probability a token of the last answer, turn
end included. Scored on a model's own earlier answers it says how much of what the model could do was lost.
"""

import json
from pathlib import Path
from typing import Any

import datasets
from lm_eval.api.group import Group
from lm_eval.api.task import ConfigurableTask

from data_prep.rows import Row, read_rows
from workflows.chat_template import ChatTemplate
from workflows.errors import UserError, did_you_mean
from workflows.evaluation.local_task import messages_of, rendered, tools_of
from workflows.training.rewards import BUILT_IN, RULES, Sample

QUESTIONS, TAUGHT = "_questions", "_taught"
"""Ends of the names of tasks and of their folders under the data directory."""
NO_KIND = "answers"
"""The task's part of the name for rows without a kind."""


class _RowsTask(ConfigurableTask):
    """A task over rows at hand, whose prompts the chat template renders."""

    def __init__(
        self, name: str, file: Path, docs: list[Row], template: ChatTemplate | None, metrics: list[str], **config: Any
    ) -> None:
        self._file, self._template = file, template
        texts = [{**doc, "tools": json.dumps(doc.get("tools"))} for doc in docs]  # a table would mix up the schemas
        self.dataset = {"test": datasets.Dataset.from_list(texts)}
        super().__init__(
            config={
                "task": name,
                "test_split": "test",
                "doc_to_text": "prompt",
                "doc_to_target": "target",
                "num_fewshot": 0,
                "process_results": self.measure,
                "metric_list": [
                    {"metric": metric, "aggregation": "mean", "higher_is_better": True} for metric in metrics
                ],
                "metadata": {"version": 1.0, "file": str(file), "scored_split": file.stem},
                **config,
            }
        )

    def download(self, dataset_kwargs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Nothing is downloaded: the rows are at hand."""

    def measure(self, doc: dict[str, Any], results: list[Any]) -> dict[str, float]:
        """The metrics of one row."""
        raise NotImplementedError

    def doc_to_text(self, doc: dict[str, Any], doc_to_text: Any = None) -> str:
        """The prompt's text, up to where the assistant answers."""
        return rendered(self._template, messages_of(doc), tools_of(doc), self._file)

    def doc_to_target(self, doc: dict[str, Any], doc_to_target: Any = None) -> str:
        """What is scored after the prompt, or would be right."""
        return str(doc["target"])

    def fewshot_context(self, doc: dict[str, Any], num_fewshot: int = 0, **kwargs: Any) -> str:
        """The prompt's text: there are no examples, and the template was decided when the task was made."""
        return self.doc_to_text(doc)


class AnswersTask(_RowsTask):
    """Greedy answers to the questions of one kind, each judged by the kind's rules."""

    def __init__(
        self, name: str, file: Path, rows: list[Row], template: ChatTemplate | None, max_new_tokens: int
    ) -> None:
        """Take the rows of one kind.

        Args:
            name: The task's name in results.
            file: Where the rows are from.
            rows: `verifiable` rows with the same rules.
            template: Renders the prompts; None writes them as plain text.
            max_new_tokens: Maximum number of tokens of an answer.
        """
        self.rules = rules_of(rows[0])
        docs = [
            {"prompt": row["prompt"], "answers": row["answers"], "tools": row.get("tools"), "target": row["answers"][0]}
            for row in rows
        ]
        generation = {"until": [], "do_sample": False, "max_gen_toks": max_new_tokens}
        super().__init__(
            name, file, docs, template, self.rules, output_type="generate_until", generation_kwargs=generation
        )

    def measure(self, doc: dict[str, Any], results: list[Any]) -> dict[str, float]:
        """What each rule says of the answer."""
        row = {"prompt": messages_of(doc), "answers": doc["answers"]}
        sample = Sample(row, results[0], tokens=0, truncated=False, max_new_tokens=0)
        return {rule: float(BUILT_IN[rule](sample)) for rule in self.rules}


class LikelihoodTask(_RowsTask):
    """Log-probability a token of the answers that conversations end with; the mean is over the answers."""

    def __init__(self, name: str, file: Path, rows: list[Row], template: ChatTemplate) -> None:
        """Take the rows.

        Args:
            name: The task's name in results.
            file: Where the rows are from.
            rows: `messages` rows.
            template: Renders the prompts, and the ends of the answers.
        """
        docs = []
        for row in rows:
            target = template.answer_text(row["messages"][-1]["content"])
            tokens = len(template.encode_inside(target))
            docs.append({"prompt": row["messages"][:-1], "tools": row.get("tools"), "target": target, "tokens": tokens})
        super().__init__(name, file, docs, template, ["logprob"], output_type="loglikelihood")

    def doc_to_text(self, doc: dict[str, Any], doc_to_text: Any = None) -> str:
        """The prompt's text as the model is asked; what the template writes before an answer is part of the target."""
        assert self._template is not None
        return self._template.render(messages_of(doc), add_generation_prompt=True, tools=tools_of(doc))

    def measure(self, doc: dict[str, Any], results: list[Any]) -> dict[str, float]:
        """The mean over the answer's tokens."""
        return {"logprob": results[0][0] / doc["tokens"]}


def rules_of(row: Row) -> list[str]:
    """The rules by which a row's answers are judged."""
    return list(row.get("rules", ["exact"]))


def file_of(name: str, data_dir: Path, split: str) -> Path | None:
    """The file of such a task, whether it exists or not; None if the name is not one's."""
    return data_dir / name / f"{split}.jsonl" if name.endswith((QUESTIONS, TAUGHT)) else None


def how_to_make(name: str) -> str:
    """Say how the data of such a task is made."""
    if name.endswith(TAUGHT):
        return (
            "It holds a model's own answers: `python -m workflows teach --checkpoint_dir BASE --data "
            f"data/{name.removesuffix(TAUGHT).partition('-')[0]} --out_dir data/{name} --max_test_rows 1000`."
        )
    return f"Make it with `make data DATA={name.removesuffix(QUESTIONS)}`."


def load(name: str, file: Path, template: ChatTemplate | None, max_new_tokens: int) -> Group | ConfigurableTask:
    """Make the task of a name, or the group of its kinds.

    Args:
        name: Ends in `_questions` or `_taught`.
        file: Its rows.
        template: The checkpoint's chat template; None has prompts as plain text.
        max_new_tokens: Maximum number of tokens of an answer.

    Raises:
        UserError: If the rows are not of the task's shape, or a rule is not known.
    """
    if name.endswith(TAUGHT):
        if template is None:
            raise UserError(
                f"Task {name} scores answers as the chat template renders them; leave out --apply_chat_template false, "
                "and evaluate a checkpoint that has a template."
            )
        return LikelihoodTask(name, file, read_rows(file, "messages"), template)
    kinds: dict[str, list[Row]] = {}
    for row in read_rows(file, "verifiable"):
        kinds.setdefault(str(row.get("kind", NO_KIND)), []).append(row)
    group = Group.from_config({"group": name, "metadata": {"version": 1.0}})
    for kind, rows in kinds.items():
        _check_rules(kind, rows, file)
        group.add(AnswersTask(f"{name}/{kind}", file, rows, template, max_new_tokens))
    return group


def _check_rules(kind: str, rows: list[Row], file: Path) -> None:
    known = [rule for rule in RULES if rule != "letter"]
    for row in rows:
        rules = row.get("rules", ["exact"])
        if not isinstance(rules, list) or not rules or not all(isinstance(rule, str) for rule in rules):
            raise UserError(f'{file}, kind {kind}: "rules" must be a list of names, e.g. ["exact"].')
        if unknown := [rule for rule in rules if rule not in known]:
            raise UserError(
                f"{file}, kind {kind}: there is no rule {unknown[0]!r}.{did_you_mean(unknown[0], known)} There are "
                f"{', '.join(known)}."
            )
        if rules != rules_of(rows[0]):
            raise UserError(
                f"{file}: rows of kind {kind} name different rules, {rules_of(rows[0])} and {rules}. Give them "
                "different kinds."
            )
