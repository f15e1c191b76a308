"""A converted checkpoint gives transformers' logits, is written one tensor at a time, and bad weights are refused."""

import json
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from litgpt import GPT
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from tests.conftest import make_llama, make_qwen2
from workflows.checkpoint import WEIGHTS, is_tied, load_config, load_weights
from workflows.conversion import litgpt_config, write_checkpoint
from workflows.errors import UserError
from workflows.gguf_header import read_header
from workflows.hf_export import write_hf
from workflows.hf_reader import read_hf_dir
from workflows.merge import write_merged
from workflows.ollama.gguf_writer import write_gguf
from workflows.training.model import LoRAArgs, load_model

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,  # small, so that the tiny model's positions feel the scaling
}


def convert(hf_dir: Path, output: Path, dtype: torch.dtype | None = None) -> Path:
    output.mkdir()
    write_checkpoint(read_hf_dir(hf_dir), output, hf_dir.name, dtype)
    return output


def lit_model(checkpoint_dir: Path) -> GPT:
    """LitGPT's own model with its own Config, as its commands load it."""
    model = GPT(load_config(checkpoint_dir)).eval()
    model.load_state_dict(load_weights(checkpoint_dir))
    return model


@torch.inference_mode()
def largest_difference(lit: GPT, hf: torch.nn.Module, length: int = 150) -> float:
    ids = torch.randint(0, lit.config.vocab_size, (2, length), generator=torch.Generator().manual_seed(1))
    return (lit(ids) - hf(ids).logits).abs().max().item()


@pytest.mark.parametrize(
    ("make", "options"),
    [
        (make_llama, {"tied": True}),
        (make_llama, {"tied": False, "head_dim": 16}),  # head size other than width / heads
        (make_llama, {"tied": False, "rope_parameters": LLAMA3_ROPE}),
        (make_llama, {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5}}),
        (make_qwen2, {"tied": True}),
        (make_qwen2, {"tied": False, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}),
    ],
    ids=["llama-tied", "llama-untied", "llama3-rope", "linear-rope", "qwen2-tied", "qwen2-untied"],
)
def test_logits_equal_transformers(make, options, tmp_path):
    hf_dir = make(tmp_path / "tiny", **options)
    hf = AutoModelForCausalLM.from_pretrained(hf_dir, dtype=torch.float32).eval()
    lit = lit_model(convert(hf_dir, tmp_path / "lit"))
    assert largest_difference(lit, hf) <= 1e-4


def test_the_older_way_to_write_rotary_settings_means_the_same(tmp_path):
    hf_dir = make_llama(tmp_path / "tiny", rope_parameters=LLAMA3_ROPE)
    new = litgpt_config(json.loads((hf_dir / "config.json").read_text()), "tiny", "here")
    config = json.loads((hf_dir / "config.json").read_text())
    rope = config.pop("rope_parameters")
    config["rope_theta"] = rope.pop("rope_theta")
    config["rope_scaling"] = rope
    old = litgpt_config(config, "tiny", "here")
    assert old == new
    assert new.rope_adjustments == {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_seq_len": 64,
    }


def test_config_comes_from_config_json_and_not_from_a_known_name(tmp_path):
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    hf_dir = make_qwen2(
        tmp_path / "DeepSeek-R1-Distill-Qwen-1.5B", max_position_embeddings=131072, rope_parameters=rope
    )
    config = load_config(convert(hf_dir, tmp_path / "lit"))
    assert (config.block_size, config.rope_base, config.attn_bias, config.bias) == (131072, 10000, True, False)
    vocab_size = json.loads((hf_dir / "config.json").read_text())["vocab_size"]
    assert config.padded_vocab_size == config.vocab_size == vocab_size  # no padding
    assert config.name == "Qwen2.5-DeepSeek-R1-Distill-Qwen-1.5B"  # LitGPT's converters know Qwen2 by this prefix


