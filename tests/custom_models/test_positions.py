"""Every kind of position equals transformers', and a text that is too long is told so."""

import math

import pytest
import torch
from transformers import BertConfig, LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.bert.modeling_bert import BertEmbeddings
from transformers.models.bloom.modeling_bloom import build_alibi_tensor
from transformers.models.deepseek_v3.configuration_deepseek_v3 import DeepseekV3Config
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3RotaryEmbedding
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb
from transformers.models.marian.modeling_marian import MarianSinusoidalPositionalEmbedding
from transformers.models.mpt.modeling_mpt import build_mpt_alibi_tensor
from transformers.models.t5.configuration_t5 import T5Config
from transformers.models.t5.modeling_t5 import T5Attention

from custom_models.attention import causal_mask
from custom_models.positions import (
    LearnedPositions,
    RelativePositionBias,
    RopeScaling,
    SinusoidalPositions,
    alibi_bias,
    alibi_slopes,
    apply_rope,
    main,
    relative_position_bucket,
    rope_frequencies,
    rope_table,
    sinusoidal_table,
    yarn_mscale,
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


# ---- turns of queries and keys ----

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}
CASES = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "factor": 4.0},
    "yarn": YARN,
    "yarn betas": {**YARN, "beta_fast": 16.0, "beta_slow": 2.0},
    "yarn attention": {**YARN, "attention_factor": 0.9},
    "yarn untruncated": {**YARN, "truncate": False},
    "yarn deepseek": {**YARN, "factor": 40.0, "mscale": 1.0, "mscale_all_dim": 0.7},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 512,
    },
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("head_size", "base"), [(64, 10000.0), (128, 500000.0)])
@pytest.mark.parametrize("length", [100, 2048, 5000])
def test_rope_is_transformers(case, head_size, base, length):
    parameters = {**CASES[case], "rope_theta": base}
    config = LlamaConfig(
        hidden_size=4 * head_size, num_attention_heads=4, max_position_embeddings=2048, rope_parameters=parameters
    )
    scaling = RopeScaling.from_config(config.to_dict())
    positions = torch.arange(length)
    cos, sin = LlamaRotaryEmbedding(config)(torch.zeros(1), positions[None])
    our_cos, our_sin = rope_table(positions, head_size, base, scaling)
    # The last bit of theta, 6e-8 of it, becomes visible in an angle of thousands of radians.
    near(our_cos, cos[0], 1e-5 if length <= 2048 else 5e-4)
    near(our_sin, sin[0], 1e-5 if length <= 2048 else 5e-4)
    if case != "default":
        theirs, factor = ROPE_INIT_FUNCTIONS[parameters["rope_type"]](config, seq_len=length)
        ours, our_factor = rope_frequencies(head_size, base, scaling, length)
        torch.testing.assert_close(ours, theirs, atol=0, rtol=2e-6)
        assert our_factor == pytest.approx(factor, rel=1e-6)


def test_rope_and_softmax_scale_are_deepseeks():
    parameters = {**CASES["yarn deepseek"], "rope_theta": 10000.0}
    config = DeepseekV3Config(qk_rope_head_dim=16, max_position_embeddings=2048, rope_parameters=parameters)
    cos, _ = DeepseekV3RotaryEmbedding(config)(torch.zeros(1), torch.arange(600)[None])
    near(rope_table(torch.arange(600), 16, 10000.0, RopeScaling.from_config(config.to_dict()))[0], cos[0], 1e-4)
    assert yarn_mscale(40.0, 0.7) == pytest.approx(0.1 * 0.7 * math.log(40) + 1) and yarn_mscale(1.0, 0.7) == 1


@pytest.mark.parametrize("batched", [False, True])
def test_turning_is_transformers(batched):
    positions = torch.tensor([[0, 1, 2, 3], [5, 9, 2, 0]]) if batched else torch.arange(4)
    cos, sin = rope_table(positions, 8)
    q, k = torch.randn(2, 3, 4, 8), torch.randn(2, 1, 4, 8)
    theirs = apply_rotary_pos_emb(q, k, *(x if batched else x[None] for x in (cos, sin)))
    assert torch.equal(apply_rope(q, cos, sin), theirs[0]) and torch.equal(apply_rope(k, cos, sin), theirs[1])


def test_only_the_distance_counts():
    q, k = torch.randn(2, 1, 1, 1, 8).unbind()
    products = []
    for shift in (0, 3, 50):
        turned_q = apply_rope(q, *rope_table(torch.tensor([7 + shift]), 8))
        products.append(turned_q @ apply_rope(k, *rope_table(torch.tensor([2 + shift]), 8)).mT)
    near(products[1], products[0])
    near(products[2], products[0])


def test_the_halves_are_the_papers_neighbours_in_another_order():
    """Equation 34 turns (x0, x1), (x2, x3), ...; ours on the reordered numbers gives the same, reordered."""
    x = torch.randn(1, 1, 5, 8)
    theta, _ = rope_frequencies(8)
    angles = torch.outer(torch.arange(5.0), theta)
    turned = torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (4, 2))) * torch.polar(torch.ones(5, 4), angles))
    order = [0, 2, 4, 6, 1, 3, 5, 7]
    near(apply_rope(x[..., order], *rope_table(torch.arange(5), 8)), turned.flatten(-2)[..., order])


def test_rope_keeps_the_dtype():
    assert (
        apply_rope(torch.zeros(1, 1, 3, 4, dtype=torch.bfloat16), *rope_table(torch.arange(3), 4)).dtype
        == torch.bfloat16
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kind": "magic", "factor": 2.0, "original_length": 9}, "no RoPE scaling 'magic'; there are linear, ntk"),
        ({"kind": "linear", "factor": 0.5}, "at least 1, not 0.5"),
        ({"kind": "linear", "factor": math.nan}, "at least 1, not nan"),
        ({"kind": "yarn", "factor": 2.0}, "'yarn' needs original_length"),
        (
            {"kind": "llama3", "factor": 2.0, "original_length": 9, "low_frequency_factor": 4.0},
            "low_frequency_factor <",
        ),
    ],
)
def test_a_scaling_that_makes_no_sense_is_refused(arguments, message):
    with pytest.raises(UserError, match=message):
        RopeScaling(**arguments)


def test_older_config_files_are_read_and_unknown_kinds_refused():
    old = {"rope_scaling": {"type": "linear", "factor": 2.0}, "max_position_embeddings": 64}
    assert RopeScaling.from_config(old) == RopeScaling("linear", 2.0, 64)
    assert RopeScaling.from_config({"rope_scaling": None}) is None
    with pytest.raises(UserError, match=r"type 'longrope'; known are default, linear"):
        RopeScaling.from_config({"rope_parameters": {"rope_type": "longrope"}})
    with pytest.raises(UserError, match="without a factor"):
        RopeScaling.from_config({"rope_parameters": {"rope_type": "linear"}})


def test_positions_beyond_a_model_and_odd_heads_are_refused():
    with pytest.raises(UserError, match=r"has 11 tokens.*made for 10 positions"):
        rope_table(torch.arange(11), 8, max_length=10)
    assert rope_table(torch.arange(10), 8, max_length=10)[0].shape == (10, 8)
    with pytest.raises(UserError, match="even, not 5"):
        rope_frequencies(5)


def test_it_runs_as_a_program(capsys):
    main()
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["pair", "plain", "linear", "ntk", "yarn", "llama3"] in rows and [
        "0",
        "6.3",
        "25.1",
        "6.3",
        "6.3",
        "6.3",
    ] in rows
