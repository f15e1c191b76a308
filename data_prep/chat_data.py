"""`ChatData`: any prepared data directory as a LitGPT data module, with loss on the assistant's tokens only.

It serves our own training loop (`encoded`) and LitGPT's commands (the data loaders):

    litgpt finetune_lora checkpoints/embedded/smollm2-135m-instruct --data data_prep.ChatData --data.path data/hpo
"""

import random
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from lightning.fabric.utilities.rank_zero import rank_zero_only
from litgpt.data import DataModule, get_sft_collate_fn
from litgpt.prompts import PromptStyle, has_prompt_style
from litgpt.tokenizer import Tokenizer
from torch.utils.data import DataLoader, Dataset

from data_prep.rows import Row, read_rows
from workflows.chat_template import ChatTemplate, EncodedChat, Reasoning
from workflows.checkpoint import load_config
from workflows.errors import UserError
from workflows.prompt_style import choose_prompt_style, read_prompt_style, writes_bos

_T = TypeVar("_T")
IGNORE_INDEX = -100
"""The label of tokens that carry no loss, as in PyTorch's cross-entropy."""


@dataclass
class EncodingReport:
    """What became of a split's rows.

    Attributes:
        name: The split's name.
        rows: Rows to encode.
        max_seq_length: The most tokens a sample may have.
        kept: Samples made.
        truncated: Those of `kept` whose answer was cut at `max_seq_length`; the token that ends the turn is lost there.
        dropped: Rows left out, by reason.
        notes: Answers of the samples that are not learned, or not in the form of the whole text, by reason.
        tokens: Tokens of the samples, prompts included.
        learned_tokens: Those of them that carry the loss.
        longest: Tokens of the longest sample.
    """

    name: str
    rows: int
    max_seq_length: int
    kept: int = 0
    truncated: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    notes: Counter[str] = field(default_factory=Counter)
    tokens: int = 0
    learned_tokens: int = 0
    longest: int = 0

    def __str__(self) -> str:
        parts = [
            f"{self.name}: {self.kept:,} samples of {self.rows:,} rows",
            f"{self.tokens:,} tokens, {self.learned_tokens:,} of them learned",
            f"the longest has {self.longest:,} (limit {self.max_seq_length:,})",
            f"{self.truncated:,} answers truncated" + (" (their turn end is lost)" if self.truncated else ""),
            f"{self.dropped.total():,} dropped",
        ]
        lines = [f"\n  {count:,} dropped: {reason}" for reason, count in self.dropped.items()]
        return "; ".join(parts) + "".join(lines + [f"\n  {count:,} {note}" for note, count in self.notes.items()])


def encode_rows(
    rows: list[Row], template: ChatTemplate, max_seq_length: int, name: str = "rows"
) -> tuple[list[EncodedChat], EncodingReport]:
    """Encode conversations for training.

    A sample longer than `max_seq_length` loses the end of its completion, which is counted; one whose prompt leaves no
    room for any token of the answer is dropped, which is counted too.

    Args:
        rows: `messages` rows.
        template: The checkpoint's chat template and tokenizer.
        max_seq_length: The most tokens a sample may have.
        name: What the rows are, for the report and for messages.

    Returns:
        The samples, in the order of their rows, and what became of the rows.

    Raises:
        UserError: If the template refuses a conversation, or a token of it has no embedding.
    """
    report = EncodingReport(name, len(rows), max_seq_length)
    chats: list[EncodedChat] = []
    for number, row in enumerate(rows, start=1):
        try:
            chat = template.encode_chat(row["messages"], tools=row.get("tools"))
        except UserError as e:
            raise UserError(f"{name}, row {number} ({row['messages'][0]['content'][:60]!r}): {e}") from None
        report.notes.update(chat.notes)
        room = max_seq_length - len(chat.prompt)
        if not chat.completion:
            report.dropped["none of its answers is learned"] += 1
            continue
        if room <= 0:
            report.dropped[f"the prompt alone fills {max_seq_length} tokens"] += 1
            continue
        if len(chat.completion) > room:
            chat = EncodedChat(chat.prompt, chat.completion[:room], chat.loss_mask[:room], chat.notes)
            report.truncated += 1
        length = len(chat.prompt) + len(chat.completion)
        report.kept += 1
        report.tokens += length
        report.learned_tokens += sum(chat.loss_mask)
        report.longest = max(report.longest, length)
        chats.append(chat)
    return chats, report