@pytest.mark.parametrize("name", ["Gemma-merge", "my-OLMo-2", "falcon-7b", "phi-like", "qwen-ish"])
def test_a_name_does_not_change_the_model(name, tiny_llama_hf, tmp_path):
    """LitGPT's norm and its converters branch on parts of the name; a Llama may be called anything."""
    hf_dir = shutil.copytree(tiny_llama_hf, tmp_path / name)
    lit_dir = convert(hf_dir, tmp_path / "lit")
    hf = AutoModelForCausalLM.from_pretrained(hf_dir, dtype=torch.float32).eval()
    assert largest_difference(lit_model(lit_dir), hf) <= 1e-4

    from litgpt.scripts.convert_lit_checkpoint import convert_lit_checkpoint

    convert_lit_checkpoint(lit_dir, tmp_path / "back")
    back = torch.load(tmp_path / "back" / "model.pth", weights_only=True)
    for key, tensor in load_file(hf_dir / "model.safetensors").items():
        assert torch.equal(back[key], tensor)


def test_tied_head_is_the_embedding_itself(tiny_llama_hf, tiny_qwen2_hf, tmp_path):
    tied = load_weights(convert(tiny_llama_hf, tmp_path / "tied"))
    assert tied["lm_head.weight"].data_ptr() == tied["transformer.wte.weight"].data_ptr()
    untied = load_weights(convert(tiny_qwen2_hf, tmp_path / "untied"))
    assert untied["lm_head.weight"].data_ptr() != untied["transformer.wte.weight"].data_ptr()


def untied(hf_dir: Path, folder: Path, head: Callable[[torch.Tensor], torch.Tensor]) -> Path:
    """A copy of a tied model whose file has an `lm_head.weight`, made from the embedding."""
    copy = shutil.copytree(hf_dir, folder)
    edit_weights(copy, lambda w: w.update({"lm_head.weight": head(w["model.embed_tokens.weight"])}))
    return copy


def test_the_tensors_decide_whether_a_head_is_tied_and_not_the_flag(tiny_llama_hf, tmp_path, capsys):
    """As transformers 5 does: two tensors that differ are never tied, and one alone serves as both."""
    same = untied(tiny_llama_hf, tmp_path / "same", lambda e: e.clone())
    other = untied(tiny_llama_hf, tmp_path / "other", lambda e: e.flip(0).contiguous())
    only_head = untied(tiny_llama_hf, tmp_path / "only-head", lambda e: e.clone())
    edit_weights(only_head, lambda w: w.pop("model.embed_tokens.weight"))
    for folder, tied in ((same, True), (only_head, True), (other, False)):
        lit = convert(folder, tmp_path / f"{folder.name}-lit")
        assert ("Both are kept, and the checkpoint is untied" in capsys.readouterr().out) == (not tied)
        assert is_tied(lit) == tied
        assert json.loads((lit / "config.json").read_text())["tie_word_embeddings"] is tied
        hf = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        assert largest_difference(lit_model(lit), hf) <= 1e-4
        model = load_model(lit)
        assert (model.lm_head.linear.weight is model.transformer.wte.weight) == tied


def test_an_untied_head_survives_export_and_gguf(tiny_llama_hf, tmp_path):
    other = untied(tiny_llama_hf, tmp_path / "other", lambda e: e.flip(0).contiguous())
    lit = convert(other, tmp_path / "lit")
    write_hf(lit, tmp_path / "hf", "")
    expected = AutoModelForCausalLM.from_pretrained(other, dtype=torch.float32).eval()
    assert largest_difference(lit_model(convert(tmp_path / "hf", tmp_path / "again")), expected) <= 1e-4
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["tie_word_embeddings"] is False
    write_gguf(lit, tmp_path / "m.gguf", "f32", "other", "0" * 64)
    _, tensors = read_header(tmp_path / "m.gguf")
    assert "output.weight" in tensors


