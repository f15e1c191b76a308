"""The tensor trainer learns exactly what the textbook loop learns."""

from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from custom_models.tokenization.bpe import GPT2_PATTERN, ByteBPE, RegexBPE
from custom_models.tokenization.bpe_training import learn_merges
from tests.custom_models.tokenization.textbook import textbook_merges
from workflows.errors import UserError


def counted(words):
    return dict(Counter(words))


def test_1024_merges_of_real_text_equal_the_textbook_loops(english):
    """The text is small, so most merges are decided by ties; the bench compares on 1 MB."""
    tokenizer = RegexBPE(GPT2_PATTERN)
    words = [word.encode() for word in tokenizer.split(english[:8_000])]
    assert learn_merges(counted(words), 1024) == textbook_merges(words, 1024)


def test_merges_of_plain_bytes_equal_the_textbook_loops(english):
    text = english[:8_000].encode()
    assert learn_merges({text: 1}, 256) == textbook_merges([text], 256)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.text(alphabet="ab", max_size=12) | st.text(alphabet="abcé", max_size=9), max_size=12))
def test_ties_and_runs_are_decided_as_the_textbook_loop_does_until_nothing_is_left(texts):
    words = [text.encode() for text in texts]
    expected = textbook_merges(words, 1000)
    assert learn_merges(counted(words), len(expected)) == expected
    with pytest.raises(UserError, match=f"Ask for at most {len(expected):,}"):
        learn_merges(counted(words), len(expected) + 1)


@settings(max_examples=50, deadline=None)
@given(st.text(alphabet="ab", min_size=1100, max_size=5000), st.integers(0, 60))
def test_long_words_of_two_letters_equal_the_textbook_loop(text, merges):
    """Longer than the first look of the search for the first pair, and with runs at every merge."""
    expected = textbook_merges([text.encode()], merges)
    assert learn_merges({text.encode(): 1}, len(expected)) == expected


@pytest.mark.parametrize(("run", "first"), [(b"aaa", (97, 97)), (b"aaaab", (97, 97)), (b"abab", (97, 98))])
def test_a_run_counts_each_neighbouring_pair_and_merges_from_the_left(run, first):
    expected = textbook_merges([run], 9)
    assert expected[0] == first
    assert learn_merges({run: 1}, len(expected)) == expected


def test_no_two_merges_spell_the_same_bytes(english):
    """Else `tokenizer.json`, where a token is its text, could not tell them apart."""
    tokenizer = ByteBPE()
    tokenizer.train("aaaaaaabaabaaab" * 3 + english[:20_000], 1500)
    assert len(set(tokenizer.vocabulary)) == len(tokenizer)


def test_training_gives_back_the_number_of_threads():
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        with pytest.raises(UserError):
            learn_merges({b"ab": 1}, 2)
        assert torch.get_num_threads() == threads + 1
    finally:
        torch.set_num_threads(threads)


def test_no_words_have_no_merges():
    assert learn_merges({}, 0) == []
    assert learn_merges({b"": 3, b"a": 1}, 0) == []
    with pytest.raises(UserError, match="after 0 each word is one token"):
        learn_merges({b"": 3, b"a": 1}, 1)
