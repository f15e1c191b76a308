"""`make summarize`: which sentences of a document sum it up, and what a summary in one's own words would be.

* `--method extractive`: BERTSum (`bertsum.py`) on the weights of MiniLM (`--encoder minilm`), or of a BERT, RoBERTa or
  DistilBERT by its folder or Hub id; it learns to choose the sentences that the oracle chooses.
* `--method abstractive`: two BERTs as encoder and decoder (`abstractive.py`).

Beside it stand the first sentences, random ones, and the oracle, which knows the references: no choice of sentences
reaches much more.
"""

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor

from custom_models.bertsum import BertSum, Pooling
from custom_models.configuration import configured
from custom_models.encoder import Encoder
from custom_models.encoder_checkpoint import (
    encoder_directory,
    frame_of,
    load_encoder,
    read_own,
    save_encoder,
    tokenizer_of,
)
from custom_models.projects import abstractive
from custom_models.projects.classifier import over_seeds
from custom_models.projects.documents import Batch, Document, encode_documents, loader, read_documents, with_oracle
from custom_models.projects.fitting import FitArgs, fit_best, seed_problems
from custom_models.projects.keeping import kept_until_done
from custom_models.projects.rouge import baselines, choose, joined, rouge, rouge_metrics, table
from custom_models.weights import fill
from workflows.checkpoint import versions, write_metrics
from workflows.errors import UserError, report_all
from workflows.files import read_json, read_text
from workflows.measure import PeakMemory, hardware, seconds_of_step, step_began


@dataclass(frozen=True)
class Chosen:
    """What a checkpoint says of an extractive summariser besides its encoder.

    Attributes:
        n_layer: Layers over the sentences.
        pooling: What stands for a sentence.
        n_sentences: Sentences of a summary.

    Raises:
        UserError: If a number is too small.
    """

    n_layer: int
    pooling: Pooling
    n_sentences: int

    def __post_init__(self) -> None:
        if self.n_layer < 0 or self.n_sentences < 1:
            raise UserError("n_layer must be at least 0 and n_sentences at least 1. Train it again.")


class SummaryTask(L.LightningModule):
    """How it is trained: each sentence is, or is not, one that the oracle chooses (arXiv 1903.10318, section 2.2).

    Args:
        model: What scores sentences.
        fit: Rate and schedule.
        total_steps: Optimizer steps in all.
        most: Sentences of a summary.
    """

    def __init__(self, model: BertSum, fit: FitArgs, total_steps: int, most: int) -> None:
        super().__init__()
        self.model, self.fit_args, self.total_steps, self.most = model, fit, total_steps, most

    def loss(self, batch: Batch) -> Tensor:
        """Binary cross-entropy, the mean over the sentences."""
        logits = self.model(batch.tokens)  # (B, S)
        real = logits > float("-inf")  # (B, S)
        return F.binary_cross_entropy_with_logits(logits[real], batch.labels[real])

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The loss, logged."""
        loss = self.loss(batch)
        self.log("train_loss", loss, on_step=False, on_epoch=True, batch_size=len(batch.documents))
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """ROUGE-1 of the chosen sentences."""
        found = [rouge(joined(document.sentences, chosen), document.summaries, ("rouge1",))[0]
                 for document, chosen in chosen_of(self.model(batch.tokens), batch.documents, self.most)]  # fmt: skip
        self.log("val_rouge1", torch.tensor(found).mean(), batch_size=len(found), prog_bar=True)

    def configure_optimizers(self) -> Any:
        """AdamW with the rate's schedule."""
        return self.fit_args.optimizer(self, self.total_steps)


def chosen_of(logits: Tensor, documents: Sequence[Document], most: int) -> list[tuple[Document, list[int]]]:
    """Each document with the sentences that its logits, a row of (B, S), choose."""
    return [(document, choose(row[: len(document.sentences)], document.sentences, most))
            for document, row in zip(documents, logits.tolist(), strict=True)]  # fmt: skip


