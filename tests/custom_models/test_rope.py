"""RoPE and every way of stretching it equal transformers'."""

import math

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.deepseek_v3.configuration_deepseek_v3 import DeepseekV3Config
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3RotaryEmbedding
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from custom_models.rope import RopeScaling, apply_rope, main, rope_frequencies, rope_table, yarn_mscale
from workflows.errors import UserError


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def near(a, b, tolerance=1e-5):
    torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


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
