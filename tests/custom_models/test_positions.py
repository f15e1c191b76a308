"""Every kind of position equals transformers', and a text that is too long is told so."""

import math

import pytest
import torch
from transformers import BertConfig
from transformers.models.bert.modeling_bert import BertEmbeddings
from transformers.models.bloom.modeling_bloom import build_alibi_tensor
from transformers.models.marian.modeling_marian import MarianSinusoidalPositionalEmbedding
from transformers.models.mpt.modeling_mpt import build_mpt_alibi_tensor
from transformers.models.t5.configuration_t5 import T5Config
from transformers.models.t5.modeling_t5 import T5Attention

from custom_models.attention import causal_mask
from custom_models.positions import (
    LearnedPositions,
    RelativePositionBias,
    SinusoidalPositions,
    alibi_bias,
    alibi_slopes,
    main,
    relative_position_bucket,
    sinusoidal_table,
)
from workflows.errors import UserError


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def near(a, b, tolerance=1e-5):
    torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


# ---- sums with the token vectors ----


def test_sinusoids_are_the_papers():
    table = sinusoidal_table(50, 16)
    for position in (0, 1, 7, 49):
        for i in range(8):
            angle = position / 10000 ** (2 * i / 16)
            assert table[position, 2 * i] == pytest.approx(math.sin(angle), abs=1e-6)
            assert table[position, 2 * i + 1] == pytest.approx(math.cos(angle), abs=1e-6)


def test_sinusoids_in_halves_are_marians():
    marian = MarianSinusoidalPositionalEmbedding(600, 32)
    near(sinusoidal_table(600, 32, layout="halves"), marian.create_weight(), 1e-6)
    positions = torch.tensor([[3, 0], [599, 1]])
    near(SinusoidalPositions(600, 32, layout="halves")(positions), marian.create_weight()[positions], 1e-6)


def test_learned_positions_are_berts():
    theirs = BertEmbeddings(BertConfig(vocab_size=9, hidden_size=12, max_position_embeddings=20)).position_embeddings
    ours = LearnedPositions(20, 12)
    ours.load_state_dict(theirs.state_dict())
    positions = torch.tensor([[0, 5, 19], [1, 1, 2]])
    assert torch.equal(ours(positions), theirs(positions))


@pytest.mark.parametrize("kind", [LearnedPositions, SinusoidalPositions])
def test_a_text_longer_than_the_positions_is_told_so(kind):
    with pytest.raises(UserError, match=r"Position 20 is asked for.*0 to 19.*Shorten or split the text"):
        kind(20, 12)(torch.arange(21))
    with pytest.raises(UserError, match="0 to 19"):
        kind(20, 12)(torch.tensor([-1, 3]))
    assert kind(20, 12)(torch.arange(0)).shape == (0, 12)


def test_sinusoids_are_not_in_the_checkpoint_and_need_an_even_width():
    assert SinusoidalPositions(4, 6).state_dict() == {}
    with pytest.raises(UserError, match=r"even width.*not 7"):
        sinusoidal_table(4, 7)


# ---- sums with the scores ----


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize(("n_buckets", "max_distance"), [(32, 128), (8, 20), (64, 1000)])
def test_buckets_are_t5s(bidirectional, n_buckets, max_distance):
    relative = torch.arange(-3000, 3001)
    theirs = T5Attention._relative_position_bucket(relative, bidirectional, n_buckets, max_distance)
    assert torch.equal(relative_position_bucket(relative, n_buckets, max_distance, bidirectional), theirs)


@pytest.mark.parametrize("decoder", [False, True])
def test_the_bias_is_t5s(decoder):
    config = T5Config(d_model=16, d_kv=4, num_heads=4, is_decoder=decoder, relative_attention_num_buckets=16)
    theirs = T5Attention(config, has_relative_attention_bias=True, layer_idx=0)
    ours = RelativePositionBias(4, n_buckets=16, bidirectional=not decoder)
    ours.load_state_dict(theirs.relative_attention_bias.state_dict())
    assert torch.equal(ours(40, 40), theirs.compute_bias(40, 40))
    assert torch.equal(ours(3, 40), theirs.compute_bias(40, 40)[:, :, -3:])  # new tokens after a KV cache


@pytest.mark.parametrize("n_head", [1, 2, 6, 8, 12, 16, 20])
def test_alibi_is_blooms_and_mpts(n_head):
    blooms = build_alibi_tensor(torch.ones(1, 10, dtype=torch.int64), n_head, torch.float32)[:, 0]  # slope * key
    near(alibi_slopes(n_head), blooms[:, 1], 1e-6)
    near(alibi_bias(n_head, 1, 10)[0], build_mpt_alibi_tensor(n_head, 10), 1e-6)  # of the last query, as ours
    # BLOOM's form leaves the query's own place out, which a softmax does not notice.
    scores, hidden = torch.randn(n_head, 10, 10), ~causal_mask(10, 10)
    ours = (scores + alibi_bias(n_head, 10, 10)[0]).masked_fill(hidden, -torch.inf).softmax(-1)
    near(ours, (scores + blooms[:, None]).masked_fill(hidden, -torch.inf).softmax(-1), 1e-6)


def test_alibi_of_new_tokens_is_the_end_of_alibi_of_all():
    assert torch.equal(alibi_bias(4, 2, 9), alibi_bias(4, 9, 9)[:, :, -2:])


def test_it_runs_as_a_program(capsys):
    main()
    rows = {row[0]: row[1:] for line in capsys.readouterr().out.splitlines() if (row := line.split())}
    # itself; near keys have a bucket each, far ones share; ALiBi's first head of eight loses half a point a token
    assert rows["0"][:2] == ["1.00", "0"] and rows["8"][1:] == ["8", "-4.00", "-0.03"]
    assert rows["128"][1] == rows["256"][1] == "31"
