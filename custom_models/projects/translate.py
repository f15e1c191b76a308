"""`make translate`: a Transformer or a T5 of our own learns to translate, from parallel text alone.

* `--data data/catalogues_fr` (or `_de`): what programs say, English to French; some 2,200 pairs, which is very little.
* `--data data/python_javascript`: programs, of which those that were written are run, and must do what the source does.
* `--data data/opus_books_fr`: books, from the Hub, for a machine with a GPU.

Beside it stand two translators that understand nothing: copying, and a translation memory, which a model may read too.
"""

import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import lightning as L
from torch.utils.data import DataLoader

from custom_models.encoder_decoder import EncoderDecoder
from custom_models.encoder_decoder_config import EncoderDecoderConfig, transformer
from custom_models.projects.classifier import over_seeds
from custom_models.projects.fitting import FitArgs, fit_best, seed_problems
from custom_models.projects.keeping import kept_until_done
from custom_models.projects.pictures import draw_curves
from custom_models.projects.program_runs import find_node
from custom_models.projects.seq2seq import (
    PairBatch,
    Seq2SeqTask,
    T5Shape,
    batch_of,
    begin_by_copying,
    begin_by_looking_near,
    row_loader,
)
from custom_models.projects.translation_memory import Memory
from custom_models.projects.translation_scores import (
    bleu_and_chrf,
    exactly,
    placeholders_as_words,
    placeholders_kept,
    working,
)
from custom_models.projects.translation_text import Codec
from custom_models.projects.translator import BeamArgs, Translator, Written
from custom_models.span_corruption import Pair
from data_prep.rows import SPLITS, Row, read_rows
from data_prep.translations import PLACEHOLDER
from workflows.checkpoint import metric, share_metric, versions, write_metrics
from workflows.errors import UserError, report_all
from workflows.measure import PeakMemory, hardware, seconds_of_step, step_began

SCALES = ("bleu", "bleu_words", "chrf")
"""Scores from 0 to 100; all others are shares."""


@dataclass
class TranslatorShape(T5Shape):
    """A small encoder-decoder that is trained from nothing."""

    vocab_size: int = 1500
    """Tokens of its vocabulary, which both languages share."""
    kind: Literal["transformer", "t5"] = "t5"
    """Of which paper; the Transformer with sine waves and layer norm, or T5 v1.1."""
    dropout: float = 0.3
    """Share of activations set to zero in training."""

    def configuration(self, codec: Codec) -> EncoderDecoderConfig:
        """The whole configuration."""
        if self.kind == "t5":
            return self.config(codec.tokenizer)
        return transformer(
            self.vocab_size,
            width=self.width,
            n_layer=self.n_layer,
            n_decoder_layer=self.n_layer,
            n_head=self.n_head,
            inner_width=self.inner_width,
            max_length=4 * codec.longest,  # merges that are left out make texts longer
            norm_first=True,
            dropout=self.dropout,
            pad_id=codec.pad_id,
            start_id=codec.pad_id,
            end_id=codec.end_id,
        )