def test_a_checkpoint_of_other_making_is_tied_by_its_tensors(tiny_llama, tmp_path):
    """LitGPT's own training unties a head and leaves config.json as it was."""
    folder = shutil.copytree(tiny_llama, tmp_path / "changed")
    weights = torch.load(folder / WEIGHTS, weights_only=True)
    torch.save({**weights, "lm_head.weight": weights["lm_head.weight"].clone()}, folder / WEIGHTS)
    assert is_tied(folder)
    torch.save({**weights, "lm_head.weight": weights["lm_head.weight"] * 2}, folder / WEIGHTS)
    assert not is_tied(folder)
    ids = torch.tensor([[5, 70, 12]])
    with torch.no_grad():
        assert torch.allclose(load_model(folder)(ids), 2 * load_model(tiny_llama)(ids), atol=1e-5)
        write_merged(folder, {}, LoRAArgs(r=0), copied(folder, tmp_path / "merged"))
        assert torch.allclose(load_model(tmp_path / "merged")(ids), 2 * load_model(tiny_llama)(ids), atol=1e-5)
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["tie_word_embeddings"] is False


def copied(checkpoint: Path, folder: Path) -> Path:
    return shutil.copytree(checkpoint, folder, ignore=shutil.ignore_patterns(WEIGHTS))


def test_weights_beyond_float16s_range_are_refused_with_the_cure(tiny_llama_hf, tmp_path):
    folder = shutil.copytree(tiny_llama_hf, tmp_path / "large")
    edit_weights(folder, lambda w: w["model.norm.weight"].mul_(1e6))
    with pytest.raises(UserError, match=r"ln_f.weight has values that are not finite(.|\n)*--dtype bfloat16"):
        convert(folder, tmp_path / "half", torch.float16)
    convert(folder, tmp_path / "lit")


def test_sharded_and_pickled_weights_give_the_same_file(tiny_qwen2_hf, tmp_path):
    expected = load_weights(convert(tiny_qwen2_hf, tmp_path / "whole"))
    weights = load_file(tiny_qwen2_hf / "model.safetensors")
    names = sorted(weights, key=lambda name: name[::-1])  # query, key and value of a layer in different shards

    sharded = shutil.copytree(tiny_qwen2_hf, tmp_path / "sharded", ignore=shutil.ignore_patterns("*.safetensors"))
    shards = {f"model-0000{i + 1}-of-00003.safetensors": names[i::3] for i in range(3)}
    for file, part in shards.items():
        save_file({name: weights[name] for name in part}, sharded / file)
    index = {"weight_map": {name: file for file, part in shards.items() for name in part}}
    (sharded / "model.safetensors.index.json").write_text(json.dumps(index))

    pickled = shutil.copytree(tiny_qwen2_hf, tmp_path / "pickled", ignore=shutil.ignore_patterns("*.safetensors"))
    stacked = torch.stack([weights["model.norm.weight"]] * 2)
    torch.save({**weights, "model.norm.weight": stacked[1]}, pickled / "pytorch_model.bin")  # a view of more

    for source in (sharded, pickled):
        got = load_weights(convert(source, tmp_path / f"{source.name}-lit"))
        assert got.keys() == expected.keys()
        assert all(torch.equal(got[name], expected[name]) for name in expected)
    assert (tmp_path / "pickled-lit" / WEIGHTS).stat().st_size == (tmp_path / "whole" / WEIGHTS).stat().st_size


def test_dtype_is_kept_or_converted_and_named_in_config_json(tiny_llama_hf, tmp_path):
    half = shutil.copytree(tiny_llama_hf, tmp_path / "half")
    weights = load_file(tiny_llama_hf / "model.safetensors")
    save_file({name: tensor.bfloat16() for name, tensor in weights.items()}, half / "model.safetensors")
    for dtype, expected in ((None, torch.bfloat16), (torch.float16, torch.float16)):
        lit = convert(half, tmp_path / f"lit-{expected}".replace("torch.", ""), dtype)
        assert {tensor.dtype for tensor in load_weights(lit).values()} == {expected}
        assert json.loads((lit / "config.json").read_text())["torch_dtype"] == str(expected).removeprefix("torch.")


