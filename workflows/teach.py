"""`make teach`: let a teacher answer a data set's questions, and keep that as data to train a student on.

Sequence-level distillation (Kim & Rush 2016, arXiv 1606.07947, sec. 3.2): the student is fine-tuned (`lora`,
`distill-lm`) on what its teacher would say, the most likely answer or sampled ones. So DeepSeek-R1's distilled models
were made, from answers with their thoughts of which a reward had kept the right ones (DeepSeek-AI 2025, arXiv
2501.12948, sec. 2.3.3 and 2.4). Teacher and student need no common vocabulary here: what is kept is text.
"""

import math
import shutil
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from data_prep.rows import Row, write_rows
from workflows.chat_template import ChatTemplate, Reasoning
from workflows.checkpoint import (
    check_checkpoint_dir,
    describe_source,
    load_config,
    metric,
    plain,
    versions,
    write_metrics,
)
from workflows.errors import UserError, report_all
from workflows.evaluation.cache import ResultCache, request_key
from workflows.files import atomic_dir, read_json, sha256, write_json
from workflows.measure import PeakMemory, seconds_of_step, step_began
from workflows.progress import Bar, watched
from workflows.training.held_out import text_of
from workflows.training.model import GPT, Precision, load_model
from workflows.training.processes import Accelerator, choose_accelerator, default_precision
from workflows.training.questions import Question, encode_questions, read_and_count
from workflows.training.rewards import Rewards, Sample, WeightedReward
from workflows.training.rollouts import Rollout, generate

SLICE = 256
"""Answers that are kept together: a run that was stopped goes on after the last whole slice. Each slice's random
numbers follow those of the one before it."""
DECIDING = ("max_new_tokens", "temperature", "top_p", "reasoning", "batch_size", "precision", "seed")
"""Settings that decide the answer to a question."""
STORY = ("title", "origin", "revision", "licence", "attribution", "files")
"""What the manifest hands on of the data that the questions are from."""
FACTS = ("kind", "id", "answers", "tools")
"""What a row hands on of its question."""