@kept_until_done
def setup(
    data: Path = Path("data/catalogues_fr"),
    out_dir: Path = Path("out/translate/catalogues_fr"),
    shape: TranslatorShape = TranslatorShape(),
    fit: FitArgs = FitArgs(batch_size=32, learning_rate=1e-3, max_epochs=60, patience=8),
    label_smoothing: float = 0.1,
    merge_dropout: float = 0.1,
    beam: BeamArgs = BeamArgs(),
    placeholders: bool = True,
    memory: bool = False,
    longest: int = 128,
    seeds: list[int] | None = None,
    max_rows: int | None = None,
    scored: Literal["validation", "test"] = "test",
) -> None:
    """Train a translator.

    Args:
        data: A data directory of {"source", "target"} rows, from `make data DATA=catalogues_fr` and its like.
        out_dir: Where pictures and numbers go; the model is in its `final` folder.
        shape: The model.
        fit: How it is trained.
        label_smoothing: So much of each token's probability is spread over the whole vocabulary in training.
        merge_dropout: So many of the vocabulary's merges are left out at random in training, so that a word is seen in
            ever other pieces (BPE-dropout).
        beam: How translations are searched for.
        placeholders: Whether %(name)s and {name} are carried over unseen.
        memory: Whether the model also reads what a translation memory finds for its text among the training pairs.
        longest: The most tokens of a text; longer pairs are not learned from.
        seeds: One training for each; [1] if null. The first one's model is kept.
        max_rows: Train on the first so many pairs only.
        scored: What is translated in the end: "test", or "validation", to choose settings by.

    Raises:
        UserError: If an argument or the data is not usable.
    """
    began = step_began()
    seeds = [1] if seeds is None else seeds
    problems = fit.problems() + beam.problems() + seed_problems(*seeds)
    problems += [f"--{name} must be from 0 to below 1, not {value}."
                 for name, value in (("label_smoothing", label_smoothing), ("merge_dropout", merge_dropout))
                 if not 0 <= value < 1]  # fmt: skip
    problems += [] if longest >= 4 else [f"--longest must be at least 4, not {longest}."]
    problems += [] if max_rows is None or max_rows >= 2 else [f"--max_rows must be at least 2, not {max_rows}."]
    report_all(problems)
    rows = {split: read_rows(data / f"{split}.jsonl", "translated") for split in SPLITS}
    rows["train"] = rows["train"][:max_rows]
    pairs = [(row["source"], row["target"]) for row in rows["train"]]
    codec = Codec.learn(pairs, shape.vocab_size, placeholders, longest)
    known = Memory(pairs, placeholders)
    if memory:
        others = known.likest_others(_groups(data, rows["train"]))
        rows["train"] = [{**row, "found": text} for row, text in zip(rows["train"], others, strict=True)]
        found = known.likest([row["source"] for row in rows["validation"]])
        rows["validation"] = [{**row, "found": text} for row, text in zip(rows["validation"], found, strict=True)]
    learned = {split: _fitting(data / f"{split}.jsonl", rows[split], codec) for split in ("train", "validation")}
    sources = [row["source"] for row in rows[scored]]
    epochs, runs, times = [], [], []
    kept: tuple[Translator, Written] | None = None
    with PeakMemory() as peak:
        for seed in seeds:
            begin = time.perf_counter()
            L.seed_everything(seed, verbose=False)
            model = EncoderDecoder(shape.configuration(codec))
            begin_by_copying(model)
            if model.encoder_bias is not None:
                begin_by_looking_near(model)
            train = pair_loader(learned["train"], codec, fit.batch_size, seed, merge_dropout)
            validation = pair_loader(learned["validation"], codec, 2 * fit.batch_size)
            task = Seq2SeqTask(model, fit, len(train) * fit.max_epochs, label_smoothing)
            epochs.append(fit_best(task, train, validation, out_dir, fit, monitor="val_loss"))
            times.append(time.perf_counter() - begin)
            translator = Translator(model, codec, beam, known if memory else None)
            written = translator.translate(sources)
            runs.append(scores(written.texts, rows[scored], placeholders))
            print(f"\nseed {seed}: {written.cut:,} sources cut, {written.unfinished:,} translations unfinished")
            kept = kept or (translator, written)
    assert kept is not None
    (translator, written) = kept
    translator.save(out_dir / "final", data.name)
    draw_curves(epochs, out_dir / "curves.png", f"{shape.kind} on {data.name}", "token")
    models = {"copy": sources, "memory": known.translate(sources)}
    baselines = {title: scores(texts, rows[scored], placeholders) for title, texts in models.items()}
    if "inputs" in rows[scored][0] and not find_node():
        print("Node.js is not installed, so no program is run; only those that are the given ones to the letter count.")
    write_metrics(
        out_dir / "metrics.json",
        _rows_of_metrics(runs, baselines, sources, scored),
        seconds=seconds_of_step(began),
        peak_bytes=peak.bytes,
        train_seconds=times,
        seeds=dict(zip(map(str, seeds), runs, strict=True)),
        cut=written.cut,
        unfinished=written.unfinished,
        parameters=sum(p.numel() for p in translator.model.parameters()),
        data=data.name,
        settings={
            "shape": asdict(shape), "fit": asdict(fit), "label_smoothing": label_smoothing, "longest": longest,
            "merge_dropout": merge_dropout, "beam": asdict(beam), "placeholders": placeholders, "memory": memory,
            "max_rows": max_rows, "scored": scored,
        },
        hardware=hardware(),
        versions=versions(),
    )  # fmt: skip
    _tell(written.texts, rows[scored], {shape.kind: runs, **{title: [found] for title, found in baselines.items()}})
    print(f"{out_dir}/final, curves.png, metrics.json")


