"""What all ways of `make ner` share: sentences are read, and what each training gave is scored and written down."""

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from custom_models.projects.classifier import over_seeds
from custom_models.projects.entity_scores import Scores, Tagged, majority_dictionary, score
from custom_models.projects.ner_model import Asking, Codec, EntityModel, Sentence, Written, by_both, by_text
from custom_models.projects.texts import drawn
from data_prep.iob import OUTSIDE, Entity
from data_prep.rows import read_rows
from workflows.checkpoint import metric, versions, write_metrics
from workflows.errors import UserError
from workflows.measure import PeakMemory, hardware, seconds_of_step

Row = TypeVar("Row")


class Round(NamedTuple):
    """One training.

    Attributes:
        model: What it gave.
        codec: The model's ids.
        epochs: The numbers of each epoch.
        seconds: How long it took, pretraining left out.
    """

    model: EntityModel
    codec: Codec
    epochs: list[dict[str, float]]
    seconds: float


def read_tagged(data: Path, split: str) -> list[Tagged]:
    """Words and tags of a data directory's sentences.

    Raises:
        UserError: If the file is missing or malformed.
    """
    return [(row["tokens"], row["tags"]) for row in read_rows(data / f"{split}.jsonl", "tagged")]


def read_splits(data: Path, max_rows: int | None) -> tuple[dict[str, list[Tagged]], list[str]]:
    """A data directory's sentences, at most `max_rows` of them for training, and the types of entities in them.

    Raises:
        UserError: If a file is missing or malformed, or no entity is marked.
    """
    splits = {split: read_tagged(data, split) for split in ("train", "validation", "test")}
    splits["train"] = splits["train"][:max_rows]
    types = sorted({tag[2:] for rows in splits.values() for _, tags in rows for tag in tags if tag != OUTSIDE})
    if not types:
        raise UserError(f"{data} marks no entity; there is nothing to learn.")
    print(f"{data}: {', '.join(types)}; " + ", ".join(f"{len(rows):,} {split}" for split, rows in splits.items()))
    return splits, types


def encode(rows: Sequence[Tagged], codec: Codec, longest: int) -> tuple[list[Sentence], int]:
    """Sentences for the model, and how many of them were cut."""
    found = [codec.encode(words, tags, longest) for words, tags in rows]
    return found, sum(len(sentence.words) < len(words) for sentence, (words, _) in zip(found, rows, strict=True))


def find(model: EntityModel, codec: Codec, sentences: Sequence[Sentence], asking: Asking) -> Written:
    """The entities of sentences by the head that is asked for."""
    if asking.head == "tokens":
        return model.by_tags(sentences)
    written = by_text(model.t5.eval(), codec, sentences, asking.constrained, asking.n_beam)
    return by_both(model, codec, sentences, written, asking.tag_share) if asking.head == "both" else written


