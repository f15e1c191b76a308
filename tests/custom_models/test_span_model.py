"""The model that finds answers: parity with transformers' own, windows, and the best span by trying all."""

import itertools
import random

import pytest
import torch
from transformers import BertConfig, BertForQuestionAnswering

from custom_models.encoder import Encoder, bert, distilbert
from custom_models.encoder_checkpoint import split_names
from custom_models.span_model import SpanModel, batch_spans, begin_by_matching, best_span, stretches
from custom_models.weights import fill
from workflows.errors import UserError

SHAPE = {"width": 32, "n_layer": 2, "n_head": 2, "inner_width": 48, "n_position": 40}


def windows() -> list[tuple[list[int], int, tuple[int, int]]]:
    chance = random.Random(0)
    found = []
    for question, context in ((3, 9), (5, 20)):
        ids = [
            1,
            *(chance.randrange(3, 60) for _ in range(question)),
            2,
            *(chance.randrange(3, 60) for _ in range(context)),
            2,
        ]
        found.append((ids, question + 2, (question + 3, question + 4)))
    return found


def test_logits_and_loss_equal_transformers():
    torch.manual_seed(0)
    config = BertConfig(60, 32, 2, 2, 48, max_position_embeddings=40)
    theirs = BertForQuestionAnswering(config).eval()
    encoder = Encoder(bert(60, **SHAPE, pooler=False))
    inner, heads = split_names(theirs.state_dict(), "bert")
    fill(encoder, inner, "test")
    model = SpanModel(encoder).eval()
    model.head.load_state_dict({name.removeprefix("qa_outputs."): tensor for name, tensor in heads.items()})
    losses = []
    for window in windows():
        ids, begin, span = window
        batch = batch_spans([window], 0)
        first, last = model(batch)
        parts = torch.tensor([[0] * begin + [1] * (len(ids) - begin)])
        wanted = theirs(torch.tensor([ids]), token_type_ids=parts)
        allowed = batch.allowed[0]
        assert allowed.nonzero().flatten().tolist() == [0, *range(begin, len(ids) - 1)]
        torch.testing.assert_close(first[0][allowed], wanted.start_logits[0][allowed], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(last[0][allowed], wanted.end_logits[0][allowed], atol=1e-5, rtol=1e-5)
        both = zip((wanted.start_logits[0], wanted.end_logits[0]), span, strict=True)
        losses += [-float(logits.masked_fill(~allowed, -1e9).log_softmax(0)[place]) for logits, place in both]
    together = model.loss(batch_spans(windows(), 0))
    assert float(together) == pytest.approx(sum(losses) / 4, abs=1e-5)


def test_a_window_scores_the_same_alone_and_in_a_batch():
    torch.manual_seed(0)
    for shape in (bert, distilbert):
        model = SpanModel(Encoder(shape(60, **SHAPE))).eval()
        together = model(batch_spans(windows(), 0))
        for number, window in enumerate(windows()):
            for logits, alone in zip(together, model(batch_spans([window], 0)), strict=True):
                torch.testing.assert_close(logits[number, : len(window[0])], alone[0], atol=1e-5, rtol=1e-5)


def test_many_windows_are_read_a_few_at_a_time():
    torch.manual_seed(0)
    model, sizes = SpanModel(Encoder(bert(60, **SHAPE))).eval(), []
    model.encoder.register_forward_hook(lambda _, inputs, __: sizes.append(len(inputs[0])))
    batch = batch_spans(windows() * 100, 0)
    rows = 4096 // batch.ids.shape[1]
    with torch.no_grad():
        few_at_a_time = model(batch)
    for logits, wanted in zip(few_at_a_time, model(batch), strict=True):
        torch.testing.assert_close(logits, wanted.detach(), atol=1e-5, rtol=1e-5)
    assert sizes == [rows, 200 - rows, 200]


def test_stretches_hold_every_token_and_every_short_answer():
    assert stretches(5, 10, 5) == [(0, 5)] and stretches(10, 4, 2) == [(0, 4), (2, 6), (4, 8), (6, 10)]
    for length, room in itertools.product((1, 7, 50), (1, 4, 9)):
        found = stretches(length, room, max(1, room // 2))
        assert found[0][0] == 0 and found[-1][1] == length and all(b - a <= room for a, b in found)
        for begin in range(length - room // 2):  # an answer of half a window stands whole in one
            assert any(a <= begin and begin + room // 2 <= b for a, b in found)
    with pytest.raises(UserError, match="leaves room for 0 tokens"):
        stretches(5, 0, 1)


def test_the_best_span_is_the_best_of_all_that_are_short_enough():
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        first, last = torch.randn(2, 12, generator=generator)
        first[1:4] = last[1:4] = float("-inf")  # the question
        score, a, b = best_span(first, last, 3)
        every = {(i, j): float(first[i] + last[j]) for i in range(4, 12) for j in range(i, min(i + 3, 12))}
        assert (a, b) == max(every, key=every.__getitem__)
        assert score == pytest.approx(every[a, b] - float(first[0] + last[0]), abs=1e-5)


def test_an_encoder_can_begin_by_looking_at_equal_tokens():
    torch.manual_seed(0)
    encoder = Encoder(bert(60, **(SHAPE | {"width": 128, "n_head": 4}), pooler=False)).eval()
    ids = torch.randperm(56)[:20].repeat(2)[None] + 3  # (1, 40), each token twice
    equal = ids[:, :, None] == ids[:, None, :]  # (1, 40, 40)

    def on_equals() -> float:
        _, weights = encoder.layers[0].attention(encoder.embed(ids), return_weights=True)  # (1, heads, 40, 40)
        return float((weights.mean(dim=1) * equal).sum(dim=-1).mean())

    before = on_equals()
    begin_by_matching(encoder)
    assert before < 0.1 and on_equals() > 0.8
