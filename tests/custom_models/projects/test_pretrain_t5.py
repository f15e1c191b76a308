"""Span corruption as a training: pieces hold every token, spans are drawn anew, and a tiny T5 learns to fill gaps."""

import dataclasses
import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from custom_models.encoder_decoder import EncoderDecoder
from custom_models.encoder_decoder_checkpoint import load_encoder_decoder
from custom_models.projects.fitting import FitArgs
from custom_models.projects.pretrain_t5 import setup
from custom_models.projects.seq2seq import (
    T5Shape,
    begin_by_copying,
    begin_by_looking_near,
    corruption_loader,
    learn_t5_vocabulary,
    pieces_of,
)
from workflows.errors import UserError

TINY = T5Shape(vocab_size=380, width=32, n_layer=1, n_head=2, inner_width=32, dropout=0.0)


@given(st.integers(0, 400), st.integers(3, 50))
def test_pieces_hold_every_token(length, longest):
    pieces = pieces_of(list(range(length)), longest)
    assert [i for piece in pieces for i in piece] == (list(range(length)) if length > 1 else [])
    assert all(2 <= len(piece) <= longest for piece in pieces)


def test_spans_are_drawn_anew_in_training_and_stay_in_validation():
    tokenizer = learn_t5_vocabulary(["one two three four five six seven eight nine ten"] * 3, 370)
    texts = [tokenizer.encode("one two three four five six seven eight nine ten").ids for _ in range(4)]
    train, held = (corruption_loader(texts, tokenizer, 2, seed=1, fixed=fixed) for fixed in (False, True))
    assert all(torch.equal(a.source, b.source) for a, b in zip(held, held, strict=True))
    assert len({tuple(batch.source.flatten().tolist()) for _ in range(4) for batch in train}) > 4


@pytest.mark.long
def test_a_tiny_t5_learns_to_fill_gaps(tmp_path, capsys):
    words = [(a, b) for a in ("red", "blue", "cold") for b in ("sun", "sea")]
    lines = [f"{'so ' * n}the {a} {b} is {a} and the {b} was {a}" for n in range(30) for a, b in words]
    (tmp_path / "text.txt").write_text("\n".join([*lines, "x", " ".join(lines[:9])]))
    fit = FitArgs(8, learning_rate=1e-2, max_epochs=6, patience=6)
    setup(tmp_path / "text.txt", tmp_path, TINY, fit, longest=40, validation_size=20)
    told = capsys.readouterr().out
    found = {row["name"]: row["value"] for row in json.loads((tmp_path / "metrics.json").read_text())["metrics"]}
    assert found["accuracy"] > 1.4 * found["accuracy_of_the_simplest_guess"]  # over 0.6, and 0.35
    assert "<extra_id_0>" in told and "it was" in told and (tmp_path / "curves.png").stat().st_size > 0
    model, tokenizer = load_encoder_decoder(tmp_path / "final")
    assert model.config.vocab_size == 380 and tokenizer.token_to_id("<extra_id_99>") == 379


def test_what_cannot_be_is_told(tmp_path):
    (tmp_path / "text.txt").write_text("one\ntwo\n")
    with pytest.raises(UserError, match="from 1 to 1"):
        setup(tmp_path / "text.txt", tmp_path, validation_size=2)
    with pytest.raises(UserError, match="--longest must be at least 3"):
        setup(tmp_path / "text.txt", tmp_path, longest=2)
    with pytest.raises(UserError, match="--max_texts must be at least 1, not -4"):
        setup(tmp_path / "text.txt", tmp_path, max_texts=-4)


def test_cross_attention_that_begins_as_a_copy_writes_what_it_sees():
    torch.manual_seed(0)
    tokenizer = learn_t5_vocabulary(["one two three four five six seven eight nine ten"] * 3, 370)
    model = EncoderDecoder(TINY.config(tokenizer)).eval()
    sources = torch.arange(40)[:, None]  # (40, 1): there is one token to look at

    def mean_rank() -> float:
        with torch.no_grad():
            logits = model(sources, torch.full_like(sources, model.config.start_id))[:, 0]  # (40, vocab_size)
        return float((logits > logits.gather(1, sources)).sum(dim=1).float().mean())

    before = mean_rank()
    begin_by_copying(model)
    assert mean_rank() < before / 4


def test_heads_that_begin_by_looking_near_weigh_a_neighbour_most_and_leave_some_heads_free():
    tokenizer = learn_t5_vocabulary(["one two three four five six seven eight nine ten"] * 3, 370)
    model = EncoderDecoder(dataclasses.replace(TINY, n_head=4).config(tokenizer))
    begin_by_looking_near(model)
    bias = model.encoder_bias(9, 9)[0]  # (4, 9, 9): head, query, key
    for head, place in enumerate((-1, 1, 0)):
        assert [int(bias[head, query].argmax()) for query in range(1, 8)] == [query + place for query in range(1, 8)]
    assert bias[3].abs().max() < 0.5
    bias = model.decoder_bias(9, 9)[0]  # (4, 9, 9)
    assert [int(bias[0, query, : query + 1].argmax()) for query in range(1, 9)] == list(range(8))