def report(
    trained: Iterable[Round],
    splits: dict[str, list[Tagged]],
    data: Path,
    model: str,
    asking: Asking,
    validation_rows: int | None,
    tag_weight: float,
    seeds: list[int],
    out_dir: Path,
    began: float,
    settings: dict[str, Any],
) -> list[Round]:
    """Score what each training gave on the test sentences, beside the majority dictionary; write `metrics.json`.

    Args:
        trained: One training for each seed, done when it is asked for.
        splits: See `read_splits`.
        data: Where they are from.
        model: What was trained, for the messages.
        asking: How it is asked.
        validation_rows: How many sentences of validation are looked at; all if None.
        tag_weight: 0 if its encoder has not learned to tag words.
        seeds: Those of the trainings.
        out_dir: Where the numbers go.
        began: When the step began, see `measure.step_began`.
        settings: Further settings, to be written down.

    Returns:
        The trainings.
    """
    names = majority_dictionary(splits["train"])
    dictionary = score(splits["test"], [names.find(words) for words, _ in splits["test"]])
    print(f"majority dictionary, test: F1 {dictionary.f1:.3f}")
    rounds: list[Round] = []
    results: list[tuple[Scores, Written]] = []
    beside: list[dict[str, float]] = []
    with PeakMemory() as peak:
        for seed, done in zip(seeds, trained, strict=True):
            test, cut = encode(splits["test"], done.codec, asking.longest)
            written = find(done.model, done.codec, test, asking)
            results.append((score(splits["test"], written.entities), written))
            rounds.append(done)
            beside.append(_beside(done, splits, test, written.lists, asking, validation_rows, tag_weight))
            print(_told(f"seed {seed}, test", *results[-1]) + f"; trained in {done.seconds:.0f} s")
            print("".join(f"  {name}: {value:.3f}\n" for name, value in beside[-1].items()), end="")
    if cut:
        print(f"{cut:,} test sentences were over {asking.longest} tokens; what is beyond counts as not found")
    first, f1s = results[0][0], [scores.f1 for scores, _ in results]
    told = [metric(name, value, n=first.n, split="test")
            for name, value in (("f1", first.f1), ("precision", first.precision), ("recall", first.recall),
                                ("f1_dictionary", dictionary.f1),
                                *((f"f1_{kind}", value) for kind, value in first.by_type.items()))]  # fmt: skip
    told += over_seeds("f1", f1s)
    write_metrics(
        out_dir / "metrics.json",
        told,
        seconds=seconds_of_step(began),
        peak_bytes=peak.bytes,
        train_seconds=[done.seconds for done in rounds],
        seeds=dict(zip(map(str, seeds), f1s, strict=True)),
        malformed=[written.malformed for _, written in results],
        unfinished=[written.unfinished for _, written in results],
        beside=beside,
        epochs=[done.epochs for done in rounds],
        sentences_cut=cut,
        parameters=sum(p.numel() for p in rounds[0].model.parameters()),
        data=data.name,
        settings={"model": model, **asdict(asking), "validation_rows": validation_rows, **settings},
        hardware=hardware(),
        versions=versions(),
    )
    spread = f" (from {min(f1s):.3f} to {max(f1s):.3f}, {len(f1s)} seeds)" if f1s[1:] else ""
    mean = f"{statistics.fmean(f1s):.3f}{spread}"
    print(f"\ntest F1: {model}, {asking.head} {mean}; majority dictionary {dictionary.f1:.3f}")
    words = splits["test"][0][0]
    print(f"  {' '.join(words)}\n    {_listed(words, results[0][1].entities[0])}")
    return rounds


def _beside(
    done: Round,
    splits: dict[str, list[Tagged]],
    test: Sequence[Sentence],
    lists: Sequence[list[list[int]]],
    asking: Asking,
    validation_rows: int | None,
    tag_weight: float,
) -> dict[str, float]:
    """Further F1s of a model that writes lists: by either of its halves alone, and with and without the grammar."""
    if asking.head == "tokens":
        return {}
    found = {}
    if asking.head == "both":
        alone = [done.codec.entities(best, each.words)[0] for each, (best, *_) in zip(test, lists, strict=True)]
        found["f1 by the decoder's lists, test"] = score(splits["test"], alone).f1
    if tag_weight:
        found["f1 by the encoder's tags, test"] = score(splits["test"], done.model.by_tags(test).entities).f1
    rows = drawn(splits["validation"], validation_rows)
    sentences, _ = encode(rows, done.codec, asking.longest)
    for name, constrained in (("constrained", True), ("free", False)):
        written = find(done.model, done.codec, sentences, replace(asking, constrained=constrained))
        found[f"f1, {name}, {len(rows):,} of validation"] = score(rows, written.entities).f1
        found[f"malformed entries, {name}"] = float(written.malformed)
    return found


def _told(name: str, scores: Scores, written: Written) -> str:
    kinds = ", ".join(f"{kind} {value:.3f}" for kind, value in scores.by_type.items())
    wrong = f"; {written.malformed:,} malformed entries, {written.unfinished:,} unfinished lists"
    return f"{name}: F1 {scores.f1:.3f} (precision {scores.precision:.3f}, recall {scores.recall:.3f}; {kinds}){wrong}"


def _listed(words: Sequence[str], entities: Sequence[Entity]) -> str:
    return " ; ".join(f"{e.type}: {' '.join(words[e.start : e.end])}" for e in entities) or "no entity"