PEAK = """
import sys
from pathlib import Path
import psutil, torch
from workflows.conversion import write_checkpoint
from workflows.gguf_header import read_header
from workflows.hf_export import write_hf
from workflows.hf_reader import read_hf_dir
from workflows.merge import write_merged
from workflows.ollama.gguf_writer import write_gguf
from workflows.training.model import LoRAArgs, load_model
from workflows.measure import PeakMemory, tree_bytes
source, tiny, output = map(Path, sys.argv[1:])
(output / "warm").mkdir(parents=True)
write_checkpoint(read_hf_dir(tiny), output / "warm", "tiny")  # whatever is imported lazily is imported now
for dtype in (torch.bfloat16, torch.float32):
    (output / str(dtype)).mkdir()
    before = tree_bytes(psutil.Process())
    with PeakMemory() as peak:
        write_checkpoint(read_hf_dir(source), output / str(dtype), "random", dtype)
    print(peak.bytes - before)
"""


@pytest.mark.long
@pytest.mark.skipif(torch.cuda.is_available(), reason="the meter counts the GPU's memory where there is one")
def test_peak_memory_is_a_few_tensors_not_the_model(tiny_llama_hf, tmp_path):
    """Three times the largest tensor (8 or 17 MB) plus 32 MB is less than the model, so holding it would not pass."""
    config = {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 8}
    big = make_llama(tmp_path / "big", num_key_value_heads=8, tied=True, vocab_size=8192, **config)
    sizes = [tensor.numel() for tensor in load_file(big / "model.safetensors").values()]

    command = [sys.executable, "-c", PEAK, str(big), str(tiny_llama_hf), str(tmp_path / "out")]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    peaks = [int(line) for line in result.stdout.split()]
    for peak, itemsize in zip(peaks, (2, 4), strict=True):
        bound = 3 * max(sizes) * itemsize + (32 << 20)
        assert bound < sum(sizes) * itemsize
        assert peak <= bound, f"{peak:,} bytes at {itemsize} bytes a weight, largest tensor {max(sizes):,} weights"


