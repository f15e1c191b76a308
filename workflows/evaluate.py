"""`make evaluate`: score a checkpoint with lm-eval, and compare it with another one on the same questions."""

import json
import logging
from pathlib import Path
from typing import Any, Literal

from lm_eval import simple_evaluate
from lm_eval.api.task import Task
from lm_eval.tasks import TaskManager
from lm_eval.utils import handle_non_serializable

from workflows.chat_template import ChatTemplate, Reasoning
from workflows.checkpoint import finite, metric, versions, write_metrics
from workflows.errors import UserError, report_all
from workflows.evaluation.answer_tasks import AnswersTask, LikelihoodTask
from workflows.evaluation.cache import ResultCache
from workflows.evaluation.compare import (
    ANSWERS,
    Comparison,
    compare_samples,
    is_share,
    samples_file,
    wilson_interval,
    with_interval,
)
from workflows.evaluation.lm import LitGPTLM, check_for_evaluation, load_for_evaluation, model_hash
from workflows.evaluation.local_task import LocalTask
from workflows.evaluation.tasks import leaf_tasks, load_tasks, settle_prompts, split_of
from workflows.files import atomic_update, read_json, write_json, write_text
from workflows.measure import PeakMemory, seconds_of_step, step_began
from workflows.progress import watched
from workflows.training.processes import choose_accelerator, default_precision, unusable_device

UNFINISHED = "unfinished.jsonl"
"""Results of a run that was stopped; gone when the run is finished."""
METRICS = "metrics.json"
"""Written last: a folder without it holds no finished evaluation."""
WRITTEN, MAX_NEW_TOKENS = 4, 64
_PLAIN = Path(__file__).parent / "evaluation" / "plain.jinja"
"""What stands in for the chat template of a checkpoint that has none; no prompt of an evaluation is rendered by it."""


