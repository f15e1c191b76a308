"""Lists of entities: the way back is exact, and a model that obeys the grammar can write nothing else."""

import random

from hypothesis import given, settings
from hypothesis import strategies as st

from custom_models.projects.entity_text import Grammar, entities_in, list_of
from data_prep.iob import Entity

TYPES = ["Chemical", "Disease"]
WORDS = ["a", "A", "b", "ß", ";", "/;", "@2", "/@2", "//@13", "/", "chemical:", "Disease:", "@", "ulcer"]


@st.composite
def sentences(draw) -> tuple[list[str], list[Entity]]:
    """Words that are as ambiguous as can be, and entities among them."""
    words = draw(st.lists(st.sampled_from(WORDS), min_size=1, max_size=12))
    found, place = [], 0
    while place < len(words):
        place = draw(st.integers(place, len(words)))
        end = draw(st.integers(place, len(words)))
        if end > place:
            found.append(Entity(draw(st.sampled_from(TYPES)), place, end))
        place = max(end, place + 1)
    return words, found


@given(sentences())
@settings(max_examples=500, deadline=None)
def test_the_way_back_is_exact(drawn):
    words, entities = drawn
    assert entities_in(" ".join(list_of(words, entities)), words, TYPES) == (entities, 0)


def letters(word: str) -> list[int]:
    """A tokenizer that begins each word alike, so that its pieces alone tell little."""
    return [1, *(ord(letter) for letter in word.casefold())]


def text_of(ids: list[int]) -> str:
    return "".join(" " if i == 1 else chr(i) for i in ids).strip()


@given(sentences())
@settings(max_examples=200, deadline=None)
def test_the_grammar_allows_the_right_list(drawn):
    words, entities = drawn
    grammar = Grammar(words, TYPES, letters, end_id=0)
    ids = [i for word in list_of(words, entities) for i in letters(word)] + [0]
    for place, token in enumerate(ids):
        assert token in grammar.allowed(ids[:place])


@given(sentences(), st.integers(0, 10**9))
@settings(max_examples=200, deadline=None)
def test_whatever_the_grammar_allows_is_a_list_of_the_sentences_words(drawn, seed):
    words, _ = drawn
    grammar, chance, ids = Grammar(words, TYPES, letters, end_id=0), random.Random(seed), []
    while not ids or ids[-1] != 0:
        allowed = sorted(grammar.allowed(ids))
        assert allowed  # it never leads to where nothing may follow
        ids.append(chance.choice(allowed))
    found, malformed = entities_in(text_of(ids[:-1]), words, TYPES)
    assert malformed == 0
    assert text_of(ids[:-1]).casefold() == " ".join(list_of(words, found)).casefold()


def test_repeated_mentions_are_told_apart():
    words = ["NO", "raised", "NO", "but", "not", "no"]
    second = [Entity("Chemical", 2, 3)]
    assert " ".join(list_of(words, second)) == "Chemical: NO @2"
    assert " ".join(list_of(words, [Entity("Chemical", 0, 1), *second])) == "Chemical: NO ; Chemical: NO"
    assert entities_in("chemical: no @3", words, TYPES) == ([Entity("Chemical", 5, 6)], 0)


def test_what_names_nothing_in_the_sentence_is_counted():
    words = ["aspirin", "causes", "gastric", "ulcer"]
    for text, malformed in {
        "Chemical: ibuprofen": 1,
        "Drug: aspirin": 1,
        "Chemical:": 1,
        "aspirin": 1,
        "Chemical: aspirin @2": 1,
        "Chemical: aspirin @0": 1,
        "Disease: gastric ulcer ; Chemical: aspirin": 1,  # the other way round
        "; ;": 3,
        "": 0,
    }.items():
        assert entities_in(text, words, TYPES)[1] == malformed, text
    assert entities_in("Drug: x ; Disease: ulcer", words, TYPES) == ([Entity("Disease", 3, 4)], 1)
