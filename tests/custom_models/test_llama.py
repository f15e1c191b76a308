"""Llama is transformers' and LitGPT's, logit by logit and word by word; the real 135M checkpoint among them."""

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import litgpt
import pytest
import torch
import yaml
from litgpt.generate.base import generate as litgpt_generate
from transformers import AutoModelForCausalLM

from custom_models.generation import generate
from custom_models.llama import Llama, LlamaConfig, main
from custom_models.llama_checkpoint import SMOLLM2_DIRECTORY, load_llama
from custom_models.rope import RopeScaling
from tests.conftest import convert, make_llama, make_qwen2
from tests.rounding import assert_greedy_up_to_a_near_tie
from workflows.chat_template import ChatTemplate
from workflows.checkpoint import load_config, load_weights
from workflows.errors import UserError

LLAMA3 = {"rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 64}  # fmt: skip
SHAPES: dict[str, tuple[Callable[..., Path], dict[str, Any]]] = {
    "grouped-query, tied": (make_llama, {}),
    "multi-head, untied": (make_llama, {"tied": False, "num_key_value_heads": 4}),
    "multi-query, heads of another size": (make_llama, {"num_key_value_heads": 1, "head_dim": 16}),
    "Llama 3's RoPE, untied": (make_llama, {"tied": False, "rope_parameters": LLAMA3}),
    "linear RoPE": (make_llama, {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}}),
    "Qwen2": (make_qwen2, {}),
}
QUESTIONS = ["Name a sign of pneumonia, and say how it is found.", "Hi"]