def setup(
    checkpoint_dir: Path,
    tasks: list[str] = ["hpo_mcq"],  # noqa: B006 (read only; jsonargparse shows it as the default)
    limit: int | None = None,
    baseline: Path | None = None,
    out_dir: Path | None = None,
    data_dir: Path = Path("data"),
    split: Literal["test", "validation"] = "test",
    precision: Literal["32-true", "bf16-true", "16-true"] | None = None,
    apply_chat_template: bool | None = None,
    num_fewshot: int | None = None,
    reasoning: Reasoning | None = None,
    fewshot_as_multiturn: bool = True,
    include_path: Path | None = None,
    row_tokens: int = 1024,
    batch_size: int = 16,
    written: int = WRITTEN,
    max_new_tokens: int = MAX_NEW_TOKENS,
    resume: bool = True,
    device: str | None = None,
    seed: int = 1234,
) -> None:
    """Score a checkpoint.

    Args:
        checkpoint_dir: A LitGPT checkpoint directory; one with `lit_model.pth.lora` alone is put on top of its base.
        tasks: Local tasks (hpo_mcq, pubmedqa_local, medmcqa_local, medqa_local, and folders of data_dir by the end of
            their name: `…_mcq` chooses an option, `…_questions` is answered and judged by the rules that its rows name,
            `…_taught` gives the log-probability a token of its answers), `medical` (a group on the Hub), tasks of
            `include_path`, or any task of lm-eval's.
        limit: Score the first so many questions of each task only.
        baseline: The out_dir of an earlier evaluation, to compare with on the same questions.
        out_dir: Where results go; by default out/evaluate/NAME, or out/RUN/evaluate/STEP for out/RUN/STEP/final.
        data_dir: The folder of prepared data, for local tasks.
        split: The split that local tasks score: validation is for choosing settings, so that the test stays unseen.
        precision: "bf16-true", "32-true" or "16-true"; null takes bfloat16 where the device computes in it.
        apply_chat_template: Render prompts by the checkpoint's chat template (true), or write them as plain text
            (false); null renders them if the checkpoint has a template, that is, for every instruction-tuned one.
        num_fewshot: Number of solved examples before each question. Local tasks take them from train.jsonl or
            validation.jsonl beside their test.jsonl, lm-eval's from the split that they name; null leaves it to the
            task, which is none for local ones.
        reasoning: Reasoning before answers; null is as the checkpoint was trained. "none" asks with thinking switched
            off, "drop" removes the reasoning of the prompts' earlier answers.
        fewshot_as_multiturn: Write each example as a turn of the conversation; false puts all of them into the
            user's message.
        include_path: A folder with task files of your own (lm-eval's YAML, `*.yaml`). `!function` in them and their
            templates run code from that folder, so name only a folder that you trust.
        row_tokens: Capacity of a packed row in tokens; bounds the memory.
        batch_size: Answers generated side by side, for tasks that generate and answers in words.
        written: Number of questions of each local task that are answered in the model's own words, too
            (`answers.jsonl`).
        max_new_tokens: Maximum number of tokens of such an answer and of answers to `…_questions`. Tasks of lm-eval's
            that generate name their own.
        resume: Keep the finished questions of a run that was stopped; false starts from scratch.
        device: "cpu", "cuda", …; null takes a GPU if there is one.
        seed: Seed of few-shot examples and of tasks that sample.

    Raises:
        UserError: If an argument, the checkpoint, a task or its data is not usable.
    """
    report_all(_problems(tasks, limit, row_tokens, batch_size, num_fewshot, written, max_new_tokens, device))
    device = device or choose_accelerator()
    precision = precision or default_precision(on_gpu=device.startswith("cuda"))
    out_dir = out_dir or default_out_dir(checkpoint_dir)
    if baseline is not None and not (baseline / METRICS).is_file():
        raise UserError(
            f"--baseline {baseline} has no {METRICS}: name the out_dir of an earlier `make evaluate` that has finished."
        )
    quiet_lm_eval()

    began = step_began()
    check_for_evaluation(checkpoint_dir)
    has_template = _has_template(checkpoint_dir)
    if apply_chat_template and not has_template:
        raise UserError(
            f"--apply_chat_template true: {checkpoint_dir} has no chat template, it looks like a base model. Leave the "
            "option out, or put a chat_template.jinja of your own into that folder."
        )
    template = ChatTemplate.from_checkpoint(checkpoint_dir, None if has_template else _PLAIN).asked_for(reasoning)
    chat = has_template if apply_chat_template is None else apply_chat_template
    shown = template if chat else None
    loaded = load_tasks(tasks, data_dir, shown, num_fewshot, include_path, split, max_new_tokens)
    leaves = leaf_tasks(loaded)
    local = [task for task in leaves if isinstance(task, LocalTask)]
    report_all(_without_effect(local, leaves, written, max_new_tokens, split))
    prompts, remarks = settle_prompts(leaves, chat, apply_chat_template, num_fewshot, fewshot_as_multiturn)
    print("\n".join(_describe_prompts(prompts)))
    with watched(out_dir), PeakMemory() as peak:
        model = load_for_evaluation(checkpoint_dir, precision, device)
        identity = {"model": model_hash(checkpoint_dir), "precision": precision, "device": device}
        unfinished = out_dir / UNFINISHED
        if not resume:
            unfinished.unlink(missing_ok=True)
        cache = ResultCache(unfinished, {**identity, "versions": versions()})
        kept, earlier = len(cache), cache.seconds
        if kept:
            print(f"resuming with {kept} finished requests of {unfinished}")
        lm = LitGPTLM(
            model,
            template,
            name=str(checkpoint_dir),
            row_tokens=row_tokens,
            batch_size=batch_size,
            cache=cache,
            seed=seed,
        )
        results = simple_evaluate(
            model=lm,
            tasks=loaded,
            task_manager=TaskManager(include_defaults=False),  # the tasks are loaded
            limit=limit,
            apply_chat_template=chat,
            num_fewshot=num_fewshot,
            fewshot_as_multiturn=fewshot_as_multiturn,
            random_seed=seed,
            numpy_random_seed=seed,
            torch_random_seed=seed,
            fewshot_random_seed=seed,
        )
        tokens, spent = cache.tokens, cache.seconds
        answers = [row for task in local for row in _written(lm, task, written, max_new_tokens)]
    results = json.loads(json.dumps(results, default=handle_non_serializable))
    samples = results.pop("samples")
    results["prompts"] = {task: how | lm.prompts.get(task, {}) for task, how in prompts.items()}
    compared: list[Comparison] = []
    if baseline is not None:
        compared, differences = compare_samples(baseline, samples)
        remarks += differences + _prompts_differ(baseline, prompts)
    if lm.folded:
        remarks.append(
            "the chat template takes no system message: a task's description opens the first user message instead"
        )
    if lm.truncated:
        remarks.append(f"{lm.truncated} requests were longer than the model's context and lost text at their beginning")

    with atomic_update(out_dir, last=[METRICS]) as fresh:
        write_results(fresh, results, samples)
        write_text(fresh / ANSWERS, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in answers))
        write_metrics(
            fresh / METRICS,
            metric_rows(results),
            seconds=seconds_of_step(began) + earlier,
            tokens_per_second=tokens / spent if spent else None,
            peak_bytes=peak.bytes,
            checkpoint_dir=str(checkpoint_dir),
            **identity,
            prompts=prompts,
            comparison=[comparison.row() for comparison in compared],
            remarks=remarks,
        )
    cache.delete()
    print(table(results, compared))
    print("\n".join([*remarks, f"{tokens:,} tokens, {tokens / max(spent, 1e-9):,.0f} a second"]))
    print(f"results: {out_dir}")


