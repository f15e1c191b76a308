"""Summaries in a model's own words: two BERTs as encoder and decoder, by transformers' `EncoderDecoderModel`.

Rothe et al. 2019, arXiv 1907.12461; Liu and Lapata 2019, arXiv 1908.08345 (section 3.3). Both halves begin at the same
weights; what the decoder looks at the encoder with is new and must be learned, which takes more documents than the
choice of sentences does.

A document over the encoder's positions is summarised by map and reduce: each window of it by itself, then the summaries
as a document of their own, until one window holds all.
"""

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import lightning as L
import torch
from tokenizers import Tokenizer
from torch import Tensor
from torch.utils.data import DataLoader

from custom_models.bertsum import windows
from custom_models.configuration import configured
from custom_models.encoder_checkpoint import frame_of, tokenizer_of
from custom_models.masked_language_model import IGNORED
from custom_models.projects.documents import Document, encode_documents, read_documents
from custom_models.projects.fitting import FitArgs, fit_best
from custom_models.projects.rouge import baselines, joined, rouge, rouge_metrics, table
from custom_models.projects.seq2seq import padded
from custom_models.projects.texts import LengthBatches
from custom_models.weights import UNREADABLE, quiet_transformers
from workflows.checkpoint import versions, write_metrics
from workflows.errors import UserError, first_line
from workflows.files import atomic_dir, read_json, recover_dir
from workflows.measure import PeakMemory, hardware, seconds_of_step


@dataclass
class Decoding:
    """How summaries are written."""

    beams: int = 4
    """Beams of the search; 1 is greedy."""
    length_penalty: float = 1.0
    """Scores are divided by length to this power: above 0 longer summaries win."""
    no_repeat_ngram: int = 3
    """So many words in a row are never written twice; 0 allows it."""
    max_length: int = 64
    """The most tokens of a summary."""

    def problems(self, longest: int) -> list[str]:
        """Everything that is wrong with them for an encoder of so many positions, as messages."""
        found = [f"--decoding.{name} must be at least {least}, not {getattr(self, name)}."
                 for name, least in (("beams", 1), ("no_repeat_ngram", 0), ("max_length", 4))
                 if getattr(self, name) < least]  # fmt: skip
        if self.max_length > longest // 4:  # so that summaries of windows are always less than the windows
            found.append(f"--decoding.max_length must be at most a quarter of the {longest} positions.")
        return found


NAMES = {"beams": "num_beams", "no_repeat_ngram": "no_repeat_ngram_size"}
"""What transformers calls a setting, where it has another name for it."""


@dataclass(frozen=True)
class Pair:
    """A document's first window and a summary of it, as tokens."""

    ids: list[int]
    summary: list[int]


class AbstractiveTask(L.LightningModule):
    """How it is trained: to write the reference, token by token.

    Args:
        model: The `EncoderDecoderModel`.
        fit: Rate and schedule.
        total_steps: Optimizer steps in all.
    """

    def __init__(self, model: Any, fit: FitArgs, total_steps: int) -> None:
        super().__init__()
        self.model, self.fit_args, self.total_steps = model, fit, total_steps

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        """Cross-entropy of the reference's tokens."""
        loss: Tensor = self.model(**batch).loss
        return loss

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """The loss, logged."""
        loss = self.loss(batch)
        self.log("train_loss", loss, on_step=False, on_epoch=True, batch_size=len(batch["labels"]))
        return loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """The loss on held-out documents."""
        self.log("val_loss", self.loss(batch), batch_size=len(batch["labels"]), prog_bar=True)

    def configure_optimizers(self) -> Any:
        """AdamW with the rate's schedule."""
        return self.fit_args.optimizer(self, self.total_steps)


def from_encoder(directory: Path, tokenizer: Tokenizer, decoding: Decoding) -> Any:
    """An `EncoderDecoderModel` whose halves begin at an encoder's weights.

    Raises:
        UserError: If the encoder cannot be a decoder, as DistilBERT cannot.
    """
    from transformers import EncoderDecoderModel

    family = read_json(directory / "config.json").get("model_type")
    if family not in ("bert", "roberta"):
        raise UserError(f"{directory} is of the architecture {family!r}; as a decoder serve bert and roberta.")
    start, end = frame_of(tokenizer, directory)
    place = str(directory)
    model = EncoderDecoderModel.from_encoder_decoder_pretrained(place, place)
    pad_id = model.config.encoder.pad_token_id
    settings = {"decoder_start_token_id": start, "eos_token_id": end, "pad_token_id": pad_id}
    for config in (model.config, model.generation_config):
        for name, value in settings.items():
            setattr(config, name, value)
    settings = {NAMES.get(name, name): value for name, value in asdict(decoding).items()}
    model.generation_config.update(bos_token_id=start, early_stopping=decoding.beams > 1, **settings)
    return model


