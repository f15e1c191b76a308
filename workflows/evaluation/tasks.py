"""What is scored: our own tasks over local files, a group of medical tasks on the Hub, and whatever lm-eval knows.

A local task reads `data/NAME/test.jsonl`, rows of `{"prompt": [messages], "choices": [...], "answer": INDEX}`. A
choice's score is the log-likelihood of its text as the assistant's answer: `acc` takes the likeliest choice, `acc_norm`
the likeliest per character, as lm-eval defines them. The prompt is always rendered by the checkpoint's chat template,
the one source of our prompts; nothing has to be asked for.
"""

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import httpx
import lm_eval.tasks
from datasets.exceptions import DatasetsError
from lm_eval.api.group import Group
from lm_eval.api.task import ConfigurableTask, Task
from lm_eval.tasks import TaskManager

from data_prep.pubmedqa import HUB_ID, official_test_ids
from data_prep.rows import read_rows
from workflows.chat_template import ChatTemplate
from workflows.errors import UserError, did_you_mean, report_all

LOCAL = {
    "hpo_mcq": "hpo_mcq",
    "pubmedqa_local": "pubmedqa_mcq",
    "medmcqa_local": "medmcqa_mcq",
    "medqa_local": "medqa_mcq",
}
"""Local tasks and their folders under the data directory. Any other folder there named `…_mcq` is a task, too."""

MMLU_MEDICAL = (
    "anatomy",
    "clinical_knowledge",
    "college_biology",
    "college_medicine",
    "medical_genetics",
    "professional_medicine",
)
"""The subjects of MMLU that Med-PaLM and others report as its medical part (Singhal et al. 2023, arXiv 2212.13138)."""

_METRICS = [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in ("acc", "acc_norm")]


