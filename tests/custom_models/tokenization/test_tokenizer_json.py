"""tokenizer.json: what is saved is loaded again by us and by `tokenizers`; what we cannot do is refused."""

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from custom_models.tokenization.bpe import GPT4_PATTERN, ByteBPE, RegexBPE, SpecialBPE
from custom_models.tokenization.tokenizer_json import load, save
from workflows.errors import UserError
from workflows.files import read_json, write_json


def test_gpt2_saved_gives_tokenizers_the_same_ids_on_10000_varied_strings(gpt2, strings, tmp_path):
    save(gpt2, tmp_path / "tokenizer.json")
    theirs = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert theirs.get_vocab_size() == len(gpt2)
    encodings = theirs.encode_batch(strings)
    assert [encoding.ids for encoding in encodings] == [gpt2.encode(text, special="parse") for text in strings]


@pytest.mark.parametrize("make", [ByteBPE, lambda: RegexBPE(GPT4_PATTERN), lambda: SpecialBPE(["<b>", "<a>"])])
def test_a_saved_tokenizer_is_loaded_again(make, english, tmp_path):
    tokenizer = make()
    tokenizer.train(english[:20_000], 200)
    save(tokenizer, tmp_path / "tokenizer.json")
    loaded = load(tmp_path / "tokenizer.json")
    assert type(loaded) is type(tokenizer)
    assert vars(loaded).keys() == vars(tokenizer).keys()
    for name in ("merges", "vocabulary", "byte_ids", "pattern", "special_tokens"):
        assert getattr(loaded, name, None) == getattr(tokenizer, name, None)
    assert loaded.encode(english[:5_000]) == tokenizer.encode(english[:5_000])


def test_a_file_of_tokenizers_own_trainer_is_loaded(english, tmp_path):
    """Its bytes are in the order of their characters, its pattern is the built-in one."""
    theirs = Tokenizer(models.BPE())
    theirs.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    theirs.train_from_iterator(
        [english[:50_000]], trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet, show_progress=False)
    )
    theirs.save(str(tmp_path / "tokenizer.json"))
    assert load(tmp_path / "tokenizer.json").encode(english[:5_000]) == theirs.encode(english[:5_000]).ids


@pytest.fixture
def saved(english, tmp_path):
    tokenizer = SpecialBPE(["<s>"])
    tokenizer.train(english[:5_000], 20)
    save(tokenizer, tmp_path / "tokenizer.json")
    return tmp_path / "tokenizer.json", read_json(tmp_path / "tokenizer.json")


@pytest.mark.parametrize(
    ("keys", "value", "message"),
    [
        (("model", "type"), "WordPiece", "not plain byte-pair encoding .WordPiece"),
        (("model", "byte_fallback"), True, "not plain byte-pair encoding .byte_fallback"),
        (("normalizer",), {"type": "NFC"}, "not plain byte-pair encoding .normalizer"),
        (("pre_tokenizer",), {"type": "Whitespace"}, "neither ByteLevel nor Split"),
        (("pre_tokenizer",), None, "is not a tokenizer.json"),
        (("pre_tokenizer", "pretokenizers"), [], "is not a tokenizer.json"),
        (("model", "merges"), [["a", "b"]], "merge 1, 'a' \\+ 'b'"),
        (("model", "merges"), ["a b c"], "is not a tokenizer.json"),
        (("model", "merges"), [], "come from no merge"),
        (("model", "vocab"), {}, "256 bytes do not have the ids"),
        (("added_tokens",), [{"content": "<s>", "id": 7}], "do not follow the merges"),
        (("added_tokens",), None, "is not a tokenizer.json"),
        (("model",), None, "is not a tokenizer.json"),
        (("pre_tokenizer",), {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}, "no pattern"),
    ],
)
def test_what_the_ladder_cannot_do_is_refused(saved, keys, value, message):
    path, file = saved
    target = file
    for key in keys[:-1]:
        target = target[key]
    target[keys[-1]] = value
    write_json(path, file)
    with pytest.raises(UserError, match=message):
        load(path)


def test_a_missing_or_cut_file_is_named(saved):
    path, _ = saved
    path.write_text(path.read_text()[:1000])
    with pytest.raises(UserError, match=r"tokenizer\.json, line"):
        load(path)
    path.unlink()
    with pytest.raises(UserError, match=r"tokenizer\.json does not exist"):
        load(path)
