import functools
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import httpx
import lm_eval.tasks
from datasets.exceptions import DatasetsError
from lm_eval.api.group import Group
from lm_eval.api.task import ConfigurableTask, Task
from lm_eval.tasks import TaskManager
from lm_eval.tasks._factory import TaskFactory
from lm_eval.tasks._index import Entry, Kind
from lm_eval.tasks._yaml_loader import load_yaml

from data_prep.pubmedqa import HUB_ID, official_test_ids
from workflows.chat_template import ChatTemplate
from workflows.errors import UserError, did_you_mean, report_all
from workflows.evaluation import answer_tasks
from workflows.evaluation.local_task import METRICS, LocalTask

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


def _pubmedqa_text(doc: dict[str, Any]) -> str:
    """lm-eval's own prompt for PubMedQA, over the columns of `qiaojin/PubMedQA`."""
    abstract = "\n".join(doc["context"]["contexts"])
    return f"Abstract: {abstract}\nQuestion: {doc['question']}\nAnswer:"


def _official(questions: datasets.Dataset, test: bool) -> datasets.Dataset:
    """The official 500 test questions among PubMedQA's 1,000 labelled ones, or the others."""
    ids = [str(pubid) for pubid in questions["pubid"]]
    test_ids = official_test_ids(dict(zip(ids, questions["final_decision"], strict=True)))
    return questions.select([i for i, pubid in enumerate(ids) if (pubid in test_ids) == test])


