"""Right answers: exact match and F1 as SQuAD counts them, and what is had without a model."""

import re
import string
from collections import Counter
from collections.abc import Sequence


def normalised(text: str) -> str:
    """Lower-cased words without punctuation and articles, as SQuAD's own script compares them (arXiv 1606.05250)."""
    bare = "".join(character for character in text.lower() if character not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", bare).split())


def exact(answer: str, references: Sequence[str]) -> float:
    """1 if the answer is one of the references, else 0."""
    return float(normalised(answer) in map(normalised, references))


def f1(answer: str, references: Sequence[str]) -> float:
    """The F-measure of shared words, the best over the references."""
    return max(_f1(normalised(answer).split(), normalised(reference).split()) for reference in references)


def _f1(answer: list[str], reference: list[str]) -> float:
    shared = sum((Counter(answer) & Counter(reference)).values())
    return 2 * shared / (len(answer) + len(reference)) if shared else float(answer == reference)


def commonest(answers: Sequence[str]) -> str:
    """The answer that is right most often: what is said without reading anything."""
    return Counter(answers).most_common(1)[0][0]


def likest_phrase(question: str, context: str) -> str:
    """The phrase between punctuation marks of a context that shares most words with a question, for its length."""
    return _likest(question, _phrases(context)) or context


def first_phrase_of_likest_sentence(question: str, context: str) -> str:
    """The first phrase of the sentence that shares most words with a question, for its length."""
    sentence = _likest(question, re.split(r"(?<=[.!?])\s+|\n+", context)) or context
    return next(iter(_phrases(sentence)), context)


def _phrases(text: str) -> list[str]:
    return [phrase.strip() for phrase in re.split(r"[.,;:()\n]+", text) if normalised(phrase)]


def _likest(question: str, parts: Sequence[str]) -> str:
    """The part that shares most words with a question, for its length; "" if no part has words."""
    asked = set(normalised(question).split())

    def worth(part: str) -> float:
        words = normalised(part).split()
        return len(asked & set(words)) / len(words) ** 0.5

    return max((part for part in parts if normalised(part)), key=worth, default="")
