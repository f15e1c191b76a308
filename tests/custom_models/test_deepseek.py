"""The decoder is transformers' DeepSeek-V3, with and without its cache; its sizes are the published ones; bad input."""

import re
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
import transformers

from custom_models.attention import KVCache
from custom_models.deepseek import DeepSeek, DeepSeekConfig, cache_numbers, deepseek_v3, main, parameters, small
from custom_models.deepseek_checkpoint import load_deepseek
from custom_models.generation import generate
from custom_models.latent_attention import LatentAttention
from custom_models.mixture_of_experts import ExpertsConfig
from workflows.errors import UserError
from workflows.files import read_json, write_json

SIZES: dict[str, Any] = {
    "vocab_size": 99, "hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 16, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 4, "n_shared_experts": 1, "n_routed_experts": 8,
    "kv_lora_rank": 16, "q_lora_rank": 24, "qk_rope_head_dim": 8, "v_head_dim": 12, "qk_nope_head_dim": 16,
    "n_group": 4, "topk_group": 2, "num_experts_per_tok": 3, "first_k_dense_replace": 1, "max_position_embeddings": 64,
}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 5000.0, "factor": 4.0, "original_max_position_embeddings": 64,
        "mscale": 1.0, "mscale_all_dim": 0.7, "beta_fast": 32.0, "beta_slow": 1.0}  # fmt: skip
CASES: dict[str, dict[str, Any]] = {
    "as V3": {},
    "direct queries": {"q_lora_rank": None},
    "YaRN": {"max_position_embeddings": 256, "rope_parameters": YARN},
    "YaRN without mscale_all_dim": {
        "max_position_embeddings": 256,
        "rope_parameters": {k: v for k, v in YARN.items() if not k.startswith("mscale")},
    },
    "halves": {"rope_interleave": False},
    "no groups": {"n_group": 1, "topk_group": 1},
    "gates not normalised": {"norm_topk_prob": False, "routed_scaling_factor": 1.5},
    "two shared, tied": {"n_shared_experts": 2, "tie_word_embeddings": True},
    "all dense": {"first_k_dense_replace": 5},
    "none dense": {"first_k_dense_replace": 0, "rms_norm_eps": 1e-3},
}


def tiny(folder: Path, shard: str = "1GB", **changes: Any) -> transformers.DeepseekV3ForCausalLM:
    """A random model, saved."""
    torch.manual_seed(0)
    model = transformers.DeepseekV3ForCausalLM(transformers.DeepseekV3Config(**{**SIZES, **changes})).eval()
    for parameter in model.parameters():  # transformers begins with ones for norms, and with small numbers for the rest
        parameter.data += 0.25 * torch.randn(parameter.shape)
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer += 0.1 * torch.randn(buffer.shape)
    model.save_pretrained(folder, max_shard_size=shard)
    return model


def texts(length: int = 20) -> torch.Tensor:
    return torch.randint(0, 99, (3, length), generator=torch.Generator().manual_seed(1))


def random_decoder(**changes: Any) -> DeepSeek:
    """A small one with weights large enough that its words differ."""
    torch.manual_seed(0)
    experts = ExpertsConfig(n_routed=8, n_active=3, inner_width=16, n_group=4, n_active_group=2)
    fields = {"width": 32, "n_layer": 3, "n_dense": 1, "inner_width": 48, "experts": experts, "n_head": 4, "q_rank": 24,
              "kv_rank": 16, "nope_size": 16, "rope_size": 8, "value_size": 12, "max_length": 64}  # fmt: skip
    model = DeepSeek(DeepSeekConfig(99, **{**fields, **changes})).eval()
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape)
    return model


@pytest.mark.parametrize("case", CASES)
def test_logits_and_greedy_text_are_transformers(case, tmp_path):
    theirs = tiny(tmp_path, **CASES[case])
    ours, prediction = load_deepseek(tmp_path)
    ours.eval()
    assert prediction is None
    ids = texts(min(100, theirs.config.max_position_embeddings))
    with torch.no_grad():
        expected = theirs(ids).logits
        assert expected.std() > 0.8
        torch.testing.assert_close(ours(ids), expected, atol=1e-4, rtol=0)
        written = theirs.generate(ids[:, :5], max_new_tokens=24, do_sample=False, eos_token_id=None)[:, 5:].tolist()
    assert all(len(set(text)) > 4 for text in written)  # no text of one word
    assert generate(ours, ids[:, :5], 24).ids == written
    assert generate(ours, ids[:, :5], 24, use_cache=False).ids == written


