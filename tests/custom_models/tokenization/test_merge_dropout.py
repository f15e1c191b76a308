"""BPE-dropout: without any the tokenizer's own pieces, with it others of the same text, the same ones for a seed."""

import random

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from custom_models.projects.vocabulary import learn_vocabulary
from custom_models.tokenization.merge_dropout import MergeDropout, main
from workflows.errors import UserError

TEXTS = ["Hepatotoxicity of the liver", "nephrotoxicity, cardiotoxicity", "the toxic liver of the patient"] * 4
TOKENIZER = learn_vocabulary(TEXTS, 300)


@given(st.text(max_size=30))
@example("<pad> the <unk>")
def test_with_next_to_none_left_out_the_pieces_are_the_tokenizers(text):
    plain = Tokenizer.from_str(TOKENIZER.to_str())
    plain.encode_special_tokens = True  # as text
    assert MergeDropout(TOKENIZER).ids_of(text, 1e-12, random.Random(0)) == plain.encode(text).ids


@given(st.sampled_from(TEXTS), st.integers(0, 1000))
def test_pieces_are_of_the_same_text_and_the_same_for_a_seed(text, seed):
    dropout = MergeDropout(TOKENIZER)
    ids = dropout.ids_of(text, 0.5, random.Random(seed))
    assert TOKENIZER.decode(ids) == TOKENIZER.decode(TOKENIZER.encode(text).ids)
    assert ids == dropout.ids_of(text, 0.5, random.Random(seed))


def test_more_left_out_is_more_pieces_up_to_single_bytes():
    dropout, text = MergeDropout(TOKENIZER), TEXTS[0]
    lengths = [len(dropout.ids_of(text, share, random.Random(1))) for share in (0.0, 0.3, 0.6, 1.0)]
    assert lengths == sorted(lengths) and lengths[0] < lengths[1] and lengths[-1] == len(f" {text}".encode())


def test_the_command_shows_them(capsys):
    main("toxicity", vocab_size=400)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["0%", "10%", "30%", "60%"]
    assert all(line.split("%")[1].replace(" ", "").startswith("toxicity") for line in lines)
    with pytest.raises(UserError, match="nothing to cut"):
        main(" ")
