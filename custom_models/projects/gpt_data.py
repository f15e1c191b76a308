"""What a GPT reads: texts turned into token files once, and batches out of these files.

A language model's data is one long row of token ids. It lies in a file of 2-byte numbers (4-byte ones for vocabularies
above 65,536), which is mapped into memory and not loaded, so that its size does not matter. A training batch is rows
cut out at random places; validation goes over the whole split in windows.

Texts come from the Human Phenotype Ontology's definitions ("definitions"), from tinyshakespeare (in WORKFLOW_DATA),
from TinyStories ("tinystories", Eldan and Li 2023, arXiv 2305.07759, from the Hugging Face Hub; or a folder laid out as
it is), or from any text file.
"""

import hashlib
import os
import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any, Literal

import lightning as L
import numpy as np
import torch
from filelock import FileLock
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler
from tqdm import tqdm

from custom_models import demo
from custom_models.gpt_checkpoint import Tokenizer, load_tokenizer, save_tokenizer
from custom_models.tokenization.bpe import SpecialBPE
from custom_models.tokenization.characters import CharacterTokenizer
from custom_models.tokenization.gpt2_files import END_OF_TEXT
from data_prep.tables import hub_splits
from workflows.errors import UserError, first_line
from workflows.files import atomic_dir, read_json, recover_dir, sha256, write_json

Kind = Literal["characters", "bpe"]
TINYSTORIES = "roneneldan/TinyStories"
SPLITS = ("train", "validation")
LEARNED_FROM = 20_000_000
"""Byte pairs are counted in so many characters of the training text; more hardly changes which are frequent."""
HELD_OUT = 10
"""One part in so many, the last one, is held out where a text has no splits of its own (nanoGPT's way)."""
VALIDATION_ROWS = 128
_META = "meta.json"
_FORMAT = 1


@dataclass(frozen=True)
class Corpus:
    """Texts to learn from.

    Attributes:
        name: What its token files are called.
        splits: For "train" and "validation" the documents; to be gone through more than once.
        identity: What the documents depend on: a hash, a commit.
        ended: Whether a token marks each document's end; a single text has none.
    """

    name: str
    splits: Mapping[str, Iterable[str]]
    identity: str
    ended: bool = True


def read_corpus(text: str, max_texts: int | None = None) -> Corpus:
    """Find the texts that a name stands for.

    Args:
        text: "definitions", "tinyshakespeare", "tinystories", a text file, or a folder of Parquet files with a column
            `text` and a split's name in theirs.
        max_texts: At most so many documents of each split.

    Raises:
        UserError: If there is no such text, or it is empty.
    """
    if text == "definitions":
        documents = demo.definitions().splitlines()
        identity = _hash("\n".join(documents))
        random.Random(0).shuffle(documents)  # in the ontology's order the last tenth would be its newest terms
        cut = len(documents) - len(documents) // HELD_OUT
        corpus = Corpus(text, {"train": documents[:cut], "validation": documents[cut:]}, identity)
    elif text == "tinystories" or Path(text).is_dir():
        corpus = _stories(text)
    else:
        file = _shakespeare() if text == "tinyshakespeare" else Path(text)
        whole = demo.read(file)
        cut = len(whole) * (HELD_OUT - 1) // HELD_OUT
        name = text if text == "tinyshakespeare" else file.stem
        corpus = Corpus(name, {"train": [whole[:cut]], "validation": [whole[cut:]]}, _hash(whole), ended=False)
    if max_texts is None:
        return corpus
    if not corpus.ended:
        raise UserError(f"--max_texts takes the first of many texts, and {text} is a single one. Leave it out.")
    shorter = {split: list(islice(documents, max_texts)) for split, documents in corpus.splits.items()}
    return Corpus(corpus.name, shorter, f"{corpus.identity} {max_texts}", corpus.ended)


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _shakespeare() -> Path:
    if not (folder := os.environ.get("WORKFLOW_DATA")):
        raise UserError(
            "tinyshakespeare is read from WORKFLOW_DATA, which is not set. Set it to a folder that has "
            "tinyshakespeare/input.txt, or name any text file instead: --text FILE."
        )
    return Path(folder) / "tinyshakespeare" / "input.txt"


def _stories(text: str) -> Corpus:
    """TinyStories, or a folder that is laid out as it is, through `datasets`, which maps them into memory."""
    if text == "tinystories":
        found, identity = hub_splits(TINYSTORIES)
    else:
        import datasets

        files = sorted(Path(text).rglob("*.parquet"))
        if not files:
            raise UserError(f"{text} is a folder without Parquet files. Name a text file, or a folder that has some.")
        try:
            found = datasets.load_dataset(text)
        except (datasets.exceptions.DatasetsError, OSError, ValueError) as e:
            raise UserError(f"{text} cannot be read as a data set ({first_line(e)}).") from None
        identity = _hash(" ".join(f"{file.name} {sha256(file)}" for file in files))
    if missing := [split for split in SPLITS if split not in found or "text" not in found[split].column_names]:
        raise UserError(f"{text} has no split {' and no split '.join(missing)} with a column `text`.")
    return Corpus(Path(text).name, {split: _Column(found[split]) for split in SPLITS}, identity)


