"""How long the packed rows of a run are: from its data where that is here, else as full as they can be.

A row's tokens decide what a forward and backward pass keeps, so the largest row of a run decides its peak.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_prep.chat_data import encode_rows, replayed
from data_prep.rows import read_rows
from workflows.chat_template import ChatTemplate
from workflows.errors import UserError
from workflows.training.answers import encode_answers
from workflows.training.attention import KEPT_PAIRS, STRETCH, RowAttention
from workflows.training.batch import ROW_MULTIPLE, PackedBatch, Tree, pack
from workflows.training.loop import TrainArgs, step_indices
from workflows.training.questions import encode_questions, read_questions
from workflows.training.scalar_heads import scored
from workflows.training.segments import SegmentAttention

READ_STEPS = 32
"""Steps whose rows are packed to see how long they get."""


@dataclass(frozen=True)
class RowShape:
    """The largest row of a run, and how many there are.

    Attributes:
        tokens: Its input tokens, filled up.
        learned: Those of its tokens that are predicted and learned.
        kept_pairs: Query-key pairs whose softmax weights are kept for the backward pass (on a CPU).
        copied_keys: Keys of all segments where some are copied for several of them (on a GPU); else 0.
        rows: Rows of a step on one device.
        step_tokens: Input tokens of a step, over all devices.
        lengths: Different lengths of rows in the run.
        prompt: Tokens of the longest prompt that is answered, of steps that sample.
        source: Where this is from, in words.
    """

    tokens: int
    learned: int
    kept_pairs: int
    copied_keys: int
    rows: int
    step_tokens: int
    lengths: int
    prompt: int
    source: str


def find_rows(step: str, settings: dict[str, Any], vocabulary_dir: Path, processes: int, read_data: bool) -> RowShape:
    """The rows of a training step.

    Args:
        step: Its name.
        settings: Its arguments by name.
        vocabulary_dir: The checkpoint directory whose tokenizer and template encode the data, if it is here.
        processes: How many share a step.
        read_data: Look at the data, where it is here.

    Raises:
        UserError: If the data is here and not usable.
    """
    train: TrainArgs = settings["train"]
    data = Path(settings["data"])
    longest = train.max_seq_length
    asks = step in ("grpo", "ppo")
    new = settings["max_new_tokens"] if asks else 0
    group = settings.get("group_size", 1) if asks else 1
    if read_data and (vocabulary_dir / "tokenizer.json").is_file() and (data / "train.jsonl").is_file():
        template = ChatTemplate.from_checkpoint(vocabulary_dir).with_reasoning(settings.get("reasoning", "keep"))
        trees = _trees(step, settings, data / "train.jsonl", template)
        if asks:
            prompt = max(len(tree.prompt) for tree in trees)
            trees = [part for tree in trees for part in _answered(tree.prompt, group, new, train.row_tokens)]
            return _rows_of_data(trees, train, processes, prompt, f"{data}, answers of full length")
        return _rows_of_data(trees, train, processes, 0, str(data))
    if asks:
        prompt = max(1, longest - new)
        keys = group * (prompt + new) / (prompt + group * new)
        return _full_rows(prompt + group * new, max(longest, train.row_tokens), train, processes, prompt, keys)
    sample = longest if step in ("lora", "distill-lm") else 2 * longest  # a pair's prompt is shared, but may be short
    return _full_rows(sample, max(sample, train.row_tokens), train, processes, 0)


def _full_rows(sample: int, room: int, train: TrainArgs, processes: int, prompt: int, keys: float = 1.0) -> RowShape:
    """Rows that are as full as the settings allow.

    Args:
        sample: Input tokens of the longest tree.
        room: The most tokens of a row.
        train: Training settings.
        processes: How many share a step.
        prompt: The longest prompt that is answered.
        keys: Keys of all segments by token: what several samples begin with (a chat template's first words, at least)
            is copied for each.
    """
    mine = math.ceil(train.global_batch_size / processes)
    tokens = _filled(min(room, mine * sample))
    rows = math.ceil(mine * sample / room)
    pairs = _pairs_of_samples(tokens, min(sample, tokens))
    return RowShape(
        tokens=tokens,
        learned=tokens,
        kept_pairs=pairs if pairs <= KEPT_PAIRS else 0,
        copied_keys=math.ceil(keys * tokens),
        rows=rows,
        step_tokens=train.global_batch_size * sample,
        lengths=min(train.max_steps * rows, max(1, tokens // ROW_MULTIPLE)),
        prompt=prompt,
        source=f"as full as the settings allow: {tokens:,} tokens",
    )


def _filled(tokens: int) -> int:
    return math.ceil(tokens / ROW_MULTIPLE) * ROW_MULTIPLE


def _pairs_of_samples(tokens: int, sample: int) -> int:
    """Pairs of a row of samples that see themselves only; stretches see all keys up to their own end."""
    stretch = min(sample, STRETCH)
    return math.ceil(tokens / sample) * sample * (sample + stretch) // 2


def _trees(step: str, settings: dict[str, Any], file: Path, template: ChatTemplate) -> list[Tree]:
    """What a run's first steps are trained on, in the order of the steps."""
    train: TrainArgs = settings["train"]
    kinds = settings.get("kinds")
    longest = train.max_seq_length

    def first(rows: list[Any]) -> list[Any]:
        samples = min(train.max_steps, READ_STEPS) * train.global_batch_size
        return [rows[i] for i in step_indices(0, len(rows), samples, settings["seed"])] if rows else []

    if step in ("grpo", "ppo"):
        rows = first(read_questions(file, (), kinds))
        questions, told = encode_questions(rows, template, longest - settings["max_new_tokens"], str(file))
        trees = [Tree(question.prompt, [[0]]) for question in questions]
    elif step in ("dpo", "reward"):
        labelled = settings.get("loss") == "kto" and '"label"' in file.open(encoding="utf-8").readline()
        answers, told = encode_answers(
            first(read_rows(file, "labelled" if labelled else "preference")), template, longest, str(file)
        )
        trees = [scored(answer.tree) if step == "reward" else answer.tree for answer in answers]
    else:
        rows = [row for row in read_rows(file, "messages") if kinds is None or row.get("kind") in kinds]
        if settings.get("replay"):
            others = read_rows(Path(settings["replay"]) / "train.jsonl", "messages")
            rows += replayed(others, len(rows), settings["replay_share"], settings["seed"])
        chats, report = encode_rows(first(rows), template, longest, str(file))
        trees = [Tree(chat.prompt, [chat.completion], [chat.loss_mask]) for chat in chats]
        told = str(report)
    if not trees:
        raise UserError(f"No row is left to train on. {told}")
    return trees


def scored_rows(settings: dict[str, Any]) -> list[PackedBatch]:
    """The rows of an evaluation's local tasks, whose data is here; none if a task is another."""
    from workflows.evaluation.tasks import local_file  # brings lm-eval along, which other steps do not load

    if settings["num_fewshot"] or settings["apply_chat_template"] is False:
        return []  # other prompts than those below
    directory = Path(settings["checkpoint_dir"])
    named = [local_file(task, settings["data_dir"], settings["split"]) for task in settings["tasks"]]
    files = [file for file in named if file is not None and file.is_file()]
    if not (directory / "tokenizer.json").is_file() or len(files) < len(named):
        return []
    template = ChatTemplate.from_checkpoint(directory)
    trees = []
    for file in files:
        for row in read_rows(file, "scoring")[: settings["limit"]]:
            prompt = template.encode(template.answer_prompt(row["prompt"], row.get("tools")))
            trees.append(Tree(prompt, [template.encode(choice) for choice in row["choices"]]))
    return [batch for _, batch in pack(trees, settings["row_tokens"])]


def _answered(prompt: list[int], group: int, new_tokens: int, room: int) -> list[Tree]:
    """A question with answers of full length, in parts as `training/groups.py` cuts a large group."""
    most = max(1, (room - len(prompt)) // new_tokens)
    counts = [most] * (group // most) + [group % most] * (group % most > 0)
    return [Tree(prompt, [[0] * new_tokens] * count) for count in counts]


def _rows_of_data(trees: list[Tree], train: TrainArgs, processes: int, prompt: int, source: str) -> RowShape:
    """The rows of a run's first steps, packed as the run packs them; those of the first process are looked at."""
    per_step = max(1, len(trees) // max(1, min(train.max_steps, READ_STEPS)))
    steps = [trees[i : i + per_step][::processes] for i in range(0, len(trees), per_step)]
    packed = [[batch for _, batch in pack(step, train.row_tokens)] for step in steps]
    batches: list[PackedBatch] = [batch for rows in packed for batch in rows]
    lengths = [batch.input_ids.size(1) for batch in batches]
    largest = batches[lengths.index(max(lengths))]
    attention = RowAttention(largest)
    pairs = sum(piece.hidden.numel() for piece in attention.pieces)
    return RowShape(
        tokens=max(lengths),
        learned=largest.targets.numel(),
        kept_pairs=pairs if attention.kept else 0,
        copied_keys=0 if (keys := SegmentAttention(largest).keys) is None else len(keys),
        rows=max(map(len, packed)),
        step_tokens=processes * sum(lengths) // len(steps),
        lengths=len(set(lengths)),
        prompt=prompt,
        source=f"the largest of the first {len(steps)} steps' rows of {source}: {max(lengths):,} tokens",
    )
