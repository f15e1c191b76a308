"""BERTSum: equal to transformers' BERT under the same layers, and a document in windows equal to one that fits."""

import random
from itertools import pairwise

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import BertConfig, BertModel

from custom_models.attention import real_tokens
from custom_models.bertsum import BertSum, DocumentBatch, batch_documents, windows
from custom_models.encoder import Encoder, bert, distilbert
from custom_models.encoder_checkpoint import split_names
from custom_models.positions import sinusoidal_table
from custom_models.weights import fill
from workflows.errors import UserError

SHAPE = {"width": 32, "n_layer": 2, "n_head": 2, "inner_width": 48, "n_position": 40}


def sentence(chance: random.Random, length: int) -> list[int]:
    return [1, *(chance.randrange(3, 60) for _ in range(length - 2)), 2]


def document(lengths: list[int], seed: int = 0) -> list[list[int]]:
    chance = random.Random(seed)
    return [sentence(chance, length) for length in lengths]


@pytest.fixture
def model() -> BertSum:
    torch.manual_seed(0)
    return BertSum(Encoder(bert(60, **SHAPE))).eval()


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_the_scores_equal_those_over_transformers_bert(pooling):
    """The encoder is Hugging Face's; pooling and the layers over the sentences are written sentence by sentence."""
    torch.manual_seed(0)
    theirs = BertModel(BertConfig(60, 32, 2, 2, 48, max_position_embeddings=40), add_pooling_layer=False).eval()
    encoder = Encoder(bert(60, **SHAPE, pooler=False))
    fill(encoder, split_names(theirs.state_dict(), "bert")[0], "test")
    model = BertSum(encoder, pooling=pooling).eval()
    documents = [document([5, 9, 4]), document([7, 6], seed=1)]
    found = model(batch_documents(documents, 40, 0))
    for row, sentences in zip(found, documents, strict=True):
        ids = torch.tensor([[i for s in sentences for i in s]])
        parts = torch.tensor([[n % 2 for n, s in enumerate(sentences) for _ in s]])
        states = theirs(ids, token_type_ids=parts).last_hidden_state[0].split([len(s) for s in sentences])
        x = torch.stack([state[0] if pooling == "cls" else state.mean(dim=0) for state in states])[None]
        x = x + sinusoidal_table(len(sentences), 32)
        for layer in model.between:
            x, _ = layer(x, None, False)
        wanted = model.head(model.norm(x))[0, :, 0]
        torch.testing.assert_close(row[: len(sentences)], wanted, atol=1e-5, rtol=1e-5)
        assert bool((row[len(sentences) :] == float("-inf")).all())


def test_a_document_scores_the_same_alone_and_in_a_batch(model):
    documents = [document([5, 9, 4, 8, 8, 8, 12]), document([6]), document([7, 7, 7], seed=3)]
    together = model(batch_documents(documents, 40, 0))
    for row, one in zip(together, documents, strict=True):
        torch.testing.assert_close(row[: len(one)], model(batch_documents([one], 40, 0))[0], atol=1e-5, rtol=1e-5)


def test_windows_begin_and_end_with_sentences_overlap_and_leave_nothing_out():
    chance = random.Random(0)
    for _ in range(300):
        longest = chance.randint(8, 60)
        lengths = [chance.randint(2, longest) for _ in range(chance.randint(1, 40))]
        found = windows(lengths, longest)
        assert found[0][0] == 0 and found[-1][1] == len(lengths)
        for begin, end in found:
            assert 0 < sum(lengths[begin:end]) <= longest
        for (first, last), (begin, end) in pairwise(found):
            assert first < begin <= last < end  # nothing skipped, something new
            assert sum(lengths[begin:last]) <= 0.25 * longest
    assert windows([10] * 10, 40) == [(0, 4), (3, 7), (6, 10)]
    assert windows([], 40) == []
    with pytest.raises(UserError, match="A sentence has 41 tokens, and a window holds 40"):
        windows([3, 41], 40)


def test_a_sentence_of_several_windows_has_the_mean_of_its_states_there(model):
    long = document([10] * 7)
    batch = batch_documents([long], 40, 0)
    assert batch.ids.shape == (2, 40) and batch.places[0].tolist() == [i for i in range(4) for _ in range(10)]
    assert batch.segments[1, 0] == 1  # sentence 3 is odd in the document, though first in its window
    captured = []
    model.between[0].register_forward_hook(lambda _, inputs, __: captured.append(inputs[0]))
    model(batch)
    states = model.encoder(batch.ids, batch.lengths, batch.segments).last
    wanted = torch.stack([states[0, 0], states[0, 10], states[0, 20], (states[0, 30] + states[1, 0]) / 2,
                          states[1, 10], states[1, 20], states[1, 30]])  # fmt: skip
    torch.testing.assert_close(captured[0][0], wanted + sinusoidal_table(7, 32), atol=1e-5, rtol=1e-5)


def test_many_windows_are_read_a_few_at_a_time(model):
    batch = batch_documents([document([10] * 600), document([10] * 60, seed=1)], 40, 0)
    sizes = []
    model.encoder.register_forward_hook(lambda _, inputs, __: sizes.append(inputs[0].numel()))
    with torch.no_grad():
        found = model(batch)
    assert sum(sizes) == batch.ids.numel() > 8000 and max(sizes) <= 4096
    torch.testing.assert_close(found, model(batch).detach(), atol=1e-5, rtol=1e-5)
    assert sizes[-1] == batch.ids.numel()  # in training all at once


def test_all_sentences_of_a_long_document_see_each_other(model):
    long = document([10] * 30)
    scores = model(batch_documents([long], 40, 0))[0].detach()
    long[0] = sentence(random.Random(9), 10)
    assert abs(float((model(batch_documents([long], 40, 0))[0].detach() - scores)[29])) > 1e-6


def test_work_and_tokens_grow_with_the_length_and_not_with_its_square(model):
    sizes = [100, 200, 400]  # 400 sentences of 20 words fill 20 pages
    batches = [batch_documents([document([20] * n)], 40, 0) for n in sizes]
    tokens = [int(batch.lengths.sum()) for batch in batches]
    assert tokens[2] / tokens[0] == pytest.approx(4, rel=0.05)

    def work(batch: DocumentBatch) -> int:
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model(batch)
        return counter.get_total_flops()

    assert work(batches[2]) < 5 * work(batches[0])  # four times the work; sixteen times, were it quadratic


def test_encoders_without_two_segments_go_without():
    torch.manual_seed(0)
    model = BertSum(Encoder(distilbert(60, **SHAPE))).eval()
    assert model(batch_documents([document([5, 6])], 40, 0)).isfinite().all()


def test_documents_without_sentences_are_refused():
    with pytest.raises(UserError, match="without sentences"):
        batch_documents([document([5]), []], 40, 0)


def test_every_parameter_learns(model):
    batch = batch_documents([document([5, 9, 4])], 40, 0)
    logits = model.train()(batch)
    logits[real_tokens(batch.n_sentences, 3)].sigmoid().sum().backward()
    assert not [name for name, p in model.named_parameters() if p.grad is None]