def _problems(
    tasks: list[str],
    limit: int | None,
    row_tokens: int,
    batch_size: int,
    num_fewshot: int | None,
    written: int,
    max_new_tokens: int,
    device: str | None,
) -> list[str]:
    problems = unusable_device(device)
    if not tasks:
        problems.append("--tasks names no task, e.g. --tasks '[hpo_mcq]'.")
    if doubled := sorted({task for task in tasks if tasks.count(task) > 1}):
        problems.append(f"--tasks names {', '.join(doubled)} more than once.")
    for name, value, least in (
        ("limit", limit, 1),
        ("row_tokens", row_tokens, 1),
        ("batch_size", batch_size, 1),
        ("num_fewshot", num_fewshot, 0),
        ("written", written, 0),
        ("max_new_tokens", max_new_tokens, 1),
    ):
        if value is not None and value < least:
            problems.append(f"--{name} must be at least {least}, not {value}.")
    return problems


def _without_effect(
    local: list[LocalTask], leaves: list[Task], written: int, max_new_tokens: int, split: str
) -> list[str]:
    """Options that are for local tasks where none is among the tasks, as messages."""
    answered = [task for task in leaves if isinstance(task, AnswersTask)]
    given = {
        "written": written != WRITTEN and not local,
        "max_new_tokens": max_new_tokens != MAX_NEW_TOKENS and not local and not answered,
        "split": split != "test"
        and not any(isinstance(task, LocalTask | AnswersTask | LikelihoodTask) for task in leaves),
    }
    return [
        f"--{name} is for local tasks, and --tasks names none that it concerns. Leave it out."
        for name, is_given in given.items()
        if is_given
    ]


def _has_template(checkpoint_dir: Path) -> bool:
    in_config = read_json(checkpoint_dir / "tokenizer_config.json").get("chat_template")
    return (checkpoint_dir / "chat_template.jinja").is_file() or isinstance(in_config, str)


def _describe_prompts(prompts: dict[str, dict[str, Any]]) -> list[str]:
    """Lines on how the prompts are made, one for all tasks that are alike."""
    alike: dict[str, list[str]] = {}
    for task, how in prompts.items():
        text = "by the chat template" if how["chat_template"] else "without the chat template"
        if number := how["num_fewshot"]:
            turns = {True: ", a turn each", False: ", in one message", None: ""}[how.get("fewshot_as_multiturn")]
            text += f", after {number} examples{turns}"
        alike.setdefault(text, []).append(task)
    return [f"{', '.join(tasks)}: prompts {text}" for text, tasks in alike.items()]


def _prompts_differ(baseline: Path, prompts: dict[str, dict[str, Any]]) -> list[str]:
    """Remarks on tasks whose prompts the baseline made in another way."""
    earlier = read_json(baseline / METRICS).get("prompts")
    if not isinstance(earlier, dict):
        return ["the baseline does not say how its prompts were made (chat template, examples)"]
    shared = {task: earlier[task] for task in prompts if task in earlier}
    return [
        f"{task}: the baseline's prompts were made in another way, {shared[task]} there, {prompts[task]} here"
        for task in shared
        if shared[task] != prompts[task]
    ]


