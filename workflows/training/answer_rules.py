"""Rules that decide whether a short answer is right: functions of a `Sample` that return 1 or 0, or an overlap.

They are rewards of `workflows.training.rewards` and the metrics of `evaluate` on questions whose rows name their
`rules`. None of them asks a model.
"""

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from data_prep.normalisation import normalise, words_of

if TYPE_CHECKING:
    from workflows.training.rewards import Sample

CLOSE = 0.8
"""The F1 from which on an answer counts as the wanted text."""
_THOUGHTS = re.compile(r"\s*(?:<think>)?(.*?)</think>\s*(.*)", re.DOTALL)
_VERBS = frozenset({"is", "are", "call", "calls", "called", "say", "says", "known"})
_FRAME = _VERBS | frozenset(
    ("a", "an", "the", "this", "that", "it", "its", "these", "they", "we", "you", "doctor", "doctors", "specialists",
     "physicians", "medicine", "medical", "clinical", "medically", "correct", "proper", "right", "term", "terms",
     "name", "named", "names", "word", "language", "in", "for", "of", "as", "by", "would", "finding", "condition",
     "also")
)  # fmt: skip
"""Words that a sentence around a name may have, beside those of the question."""
_NEGATIONS = frozenset({"not", "no", "never", "neither", "nor", "or", "t"})
_MOST_FRAME_WORDS = 30
_SENTENCE = re.compile(r"""["'(]?[A-Z0-9].*[^\s.!?][.!]""")
_SENTENCE_END = re.compile(r"[.!?]\s|\n")
_NO_ADVICE = re.compile(
    r"(?:\b(?:not|no|cannot|never|without|unable)|n't)\b[^.!?\n]{0,60}\b(?:medical|health|professional)\b[^.!?\n]{0,20}\badvice\b"
    r"|(?:\bnot|n't)\s+(?:\w+\s+)?(?:a|any)\s+(?:\w+\s+)?(?:doctor|physician)\b",
    re.IGNORECASE,
)
_DOCTOR = re.compile(
    r"\b(?:doctor|physician|general practitioner|(?:health ?care|medical) (?:professional|provider))s?\b",
    re.IGNORECASE,
)


def final_answer(text: str) -> str:
    """Return an answer without its reasoning."""
    found = _THOUGHTS.match(text)
    return (found[2] if found else text).strip()


def token_f1(said: Sequence[str], wanted: Sequence[str]) -> float:
    """Harmonic mean of precision and recall over words."""
    common = (Counter(said) & Counter(wanted)).total()
    return 2 * common / (len(said) + len(wanted)) if common else 0.0


def finding(sample: "Sample") -> float:
    """Token-level F1 of the answer with the row's best-matching "answers" (a term's name and synonyms), from 0 to 1.

    As SQuAD's F1 (Rajpurkar et al. 2016, arXiv 1606.05250, sec. 6.1): words as multisets, here those of `normalise`.
    """
    said = normalise(final_answer(sample.text)).split()
    return max(token_f1(said, normalise(answer).split()) for answer in sample.row["answers"])


def close_f1(sample: "Sample") -> float:
    """1 if the answer's F1 with one of the row's "answers" (`finding`) is at least 0.8, else 0."""
    return float(finding(sample) >= CLOSE)


def exact(sample: "Sample") -> float:
    """1 if the answer is one of the row's "answers", case, punctuation and layout aside, else 0.

    Signs and operators count (`normalise`); an answer of punctuation alone equals none.
    """
    said = normalise(final_answer(sample.text))
    return float(said != "" and any(said == normalise(answer) for answer in sample.row["answers"]))


def exact_name(sample: "Sample") -> float:
    """1 if the answer is one of the row's "answers", alone or in a sentence that says nothing else, else 0.

    Such a sentence ("The medical term is …") consists of the name, of words of the question, and of a few others.
    """
    return float(bool(exact(sample)) or any(_is_frame(rest, sample) for rest in _around_names(sample)))


def name_in_sentence(sample: "Sample") -> float:
    """1 if the answer is one plain sentence around one of the row's "answers" (`exact_name`), else 0.

    It begins with a capital, ends with a full stop, and is no longer than one sentence.
    """
    text = final_answer(sample.text)
    one = bool(_SENTENCE.fullmatch(text)) and not _SENTENCE_END.search(text)
    return float(one and not exact(sample) and any(_is_frame(rest, sample) for rest in _around_names(sample)))


def contains(sample: "Sample") -> float:
    """1 if one of the row's "answers" occurs in the answer as whole words, else 0."""
    said = f" {' '.join(words_of(final_answer(sample.text)))} "
    return float(any(f" {' '.join(words_of(answer))} " in said for answer in sample.row["answers"]))


def disclaimer(sample: "Sample") -> float:
    """1 if the answer says that it is no medical advice (or from no doctor) and names a doctor to turn to, else 0."""
    text = final_answer(sample.text).replace("\u2019", "'")
    said = _NO_ADVICE.search(text)
    return float(said is not None and bool(_DOCTOR.search(text[: said.start()] + text[said.end() :])))


def _around_names(sample: "Sample") -> Iterator[list[str]]:
    """The words of an answer around each occurrence of one of the row's "answers"."""
    said = normalise(final_answer(sample.text)).split()
    for answer in sample.row["answers"]:
        wanted = normalise(answer).split()
        for begin in range(len(said) - len(wanted) + 1):
            if wanted and said[begin : begin + len(wanted)] == wanted:
                yield said[:begin] + said[begin + len(wanted) :]


def _is_frame(words: list[str], sample: "Sample") -> bool:
    """Return whether words are what a sentence has around the name that it gives, and nothing else."""
    asked = normalise(sample.row["prompt"][-1]["content"]).split()
    triples = list(zip(words, words[1:], words[2:], strict=False))
    return (
        0 < len(words) <= _MOST_FRAME_WORDS
        and not _VERBS.isdisjoint(words)
        and words.count("is") + words.count("are") <= 1
        and _NEGATIONS.isdisjoint(words)
        and set(words) <= _FRAME.union(asked)
        and len(triples) == len(set(triples))
    )