def positions_of(model: Any) -> int:
    """The most tokens that the encoder reads; RoBERTa's first positions are padding's."""
    config = model.config.encoder
    return config.max_position_embeddings - (config.pad_token_id + 1 if config.model_type == "roberta" else 0)


def window_ids(ids: Sequence[Sequence[int]], longest: int) -> list[list[int]]:
    """The windows of a document as texts of their own: one [CLS], the sentences, one [SEP].

    Args:
        ids: Its sentences' tokens, each with its own [CLS] and [SEP].
        longest: The most tokens of a window.
    """
    start, end, bare = ids[0][0], ids[0][-1], [sentence[1:-1] for sentence in ids]
    parts = windows([len(sentence) for sentence in bare], longest - 2)
    return [[start, *(i for sentence in bare[a:b] for i in sentence), end] for a, b in parts]


def masked(rows: Sequence[Sequence[int]], pad_id: int) -> dict[str, Tensor]:
    """What the encoder reads: ids and which of them are real, (B, T) each."""
    return {"input_ids": padded(rows, pad_id), "attention_mask": padded([[1] * len(row) for row in rows], 0)}


@torch.no_grad()
def write(model: Any, tokenizer: Tokenizer, rows: Sequence[Sequence[int]], batch_size: int = 8) -> list[str]:
    """A summary of each text that fits the encoder, in the order given."""
    found: list[str] = []
    for begin in range(0, len(rows), batch_size):
        inputs = masked(rows[begin : begin + batch_size], model.config.pad_token_id)
        written = model.generate(**{name: tensor.to(model.device) for name, tensor in inputs.items()})  # (B, T)
        found += [text.strip() for text in tokenizer.decode_batch(written.tolist())]
    return found


def summarize(sentences: Sequence[str], model: Any, tokenizer: Tokenizer) -> tuple[str, int]:
    """Summarise a document of any length, by map and reduce.

    Args:
        sentences: The document's. A sentence over the encoder's positions is read without its end.
        model: The `EncoderDecoderModel`.
        tokenizer: Whose ids it reads.

    Returns:
        The summary, and how many sentences were cut.

    Raises:
        UserError: If the summaries of its windows fill as many windows again, as those of an untrained model may.
    """
    longest, cut, before = positions_of(model), 0, None
    while True:
        (document,), over = encode_documents([(list(sentences), [])], tokenizer, longest)  # as training reads them
        cut += over
        parts = window_ids(document.ids, longest)
        if before is not None and len(parts) >= before:
            raise UserError(
                f"The summaries of the text's {before} parts are as long as the parts. Train the model longer."
            )
        before = len(parts)
        sentences = write(model, tokenizer, parts)
        if len(parts) == 1:
            return sentences[0], cut


def load(folder: Path) -> tuple[Any, Tokenizer]:
    """The model that `train` has written, and its tokenizer.

    Raises:
        UserError: If the folder is damaged.
    """
    from transformers import EncoderDecoderModel

    recover_dir(folder)
    place = folder / "generation_config.json"
    found = read_json(place)  # one that is damaged transformers passes over
    values = {
        field.name: found[name] for field in fields(Decoding) if (name := NAMES.get(field.name, field.name)) in found
    }
    decoding = configured(Decoding, values, str(place), NAMES)
    quiet_transformers()
    try:
        model = EncoderDecoderModel.from_pretrained(str(folder), local_files_only=True)
        problems = decoding.problems(positions_of(model))
    except UNREADABLE as e:
        raise UserError(
            f"{folder} is no encoder-decoder that transformers can read ({first_line(e)}). Train it again."
        ) from None
    if problems:
        raise UserError(f"{place}: {' '.join(problems)} Train it again.")
    return model.eval(), tokenizer_of(folder)


