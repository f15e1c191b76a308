"""Words and sentences by nltk: Treebank words, Punkt sentences.

Treebank words (Marcus et al. 1993) are what parsers and taggers were trained on: "don't" is "do" and "n't", signs stand
alone, and straight double quotes become `` and ''. Punkt (Kiss and Strunk 2006, Computational Linguistics 32:4) tells a
sentence's full stop from an abbreviation's by counts from plain text; nobody labels anything, so where nltk's own
parameters are not installed they are learned from the given text.

    python -m custom_models.tokenization.words --text "Dr. Smith isn't in. He left."
"""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

from custom_models import demo
from workflows.errors import UserError, run_file


def sentences(text: str, language: str = "english", learn_from: str | None = None) -> list[str]:
    """Split a text into sentences; white space between them is left out, nothing else.

    Args:
        text: One or more sentences.
        language: Whose parameters to take from nltk's `punkt_tab`, where that is installed
            (`python -m nltk.downloader punkt_tab`).
        learn_from: A text of the same kind to learn abbreviations from where it is not; default: `text` itself. Ten
            thousand words are enough for common abbreviations; a few sentences teach none, and "Dr." then ends one.

    Returns:
        The sentences, in order.

    Raises:
        UserError: If the text is blank, or `punkt_tab` is installed but has no such language.
    """
    if not text.strip():
        raise UserError("The text to split into sentences is empty. Give one with words in it.")
    return splitter(text if learn_from is None else learn_from, language)(text)


def splitter(learn_from: str, language: str = "english") -> Callable[[str], list[str]]:
    """What splits many texts into sentences, looked for and learned once; arguments and errors as for `sentences`."""
    found = _installed(language) or _learned(learn_from)
    return lambda text: list(found.tokenize(text))


def words(sentence: str) -> list[str]:
    """Split a sentence into Treebank words.

    A full stop is split off at the end only: give one sentence at a time (`words_of` does).

    Raises:
        UserError: If the sentence is blank.
    """
    from nltk.tokenize import TreebankWordTokenizer

    if not sentence.strip():
        raise UserError("The sentence to split into words is empty. Give one with words in it.")
    return TreebankWordTokenizer().tokenize(sentence)


def words_of(text: str, language: str = "english", learn_from: str | None = None) -> list[list[str]]:
    """The words of each sentence of a text; arguments and errors as for `sentences`."""
    return [words(sentence) for sentence in sentences(text, language, learn_from)]


def punkt_is_installed() -> bool:
    """Whether nltk finds `punkt_tab` on this machine."""
    import nltk

    try:
        nltk.data.find("tokenizers/punkt_tab")
    except LookupError:
        return False
    return True


def _installed(language: str) -> Any:
    """nltk's own splitter for a language, None if `punkt_tab` is not installed."""
    from nltk.tokenize import PunktTokenizer

    if not punkt_is_installed():
        return None
    try:
        return PunktTokenizer(language)
    except LookupError:
        raise UserError(f"nltk's punkt_tab has no language {language!r}. It has english, german and others.") from None


@functools.lru_cache(maxsize=4)
def _learned(text: str) -> Any:
    """A splitter whose abbreviations, collocations and sentence starters are learned from a text."""
    from nltk.tokenize.punkt import PunktSentenceTokenizer, PunktTrainer

    return PunktSentenceTokenizer(PunktTrainer(text).get_params())


def main(
    text: str = "An increased size of the liver, e.g. of 18 cm. It isn't always felt.",
    file: Path | None = None,
) -> None:
    """See a text as sentences and words.

    Args:
        text: What to split.
        file: A text to learn abbreviations from; default: the Human Phenotype Ontology's definitions.
    """
    if punkt_is_installed():
        print("Sentences by nltk's punkt_tab, words by the Treebank's rules:")
        found = words_of(text)
    else:
        print("Sentences by Punkt, trained here (punkt_tab is not installed), words by the Treebank's rules:")
        found = words_of(text, learn_from=demo.read(file)[:1_000_000])
    for sentence in found:
        print(demo.separated(sentence))


if __name__ == "__main__":
    run_file(main)