def _written(lm: LitGPTLM, task: LocalTask, number: int, max_new_tokens: int) -> list[dict[str, str]]:
    """The first questions that were scored, with the right answers and the model's own words after the same prompts."""
    asked = [instance for instance in task.instances if instance.idx == 0][:number]
    answers = lm.write([instance.args[0] for instance in asked], max_new_tokens)
    return [
        {
            "task": task.config.task,
            "question": instance.doc["prompt"][-1]["content"],
            "wanted": instance.doc["choices"][instance.doc["answer"]],
            "answer": answer,
        }
        for instance, answer in zip(asked, answers, strict=True)
    ]


def default_out_dir(checkpoint_dir: Path) -> Path:
    """out/RUN/evaluate/STEP for out/RUN/STEP/final, else out/evaluate/NAME: checkpoints/ holds downloads only."""
    if checkpoint_dir.name == "final":
        step = checkpoint_dir.resolve().parent
        return checkpoint_dir.parent.parent / "evaluate" / step.name
    return Path("out") / "evaluate" / checkpoint_dir.resolve().name


def quiet_lm_eval() -> None:
    """lm-eval narrates at INFO and warns of what we do on purpose; its errors stay."""
    logging.getLogger("lm_eval").setLevel(logging.ERROR)


def metric_rows(results: dict[str, Any]) -> list[dict[str, Any]]:
    """lm-eval's scores as rows of metrics.json, with the task's name; groups come last."""
    rows = []
    for task, scores in {**results["results"], **results.get("groups", {})}.items():
        config = results["configs"].get(task, {})
        n = results["n-samples"].get(task, {}).get("effective", scores.get("sample_len"))
        for key, value in scores.items():
            name, _, kind = key.partition(",")
            if kind and not name.endswith("_stderr") and isinstance(value, int | float):
                stderr = scores.get(f"{name}_stderr,{kind}")
                stderr = float(stderr) if isinstance(stderr, int | float) else None
                row = metric(name, float(value), stderr=stderr, n=n, split=split_of(config))
                if n and is_share(row["value"], stderr, n):
                    row["low"], row["high"] = wilson_interval(row["value"], n)
                rows.append({**row, "task": task} | ({"filter": kind} if kind != "none" else {}))
    return rows


def write_results(out_dir: Path, results: dict[str, Any], samples: dict[str, list[dict[str, Any]]]) -> None:
    """Write lm-eval's results.json, and one line for each question in samples_TASK.jsonl."""
    for task, rows in samples.items():
        named = [
            {**row, "arguments": {f"gen_args_{i}": _numbered(args) for i, args in enumerate(row["arguments"])}}
            for row in rows
        ]
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in named)
        write_text(samples_file(out_dir, task), "".join(lines))
    write_json(out_dir / "results.json", finite(results, {}))


def _numbered(args: list[Any]) -> dict[str, Any]:
    return {f"arg_{i}": arg for i, arg in enumerate(args)}


def table(results: dict[str, Any], compared: list[Comparison]) -> str:
    """The scores as text: a line for each task and metric, with the difference where there is a baseline."""
    by_name = {(c.task, c.metric): c for c in compared}
    lines = [
        ["task", "metric", "n"] + (["base", "tuned", "difference", "95% interval", "p"] if compared else ["score"])
    ]
    for row in metric_rows(results):
        cells = [row["task"], row["name"] + (f" ({row['filter']})" if "filter" in row else ""), str(row["n"])]
        if (c := by_name.get((row["task"], row["name"]))) is not None:
            cells[2] = str(c.n)
            cells += map(with_interval, c.means())
            cells += [f"{c.difference:+.3f}", f"{c.low:+.3f} to {c.high:+.3f}", f"{c.p_value:.2g}"]
        else:
            cells += ["", with_interval(row)] if compared else [with_interval(row)]
        lines.append(cells)
    widths = [max(len(line[i]) for line in lines if i < len(line)) for i in range(len(lines[0]))]
    return "\n".join("  ".join(f"{c:<{w}}" for c, w in zip(line, widths, strict=False)).rstrip() for line in lines)
