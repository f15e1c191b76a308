"""The facts that `assistant` teaches: findings of the ontology that people without medical training have a word for."""

import random
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from data_prep.assistant_texts import COUNTABLE
from data_prep.normalisation import normalise, words_of
from data_prep.ontology import Term
from data_prep.splits import Phrases

FACTS = 100
WITH_OTHER_SYNONYMS = 50
"""Number of facts, as far as there are, that are chosen for having a second synonym, to be asked by in the exam."""
MIN_DEFINITION, MAX_DEFINITION = 40, 130
MAX_NAME_WORDS, MAX_LAY_WORDS = 4, 5
_STEM = 4
"""Letters by which words are compared: those with the same beginning count as the same word."""
_ODD = frozenset("/(),;:")
"""Signs of a label that is more than one name, or an explanation."""
_PROPER = frozenset({"syndrome", "sign", "phenomenon", "anomaly"})


@dataclass(frozen=True)
class Fact:
    """A finding to be learned.

    Attributes:
        id: Its id in the ontology.
        name: Its name.
        definition: Its definition.
        lay: The layperson's words that training asks by.
        other: A layperson's synonym in other words, which no training row has; "" if there is none.
        answers: What counts as the medical name: the name and the exact synonyms that are no layperson's words.
    """

    id: str
    name: str
    definition: str
    lay: str
    other: str
    answers: list[str]

    def asked(self, wording: str, lay: str | None = None) -> str:
        """A question about it, by a synonym other than `lay` if one is given."""
        said = with_article(inside_sentence(lay or self.lay))
        return wording.format(lay=said, name=inside_sentence(self.name), definition=self.definition)

    def answer(self, kind: str) -> str:
        """The answer to a question of a kind."""
        return self.definition if kind == "meaning" else self.name


def inside_sentence(text: str) -> str:
    """A label as it is written inside a sentence: without the capital, except in abbreviations and names."""
    proper = not _PROPER.isdisjoint(text.lower().split())
    return text if proper or not text[1:2].islower() else text[0].lower() + text[1:]


def with_article(lay: str) -> str:
    """A layperson's phrase with the article that English wants before what can be counted."""
    words = lay.lower().split()
    if words[-1] not in COUNTABLE or words[0] in ("a", "an", "the", "no", "two", "multiple", "lack", "loss"):
        return lay
    return ("an " if lay[0].lower() in "aeiou" else "a ") + lay


def stems(text: str) -> set[str]:
    """Beginnings of a text's words, short words left out."""
    return {word[:_STEM] for word in words_of(text) if len(word) >= _STEM}


def candidates_for(terms: Iterable[Term], everything: Iterable[Term], secrets: Phrases) -> list[Fact]:
    """Findings that can be learned, each with its layperson's words, in the order of their ids."""
    bearers = Counter(label for term in everything for label in {normalise(text) for text in term.labels})
    found: list[Fact] = []
    for term in sorted(terms, key=lambda term: term.id):
        if not MIN_DEFINITION <= len(term.definition) <= MAX_DEFINITION or len(words_of(term.name)) > MAX_NAME_WORDS:
            continue
        if Phrases((term.name, *term.exact)).found_in(term.definition) or not _ODD.isdisjoint(term.name):
            continue
        usable = [
            text
            for text in term.layperson
            if len(words_of(text)) <= MAX_LAY_WORDS
            and stems(text)
            and _ODD.isdisjoint(text)
            and not stems(text) & stems(term.name)
            and bearers[normalise(text)] == 1
            and not secrets.found_in(text)
        ]
        if not usable:
            continue
        lay, *rest = sorted(usable, key=lambda text: (len(words_of(text)), len(text), text))
        definition = term.definition if term.definition.endswith((".", "!", "?")) else f"{term.definition}."
        others = [text for text in rest if stems(text) - stems(lay) and not Phrases((text,)).found_in(definition)]
        other = others[0] if others else ""
        everyday = {normalise(text) for text in term.layperson}
        medical = [
            text
            for text in term.exact
            if normalise(text) not in everyday and not any(Phrases((text,)).found_in(asked) for asked in (lay, other))
        ]
        found.append(Fact(term.id, term.name, definition, lay, other, [term.name, *medical]))
    return found


def choose_facts(candidates: list[Fact], rng: random.Random) -> tuple[list[Fact], list[Fact]]:
    """Draw the facts, and two findings that are not taught."""
    drawn = rng.sample(candidates, len(candidates))
    preferred = [fact for fact in drawn if fact.other][:WITH_OTHER_SYNONYMS]
    chosen = {fact.id for fact in preferred}
    order = [*preferred, *(fact for fact in drawn if fact.id not in chosen)]
    facts = order[: min(FACTS, len(order) - 2)]
    told = "\n".join(fact.definition for fact in facts)
    rest = sorted(order[len(facts) :], key=lambda fact: Phrases((fact.name, fact.lay)).found_in(told))
    return facts, rest[:2]  # such as no definition mentions, as far as there are