class ChatDataset(Dataset[dict[str, Any]]):
    """Encoded samples in the form of LitGPT's `SFTDataset`.

    Args:
        chats: The samples.
        questions: Some questions of the split, one of which LitGPT's commands answer now and then as an example.
    """

    def __init__(self, chats: list[EncodedChat], questions: list[str]) -> None:
        self.chats = chats
        self.data = [{"instruction": question} for question in questions]

    def __len__(self) -> int:
        return len(self.chats)

    def __getitem__(self, index: int) -> dict[str, Any]:
        chat = self.chats[index]
        learned = [i if mask else IGNORE_INDEX for i, mask in zip(chat.completion, chat.loss_mask, strict=True)]
        length = len(chat.prompt) + len(chat.completion)
        return {
            "input_ids": torch.tensor(chat.prompt + chat.completion),  # (T,)
            "labels": torch.tensor([IGNORE_INDEX] * len(chat.prompt) + learned),  # (T,)
            # Only for LitGPT's performance report; "raw" are the tokens that are learned from.
            "token_counts": {"raw": sum(chat.loss_mask), "raw_plus_prompt_template": length},
        }


@dataclass
class ChatData(DataModule):
    """A data directory made by `make data`: {train,validation}.jsonl with `messages` rows."""

    path: Path
    """The data directory, such as data/hpo."""
    kinds: list[str] | None = None
    """Use only rows of these kinds (see manifest.json); all by default. A validation split that has none of them, as
    with hpo's `signs`, is used whole."""
    max_train_rows: int | None = None
    """Train on at most this many rows, chosen at random by `seed`."""
    max_val_rows: int | None = None
    """Validate on at most this many rows, chosen at random by `seed`."""
    checkpoint_dir: Path | None = None
    """The checkpoint whose chat template and tokenizer are used; LitGPT's commands need not be told, it is theirs."""
    chat_template: Path | None = None
    """A Jinja file to use in place of the checkpoint's own chat template."""
    reasoning: Reasoning = "keep"
    """The reasoning before answers: "keep" it as the data has it, "drop" it from the data, or "none": drop it and
    switch thinking off in the chat template."""
    seed: int = 42
    """The random seed for choosing and shuffling rows."""
    num_workers: int = 0
    """How many DataLoader processes to use; samples are encoded before training, so none are needed."""

    batch_size: int = field(default=1, init=False, repr=False)
    max_seq_length: int = field(default=-1, init=False, repr=False)
    template: ChatTemplate | None = field(default=None, init=False, repr=False)
    prompt_style: PromptStyle | None = field(default=None, init=False, repr=False)
    train_dataset: ChatDataset | None = field(default=None, init=False, repr=False)
    test_dataset: ChatDataset | None = field(default=None, init=False, repr=False)
    reports: dict[str, EncodingReport] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        super().__init__()
        if missing := [name for name in ("train.jsonl", "validation.jsonl") if not (self.path / name).is_file()]:
            raise UserError(
                f"{self.path} is not a prepared data directory, it lacks {' and '.join(missing)}. "
                f"Run `make data DATA={self.path.name}`, or name a folder that `make data` wrote: --data (in LitGPT's "
                "own commands --data.path)."
            )

    def connect(
        self, tokenizer: Tokenizer | None = None, batch_size: int = 1, max_seq_length: int | None = None, **_: Any
    ) -> None:
        """Say what the samples are for; called before any of them is encoded.

        Args:
            tokenizer: LitGPT's tokenizer of the model in training, used to make sure that it is the checkpoint's own.
            batch_size: Samples per batch of the data loaders.
            max_seq_length: The most tokens of a sample; default, and upper limit, is the model's context length.

        Raises:
            UserError: If the checkpoint is not known or not whole, or has another tokenizer.
        """
        directory = self.checkpoint_dir or _running_checkpoint_dir()
        if directory is None:
            raise UserError("ChatData does not know the checkpoint; name it with --data.checkpoint_dir.")
        template = ChatTemplate.from_checkpoint(directory, self.chat_template)
        self.template = template.with_reasoning(self.reasoning)
        if tokenizer is not None and tokenizer.processor.get_vocab() != self.template.tokenizer.get_vocab():
            raise UserError(
                f"{directory} has another tokenizer than the model in training. "
                "Make --data.checkpoint_dir the same as --checkpoint_dir, or leave it out."
            )
        if self.template.source == template.source and self.chat_template is None and has_prompt_style(directory):
            self.prompt_style = read_prompt_style(directory)
        else:
            self.prompt_style = choose_prompt_style(directory, self.template, writes_bos(self.template))
        context = load_config(directory).block_size
        self.max_seq_length = min(max_seq_length or context, context)
        self.batch_size = batch_size
        self.reports.clear()

    def rows(self, split: str) -> list[Row]:
        """The rows of a split after `kinds`, `max_train_rows` and `max_val_rows`.

        Raises:
            UserError: If the file is missing or malformed, or training has no rows of the kinds.
        """
        rows = read_rows(self.path / f"{split}.jsonl")
        if self.kinds is not None:
            chosen = [row for row in rows if row.get("kind") in self.kinds]
            if not chosen and split == "train":
                present = sorted({str(row.get("kind")) for row in rows})
                raise UserError(f"{self.path} has no training rows of kind {', '.join(self.kinds)}; it has {present}.")
            rows = chosen or rows
        limit = self.max_train_rows if split == "train" else self.max_val_rows
        if limit is not None and limit < len(rows):
            rows = [rows[i] for i in sorted(random.Random(self.seed).sample(range(len(rows)), limit))]
        return rows

    def encoded(self, split: str) -> list[EncodedChat]:
        """The samples of a split, in the order of its rows; what became of the rows is then in `reports[split]`.

        Raises:
            UserError: If the rows are malformed, or none fits into `max_seq_length`.
        """
        if self.template is None:
            raise RuntimeError("ChatData.connect must be called before the samples are encoded")
        chats, report = encode_rows(self.rows(split), self.template, self.max_seq_length, str(self.path / split))
        self.reports[split] = report
        if not chats:
            raise UserError(f"No sample is left to use. {report}\nRaise --train.max_seq_length.")
        return chats

    def setup(self, stage: str = "") -> None:
        """Encode both splits and say what was truncated or dropped, for LitGPT's commands."""
        self.train_dataset = self._dataset("train")
        self.test_dataset = self._dataset("validation")  # LitGPT looks for its validation samples under this name

    def _dataset(self, split: str) -> ChatDataset:
        chats = self.encoded(split)
        rank_zero_only(print)(str(self.reports[split]))
        questions = [_last_question(row) for row in self.rows(split)[:100]]
        return ChatDataset(chats, questions)

    def train_dataloader(self) -> DataLoader[dict[str, Any]]:
        """Batches of padded training samples, shuffled by `seed`."""
        return self._loader(self.train_dataset, shuffle=True)

    def val_dataloader(self) -> DataLoader[dict[str, Any]]:
        """Batches of padded validation samples, in order."""
        return self._loader(self.test_dataset, shuffle=False)

    def _loader(self, dataset: ChatDataset | None, shuffle: bool) -> DataLoader[dict[str, Any]]:
        if dataset is None:
            raise RuntimeError("ChatData.setup must be called before its data loaders")
        return DataLoader(
            dataset,
            batch_size=self.batch_size,
            shuffle=shuffle,
            generator=torch.Generator().manual_seed(self.seed) if shuffle else None,
            num_workers=self.num_workers,
            collate_fn=get_sft_collate_fn(max_seq_length=self.max_seq_length, ignore_index=IGNORE_INDEX),
        )