def some_ids(length: int = 40, batch: int = 2) -> torch.Tensor:
    return torch.randint(3, 300, (batch, length), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module", params=SHAPES)
def folder(request, tmp_path_factory) -> Path:
    """A tiny random model in Hugging Face's form."""
    make, fields = SHAPES[request.param]
    return make(tmp_path_factory.mktemp("hf") / "tiny", **fields)


def litgpt_model(directory: Path) -> litgpt.GPT:
    """LitGPT's own model with a directory's weights."""
    model = litgpt.GPT(load_config(directory)).eval()
    model.load_state_dict({name: tensor.float() for name, tensor in load_weights(directory).items()})
    return model


@pytest.mark.parametrize("backend", ["sdpa", "naive", "flash"])
@torch.no_grad()
def test_logits_are_transformers(folder, backend):
    model = load_llama(folder).eval()
    for layer in model.layers:
        layer.attention.backend = backend
    expected = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()(some_ids()).logits
    assert expected.std() > 0.5  # it has opinions: logits that are all alike would be equal in any order
    torch.testing.assert_close(model(some_ids()), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", ["dynamic", "yarn"])
@torch.no_grad()
def test_logits_are_transformers_with_stretches_that_litgpt_lacks(kind, tmp_path):
    rope = {"rope_type": kind, "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 128}
    if kind == "dynamic":  # stretches texts beyond the model's length only, which are refused
        del rope["original_max_position_embeddings"]
    folder = make_llama(tmp_path, rope_parameters=rope)
    expected = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()(some_ids()).logits
    torch.testing.assert_close(load_llama(folder)(some_ids()), expected, atol=1e-4, rtol=0)


@torch.no_grad()
def test_greedy_text_is_transformers(folder):
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    prompts = some_ids(7)
    expected = theirs.generate(
        prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=24, do_sample=False, eos_token_id=None
    )
    found = generate(load_llama(folder).eval(), prompts, 24)
    assert found.ids == expected[:, 7:].tolist()


@torch.no_grad()
def test_logits_are_litgpts_on_the_converted_checkpoint(folder, tmp_path):
    directory = convert(folder, tmp_path)
    model, ids = load_llama(directory).eval(), some_ids()
    torch.testing.assert_close(model(ids), litgpt_model(directory)(ids), atol=1e-4, rtol=0)
    assert torch.equal(model(ids), load_llama(folder).eval()(ids))
    assert (model.head is None) == load_llama(folder).config.tied


@torch.no_grad()
def test_a_checkpoint_of_litgpts_own_making_is_read(tmp_path):
    """As `litgpt pretrain` leaves it: a padded vocabulary, the head apart, no config.json."""
    config = litgpt.Config(
        name="mine", block_size=128, n_layer=2, n_embd=48, n_head=4, n_query_groups=2, vocab_size=301,
        padding_multiple=64, norm_class_name="RMSNorm", mlp_class_name="LLaMAMLP", intermediate_size=96, bias=False,
        parallel_residual=False, rotary_percentage=1.0, rope_condense_ratio=4,
    )  # fmt: skip
    torch.manual_seed(0)
    theirs = litgpt.GPT(config).eval()
    torch.save(theirs.state_dict(), tmp_path / "lit_model.pth")
    (tmp_path / "model_config.yaml").write_text(yaml.safe_dump(dataclasses.asdict(config)))
    model = load_llama(tmp_path).eval()
    assert model.config.vocab_size == 320 and model.config.rope_scaling == RopeScaling("linear", 4)
    torch.testing.assert_close(model(some_ids()), theirs(some_ids()), atol=1e-4, rtol=0)


@torch.no_grad()
def test_shards_are_read_as_one_file_is(tmp_path):
    whole = make_llama(tmp_path / "whole")
    AutoModelForCausalLM.from_pretrained(whole).save_pretrained(tmp_path / "shards", max_shard_size="100KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    assert torch.equal(load_llama(whole)(some_ids()), load_llama(tmp_path / "shards")(some_ids()))


@torch.no_grad()
def test_what_stands_after_a_texts_end_changes_nothing_before_it():
    model = tiny().eval()
    ids = some_ids(20)
    padded = torch.cat([ids[:, :12], torch.zeros(2, 8, dtype=torch.long)], dim=1)
    torch.testing.assert_close(model(padded)[:, :12], model(ids)[:, :12], atol=1e-6, rtol=0)


@torch.no_grad()
def test_logits_are_computed_where_they_are_wanted():
    model, ids = tiny().eval(), some_ids(20)
    predict = torch.rand(2, 20, generator=torch.Generator().manual_seed(2)) < 0.3
    found = model(ids, predict=predict)
    assert found.shape == (int(predict.sum()), 300)
    torch.testing.assert_close(found, model(ids)[predict], atol=1e-6, rtol=0)


@torch.no_grad()
def test_half_precision_is_kept_throughout():
    model = tiny().to(torch.bfloat16).eval()
    caches = model.new_caches(2, 9)
    logits = model(some_ids(9), caches)
    assert logits.dtype == caches[0].k.dtype == torch.bfloat16
    torch.testing.assert_close(logits.float(), tiny().eval()(some_ids(9)), atol=0.05, rtol=0.05)


def tiny(**changes: Any) -> Llama:
    torch.manual_seed(0)
    fields: dict[str, Any] = {"vocab_size": 300, "width": 48, "n_layer": 2, "n_head": 4, "n_kv_head": 2,
                              "inner_width": 96, "max_length": 64}  # fmt: skip
    return Llama(LlamaConfig(**{**fields, **changes}))


# ---- the real checkpoint ----


@pytest.fixture(scope="module")
def real(embedded_checkpoint) -> tuple[Llama, ChatTemplate]:
    return load_llama(embedded_checkpoint).eval(), ChatTemplate.from_checkpoint(embedded_checkpoint)


def prompts_of(template: ChatTemplate) -> list[torch.Tensor]:
    return [torch.tensor([template.prompt_ids([{"role": "user", "content": text}])]) for text in QUESTIONS]


def assert_the_same_answer(model: Llama, prompt: torch.Tensor, found: list[int], expected: list[int], template) -> None:
    """Without the stop token, which LitGPT does not give back, and up to a near tie: logits may be 5e-4 apart."""
    logits = model(torch.cat([prompt, torch.tensor([found])], dim=1))[0, prompt.shape[1] - 1 : -1]  # (T, vocab_size)
    ours, theirs = ([token for token in ids if token not in template.stop_ids] for ids in (found, expected))
    assert_greedy_up_to_a_near_tie(ours, theirs, logits, within=1e-3)
    assert len(ours) > 4


@pytest.mark.checkpoint
@torch.no_grad()
def test_the_real_checkpoint_is_litgpts(real, embedded_checkpoint):
    model, template = real
    theirs = litgpt_model(embedded_checkpoint)
    theirs.max_seq_length = 96
    for prompt in prompts_of(template):
        torch.testing.assert_close(model(prompt), theirs(prompt), atol=5e-4, rtol=0)
        theirs.set_kv_cache(batch_size=1)
        length = prompt.shape[1]
        expected = litgpt_generate(theirs, prompt[0], length + 16, temperature=0.0, eos_id=template.stop_ids[0])
        theirs.clear_kv_cache()
        found = generate(model, prompt, 16, stop_ids=template.stop_ids).ids[0]
        assert_the_same_answer(model, prompt, found, expected[length:].tolist(), template)


@pytest.mark.checkpoint
@torch.no_grad()
def test_the_real_checkpoint_is_transformers(real, embedded_hf):
    model, template = real
    theirs = AutoModelForCausalLM.from_pretrained(embedded_hf, dtype=torch.float32).eval()
    for prompt in prompts_of(template):
        torch.testing.assert_close(model(prompt), theirs(prompt).logits, atol=5e-4, rtol=0)
        expected = theirs.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=16, do_sample=False)
        found = generate(model, prompt, 16, stop_ids=template.stop_ids).ids[0]
        assert_the_same_answer(model, prompt, found, expected[0, prompt.shape[1] :].tolist(), template)


@pytest.mark.checkpoint
@torch.no_grad()
def test_the_real_checkpoint_is_the_same_in_hugging_faces_form(real, embedded_hf):
    model, template = real
    assert SMOLLM2_DIRECTORY.is_dir() and model.config.tied
    again = load_llama(embedded_hf).eval()
    assert again.config == model.config
    ids = prompts_of(template)[0]
    assert torch.equal(again(ids), model(ids))


@pytest.mark.checkpoint
def test_the_files_command_answers_with_and_without_the_cache(embedded_checkpoint, capsys):
    main("Hi", max_new_tokens=8)  # none of these tokens is a near tie: the nearest second one is 0.1 below
    said = capsys.readouterr().out
    assert "smollm2-135m-instruct: 134.5 M parameters, 30 layers of 9 query heads and 3 key and value heads" in said
    assert re.search(r".+\n\nwith the KV cache 8 tokens, [\d.]+ tokens/s\nwithout +8 tokens", said)
    assert "both wrote the same text" in said


# ---- what cannot be ----


def test_a_text_beyond_the_models_positions_is_refused():
    model = tiny()
    with pytest.raises(UserError, match="has 65 tokens, and the model was made for 64 positions"):
        model(some_ids(65))
    with pytest.raises(UserError, match="60 tokens and 5 new ones are more than the 64"):
        generate(model, some_ids(60), 5)
    with pytest.raises(UserError, match="A cache of 65 tokens is longer than the 64"):
        model.new_caches(1, 65)
    caches = model.new_caches(2, 10)
    model(some_ids(8), caches)
    with pytest.raises(UserError, match="grows to 11 tokens, and the KV cache holds 10"):
        model(some_ids(3), caches)


@pytest.mark.parametrize("wrong", [-1, 300])
def test_an_id_that_is_no_token_is_refused(wrong):
    ids = torch.tensor([[1, wrong, 2]])
    with pytest.raises(UserError, match=r"from 0 to 299, and these go from .* Does the tokenizer belong"):
        tiny()(ids)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_layer": 0, "inner_width": 0}, r"2 problems:\n.*n_layer must be at least 1, not 0"),
        ({"norm_eps": 0.0}, "norm_eps must be positive"),
        ({"n_head": 5}, "width 48 is no multiple of n_head 5"),
        ({"n_kv_head": 3}, "n_head 4 is no multiple of n_kv_head 3"),
        ({"rope_scaling": RopeScaling("ntk", 2.0, 32)}, "must not be above original_length 32"),
    ],
)
def test_a_shape_that_cannot_be_is_refused(changes, message):
    with pytest.raises(UserError, match=message):
        tiny(**changes)
