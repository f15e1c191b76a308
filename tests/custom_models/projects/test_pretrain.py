"""Pretraining: pieces and pairs are what they are said to be, and a tiny encoder learns to fill masks."""

import json

import pytest
import torch

from custom_models.encoder_checkpoint import load_encoder, tokenizer_of
from custom_models.projects.fitting import FitArgs
from custom_models.projects.pretrain import Texts, setup
from custom_models.projects.shape import Shape
from workflows.errors import UserError

DOCUMENTS = [[[10 * d + s] * (3 + s) for s in range(3)] for d in range(1, 6)]
PAD, START, END = 0, 1, 2


def test_pieces_hold_every_token_once():
    texts = Texts(DOCUMENTS, "roberta", 8, 2, (PAD, START, END), seed=1)
    batches = list(texts)
    assert len(batches) == texts.batches()
    tokens = [i for batch in batches for row, n in zip(batch.ids, batch.lengths, strict=True) for i in row[:n].tolist()]
    expected = [t for document in DOCUMENTS for sentence in document for t in sentence] + [END] * 5
    assert sorted(t for t in tokens if t != START) == sorted(expected)
    for batch in batches:
        for row, n in zip(batch.ids.tolist(), batch.lengths.tolist(), strict=True):
            assert row[0] == START and n <= 8
    assert not torch.equal(batches[0].ids, next(iter(texts)).ids)  # another order in the next epoch


def test_pairs_are_two_sentences_and_half_of_them_follow():
    texts = Texts(DOCUMENTS * 40, "bert", 16, 8, (PAD, START, END), seed=1)
    batches = list(texts)
    assert len(batches) == texts.batches() == 50
    follow = torch.cat([batch.follows for batch in batches]).float().mean()
    assert 0.4 < float(follow) < 0.6
    for batch in batches:
        for ids, n, segments, follows in zip(batch.ids, batch.lengths, batch.segments, batch.follows, strict=True):
            row, kinds = ids[:n].tolist(), segments[:n].tolist()
            middle = row.index(END)
            a, b = row[1:middle], row[middle + 1 : -1]
            assert row[0] == START and row[-1] == END and kinds == [0] * (middle + 1) + [1] * (len(b) + 1)
            assert len(set(a)) == len(set(b)) == 1
            if follows:
                assert b[0] == a[0] + 1


def test_pieces_begin_with_a_sentence_and_long_ones_are_cut():
    texts = Texts([[[5, 6, 7], [8] * 12, [9, 9]]], "roberta", 8, 1, (PAD, START, END), seed=1)
    assert [batch.ids[0].tolist() for batch in texts] == [
        [START, 5, 6, 7], [START, *[8] * 7], [START, *[8] * 5], [START, 9, 9, END]
    ]  # fmt: skip


def test_validation_is_the_same_each_time():
    texts = Texts(DOCUMENTS, "bert", 16, 4, (PAD, START, END), seed=1, fixed=True)
    first, second = list(texts), list(texts)
    assert all(torch.equal(a.ids, b.ids) for a, b in zip(first, second, strict=True))


def test_texts_of_one_sentence_have_no_pairs():
    with pytest.raises(UserError, match=r"no pairs\. Use --style roberta"):
        Texts([[[5, 6]], [[7]]], "bert", 16, 4, (PAD, START, END), seed=1)


@pytest.mark.long
@pytest.mark.parametrize("style", ["roberta", "bert"])
def test_a_tiny_encoder_learns_to_fill_masks(style, tmp_path, capsys):
    lines = [f"the {a} {b} is {a}. it {b} a {a} one." for a in ("red", "blue", "cold") for b in ("sun", "sea")] * 30
    (tmp_path / "text.txt").write_text("\n".join(lines))
    shape = Shape(dropout=0.1, vocab_size=280, width=32, n_layer=1, n_head=2, inner_width=32, n_position=24)
    setup(
        tmp_path / "text.txt",
        style,
        tmp_path,
        shape,
        FitArgs(8, learning_rate=5e-3, max_epochs=20, patience=20),
        validation_size=20,
    )
    found = {row["name"]: row["value"] for row in json.loads((tmp_path / "metrics.json").read_text())["metrics"]}
    assert found["masked_accuracy"] > 3 * found["masked_accuracy_of_the_commonest_token"]  # over 0.4, and 0.1
    assert ("next_sentence_accuracy" in found) == (style == "bert")
    assert "held-out masks filled right" in capsys.readouterr().out
    assert load_encoder(tmp_path / "final").config.vocab_size == tokenizer_of(tmp_path / "final").get_vocab_size()


def test_what_cannot_be_is_told(tmp_path):
    (tmp_path / "text.txt").write_text("one\ntwo\n")
    with pytest.raises(UserError, match="from 1 to 1"):
        setup(tmp_path / "text.txt", out_dir=tmp_path, validation_size=2)
    with pytest.raises(UserError, match="n_position must be at least 8"):
        setup(tmp_path / "text.txt", out_dir=tmp_path, shape=Shape(n_position=4))
