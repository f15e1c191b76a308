"""How well entities are found: strict F1 by seqeval, and the baseline that knows the training data by heart."""

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from data_prep.iob import Dictionary, Entity, entities_of, tags_of

Tagged = tuple[list[str], list[str]]
"""A sentence's words and tags."""


class Scores(NamedTuple):
    """An entity counts as found if its type, its first and its last word are right.

    Attributes:
        precision: The share of those named that are right.
        recall: The share of those there are that were named.
        f1: The harmonic mean of the two, over all types together.
        by_type: Each type's F1.
        n: How many entities there are.
    """

    precision: float
    recall: float
    f1: float
    by_type: dict[str, float]
    n: int


def score(sentences: Sequence[Tagged], found: Sequence[Sequence[Entity]]) -> Scores:
    """Compare entities with those of tagged sentences."""
    from seqeval.metrics import classification_report
    from seqeval.scheme import IOB2

    wanted = [tags for _, tags in sentences]
    named = [tags_of(entities, len(tags)) for entities, tags in zip(found, wanted, strict=True)]
    n = sum(len(entities_of(tags)) for tags in wanted)
    if not n:
        return Scores(0.0, 0.0, 0.0, {}, 0)
    report = classification_report(wanted, named, output_dict=True, mode="strict", scheme=IOB2, zero_division=0)
    total = report["micro avg"]
    kinds = {name: float(row["f1-score"]) for name, row in report.items() if not name.endswith(" avg")}
    return Scores(float(total["precision"]), float(total["recall"]), float(total["f1-score"]), kinds, n)


def majority_dictionary(sentences: Sequence[Tagged]) -> Dictionary:
    """Mentions that are an entity more often than not, wherever their words stand, with their commonest type.

    Args:
        sentences: The training data.
    """
    kinds: dict[tuple[str, ...], Counter[str]] = {}
    folded = [[word.casefold() for word in words] for words, _ in sentences]
    for words, (_, tags) in zip(folded, sentences, strict=True):
        for entity in entities_of(tags):
            kinds.setdefault(tuple(words[entity.start : entity.end]), Counter())[entity.type] += 1
    sizes = sorted({len(mention) for mention in kinds})
    occurs: Counter[tuple[str, ...]] = Counter()
    for words in folded:
        for size in sizes:
            grams = (tuple(words[i : i + size]) for i in range(len(words) - size + 1))
            occurs.update(gram for gram in grams if gram in kinds)
    often = {mention: counts for mention, counts in kinds.items() if 2 * counts.total() >= occurs[mention]}
    return Dictionary({mention: counts.most_common(1)[0][0] for mention, counts in often.items()})
