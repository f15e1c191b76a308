"""How good translations are: BLEU and chrF, what became of placeholders, whether programs do what they are to do."""

import re
from collections import Counter
from collections.abc import Sequence

from custom_models.projects.program_runs import do_the_same
from custom_models.projects.translation_text import mark, mark_as
from data_prep.rows import Row
from data_prep.translations import PLACEHOLDER
from workflows.errors import UserError


def bleu_and_chrf(written: Sequence[str], targets: Sequence[str]) -> dict[str, float]:
    """Both scores of sacrebleu's with its settings, from 0 to 100 (Papineni et al. 2002; Popović 2015)."""
    from sacrebleu.metrics.bleu import BLEU
    from sacrebleu.metrics.chrf import CHRF

    references = [list(targets)]
    return {"bleu": BLEU().corpus_score(list(written), references).score,
            "chrf": CHRF().corpus_score(list(written), references).score}  # fmt: skip


def placeholders_as_words(texts: Sequence[str], sources: Sequence[str]) -> list[str]:
    """Translations with one word in place of each placeholder.

    Scores cut "%(name)s" into five tokens, which a copy has right. So nearly half of BLEU is about what no translator
    needs to know; with these texts it is about the words.
    """
    marked = (mark_as(text, mark(source).values) for text, source in zip(texts, sources, strict=True))
    return [re.sub(r"<(\d)>", r"placeholder\1", text) for text in marked]


def exactly(written: Sequence[str], targets: Sequence[str]) -> float:
    """The share of translations that are the given ones to the letter."""
    return sum(map(str.__eq__, written, targets)) / len(targets)


def placeholders_kept(written: Sequence[str], sources: Sequence[str]) -> tuple[int, int]:
    """How many translations have just the placeholders of their source, and how many sources have any."""
    found = [
        (Counter(PLACEHOLDER.findall(a)), Counter(PLACEHOLDER.findall(b)))
        for a, b in zip(written, sources, strict=True)
    ]
    asked = [(ours, theirs) for ours, theirs in found if theirs]
    return sum(ours == theirs for ours, theirs in asked), len(asked)


def working(written: Sequence[str], rows: Sequence[Row]) -> float:
    """The share of programs that give the results of their sources for all inputs.

    Raises:
        UserError: If a source is no program that runs on its inputs.
    """
    right = 0
    for number, (text, row) in enumerate(zip(written, rows, strict=True), start=1):
        try:
            right += do_the_same(row["source"], text, row["inputs"])
        except ValueError as e:
            raise UserError(f"Row {number}: {e}. Prepare the data again: make data DATA=python_javascript") from None
    return right / len(rows)