def pairs_of(documents: Sequence[Document], tokenizer: Tokenizer, longest: int, most: int) -> tuple[list[Pair], int]:
    """What is learned from: each summary with the first window of its document.

    Args:
        documents: Whole.
        tokenizer: Whose ids.
        longest: The most tokens of a window.
        most: The most tokens of a summary; a longer one is not learned to its end.

    Returns:
        The pairs, and how many summaries were cut.
    """
    found, cut = [], 0
    for document in documents:
        first = window_ids(document.ids, longest)[0]
        for summary in document.summaries:
            ids = tokenizer.encode(summary).ids[1:]  # the start is put before it by the model
            cut += len(ids) >= most
            found.append(Pair(first, ids[: most - 1]))
    return found, cut


def _loader(pairs: list[Pair], pad_id: int, batch_size: int, seed: int | None) -> DataLoader[Any]:
    def collate(rows: Sequence[Pair]) -> dict[str, Tensor]:
        return {**masked([row.ids for row in rows], pad_id), "labels": padded([row.summary for row in rows], IGNORED)}

    order = LengthBatches([len(pair.ids) for pair in pairs], batch_size, seed)
    return DataLoader(pairs, batch_sampler=order, collate_fn=collate)  # type: ignore[arg-type]


def train(
    data: Path,
    encoder: str,
    directory: Path,
    tokenizer: Tokenizer,
    out_dir: Path,
    decoding: Decoding,
    fit: FitArgs,
    seed: int,
    max_rows: int | None,
    max_test_rows: int | None,
    began: float,
) -> None:
    """Train, score and write an abstractive summariser; arguments as of `summarize.setup`.

    Raises:
        UserError: If the data or the encoder is not usable.
    """
    L.seed_everything(seed, verbose=False)
    model = from_encoder(directory, tokenizer, decoding)
    longest, pad_id = positions_of(model), model.config.pad_token_id
    if problems := decoding.problems(longest):
        raise UserError(" ".join(problems))
    documents = {split: read_documents(data, split, tokenizer, longest, most) for split, most in (
        ("train", max_rows), ("validation", max_test_rows), ("test", max_test_rows))}  # fmt: skip
    pairs = {}
    for split in ("train", "validation"):
        pairs[split], cut = pairs_of(documents[split], tokenizer, longest, decoding.max_length)
        print(f"{split}: {len(pairs[split]):,} pairs, of documents' first windows; {cut:,} summaries are learned "
              f"without their ends: over {decoding.max_length} tokens")  # fmt: skip
    steps = -(-len(pairs["train"]) // fit.batch_size) * fit.max_epochs
    started = time.perf_counter()
    with PeakMemory() as peak:
        task = AbstractiveTask(model, fit, steps)
        train_loader = _loader(pairs["train"], pad_id, fit.batch_size, seed)
        epochs = fit_best(task, train_loader, _loader(pairs["validation"], pad_id, fit.batch_size, None), out_dir, fit,
                          "val_loss")  # fmt: skip
    trained = time.perf_counter() - started
    with atomic_dir(out_dir / "final") as folder:
        model.save_pretrained(folder)
        (folder / "tokenizer.json").write_text(tokenizer.to_str(), encoding="utf-8")
    test = documents["test"]
    written = [summarize(document.sentences, model, tokenizer)[0] for document in test]
    rows = rouge_metrics("abstractive", [rouge(text, d.summaries) for text, d in zip(written, test, strict=True)])
    for name, chooser in baselines(1, seed).items():
        found = [rouge(joined(d.sentences, chooser(d.sentences, d.summaries)), d.summaries) for d in test]
        rows += rouge_metrics(name, found)
    print(f"\n{data}/test.jsonl, {len(test):,} documents, seed {seed}; 95% intervals\n{table(rows)}\n\n"
          f"wrote:  {written[0]}\nwanted: {test[0].summaries[0]}")  # fmt: skip
    write_metrics(
        out_dir / "metrics.json",
        rows,
        seconds=seconds_of_step(began),
        peak_bytes=peak.bytes,
        train_seconds=[trained],
        validation_loss=min(row["val_loss"] for row in epochs),
        data=data.name,
        settings={"encoder": encoder, "decoding": asdict(decoding), "fit": asdict(fit), "seed": seed,
                  "max_rows": max_rows, "max_test_rows": max_test_rows},
        hardware=hardware(),
        versions=versions(),
    )  # fmt: skip
    print(f"{out_dir}/final, metrics.json")