def replayed(others: list[_T], rows: int, share: float, seed: int) -> list[_T]:
    """Draw the rows of a second data set that are mixed into an epoch.

    Args:
        others: What to draw from; each is taken once before any is taken again.
        rows: Number of rows of the data that is learned.
        share: The share of all rows that they are to be.
        seed: Seed of the choice.
    """
    repeats, rest = divmod(replay_number(rows, share), len(others))
    return others * repeats + [others[i] for i in sorted(random.Random(seed).sample(range(len(others)), rest))]


def replay_number(rows: int, share: float) -> int:
    """Number of rows to mix into `rows` others so that they are a share of all."""
    return max(1, round(rows * share / (1 - share)))


def _last_question(row: Row) -> str:
    return next((message["content"] for message in reversed(row["messages"]) if message["role"] == "user"), "")


def _running_checkpoint_dir() -> Path | None:
    """The checkpoint of the LitGPT command that is running, if one is.

    LitGPT hands a data module its tokenizer but not the folder that it came from. Every LitGPT command that trains has
    the folder in a local variable of this name, whether it was given by position, by option or in a config file.
    """
    frame = sys._getframe()
    while (caller := frame.f_back) is not None:
        frame = caller
        if frame.f_globals.get("__name__", "").startswith("litgpt.") and "checkpoint_dir" in frame.f_locals:
            return Path(frame.f_locals["checkpoint_dir"])
    return None