def _groups(data: Path, rows: Sequence[Row]) -> list[int]:
    """The numbers of the rows' groups, what no two splits share."""
    if not all(isinstance(row.get("group"), int) for row in rows):
        raise UserError(f"{data}/train.jsonl: rows have no group, which --memory needs. Prepare the data again.")
    return [row["group"] for row in rows]


def _fitting(file: Path, rows: Sequence[Row], codec: Codec) -> list[Row]:
    """The rows that are short enough to learn from."""
    kept = [row for row in rows if max(map(codec.size, (row["source"], row["target"]))) <= codec.longest]
    print(f"{file}: {len(rows):,} pairs; {len(rows) - len(kept):,} left out: over {codec.longest} tokens")
    if not kept:
        raise UserError(f"No pair of {file} has at most {codec.longest} tokens. Raise --longest.")
    return kept


def pair_loader(
    rows: Sequence[Row], codec: Codec, batch_size: int, seed: int | None = None, merge_dropout: float = 0.0
) -> DataLoader[Any]:
    """Pairs of texts as batches of ids, shuffled by a seed (training) or in the order of their lengths.

    Args:
        rows: The pairs.
        codec: Encodes them, anew each time.
        batch_size: Pairs in a batch.
        seed: Of the order, or None.
        merge_dropout: Share of merges that are left out.
    """

    chance = random.Random(f"{seed} merges")

    def collate(drawn: list[Row]) -> PairBatch:
        pairs = []
        for row in drawn:
            source, values, _ = codec.source(row["source"], row.get("found"), merge_dropout, chance)
            pairs.append(Pair(source, codec.target(row["target"], values, merge_dropout, chance)))
        return batch_of(pairs, codec.pad_id)

    lengths = [len(codec.ids_of(row["source"])) + len(codec.ids_of(row["target"])) for row in rows]
    return row_loader(rows, lengths, batch_size, collate, seed)


def scores(written: Sequence[str], rows: Sequence[Row], placeholders: bool) -> dict[str, float]:
    """All numbers about translations, by their names; shares from 0 to 1, BLEU and chrF to 100."""
    sources, targets = ([row[side] for row in rows] for side in ("source", "target"))
    found = {**bleu_and_chrf(written, targets), "exact": exactly(written, targets)}
    if placeholders:
        words = [placeholders_as_words(texts, sources) for texts in (written, targets)]
        found["bleu_words"] = bleu_and_chrf(*words)["bleu"]
        kept, asked = placeholders_kept(written, sources)
        if asked:
            found["placeholders_kept"] = kept / asked
    if all("inputs" in row for row in rows) and find_node():
        found["works"] = working(written, rows)
    return found


def _rows_of_metrics(
    runs: list[dict[str, float]], baselines: dict[str, dict[str, float]], sources: Sequence[str], split: str
) -> list[dict[str, Any]]:
    """The first seed's numbers, their means over the seeds, and those of the baselines."""
    n_of = {"placeholders_kept": sum(bool(PLACEHOLDER.search(text)) for text in sources)}
    found = []
    for name, value in runs[0].items():
        n = n_of.get(name, len(sources))
        found.append(metric(name, value, n=n) if name in SCALES else share_metric(name, value, n))
        found += over_seeds(name, [run[name] for run in runs])
        found += [metric(f"{name}_{title}", numbers[name], n=n) for title, numbers in baselines.items()]
    return [{**row, "split": split} for row in found]


def _tell(written: Sequence[str], rows: Sequence[Row], runs: dict[str, list[dict[str, float]]]) -> None:
    """Print the scores side by side, and a few translations."""
    names = list(next(iter(runs.values()))[0])
    print(f"\n{'':<24}" + "".join(f"{name:>18}" for name in names))
    for title, numbers in runs.items():
        means = {name: statistics.fmean(run[name] for run in numbers) for name in names}
        line = "".join(f"{value:>18.1f}" if name in SCALES else f"{value:>18.1%}" for name, value in means.items())
        print(f"{title + (f', {len(numbers)} seeds' if numbers[1:] else ''):<24}{line}")
    for row, text in list(zip(rows, written, strict=True))[:3]:
        print(f"\n{row['source']}\n-> {text}\n   (it was: {row['target']})")
