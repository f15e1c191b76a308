"""The ladder's classes: parity with tiktoken and `tokenizers`, round trips, bad input."""

import time

import pytest
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from custom_models.tokenization.bpe import GPT2_PATTERN, GPT4_PATTERN, ByteBPE, RegexBPE, SpecialBPE
from custom_models.tokenization.tokenizer_json import save
from tests.custom_models.tokenization.textbook import textbook_ids, textbook_merges
from workflows.errors import UserError


@pytest.fixture(scope="session")
def rungs(english):
    """Each rung, trained on the same text."""
    ladder = {
        "bytes": ByteBPE(),
        "gpt2 words": RegexBPE(GPT2_PATTERN),
        "gpt4 words": RegexBPE(GPT4_PATTERN),
        "special": SpecialBPE(["<|end|>", "<|endoftext|>", "<|endoftext|><|end|>"], GPT4_PATTERN),
    }
    for rung in ladder.values():
        rung.train(english[:200_000], 400)
    return ladder


TIKTOKENS_GPT4_PATTERN = (  # in `cl100k_base`, which cannot be called without a download
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s*[\r\n]|"
    r"\s+(?!\S)|\s"
)
RUNGS = ("bytes", "gpt2 words", "gpt4 words", "special")


def encoded(tokenizer, text):
    return tokenizer.encode(text, special="parse") if isinstance(tokenizer, SpecialBPE) else tokenizer.encode(text)


def test_gpt2s_ids_equal_tiktokens_and_tokenizers_on_10000_varied_strings(gpt2, gpt2_tiktoken, gpt2_folder, strings):
    assert len(set(strings)) == 10_000
    theirs = Tokenizer(models.BPE.from_file(*(str(gpt2_folder / name) for name in ("encoder.json", "vocab.bpe"))))
    theirs.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    theirs.decoder = decoders.ByteLevel()
    theirs.add_special_tokens(["<|endoftext|>"])
    ours = [gpt2.encode(text, special="parse") for text in strings]
    assert ours == [gpt2_tiktoken.encode(text, allowed_special="all") for text in strings]
    assert ours == [encoding.ids for encoding in theirs.encode_batch(strings)]
    assert [gpt2.decode(ids) for ids in ours] == strings


@pytest.mark.parametrize("name", RUNGS)
def test_a_trained_rungs_ids_equal_tokenizers_on_10000_varied_strings(rungs, name, strings, tmp_path):
    save(rungs[name], tmp_path / "tokenizer.json")
    theirs = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    ours = [encoded(rungs[name], text) for text in strings]
    assert ours == [encoding.ids for encoding in theirs.encode_batch(strings)]
    assert [theirs.decode(ids, skip_special_tokens=False) for ids in ours[:1000]] == strings[:1000]


def test_gpt4s_words_equal_tiktokens_on_10000_varied_strings(rungs, strings):
    ours = rungs["special"]
    ranks = {token: i for i, token in enumerate(ours.vocabulary) if i < 256 + 400}
    theirs = tiktoken.Encoding(
        "ours", pat_str=TIKTOKENS_GPT4_PATTERN, mergeable_ranks=ranks, special_tokens=dict(ours.special_tokens)
    )
    assert [ours.encode(text, special="text") for text in strings] == [theirs.encode_ordinary(text) for text in strings]


@pytest.mark.parametrize("name", RUNGS)
@settings(max_examples=100, deadline=None)
@given(text=st.text(max_size=60))
def test_any_unicode_round_trips(rungs, name, text):
    assert rungs[name].decode(encoded(rungs[name], text)) == text
    assert rungs[name].decode_bytes(encoded(rungs[name], text)) == text.encode()


@settings(max_examples=200, deadline=None)
@given(text=st.text(max_size=60))
def test_gpt2_round_trips_any_unicode(gpt2, text):
    assert gpt2.decode(gpt2.encode(text, special="text")) == text


@settings(max_examples=200, deadline=None)
@given(text=st.text(alphabet="aab n", max_size=40), learned_from=st.text(alphabet="ab n", max_size=60))
def test_encoding_equals_the_textbook_loop(text, learned_from):
    tokenizer = ByteBPE(textbook_merges([learned_from.encode()], 10))
    assert tokenizer.encode(text) == textbook_ids(text.encode(), tokenizer.merges)


