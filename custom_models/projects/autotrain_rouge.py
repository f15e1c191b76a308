"""ROUGE as a metric of the library `evaluate`, by rouge-score.

AutoTrain asks for `evaluate.load("rouge")`, which is a program on the Hub. This file takes its place where AutoTrain
runs, as `rouge/rouge.py`, so that nothing is downloaded to be run. `evaluate` reads the imports line by line.
"""

from collections.abc import Sequence
from statistics import fmean

import datasets
import evaluate
from rouge_score.rouge_scorer import RougeScorer

_TYPES = ["rouge1", "rouge2", "rougeL", "rougeLsum"]


class Rouge(evaluate.Metric):
    """The mean F1 of ROUGE-1, 2, L and Lsum over the texts."""

    def _info(self) -> evaluate.MetricInfo:
        text = datasets.Value("string")
        features = datasets.Features({"predictions": text, "references": text})
        return evaluate.MetricInfo(description="ROUGE (Lin 2004)", citation="", features=features)

    def _compute(
        self, predictions: Sequence[str], references: Sequence[str], use_stemmer: bool = False
    ) -> dict[str, float]:
        scorer = RougeScorer(_TYPES, use_stemmer=use_stemmer)
        scores = [scorer.score(wanted, found) for wanted, found in zip(references, predictions, strict=True)]
        return {kind: fmean(score[kind].fmeasure for score in scores) for kind in _TYPES}