def setup(
    checkpoint_dir: Path,
    data: Path = Path("data/hpo"),
    out_dir: Path | None = None,
    kinds: list[str] | None = None,
    max_rows: int | None = None,
    max_val_rows: int = 200,
    max_test_rows: int = 0,
    max_new_tokens: int = 256,
    samples: int = 1,
    temperature: float = 0.0,
    top_p: float = 1.0,
    rewards: list[WeightedReward] | None = None,
    threshold: float = 1.0,
    reasoning: Reasoning = "keep",
    batch_size: int = 32,
    precision: Precision | None = None,
    accelerator: Accelerator = "auto",
    seed: int = 1337,
) -> None:
    """Write a data directory of a teacher's own answers.

    Args:
        checkpoint_dir: The teacher, a LitGPT checkpoint directory.
        data: A data directory with train.jsonl and validation.jsonl whose rows have a prompt.
        out_dir: The data directory to write; `data` with `_taught` added to its name by default.
        kinds: Ask only rows whose `kind` is one of these; all rows if null.
        max_rows: At most this many training rows are asked.
        max_val_rows: At most this many validation rows are asked.
        max_test_rows: At most this many test rows are asked; 0, the default, writes no test split.
        max_new_tokens: Maximum number of tokens of an answer; one that has not ended by then is dropped, and counted.
        samples: Number of answers to each question; the same answer twice is kept once.
        temperature: Sampling temperature; 0 takes the most likely token.
        top_p: Nucleus sampling: sample among the smallest set of most likely tokens whose probabilities reach this sum.
        rewards: Keep only answers that these accept, as in `grpo`, e.g. [{reward: finding}].
        threshold: Minimum weighted sum of rewards of an answer that is kept.
        reasoning: Reasoning in the prompts' earlier answers: "keep" it, "drop" it, or "none", which drops it and
            switches the teacher's thinking off.
        batch_size: Number of questions answered side by side; bounds the memory of the cache.
        precision: Precision of the teacher; null takes bfloat16 where the device computes in it, else float32.
        accelerator: One of "cuda", "cpu" and "mps"; "auto" takes CUDA where there is a GPU, else the CPU.
        seed: Seed of the sampling.

    Raises:
        UserError: If an argument, the checkpoint, the data or a reward is not usable, or no answer is left.
    """
    settings = {name: plain(value) for name, value in locals().items()}
    directory, began = check_checkpoint_dir(checkpoint_dir), step_began()
    room = load_config(directory).block_size - max_new_tokens
    target = out_dir or data.with_name(data.name + "_taught")
    problems = _problems(settings, room)
    if target.resolve() == data.resolve():
        problems.append("--out_dir is the data that the questions are from; it would be written over.")
    report_all(problems)

    device = choose_accelerator(accelerator)
    settings["precision"] = precision = precision or default_precision(device == "cuda")
    judge = Rewards(rewards, precision, device) if rewards else None
    template = ChatTemplate.from_checkpoint(directory).with_reasoning(reasoning)
    asked: dict[str, list[Question]] = {}
    limits = {"train": max_rows, "validation": max_val_rows, **({"test": max_test_rows} if max_test_rows else {})}
    for split, most in limits.items():
        path = data / f"{split}.jsonl"
        rows, left_out = read_and_count(path, judge.fields if judge else (), kinds)
        rows = rows[:most]
        if judge:
            judge.check(rows, path)
        questions, told = encode_questions(rows, template, room, str(path))
        asked[split] = questions * samples
        print(told + left_out)
    model = load_model(directory, None, precision, device=device).eval()
    working = target.with_name(f"{target.name}.unfinished")
    identity = {"teacher": describe_source(directory).get("files"), "versions": versions()}
    cache = ResultCache(working / "answers.jsonl", {**identity, **{name: settings[name] for name in DECIDING}})
    began -= cache.seconds
    if len(cache):
        print(f"resuming with {len(cache)} finished answers of {cache.path}")
    dropped: Counter[str] = Counter()
    with watched(working), atomic_dir(target) as temporary, PeakMemory() as peak:
        splits: dict[str, Any] = {}
        for number, (split, questions) in enumerate(asked.items()):
            draw = torch.Generator().manual_seed(seed + number)
            sampled: Any = {"max_new_tokens": max_new_tokens, "temperature": temperature, "top_p": top_p}
            answers = _answered(model, template, questions, split, draw, cache, batch_size=batch_size, **sampled)
            worth = _worth(judge, questions, answers, template, max_new_tokens)
            taught = _kept(questions, answers, template, worth, threshold, dropped)
            if not taught:
                reasons = [f"{count:,} {reason}" for reason, count in dropped.items()]
                raise UserError(f"No answer to {data / split}.jsonl is left: {'; '.join(reasons) or 'no question'}.")
            file = temporary / f"{split}.jsonl"
            write_rows(file, taught)
            splits[file.name] = {"rows": len(taught), "asked": len(questions), "sha256": sha256(file)}
        source = read_json(data / "manifest.json") if (data / "manifest.json").is_file() else {}
        manifest = {
            "name": target.name,
            "shape": "messages",
            **{name: source[name] for name in STORY if name in source},
            "answers": "a model's, not the source's",
            "sources": {"teacher": describe_source(directory), "data": describe_source(data)},
            "settings": settings,
            "versions": versions(),
            "split": f"as {data}'s",
            "splits": splits,
            "dropped": dict(dropped),
        }
        write_json(temporary / "manifest.json", plain(manifest))
        counts = [metric("rows", split["rows"], split=name.removesuffix(".jsonl")) for name, split in splits.items()]
        write_metrics(temporary / "metrics.json", counts, seconds=seconds_of_step(began), peak_bytes=peak.bytes)
    shutil.rmtree(working)
    for name, split in splits.items():
        print(f"{target / name}: {split['rows']:,} of {split['asked']:,} answers")
    for reason, count in dropped.items():
        print(f"  {count:,} dropped: {reason}")