class _Column:
    """The documents of a data set, read as they are asked for, some thousand at a time."""

    def __init__(self, rows: Any) -> None:
        self.rows = rows

    def __iter__(self) -> Iterator[str]:
        return chain.from_iterable(batch["text"] for batch in self.rows.iter(batch_size=4096))


@dataclass(frozen=True)
class TokenFiles:
    """A corpus as token ids, on the disk.

    Attributes:
        folder: With a file for each split and the tokenizer.
        tokens: How many ids each split has.
        characters: How many characters they stand for.
        vocab_size: Ids are below it.
        identity: Of the texts and the tokenizer.
    """

    folder: Path
    tokens: dict[str, int]
    characters: dict[str, int]
    vocab_size: int
    identity: str

    @property
    def tokenizer(self) -> Any:
        """The tokenizer that made them."""
        return load_tokenizer(self.folder)

    def read(self, split: str) -> np.ndarray:
        """The ids of a split, mapped into memory, (tokens,).

        Raises:
            UserError: If the file is not as long as it was when it was written.
        """
        file = self.folder / f"{split}.bin"
        ids = np.memmap(file, dtype=_dtype(self.vocab_size), mode="r") if file.stat().st_size else np.zeros(0, int)
        if len(ids) != self.tokens[split]:
            raise UserError(f"{file} holds {len(ids):,} tokens, not {self.tokens[split]:,}. Delete {self.folder}.")
        return ids


def _dtype(vocab_size: int) -> type[np.unsignedinteger[Any]]:
    return np.uint16 if vocab_size <= 1 << 16 else np.uint32


def token_files(corpus: Corpus, kind: Kind, vocab_size: int, folder: Path) -> TokenFiles:
    """The token files of a corpus: those that are there if they are of these very texts, else new ones.

    The tokenizer learns from the training text; that of characters has those of both splits, as in nanoGPT. Files are
    written under another name and renamed when all are whole; several processes may ask at once.

    Args:
        corpus: The texts.
        kind: Characters or byte pairs.
        vocab_size: Of byte pairs, the bytes and the end-of-text token among them.
        folder: In which each corpus gets a folder of its own.

    Raises:
        UserError: If the vocabulary is too small or too large for the text, or there is no room.
    """
    made_from = f"{_FORMAT} {corpus.identity} {kind}" + (f" {vocab_size}" if kind == "bpe" else "")
    folder = folder / f"{corpus.name}-{kind}{f'-{vocab_size}' if kind == 'bpe' else ''}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_name(f".{folder.name}.lock")):
        recover_dir(folder)
        meta = read_json(folder / _META) if (folder / _META).is_file() else {}
        if meta.get("made_from") != made_from or not all((folder / f"{split}.bin").is_file() for split in SPLITS):
            tokenizer = _learn(corpus, kind, vocab_size)
            with atomic_dir(folder) as temporary:
                save_tokenizer(tokenizer, temporary)
                counts = {split: _write(corpus, split, tokenizer, temporary) for split in SPLITS}
                tokens, characters = ({split: counts[split][i] for split in SPLITS} for i in (0, 1))
                meta = {"made_from": made_from, "vocab_size": len(tokenizer), "tokens": tokens,
                        "characters": characters}  # fmt: skip
                write_json(temporary / _META, meta)
    return TokenFiles(folder, meta["tokens"], meta["characters"], meta["vocab_size"], made_from)


def _learn(corpus: Corpus, kind: Kind, vocab_size: int) -> CharacterTokenizer | SpecialBPE:
    if kind == "characters":
        characters = {"\n"} if corpus.ended else set()
        for document in chain(*(corpus.splits[split] for split in SPLITS)):
            characters.update(document)
        return CharacterTokenizer.from_text("".join(characters))
    if vocab_size < 257:
        raise UserError(f"--vocab_size must be at least 257, the bytes and the end of a text, not {vocab_size}.")
    parts, length = [], 0
    for document in corpus.splits["train"]:
        parts.append(document)
        length += len(document)
        if length > LEARNED_FROM:
            break
    tokenizer = SpecialBPE([END_OF_TEXT])
    tokenizer.train("\n".join(parts)[:LEARNED_FROM], vocab_size - 257)
    return tokenizer


def _write(corpus: Corpus, split: str, tokenizer: CharacterTokenizer | SpecialBPE, folder: Path) -> tuple[int, int]:
    """Write a split's ids; returns how many, and of how many characters."""
    encode, end = encoder_of(tokenizer), []
    if corpus.ended:
        end = encode("\n") if isinstance(tokenizer, CharacterTokenizer) else [tokenizer.special_tokens[END_OF_TEXT]]
    tokens = characters = 0
    with open(folder / f"{split}.bin", "wb") as file:
        shown = tqdm(corpus.splits[split], f"{corpus.name}, {split}", unit=" texts", disable=None, leave=False)
        for document in shown:
            ids = np.array(encode(document) + end, dtype=_dtype(len(tokenizer)))  # (T,)
            ids.tofile(file)
            tokens, characters = tokens + len(ids), characters + len(document) + len(end)
    return tokens, characters