def break_config(hf_dir: Path, **changes: object) -> None:
    file = hf_dir / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def edit_weights(hf_dir: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    weights = load_file(hf_dir / "model.safetensors")
    edit(weights)
    save_file(weights, hf_dir / "model.safetensors", metadata={"format": "pt"})


def shorten(file: Path, size: int) -> None:
    file.write_bytes(file.read_bytes()[:size])


class Payload:
    """What a malicious `.bin` carries: a call that runs when the pickle is read."""

    def __reduce__(self):
        return (Path.touch, (Path("payload-ran"),))


BAD = {
    "unknown architecture": (
        lambda d: break_config(d, architectures=["MambaForCausalLM"]),
        r"MambaForCausalLM is not supported. Supported are LlamaForCausalLM and Qwen2ForCausalLM",
    ),
    "a reward model": (lambda d: break_config(d, architectures=["LlamaForSequenceClassification"]), "not supported"),
    "unsupported rotary scaling": (
        lambda d: break_config(d, rope_parameters={"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4}),
        "yarn",
    ),
    "several unsupported settings": (
        lambda d: break_config(d, hidden_act="gelu", attention_bias=True, mlp_bias=True),
        r"3 problems:(.|\n)*gelu(.|\n)*attention_bias(.|\n)*mlp_bias",
    ),
    "quantized weights": (lambda d: break_config(d, quantization_config={"bits": 4}), "quantized"),
    "wrong size": (
        lambda d: break_config(d, intermediate_size=128),
        r"intermediate_size is 128 in the configuration, but 96 by .*(.|\n)*fc_1.weight has shape \(96, 48\), expected",
    ),
    "too many layers": (
        lambda d: break_config(d, num_hidden_layers=3),
        r"num_hidden_layers is 3 in the configuration, but the weights have 2(.|\n)*transformer.h.2.*is missing",
    ),
    "too few layers": (
        lambda d: break_config(d, num_hidden_layers=1),
        r"num_hidden_layers is 1 in the configuration, but the weights have 2(.|\n)*h.1.* has no place in a model",
    ),
    "another vocabulary": (
        lambda d: break_config(d, vocab_size=400),
        r"vocab_size is 400 in the configuration, but \d+ by",
    ),
    "another width": (lambda d: break_config(d, hidden_size=96), r"hidden_size is 96 in the configuration, but 48 by"),
    "another head size": (
        lambda d: break_config(d, head_dim=24),
        r"num_attention_heads \* head_dim is 96 in the configuration, but 48 by(.|\n)*_value_heads \* head_dim is 48",
    ),
    "fewer heads": (
        lambda d: break_config(d, num_key_value_heads=4),
        r"num_key_value_heads \* head_dim is 48 in the configuration, but 24 by",
    ),
    "biases that config.json denies": (
        lambda d: edit_weights(d, lambda w: w.update({"model.layers.0.self_attn.q_proj.bias": torch.ones(48)})),
        r"the weights have biases \(model.layers.0.self_attn.q_proj.bias, …\)",
    ),
    "no head": (
        lambda d: break_config(d, tie_word_embeddings=False),
        r"the weights have no lm_head.weight; if this model is tied, set tie_word_embeddings(.|\n)*weight is missing",
    ),
    "a flag that is none": (
        lambda d: break_config(d, tie_word_embeddings="no"),
        "tie_word_embeddings is 'no', not true or false",
    ),
    "a weight that is no number": (
        lambda d: edit_weights(d, lambda w: w["model.norm.weight"].fill_(float("nan"))),
        "transformer.ln_f.weight has values that are not finite",
    ),
    "config cut short": (lambda d: shorten(d / "config.json", 40), r"config.json, line \d+: not valid JSON"),
    "no config": (lambda d: (d / "config.json").unlink(), "config.json does not exist"),
    "no tokenizer": (lambda d: (d / "tokenizer.json").unlink(), "no tokenizer.json"),
    "tokenizer cut short": (lambda d: shorten(d / "tokenizer.json", 900), "not a readable tokenizer"),
    "no weights": (lambda d: (d / "model.safetensors").unlink(), "has no weights"),
    "empty weights": (lambda d: shorten(d / "model.safetensors", 0), "cut short"),
    "header cut": (lambda d: shorten(d / "model.safetensors", 100), "cut short"),
    "data cut": (lambda d: shorten(d / "model.safetensors", 100_000), "cut short"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_directories_are_refused_before_weights_are_written(case, tiny_llama_hf, tmp_path):
    spoil, message = BAD[case]
    hf_dir = shutil.copytree(tiny_llama_hf, tmp_path / "bad")
    spoil(hf_dir)
    with pytest.raises(UserError, match=message):
        convert(hf_dir, tmp_path / "lit")
    assert case == "a weight that is no number" or not list(tmp_path.glob("lit/lit_model*"))


def test_a_missing_shard_is_named(tiny_llama_hf, tmp_path):
    hf_dir = shutil.copytree(tiny_llama_hf, tmp_path / "bad")
    index = {"weight_map": {"a": "model-1.safetensors", "b": "../model-2.safetensors"}}
    (hf_dir / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"lacks model-2.safetensors, model-1.safetensors|lacks model-1"):
        read_hf_dir(hf_dir)


@pytest.mark.parametrize("kind", ["payload", "cut short", "not a dictionary"])
def test_a_pickle_that_is_no_file_of_tensors_is_refused(kind, tiny_llama_hf, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    hf_dir = shutil.copytree(tiny_llama_hf, tmp_path / "bad", ignore=shutil.ignore_patterns("*.safetensors"))
    file = hf_dir / "pytorch_model.bin"
    if kind == "payload":
        torch.save({"model.norm.weight": torch.ones(48), "more": Payload()}, file)
    elif kind == "cut short":
        torch.save(load_file(tiny_llama_hf / "model.safetensors"), file)
        shorten(file, file.stat().st_size // 2)
    else:
        torch.save([torch.ones(3)], file)
    with pytest.raises(UserError, match="safetensors"):
        read_hf_dir(hf_dir)
    assert not Path("payload-ran").exists()

    with file.open("wb") as f:  # an old-style pickle, not even a zip file
        pickle.dump({"w": Payload()}, f)
    with pytest.raises(UserError, match="refused"):
        read_hf_dir(hf_dir)
    assert not Path("payload-ran").exists()