class LocalTask(ConfigurableTask):
    """Multiple choice over one local JSONL file, each prompt rendered by the checkpoint's chat template."""

    def __init__(self, name: str, file: Path, template: ChatTemplate) -> None:
        """Read the rows.

        Args:
            name: The task's name in results.
            file: The JSONL file.
            template: Renders each row's messages.

        Raises:
            UserError: If the file is missing, empty or has a bad row.
        """
        self._file, self._template = file, template
        config = {
            "task": name,
            "test_split": "test",
            "output_type": "multiple_choice",
            "doc_to_text": "prompt",  # a field; `doc_to_text` below renders it
            "doc_to_choice": "choices",
            "doc_to_target": "answer",
            "target_delimiter": "",
            "num_fewshot": 0,
            "metric_list": _METRICS,
            "metadata": {"version": 1.0, "file": str(file)},
        }
        super().__init__(config=config)

    def download(self, dataset_kwargs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Read the file; nothing is downloaded."""
        rows = read_rows(self._file, "scoring")
        fields = ("prompt", "choices", "answer")
        docs = [{**{name: row[name] for name in fields}, "tools": json.dumps(row.get("tools"))} for row in rows]
        self.dataset = {"test": datasets.Dataset.from_list(docs)}

    def doc_to_text(self, doc: dict[str, Any], doc_to_text: Any = None) -> str:
        """The prompt's text, up to where the answer's content begins: reasoning that the template opens is closed."""
        # The table gives every message the fields of all of them.
        messages = [{name: value for name, value in m.items() if value is not None} for m in doc["prompt"]]
        return self._template.answer_prompt(messages, json.loads(doc["tools"]))

    def fewshot_context(self, doc: dict[str, Any], *args: Any, **kwargs: Any) -> str:
        """The prompt alone, whatever lm-eval would add: no examples, no second chat template."""
        return self.doc_to_text(doc)


def _pubmedqa_text(doc: dict[str, Any]) -> str:
    """lm-eval's own prompt for PubMedQA, over the columns of `qiaojin/PubMedQA`."""
    abstract = "\n".join(doc["context"]["contexts"])
    return f"Abstract: {abstract}\nQuestion: {doc['question']}\nAnswer:"


def _official_test(questions: datasets.Dataset) -> datasets.Dataset:
    """The official 500 test questions among PubMedQA's 1,000 labelled ones."""
    ids = [str(pubid) for pubid in questions["pubid"]]
    test_ids = official_test_ids(dict(zip(ids, questions["final_decision"], strict=True)))
    return questions.select([i for i, pubid in enumerate(ids) if pubid in test_ids])


def hub_pubmedqa() -> dict[str, Any]:
    """lm-eval's `pubmedqa` over the authors' Parquet: its own names a script, which datasets 5 does not run."""
    return {
        "task": "pubmedqa",
        "dataset_path": HUB_ID,
        "dataset_name": "pqa_labeled",
        "training_split": None,
        "validation_split": None,
        "test_split": "train",  # the only one there is; `process_docs` picks the official test
        "process_docs": _official_test,
        "output_type": "multiple_choice",
        "doc_to_text": _pubmedqa_text,
        "doc_to_target": "final_decision",
        "doc_to_choice": ["yes", "no", "maybe"],
        "metric_list": _METRICS[:1],
        "metadata": {"version": 1.0, "scored_split": "test"},
    }


def medical_group() -> Group:
    """The Hub's medical tasks as one lm-eval group; its accuracy is the mean over the tasks, each counting the same."""
    folders = [Path(lm_eval.tasks.__file__).parent / name for name in ("medqa", "medmcqa", "mmlu/default")]
    manager = TaskManager(include_defaults=False, include_path=list(folders))  # to read all of lm-eval's takes long
    average = {"metric": "acc", "aggregation": "mean", "weight_by_size": False}
    group = Group.from_config({"group": "medical", "aggregate_metric_list": [average], "metadata": {"version": 1.0}})
    members = ["medqa_4options", "medmcqa", hub_pubmedqa(), *(f"mmlu_{subject}" for subject in MMLU_MEDICAL)]
    for task in manager.load(members)["tasks"].values():
        group.add(task)
    return group


@functools.cache
def all_tasks() -> TaskManager:
    """Every task that lm-eval knows; it reads thousands of files for that."""
    return TaskManager()


OWN: dict[str, Callable[[], Any]] = {"medical": medical_group, "pubmedqa": hub_pubmedqa}
"""What we define on the Hub's data; these take precedence over lm-eval's own of the same name."""


def local_file(name: str, data_dir: Path) -> Path | None:
    """The file of a local task, whether it exists or not; None if the name is not a local task's."""
    if name in LOCAL:
        return data_dir / LOCAL[name] / "test.jsonl"
    if name.endswith("_mcq"):
        return data_dir / name / "test.jsonl"
    return None


def load_tasks(names: list[str], data_dir: Path, template: ChatTemplate) -> list[Task | Group]:
    """Turn task names into what lm-eval evaluates; data sets on the Hub are downloaded by that.

    Args:
        names: Local tasks, `medical`, or any task, group or tag of lm-eval's.
        data_dir: The folder of prepared data.
        template: The checkpoint's chat template, for local tasks.

    Returns:
        Groups, and the tasks that are in none of them.

    Raises:
        UserError: If a name is unknown or a local task's data is missing (all of that at once), if a data set cannot be
            had, or a task is named twice.
    """
    files = {name: local_file(name, data_dir) for name in names}
    problems = [
        f"Task {name} reads {file}, which does not exist. Make it with `make data DATA={file.parent.name[:-4]}`."
        for name, file in files.items()
        if file is not None and not file.is_file()
    ]
    foreign = [name for name, file in files.items() if file is None and name not in OWN]
    manager = all_tasks() if foreign else TaskManager(include_defaults=False)
    problems += [_unknown(name, manager.all_tasks) for name in foreign if name not in manager.all_tasks]
    report_all(problems)
    try:
        loaded = manager.load([_specification(name, file, template) for name, file in files.items()])
    except (DatasetsError, httpx.HTTPError, OSError) as e:
        raise UserError(
            f"A task's data set could not be loaded: {type(e).__name__}: {e}\n"
            "Tasks outside data/ come from the Hugging Face Hub and need the internet; the local ones are "
            f"{', '.join(LOCAL)}."
        ) from None
    except ValueError as e:
        if "Duplicate task" not in str(e):
            raise
        raise UserError(f"--tasks names a task twice. {e}") from None
    inside = {child for children in loaded["group_map"].values() for child in children}
    found: dict[str, Task | Group] = {**loaded["groups"], **loaded["tasks"]}
    return [item for name, item in found.items() if name not in inside]


def _specification(name: str, file: Path | None, template: ChatTemplate) -> Any:
    """What lm-eval's task manager loads for a name."""
    if file is not None:
        return LocalTask(name, file, template)
    return OWN[name]() if name in OWN else name


def _unknown(name: str, known: list[str]) -> str:
    return (
        f"There is no task {name!r}.{did_you_mean(name, sorted({*known, *LOCAL, *OWN}))} "
        f"Local tasks: {', '.join(LOCAL)}. Groups: medical (on the Hugging Face Hub), and all of lm-eval's: "
        "`.venv/bin/lm-eval ls tasks`."
    )


def split_of(config: dict[str, Any]) -> str:
    """The split that lm-eval scores for a task with this configuration."""
    named = (config.get("metadata") or {}).get("scored_split")
    return str(named or config.get("test_split") or config.get("validation_split") or "test")