def encoder_of(tokenizer: Tokenizer) -> Callable[[str], list[int]]:
    """Encodes what looks like the end-of-text token as ordinary text: a document cannot end another."""
    return partial(tokenizer.encode, special="text") if isinstance(tokenizer, SpecialBPE) else tokenizer.encode


class Rows(Dataset[tuple[Tensor, Tensor]]):
    """Training batches: rows from random places of the text.

    Batch i depends on the seed and i alone, so a run that was stopped goes on with what it would have seen; and of its
    rows each process takes every n-th, so that all together see the same however many they are.

    Args:
        ids: The text, (tokens,).
        context: T, the length of a row.
        batch_size: Rows of a batch, over all processes.
        batches: How many there are.
        seed: Decides the places.
        rank: Which process this is.
        world_size: Of how many.
    """

    def __init__(
        self,
        ids: np.ndarray,
        context: int,
        batch_size: int,
        batches: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.ids, self.context, self.batch_size, self.batches = ids, context, batch_size, batches
        self.seed, self.rank, self.world_size = seed, rank, world_size

    def __len__(self) -> int:
        return self.batches

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """Inputs and the tokens that follow them, (B, T) each."""
        generator = np.random.default_rng((self.seed, index))
        begins = generator.integers(0, len(self.ids) - self.context, self.batch_size)[self.rank :: self.world_size]
        rows = torch.from_numpy(self.ids[begins[:, None] + np.arange(self.context + 1)].astype(np.int64))  # (B, T + 1)
        return rows[:, :-1], rows[:, 1:]


class Windows(Dataset[tuple[Tensor, Tensor]]):
    """A whole text in windows that do not overlap, each token predicted once; the last window may be shorter.

    Args:
        ids: The text, (tokens,).
        context: T, the length of a window.
        rows: Windows of a batch.
        rank: Which process this is.
        world_size: Of how many; each takes every n-th batch, and all equally many, an empty one if need be: processes
            that work together must do the same number of steps.
    """

    def __init__(
        self, ids: np.ndarray, context: int, rows: int = VALIDATION_ROWS, rank: int = 0, world_size: int = 1
    ) -> None:
        whole, rest = divmod(len(ids) - 1, context)
        spans = [(begin * context, min(rows, whole - begin), context) for begin in range(0, whole, rows)]
        spans += [(whole * context, 1, rest)] if rest else []
        spans += [(0, 0, context)] * (-len(spans) % world_size)
        self.ids, self.spans = ids, spans[rank::world_size]

    def __len__(self) -> int:
        return len(self.spans)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """Inputs and the tokens that follow them, (rows, T) each."""
        begin, rows, length = self.spans[index]
        ids = torch.from_numpy(self.ids[begin : begin + rows * length + 1].astype(np.int64))  # (rows * T + 1,)
        return ids[:-1].view(rows, length), ids[1:].view(rows, length)


class _From(Sampler[int]):
    """Batches from some number on. Its length is that of all: Lightning counts those that were seen before, too."""

    def __init__(self, first: int, batches: int) -> None:
        self.first, self.batches = first, batches

    def __len__(self) -> int:
        return self.batches

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.first, self.batches))


class TokenData(L.LightningDataModule):
    """Token files as Lightning's loaders.

    Args:
        files: The token files.
        context: T.
        batch_size: Rows of a batch, over all processes.
        batches: Training batches of the whole run.
        accumulate: Batches of one optimizer step.
        seed: Of the rows' places.

    Raises:
        UserError: If a split is shorter than it must be.
    """

    def __init__(
        self, files: TokenFiles, context: int, batch_size: int, batches: int, accumulate: int = 1, seed: int = 1
    ) -> None:
        super().__init__()
        self.files, self.context, self.batch_size, self.seed = files, context, batch_size, seed
        self.batches, self.accumulate = batches, accumulate
        for split, least in (("train", context + 1), ("validation", 2)):
            if files.tokens[split] < least:
                raise UserError(
                    f"The {split} text in {files.folder} has {files.tokens[split]:,} tokens, and at least {least:,} "
                    f"are needed for a context of {context}. Take a longer text, or a smaller --model.context."
                )

    def _place(self) -> dict[str, int]:
        trainer = self.trainer
        return {} if trainer is None else {"rank": trainer.global_rank, "world_size": trainer.world_size}

    def train_dataloader(self) -> DataLoader[tuple[Tensor, Tensor]]:
        """Batches from the one on that the trainer has come to."""
        rows = Rows(self.files.read("train"), self.context, self.batch_size, self.batches, self.seed, **self._place())
        done = 0 if self.trainer is None else self.trainer.global_step * self.accumulate
        return DataLoader(rows, batch_size=None, sampler=_From(done, self.batches))

    def val_dataloader(self) -> DataLoader[tuple[Tensor, Tensor]]:
        """The whole validation split."""
        return DataLoader(Windows(self.files.read("validation"), self.context, **self._place()), batch_size=None)