def _problems(settings: dict[str, Any], room: int) -> list[str]:
    """What is wrong with a step's settings, as messages; `room` is what an answer leaves of the context."""
    problems = [
        f"--{name} must be at least 1, not {settings[name]}."
        for name in ("max_rows", "max_val_rows", "batch_size")
        if settings[name] is not None and settings[name] < 1
    ]
    if settings["max_test_rows"] < 0:
        problems.append(f"--max_test_rows must be at least 0, not {settings['max_test_rows']}.")
    tokens, samples, temperature = (settings[name] for name in ("max_new_tokens", "samples", "temperature"))
    if tokens < 1 or room < 1:
        problems.append(f"--max_new_tokens must be from 1 to below the model's context, not {tokens}.")
    if not 0 <= temperature < math.inf:
        problems.append(f"--temperature must be 0 or more, not {temperature}.")
    if not 0 < settings["top_p"] <= 1:
        problems.append(f"--top_p must be from above 0 to 1, not {settings['top_p']}.")
    if samples < 1 or (samples > 1 and temperature == 0):
        problems.append(f"--samples must be 1, or with a --temperature above 0 more; not {samples}.")
    return problems


def _answered(
    model: GPT,
    template: ChatTemplate,
    questions: list[Question],
    name: str,
    draw: torch.Generator,
    cache: ResultCache,
    **sampled: Any,
) -> list[Rollout]:
    """One answer to each question, slice by slice; those of a run that was stopped are taken from the cache."""
    answers: list[Rollout] = []
    with Bar(total=len(questions), desc=name, unit="answer") as bar:
        for begin in range(0, len(questions), SLICE):
            prompts = [question.prompt for question in questions[begin : begin + SLICE]]
            draws = torch.rand(len(prompts), sampled["max_new_tokens"], generator=draw, dtype=torch.float64)
            keys = [request_key("answer", name, begin + i, prompt) for i, prompt in enumerate(prompts)]
            if not cache.has(keys):
                start = time.perf_counter()
                found = generate(model, prompts, stop_ids=template.stop_ids, draws=draws, **sampled)
                kept = {key: [answer.ids, answer.stopped] for key, answer in zip(keys, found, strict=True)}
                cache.add(kept, time.perf_counter() - start, sum(len(answer.ids) for answer in found))
            answers += [Rollout(ids=cache[key][0], stopped=cache[key][1]) for key in keys]
            bar.update(len(prompts))
    return answers


def _worth(
    judge: Rewards | None,
    questions: list[Question],
    answers: list[Rollout],
    template: ChatTemplate,
    max_new_tokens: int,
) -> list[float]:
    """The weighted sum of each answer's rewards; without rewards all are welcome."""
    if judge is None:
        return [math.inf] * len(answers)
    samples = [
        Sample(question.row, text_of(answer, template), len(answer.ids), not answer.stopped, max_new_tokens)
        for question, answer in zip(questions, answers, strict=True)
    ]
    return [rewards["total"] for rewards in judge(samples)]


def _kept(
    questions: list[Question],
    answers: list[Rollout],
    template: ChatTemplate,
    worth: list[float],
    threshold: float,
    dropped: Counter[str],
) -> list[Row]:
    """The answers to learn from, as `messages` rows; the others are counted in `dropped`, by reason."""
    rows: list[Row] = []
    said: set[tuple[tuple[int, ...], str]] = set()
    for question, answer, value in zip(questions, answers, worth, strict=True):
        text = text_of(answer, template)
        if not answer.stopped:
            dropped["cut at --max_new_tokens"] += 1
        elif not text.strip():
            dropped["empty"] += 1
        elif template.opens_thoughts and "</think>" not in text:
            dropped["thoughts without an end"] += 1
        elif value < threshold:
            dropped[f"rewards below {threshold}"] += 1
        elif (key := (tuple(question.prompt), text)) in said:
            dropped["the same answer again"] += 1
        else:
            said.add(key)
            # Where the prompt has opened the thoughts, the conversation is to show where they began.
            content = f"<think>\n{text}" if template.opens_thoughts else text
            messages = [*question.row["prompt"], {"role": "assistant", "content": content}]
            rows.append({"messages": messages, **{name: question.row[name] for name in FACTS if name in question.row}})
    return rows