@pytest.mark.parametrize("backend", ["naive", "sdpa", "flash"])
def test_a_cached_step_gives_the_logits_of_the_whole_text(backend):
    model, ids = random_decoder(backend=backend), texts()
    with torch.no_grad():
        expected, caches = model(ids), model.new_caches(3, 20)
        found = [model(ids[:, :9], caches), *(model(ids[:, i : i + 1], caches) for i in range(9, 20))]
    torch.testing.assert_close(torch.cat(found, dim=1), expected, atol=1e-5, rtol=0)


def test_the_prompt_goes_the_plain_way_and_later_tokens_the_absorbed(monkeypatch):
    taken = []

    def noted(name, form):
        def form_noted(self, q_nope, *rest):
            taken.append((name, q_nope.shape[2]))
            return form(self, q_nope, *rest)

        monkeypatch.setattr(LatentAttention, name, form_noted)

    for name in ("_plain", "_absorbed"):
        noted(name, getattr(LatentAttention, name))
    generate(random_decoder(n_layer=1, n_dense=1), texts(5), 3)
    assert taken == [("_plain", 5), ("_absorbed", 1), ("_absorbed", 1)]


def test_a_token_sees_none_that_come_later():
    model, ids = random_decoder(), texts()
    other = ids.clone()
    other[:, 12:] = 98 - other[:, 12:]
    with torch.no_grad():
        torch.testing.assert_close(model(ids)[:, :12], model(other)[:, :12], atol=1e-6, rtol=0)


@pytest.mark.parametrize("tied", [False, True])
def test_gradients_reach_every_parameter(tied):
    model, ids = random_decoder(tied=tied), texts(64)
    F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def test_caches_are_as_small_as_the_table_says():
    for config in (random_decoder().config, random_decoder(n_layer=2, kv_rank=20, rope_size=6).config):
        numbers = cache_numbers(config)
        caches = DeepSeek(config).new_caches(2, 7)
        assert sum(cache.k.numel() + cache.v.numel() for cache in caches) == 2 * 7 * numbers["latent"]
        for kind, heads in {"multi-head": config.n_head, "grouped-query, 8 groups": 8, "multi-query": 1}.items():
            other = KVCache(2, heads, 7, config.value_size)
            assert config.n_layer * (other.k.numel() + other.v.numel()) == 2 * 7 * numbers[kind]
    bytes_of = {kind: 2 * count for kind, count in cache_numbers(deepseek_v3()).items()}
    assert bytes_of == {"multi-head": 3_997_696, "grouped-query, 8 groups": 249_856, "multi-query": 31_232,
                        "latent": 70_272}  # fmt: skip
    assert cache_numbers(small())["latent"] == 27 * 576


def test_sizes_are_the_published_ones(capsys):
    model = random_decoder()
    idle = 2 * 5 * sum(p.numel() for p in model.layers[1].feed_forward.experts[0].parameters())
    total = sum(p.numel() for p in model.parameters())
    assert parameters(model.config) == (total, total - idle)
    assert parameters(random_decoder(tied=True).config)[0] == total - 99 * 32
    main(length=1000)
    said = capsys.readouterr().out
    assert "DeepSeek-V3: 671.0 billion parameters, 37.6 at work" in said and "shape: 15.7 billion" in said
    assert re.search(r"multi-head +3,997,696 +4\.0 GB +56\.9", said)
    assert deepseek_v3().sharpen == pytest.approx(1.3689**2, abs=1e-3)  # (0.1 ln 40 + 1)^2


def test_a_checkpoint_in_shards_and_in_sixteen_bits_is_read(tmp_path):
    model = tiny(tmp_path / "whole")
    model.bfloat16().save_pretrained(tmp_path / "shards", max_shard_size="30KB")
    assert len(list((tmp_path / "shards").glob("model-*.safetensors"))) > 2
    whole, shards = load_deepseek(tmp_path / "whole")[0], load_deepseek(tmp_path / "shards")[0]
    for a, b in zip(whole.parameters(), shards.parameters(), strict=True):
        assert b.dtype == torch.float32 and torch.equal(a.bfloat16().float(), b)


