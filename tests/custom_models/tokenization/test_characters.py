"""Characters: every text of known characters round-trips, an unknown one is named."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from custom_models.tokenization.characters import CharacterTokenizer
from workflows.errors import UserError


@given(st.text(min_size=1))
def test_a_texts_own_vocabulary_round_trips_it(text):
    tokenizer = CharacterTokenizer.from_text(text)
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text and len(ids) == len(text) and max(ids) < len(tokenizer)


def test_ids_are_in_the_order_of_code_points():
    tokenizer = CharacterTokenizer.from_text("bca🙂a")
    assert tokenizer.characters == "abc🙂"
    assert tokenizer.encode("cab") == [2, 0, 1] and tokenizer.encode("") == []


def test_an_unknown_character_is_named_unless_one_stands_for_it():
    with pytest.raises(UserError, match=r"has no 'é' \(U\+00E9, character 3 of the text\)"):
        CharacterTokenizer.from_text("caf").encode("café é")
    tokenizer = CharacterTokenizer.from_text("caf", unknown="\ufffd")
    assert tokenizer.decode(tokenizer.encode("café")) == "caf\ufffd"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: CharacterTokenizer.from_text(""), "is empty"),
        (lambda: CharacterTokenizer(""), "at least one"),
        (lambda: CharacterTokenizer("aba"), "'a' is in the vocabulary twice"),
        (lambda: CharacterTokenizer("ab", unknown="?"), "not in the vocabulary itself"),
        (lambda: CharacterTokenizer.from_text("ab", unknown="<unk>"), "must be one character"),
        (lambda: CharacterTokenizer("ab").decode([0, 2]), "has the id 2; this vocabulary's are 0 to 1"),
        (lambda: CharacterTokenizer("ab").decode([-1]), "has the id -1"),
    ],
)
def test_bad_input_is_a_clear_error(make, message):
    with pytest.raises(UserError, match=message):
        make()