@kept_until_done
def setup(
    data: Path = Path("data/docstrings"),
    method: Literal["extractive", "abstractive"] = "extractive",
    encoder: str = "minilm",
    out_dir: Path = Path("out/summarize/docstrings/minilm"),
    n_sentences: int = 1,
    n_layer: int = 2,
    pooling: Pooling = "cls",
    frozen_layers: int = 0,
    decoding: abstractive.Decoding = abstractive.Decoding(),
    fit: FitArgs = FitArgs(batch_size=16, learning_rate=5e-5, max_epochs=3, patience=2),
    seeds: list[int] | None = None,
    max_rows: int | None = None,
    max_test_rows: int | None = None,
) -> None:
    """Train a summariser.

    Args:
        data: A data directory of {"sentences", "summaries"} rows, from `make data DATA=scitldr` and its like.
        method: Choose sentences, or write new ones.
        encoder: "minilm", the folder of a BERT, RoBERTa or DistilBERT, or its id on the Hub.
        out_dir: Where the numbers go; the model is in its `final` folder.
        n_sentences: Sentences of a summary (extractive).
        n_layer: Layers over the sentences (extractive).
        pooling: What stands for a sentence: the state of its [CLS], or the mean of its tokens' (extractive).
        frozen_layers: The encoder's embeddings and so many of its first layers stay as they are (extractive), which
            makes a step cheaper.
        decoding: How summaries are written (abstractive).
        fit: How it is trained.
        seeds: One training for each; [1] if null. The first one's model is kept.
        max_rows: Train on so many documents only, drawn at random.
        max_test_rows: Validate and test on so many only, likewise.

    Raises:
        UserError: If an argument, the data or the encoder is not usable.
    """
    began = step_began()
    seeds = [1] if seeds is None else seeds
    problems = fit.problems() + seed_problems(*seeds)
    problems += [f"--{name} must be at least 1, not {value}."
                 for name, value in (("n_sentences", n_sentences), ("max_rows", max_rows),
                                     ("max_test_rows", max_test_rows)) if value is not None and value < 1]  # fmt: skip
    problems += [] if n_layer >= 0 else [f"--n_layer must be at least 0, not {n_layer}."]
    problems += [] if frozen_layers >= 0 else [f"--frozen_layers must be at least 0, not {frozen_layers}."]
    report_all(problems)
    directory = encoder_directory(encoder)
    tokenizer = tokenizer_of(directory)
    frame_of(tokenizer, directory)  # sentences lose and get it
    if method == "abstractive":
        if len(seeds) > 1:
            raise UserError("--method abstractive trains once: give one seed.")
        abstractive.train(
            data, encoder, directory, tokenizer, out_dir, decoding, fit, seeds[0], max_rows, max_test_rows, began
        )
        return
    longest = load_encoder(directory).config.n_position
    train, validation, test = (read_documents(data, split, tokenizer, longest, most) for split, most in (
        ("train", max_rows), ("validation", max_test_rows), ("test", max_test_rows)))  # fmt: skip
    train = with_oracle(train, n_sentences)
    if not train:
        raise UserError(f"{data}/train.jsonl has no document of two sentences or more: there is nothing to choose.")
    runs, kept, times = [], None, []
    with PeakMemory() as peak:
        for seed in seeds:
            L.seed_everything(seed, verbose=False)
            model = BertSum(load_encoder(directory), n_layer, pooling)
            freeze(model.encoder, frozen_layers)
            pad_id, started = model.encoder.config.pad_id, time.perf_counter()
            steps = -(-len(train) // fit.batch_size) * fit.max_epochs
            task = SummaryTask(model, fit, steps, n_sentences)
            held = loader(validation, longest, pad_id, 2 * fit.batch_size)
            epochs = fit_best(
                task, loader(train, longest, pad_id, fit.batch_size, seed), held, out_dir, fit, "val_rouge1"
            )
            times.append(time.perf_counter() - started)
            runs.append([rouge(joined(d.sentences, c), d.summaries) for d, c in summarize(model, test, n_sentences)])
            best = max(row["val_rouge1"] for row in epochs)
            print(f"seed {seed}: validation ROUGE-1 {100 * best:.1f} (best of {len(epochs)} epochs), test "
                  f"{100 * _mean(runs[-1]):.1f}, {times[-1]:.0f} s")  # fmt: skip
            kept = kept or model
    assert kept is not None
    save_encoder(kept, kept.encoder.config, tokenizer, out_dir / "final", method="extractive", data=data.name,
                 **asdict(Chosen(n_layer, pooling, n_sentences)))  # fmt: skip
    rows = rouge_metrics("extractive", runs[0])
    for name, chooser in baselines(n_sentences, seeds[0]).items():
        found = [rouge(joined(d.sentences, chooser(d.sentences, d.summaries)), d.summaries) for d in test]
        rows += rouge_metrics(name, found)
    print(f"\n{data}/test.jsonl, {len(test):,} documents, seed {seeds[0]}; 95% intervals\n{table(rows)}")
    write_metrics(
        out_dir / "metrics.json",
        rows + over_seeds("extractive_rouge1", [_mean(run) for run in runs]),
        seconds=seconds_of_step(began),
        peak_bytes=peak.bytes,
        train_seconds=times,
        seeds={str(seed): [_mean(run, kind) for kind in range(3)] for seed, run in zip(seeds, runs, strict=True)},
        data=data.name,
        settings={"encoder": encoder, "n_sentences": n_sentences, "n_layer": n_layer, "pooling": pooling,
                  "frozen_layers": frozen_layers,
                  "fit": asdict(fit), "max_rows": max_rows, "max_test_rows": max_test_rows},
        hardware=hardware(),
        versions=versions(),
    )  # fmt: skip
    print(f"{out_dir}/final, metrics.json")


def freeze(encoder: Encoder, n_layer: int) -> None:
    """Keep the embeddings and the first layers as they are, without dropout; nothing if `n_layer` is 0."""
    around = (encoder.tokens, encoder.positions, encoder.segments, encoder.embedding_norm, encoder.dropout)
    for module in [*around, *encoder.layers[:n_layer]] if n_layer else []:
        if module is not None:
            module.requires_grad_(False).eval()


def _mean(scores: Sequence[Sequence[float]], kind: int = 0) -> float:
    return sum(row[kind] for row in scores) / len(scores)


@torch.no_grad()
def summarize(
    model: BertSum, documents: Sequence[Document], most: int, batch_size: int = 16
) -> list[tuple[Document, list[int]]]:
    """Each document with the numbers of the sentences that sum it up, in the order given."""
    model.eval()
    device, config = model.head.weight.device, model.encoder.config
    batches = loader(documents, config.n_position, config.pad_id, batch_size)
    found = [pair for batch in batches for pair in chosen_of(model(batch.tokens.to(device)), batch.documents, most)]
    chosen = {id(document): numbers for document, numbers in found}
    return [(document, chosen[id(document)]) for document in documents]


def load_summarizer(folder: Path) -> tuple[BertSum, Tokenizer, int]:
    """Read an extractive summariser: the model, its tokenizer, and how many sentences a summary has.

    Raises:
        UserError: If it is none of ours, or damaged.
    """
    config, shape, weights = read_own(folder)
    if config.get("method") != "extractive":
        raise UserError(f"{folder} is no summariser. Train one with `make summarize`.")
    values = {field.name: config[field.name] for field in fields(Chosen) if field.name in config}
    how = configured(Chosen, values, f"{folder}/config.json")
    model = BertSum(Encoder(shape), how.n_layer, how.pooling)
    fill(model, weights, str(folder))
    return model.eval(), tokenizer_of(folder), how.n_sentences


def summary(checkpoint_dir: Path, file: Path, n_sentences: int | None = None) -> None:
    """Print a summary of a text, and the text with the chosen sentences marked.

    Args:
        checkpoint_dir: A summariser's folder, such as out/summarize/docstrings/minilm/final.
        file: A UTF-8 text file; a blank line ends a paragraph.
        n_sentences: Sentences of the summary (extractive); as it was trained if null.

    Raises:
        UserError: If the folder holds no summariser, or the file has no text.
    """
    from custom_models.demo import definitions
    from custom_models.tokenization.words import punkt_is_installed, splitter
    from data_prep.summaries import split_sentences

    if not (checkpoint_dir / "config.json").is_file():
        raise UserError(f"{checkpoint_dir} holds no summariser. Train one with `make summarize`, or name its folder.")
    if n_sentences is not None and n_sentences < 1:
        raise UserError(f"--n_sentences must be at least 1, not {n_sentences}.")
    if file.is_dir():
        raise UserError(f"{file} is a folder. Name a text file in it.")
    text = read_text(file)
    learn_from = text if punkt_is_installed() else f"{definitions()[:100_000]}\n{text}"
    if not (sentences := split_sentences(text, splitter(learn_from))):
        raise UserError(f"{file} is empty: there is nothing to summarise.")
    if read_json(checkpoint_dir / "config.json").get("model_type") == "encoder-decoder":
        if n_sentences is not None:
            raise UserError(f"{checkpoint_dir} writes summaries and chooses no sentences: leave out --n_sentences.")
        writer, tokenizer = abstractive.load(checkpoint_dir)
        written, cut = abstractive.summarize(sentences, writer, tokenizer)
        print(written)
        _tell_cut(cut, abstractive.positions_of(writer))
        return
    model, tokenizer, most = load_summarizer(checkpoint_dir)
    (document,), cut = encode_documents([(sentences, [])], tokenizer, model.encoder.config.n_position)
    ((_, chosen),) = summarize(model, [document], n_sentences or most)
    print(joined(sentences, chosen) + "\n")
    for i, sentence in enumerate(sentences):
        print(f"{'>' if i in chosen else ' '} {' '.join(sentence.split())}")
    if len(sentences) == 1:
        print("\nThe text has one sentence, so there was nothing to choose.")
    _tell_cut(cut, model.encoder.config.n_position)


def _tell_cut(cut: int, longest: int) -> None:
    if cut:
        print(f"\n{cut} sentences were read without their ends: over {longest} tokens.")