def test_a_word_of_200000_letters_does_not_take_quadratic_time(rungs):
    text = "abnormality" * 18_000
    began = time.process_time()  # not the clock's: other processes may have the core
    ids = rungs["gpt2 words"].encode(text)
    assert time.process_time() - began < 60  # under a second; a loop over all pairs takes hours
    assert rungs["gpt2 words"].decode(ids) == text


def test_without_merges_the_tokens_are_the_bytes():
    assert ByteBPE().encode("é!") == [0xC3, 0xA9, 0x21]
    assert ByteBPE().decode([0xC3, 0xA9, 0x21]) == "é!"
    assert len(ByteBPE()) == 256


def test_an_empty_text_has_no_tokens(rungs):
    assert [rung.encode("") for rung in rungs.values()] == [[]] * 4
    assert [rung.decode([]) for rung in rungs.values()] == [""] * 4


def test_a_token_that_ends_within_a_character_is_exact_in_bytes():
    assert ByteBPE().decode([0xC3]) == "\ufffd"
    assert ByteBPE().decode_bytes([0xC3]) == b"\xc3"


def test_training_again_forgets_what_was_learned(english):
    tokenizer, fresh = SpecialBPE(["<s>", "</s>"]), SpecialBPE(["<s>", "</s>"])
    tokenizer.train("to be or not to be" * 9, 10)
    tokenizer.encode(english[:2_000])
    for each in (tokenizer, fresh):
        each.train(english[:20_000], 100)
    assert tokenizer.special_tokens == {"<s>": 356, "</s>": 357} and len(tokenizer) == 358
    assert tokenizer.encode(english[:2_000]) == fresh.encode(english[:2_000])


def test_special_tokens_are_refused_unless_asked_for(gpt2):
    text = "a<|endoftext|>b"
    with pytest.raises(UserError, match=r"special token <\|endoftext\|> \(at character 1\)"):
        gpt2.encode(text)
    assert gpt2.encode(text, special="parse") == [64, 50256, 65]
    assert 50256 not in gpt2.encode(text, special="text")
    assert gpt2.decode(gpt2.encode(text, special="text")) == text


def test_of_special_tokens_that_begin_alike_the_longest_is_found(rungs):
    ids = rungs["special"].special_tokens
    assert encoded(rungs["special"], "<|endoftext|><|end|><|end|>") == [ids["<|endoftext|><|end|>"], ids["<|end|>"]]


def test_special_tokens_are_not_learned_from():
    with_tokens, without = SpecialBPE(["<|end|>"]), RegexBPE()
    with_tokens.train("low lower<|end|>lowest low<|end|>" * 3, 5)
    without.train("low lower", 0)
    assert not any(b"|" in token or b"<" in token for token in with_tokens.vocabulary[256:-1])
    assert with_tokens.vocabulary[-1] == b"<|end|>"


@pytest.mark.parametrize("make", [ByteBPE, RegexBPE, lambda: SpecialBPE(["<s>"])])
def test_bad_texts_and_numbers_are_clear_errors(make):
    tokenizer = make()
    with pytest.raises(UserError, match="empty"):
        tokenizer.train("", 3)
    with pytest.raises(UserError, match="Ask for at most 2, or give a longer text"):
        tokenizer.train("abc", 5)
    with pytest.raises(UserError, match="0 or more, not -1"):
        tokenizer.train("abc", -1)
    for broken in (tokenizer.encode, lambda text: tokenizer.train(text, 1)):
        with pytest.raises(UserError, match=r"Character 2 .*surrogate pair \(U\+D800\)"):
            broken("ab\ud800c")
    for wrong in (-1, len(tokenizer)):
        with pytest.raises(UserError, match=f"id {wrong};"):
            tokenizer.decode([65, wrong])


def test_bad_patterns_are_clear_errors():
    with pytest.raises(UserError, match="no regular expression"):
        RegexBPE("(")
    with pytest.raises(UserError, match="groups that capture"):
        RegexBPE(r"(\w+)|\W")
    with pytest.raises(UserError, match=r"does not match ' b' \(at character 1\)"):
        RegexBPE(r"\w+").encode("a b")


@pytest.mark.parametrize("tokens", [["<s>", "<s>"], ["<s>", ""]])
def test_special_tokens_that_are_none_are_refused(tokens):
    with pytest.raises(UserError, match="different texts, none of them empty"):
        SpecialBPE(tokens)