def test_texts_that_do_not_fit_are_told():
    model = random_decoder(max_length=10)
    with pytest.raises(UserError, match="11 tokens, and the model was made for 10 positions"):
        model(texts(11))
    with pytest.raises(UserError, match="8 tokens and 3 new ones are more than the 10"):
        generate(model, texts(8), 3)
    caches = model.new_caches(3, 10)
    model(texts(10), caches)
    with pytest.raises(UserError, match="11 tokens, and the model was made for 10 positions"):
        model(texts(1), caches)
    with pytest.raises(UserError, match=r"from 0 to 98, and these go from 3 to 99\. Does the tokenizer belong"):
        model(torch.tensor([[3, 99]]))
    with pytest.raises(UserError, match="5 problems"):
        DeepSeekConfig(0, n_layer=2, n_dense=3, rope_size=5, q_rank=0, n_head=0)


def test_a_config_that_does_not_fit_is_told(tmp_path):
    tiny(tmp_path)
    config = read_json(tmp_path / "config.json")

    def refused(**changes: Any) -> str:
        write_json(tmp_path / "config.json", {**config, **changes})
        with pytest.raises(UserError) as told:
            load_deepseek(tmp_path)
        return str(told.value)

    assert "architecture 'deepseek_v2'; this decoder reads 'deepseek_v3'" in refused(model_type="deepseek_v2")
    said = refused(scoring_func="softmax", hidden_act="gelu")
    assert "2 problems" in said and "'softmax' for scoring_func; this decoder knows 'sigmoid' only" in said
    said = refused(hidden_size=None, q_lora_rank=1.5, rms_norm_eps="x", rope_interleave="no", vocab_size=True)
    assert "5 problems" in said and "None for hidden_size" in said and "'x' for rms_norm_eps" in said
    assert "'many' for n_group" in refused(n_group="many") and "for num_hidden_layers" in refused(
        num_hidden_layers=10**9
    )
    assert "take it in 16 bits" in refused(quantization_config={"quant_method": "fp8"})
    assert "RoPE's parameters are [1]" in refused(rope_parameters=[1])
    assert "'abc' for rope_theta" in refused(rope_parameters={"rope_theta": "abc"})
    yarn = {"rope_type": "yarn", "original_max_position_embeddings": 16}
    assert "has 'x' for factor" in refused(rope_parameters={**yarn, "factor": "x"})
    assert "RoPE of type 'longrope'" in refused(rope_parameters={"rope_type": "longrope"})
    assert f"{tmp_path}/config.json: 8 experts do not make 3 equal groups" in refused(n_group=3)
    # the vocabulary, the layers and the ranks of another model
    said = refused(vocab_size=100)
    assert all(f"{name}.weight of shape (99, 32), not (100, 32)" in said for name in ("tokens", "head"))
    assert "lacks layers.3.attention_norm.weight" in refused(num_hidden_layers=4)
    assert "has layers.2.attention_norm.weight, which the model has not" in refused(num_hidden_layers=2)
    assert "kv_down.weight of shape (24, 32), not (28, 32)" in refused(kv_lora_rank=20)


def test_weights_that_do_not_fit_are_told(tmp_path):
    tiny(tmp_path)
    file = tmp_path / "model.safetensors"
    weights = safetensors.torch.load_file(file)
    lost = weights.pop("model.layers.1.self_attn.kv_b_proj.weight")
    weights["model.surplus.weight"] = lost
    weights["model.layers.2.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    weights["model.norm.weight"] = torch.ones(7)
    safetensors.torch.save_file(weights, file)
    with pytest.raises(UserError) as told:
        load_deepseek(tmp_path)
    said = str(told.value)
    assert "lacks layers.1.attention.kv_up.weight" in said and "has model.surplus.weight" in said and "1 more" in said
    file.write_bytes(file.read_bytes()[:5000])
    with pytest.raises(UserError, match="cut short"):
        load_deepseek(tmp_path)
    file.rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"neither model\.safetensors nor model\.safetensors\.index\.json"):
        load_deepseek(tmp_path)
    with pytest.raises(UserError, match="does not exist"):
        load_deepseek(tmp_path / "nowhere")