def hub_pubmedqa() -> dict[str, Any]:
    """lm-eval's `pubmedqa` over the authors' Parquet: its own names a script, which datasets 5 does not run."""
    return {
        "task": "pubmedqa",
        "dataset_path": HUB_ID,
        "dataset_name": "pqa_labeled",
        "training_split": None,
        "validation_split": None,
        "test_split": "train",  # the only one there is; `process_docs` picks the official test
        "process_docs": functools.partial(_official, test=True),
        "fewshot_split": "train",
        "fewshot_config": {"process_docs": functools.partial(_official, test=False)},
        "output_type": "multiple_choice",
        "doc_to_text": _pubmedqa_text,
        "doc_to_target": "final_decision",
        "doc_to_choice": ["yes", "no", "maybe"],
        "metric_list": METRICS[:1],
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


def _manager(include_path: Path | None, include_defaults: bool) -> TaskManager:
    """The tasks of a user's folder, before lm-eval's own of the same name."""
    manager = TaskManager(include_path=include_path, include_defaults=False)
    if include_defaults:
        manager._index = {**all_tasks().task_index, **manager.task_index}
    if include_path is not None:
        manager._factory = _BesideItsData(include_path.resolve())
    return manager


class _BesideItsData(TaskFactory):
    """Reads task files; data that a user's file names by a relative path may be beside the file, too."""

    def __init__(self, include_path: Path) -> None:
        super().__init__()
        self._include_path = include_path

    def _load_full_config(self, entry: Entry, overrides: dict[str, Any] | None = None) -> dict[str, Any]:
        config = super()._load_full_config(entry, overrides)
        if entry.yaml_path is not None and entry.yaml_path.resolve().is_relative_to(self._include_path):
            folder = entry.yaml_path.resolve().parent
            if str(config.get("dataset_path", "")).startswith("."):
                config["dataset_path"] = _found(config["dataset_path"], folder)
            kwargs = dict(config.get("dataset_kwargs") or {})
            kwargs |= {name: _found(kwargs[name], folder) for name in ("data_files", "data_dir") if kwargs.get(name)}
            config |= {"dataset_kwargs": kwargs} if kwargs else {}
        return config


def _found(named: Any, folder: Path) -> Any:
    """Paths that do not exist in the current folder but do in this one, made whole; also in lists and by split."""
    if isinstance(named, dict):
        return {split: _found(value, folder) for split, value in named.items()}
    if isinstance(named, list):
        return [_found(value, folder) for value in named]
    beside = isinstance(named, str) and not Path(named).exists() and (folder / named).exists()
    return str(folder / named) if beside else named


OWN: dict[str, Callable[[], Any]] = {"medical": medical_group, "pubmedqa": hub_pubmedqa}
"""What we define on the Hub's data; these take precedence over lm-eval's own of the same name."""


def local_file(name: str, data_dir: Path, split: str = "test") -> Path | None:
    """The file of a local task with options, whether it exists or not; None if the name is not one's."""
    if name in LOCAL:
        return data_dir / LOCAL[name] / f"{split}.jsonl"
    return data_dir / name / f"{split}.jsonl" if name.endswith("_mcq") else None


def load_tasks(
    names: list[str],
    data_dir: Path,
    template: ChatTemplate | None,
    num_fewshot: int | None = None,
    include_path: Path | None = None,
    split: str = "test",
    max_new_tokens: int = 64,
) -> list[Task | Group]:
    """Turn task names into what lm-eval evaluates; data sets on the Hub are downloaded by that.

    Args:
        names: Local tasks (with options, of questions, of answers), `medical`, tasks of `include_path`, or any task,
            group or tag of lm-eval's.
        data_dir: The folder of prepared data.
        template: The checkpoint's chat template, for local tasks; None has them as plain text.
        num_fewshot: Number of examples before each question of a local task.
        include_path: A user's folder of task files. A name that one of them defines means that one.
        split: The split that local tasks score.
        max_new_tokens: Maximum number of tokens of an answer of a local task.

    Returns:
        Groups, and the tasks that are in none of them.

    Raises:
        UserError: If a name is unknown or a local task's data is missing (all of that at once), if a data set cannot be
            had, a user's task file is faulty, or a task is named twice.
    """
    if include_path is not None and not include_path.is_dir():
        raise UserError(
            f"--include_path {include_path} is not a folder. Name the one that holds your task files (*.yaml)."
        )
    manager = _manager(include_path, include_defaults=False)
    users = manager.task_index
    options = {name: None if name in users else local_file(name, data_dir, split) for name in names}
    answered = {name: None if name in users else answer_tasks.file_of(name, data_dir, split) for name in names}
    files = {name: options[name] or answered[name] for name in names}
    problems = [
        f"Task {name} reads {file}, which does not exist. "
        + (
            f"Make it with `make data DATA={file.parent.name[:-4]}`."
            if options[name]
            else answer_tasks.how_to_make(name)
        )
        for name, file in files.items()
        if file is not None and not file.is_file()
    ]
    foreign = [name for name, file in files.items() if file is None and (name in users or name not in OWN)]
    if any(name not in users or users[name].kind is Kind.GROUP for name in foreign):  # a group may name lm-eval's
        manager = _manager(include_path, include_defaults=True)
    known = {*manager.task_index, *LOCAL, *OWN}
    problems += [_unknown(name, known, include_path) for name in foreign if name not in manager.task_index]
    if include_path is not None:
        problems += _ambiguous(foreign, include_path)
        if not problems and not any(name in users for name in names):
            has = f"it defines {', '.join(sorted(users))}" if users else "it defines none"
            problems.append(f"--include_path {include_path}: --tasks names none of its tasks; {has}.")
    report_all(problems)
    own = {name: users[name] for name in foreign if name in users}
    for name, entry in own.items():
        print(f"{name}: as {entry.yaml_path or include_path} defines it")
    try:
        specifications = [
            LocalTask(name, file, template, num_fewshot or 0)
            if file is not None and options[name] is not None
            else answer_tasks.load(name, file, template, max_new_tokens)
            if file is not None
            else OWN[name]()
            if name in OWN and name not in users
            else name
            for name, file in files.items()
        ]
        loaded = manager.load(specifications)
    except UserError:
        raise
    except Exception as e:
        raise UserError(_why_not_loaded(e, own, include_path)) from None
    inside = {child for children in loaded["group_map"].values() for child in children}
    found: dict[str, Task | Group] = {**loaded["groups"], **loaded["tasks"]}
    return [item for name, item in found.items() if name not in inside]


def _why_not_loaded(error: Exception, own: dict[str, Entry], include_path: Path | None) -> str:
    """The message for a task that lm-eval could not make; an error that is none of the user's is raised again."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    where = f"{Path(frame.filename).name}, line {frame.lineno}, in {frame.name}"
    reason = f"{type(error).__name__}: {error} ({where})"
    if isinstance(error, ValueError) and "Duplicate task" in str(error):
        return f"--tasks names a task twice. {error}"
    if own:  # whatever a user's file or function may have raised
        return (
            f"A task could not be loaded. {include_path} defines {', '.join(own)}. {reason}\n"
            "Data that a task file names by a relative path is looked for in the current folder and beside the file."
        )
    if isinstance(error, ImportError):
        return f"A task needs a package that is not installed. {reason}"
    closed = isinstance(error, RuntimeError) and "httpx" in Path(frame.filename).parts  # a second try after a lost one
    if closed or isinstance(error, DatasetsError | httpx.HTTPError | OSError):
        return (
            f"A task's data set could not be loaded: {reason}\n"
            "Tasks outside data/ come from the Hugging Face Hub and need the internet; the local ones are "
            f"{', '.join(LOCAL)}."
        )
    raise error


def _unknown(name: str, known: set[str], include_path: Path | None) -> str:
    faulty = [f"{file}: {why}" for file, _, why in _task_files(include_path) if why]
    return (
        f"There is no task {name!r}.{did_you_mean(name, sorted(known))} "
        f"Local tasks: {', '.join(LOCAL)}, and folders of data/ named …_mcq, …_questions or …_taught. "
        "Groups: medical (on the Hugging Face Hub), and all of lm-eval's: "
        "`.venv/bin/lm-eval ls tasks`."
        + (f" Of --include_path these files could not be read: {'; '.join(faulty)}." if faulty else "")
    )


def _ambiguous(names: list[str], include_path: Path) -> list[str]:
    """Names that two files of a folder define; lm-eval would take the first without a word."""
    by_name: dict[str, list[str]] = {}
    for file, name, _ in _task_files(include_path):
        by_name.setdefault(name, []).append(str(file))
    return [
        f"Task {name!r} is defined by {' and '.join(files)}. Give each a name of its own."
        for name in names
        if len(files := by_name.get(name, [])) > 1
    ]


def _task_files(include_path: Path | None) -> Iterator[tuple[Path, str, str]]:
    """The YAML files of a folder, each with the name that it defines and why it cannot be read; "" for neither."""
    for file in sorted(include_path.rglob("*.y*ml")) if include_path is not None else []:
        if file.suffix == ".yml":
            yield file, "", "lm-eval reads files that end in .yaml; rename it"
            continue
        try:
            config = load_yaml(file, resolve_func=False)
        except Exception as e:  # of the YAML parser, of the file system, of an include
            yield file, "", " ".join(str(e).split())
            continue
        name = config.get("group") or config.get("task")
        yield file, name if isinstance(name, str) else "", ""


def leaf_tasks(loaded: list[Task | Group]) -> list[Task]:
    """The tasks of `load_tasks`, those inside groups included."""
    return [task for item in loaded for task in (item.get_all_tasks() if isinstance(item, Group) else [item])]


def settle_prompts(
    tasks: list[Task], chat: bool, asked: bool | None, num_fewshot: int | None, multiturn: bool
) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """Find out how each task's prompts are made, before anything is scored.

    Args:
        tasks: The tasks, as `leaf_tasks` gives them.
        chat: Whether prompts are rendered by the chat template.
        asked: What `--apply_chat_template` says.
        num_fewshot: What `--num_fewshot` says.
        multiturn: What `--fewshot_as_multiturn` says.

    Returns:
        For each task `{"chat_template", "num_fewshot", "fewshot_as_multiturn"}`, and remarks.

    Raises:
        UserError: If an option would have no effect on a task, or there are fewer examples than asked for.
    """
    made: dict[str, dict[str, Any]] = {}
    problems, remarks = [], []
    for task in tasks:
        name = task.task_name
        if getattr(task, "MULTIMODAL", False):
            problems.append(f"Task {name} asks about pictures or sound; checkpoints of this project read text.")
        if getattr(task, "UNSAFE_CODE", False):
            problems.append(f"Task {name} runs what the model writes as code, which is not supported here.")
        fixed = task.get_config("num_fewshot")
        number = int(fixed or 0) if num_fewshot is None else num_fewshot
        rendered = chat
        if not isinstance(task, ConfigurableTask) or task.OUTPUT_TYPE == "loglikelihood_rolling":
            what = "scores whole texts" if isinstance(task, ConfigurableTask) else "makes its own prompts"
            rendered, number = False, 0
            options = {"apply_chat_template true": asked is True, f"num_fewshot {num_fewshot}": bool(num_fewshot)}
            problems += [
                f"Task {name} {what}: --{option} would have no effect." for option, given in options.items() if given
            ]
        elif isinstance(task, LocalTask):
            if task.shared_examples:
                remarks.append(
                    f"{name}: {task.shared_examples} examples are questions of the test, too, and are not used"
                )
        elif num_fewshot and fixed == 0:
            problems.append(
                f"Task {name} is defined without examples (num_fewshot: 0): --num_fewshot has no effect on it."
            )
        elif number:
            problem, remark = _check_examples(task, number)
            problems += problem
            remarks += remark
        made[name] = {"chat_template": rendered, "num_fewshot": number}
        if rendered and number:
            made[name]["fewshot_as_multiturn"] = multiturn
    if not multiturn and not any("fewshot_as_multiturn" in how for how in made.values()):
        problems.append("--fewshot_as_multiturn false has no effect without --num_fewshot and the chat template.")
    report_all(problems)
    return made, remarks


def _check_examples(task: ConfigurableTask, number: int) -> tuple[list[str], list[str]]:
    """Problems and remarks about a task's examples; a question is kept from being its own example.

    lm-eval leaves the question out only where `fewshot_split` names the test split. Here it does wherever examples come
    from the questions that are scored.
    """
    config, fewshot = task.config, task.fewshot_cfg
    source = fewshot.split
    if source is None and fewshot.samples is None:
        source = config.training_split or config.validation_split or config.test_split
    scored = config.test_split or config.validation_split
    shared = source is not None and source == scored and fewshot.process_docs is config.process_docs
    if shared:
        fewshot.split = config.test_split
    available = len(task.sampler.df) - (fewshot.split == config.test_split)  # one may be the question itself
    if available < number:
        return [f"--num_fewshot {number}: task {config.task} has {available} examples."], []
    remark = f"{config.task}: its examples are other questions of the split that is scored ({scored})"
    return [], [remark] if shared else []


def split_of(config: dict[str, Any]) -> str:
    """The split that lm-eval scores for a task with this configuration."""
    named = (config.get("metadata") or {}).get("scored_split")
    return str(named or config.get("test_split") or config.get("validation_split") or "test")
