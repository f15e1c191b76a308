"""How near a summary comes to what people wrote: ROUGE (Lin 2004), and the best that choosing sentences could reach.

ROUGE-1 and ROUGE-2 are F-measures of shared words and pairs of words, ROUGE-L of the longest common subsequence, by the
package `rouge-score` with Porter's stems. With several references a summary has, for each of the three, its best score.
"""

import functools
import random
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from rouge_score.rouge_scorer import RougeScorer
from rouge_score.tokenizers import DefaultTokenizer, Tokenizer

from workflows.checkpoint import metric

KINDS = ("rouge1", "rouge2", "rougeL")


class _Once(Tokenizer):
    """Stems of a text, made once: the oracle scores each sentence, and each reference, many times."""

    def __init__(self) -> None:
        self._stems = functools.lru_cache(maxsize=100_000)(DefaultTokenizer(use_stemmer=True).tokenize)

    def tokenize(self, text: str) -> list[str]:
        return self._stems(text)


@functools.cache
def _scorer(*kinds: str) -> RougeScorer:
    return RougeScorer(list(kinds), tokenizer=_Once())


def rouge(summary: str, references: Sequence[str], kinds: tuple[str, ...] = KINDS) -> list[float]:
    """A summary's F-measures, from 0 to 1, each the best over the references."""
    scores = [_scorer(*kinds).score(reference, summary) for reference in references]
    return [max(score[kind].fmeasure for score in scores) for kind in kinds]


def oracle(sentences: Sequence[str], references: Sequence[str], most: int) -> list[int]:
    """The sentences that come nearest to the references, found one after the other (arXiv 1903.10318, section 3.1).

    In each step the sentence joins that raises ROUGE-1 + ROUGE-2 most, until none does or there are enough.

    Args:
        sentences: A document's.
        references: Its summaries.
        most: The most sentences to choose.

    Returns:
        Their numbers in the document's order; at least one, the first where no sentence shares a word.
    """
    chosen: list[int] = []
    best = 0.0
    while len(chosen) < min(most, len(sentences)):
        found = {
            i: sum(rouge(joined(sentences, [*chosen, i]), references, KINDS[:2]))
            for i in range(len(sentences))
            if i not in chosen
        }
        i = max(found, key=found.__getitem__)
        if found[i] <= best:
            break
        best = found[i]
        chosen.append(i)
    return sorted(chosen) or [0]


def joined(sentences: Sequence[str], chosen: Sequence[int]) -> str:
    """The chosen sentences as one text, in the document's order."""
    return " ".join(sentences[i] for i in sorted(chosen))


def choose(scores: Sequence[float], sentences: Sequence[str], most: int) -> list[int]:
    """The best sentences that do not repeat each other (trigram blocking, Paulus et al. 2017, arXiv 1705.04304).

    Args:
        scores: Of the sentences.
        sentences: Their texts; one that shares three words in a row with a better one is passed over.
        most: The most sentences to choose.

    Returns:
        Their numbers in the document's order.
    """
    chosen: list[int] = []
    seen: set[tuple[str, ...]] = set()
    for i in sorted(range(len(sentences)), key=lambda i: -scores[i]):
        words = sentences[i].lower().split()
        trigrams = set(zip(words, words[1:], words[2:], strict=False))
        if len(chosen) < most and not trigrams & seen:
            chosen.append(i)
            seen |= trigrams
    return sorted(chosen)


Chooser = Callable[[Sequence[str], Sequence[str]], list[int]]
"""Chooses sentences of a document, knowing them and the references."""


def baselines(most: int, seed: int) -> dict[str, Chooser]:
    """What a summary is compared with: functions of a document's sentences and its references that choose sentences.

    Args:
        most: The sentences of a summary; the first so many are chosen, the first and the first three in any case.
        seed: Of the random choice.
    """
    chance = random.Random(seed)
    found: dict[str, Chooser] = {f"lead{n}": functools.partial(_lead, n) for n in sorted({1, 3, most})}
    found["random"] = lambda sentences, _: chance.sample(range(len(sentences)), min(most, len(sentences)))
    found["oracle"] = lambda sentences, references: oracle(sentences, references, most)
    return found


def _lead(n: int, sentences: Sequence[str], references: Sequence[str]) -> list[int]:
    return list(range(min(n, len(sentences))))


def interval(values: Sequence[float], seed: int = 0, draws: int = 1000) -> tuple[float, float]:
    """The 95% confidence interval of a mean, by the bootstrap: documents are drawn anew with replacement.

    Args:
        values: One for each document.
        seed: Of the draws.
        draws: How many.
    """
    drawn = np.random.default_rng(seed).integers(len(values), size=(draws, len(values)))  # (draws, documents)
    low, high = np.percentile(np.asarray(values)[drawn].mean(axis=1), [2.5, 97.5])
    return float(low), float(high)


def rouge_metrics(name: str, scores: Sequence[Sequence[float]]) -> list[dict[str, Any]]:
    """Rows of `metrics.json` for the test split: ROUGE-1, 2 and L with their intervals.

    Args:
        name: Whose they are; stands before the kind.
        scores: Each document's `rouge`.
    """
    rows = []
    for kind, values in zip(KINDS, zip(*scores, strict=True), strict=True):
        spread = float(np.std(values, ddof=1) / len(values) ** 0.5) if len(values) > 1 else None
        row = metric(f"{name}_{kind}", float(np.mean(values)), stderr=spread, n=len(values), split="test")
        rows.append({**row, "interval": interval(values)})
    return rows


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Rows of `rouge_metrics` as lines: in percent, with the interval."""
    by_name: dict[str, list[str]] = {}
    for row in rows:
        name, _, _ = row["name"].rpartition("_")
        low, high = row["interval"]
        by_name.setdefault(name, []).append(f"{100 * row['value']:6.1f} ({100 * low:.1f} to {100 * high:.1f})")
    head = f"{'':<14}" + "".join(f"{kind:>23}" for kind in ("ROUGE-1", "ROUGE-2", "ROUGE-L"))
    return "\n".join([head, *(f"{name:<14}" + "".join(f"{c:>23}" for c in cells) for name, cells in by_name.items())])
