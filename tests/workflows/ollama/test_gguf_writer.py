"""The GGUF we write, read back by the gguf library and by transformers."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader
from gguf.quants import dequantize
from transformers import AutoModelForCausalLM, LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from tests.conftest import convert, make_llama, make_qwen2
from tests.workflows.conftest import file_size_limit
from workflows.checkpoint import load_config
from workflows.errors import UserError
from workflows.hf_export import hf_tensors
from workflows.measure import PeakMemory
from workflows.ollama.gguf_writer import is_gguf_of, rope_factors, write_gguf
from workflows.ollama.tokenizer_fields import pre_tokenizer_name, read_tokenizer

SHA = "0" * 64
IDS = torch.tensor([[5, 70, 12, 200, 33, 9, 141, 7]])


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama whose rows fill q8_0's blocks of 32."""
    folder = tmp_path_factory.mktemp("wide")
    return convert(make_llama(folder / "wide", hidden_size=64, intermediate_size=128), folder / "checkpoints")


def logits_of_gguf(file: Path) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name)
    with torch.no_grad():
        return model(IDS).logits


def logits_of_hf(folder: Path) -> torch.Tensor:
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(folder)(IDS).logits


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_float32_file_gives_the_same_logits_in_transformers(family: str, tmp_path: Path, request) -> None:
    checkpoint = request.getfixturevalue(f"tiny_{family}")
    write_gguf(checkpoint, tmp_path / "m.gguf", "f32", "tiny", SHA)
    expected = logits_of_hf(request.getfixturevalue(f"tiny_{family}_hf"))
    assert (logits_of_gguf(tmp_path / "m.gguf") - expected).abs().max() <= 1e-5


@pytest.mark.parametrize(("kind", "tolerance"), [("f16", 1e-3), ("bf16", 8e-3), ("q8_0", 1e-2)])
def test_matrices_are_within_the_types_tolerance_and_vectors_exact(kind, tolerance, wide: Path, tmp_path: Path) -> None:
    write_gguf(wide, tmp_path / "m.gguf", kind, "wide", SHA)
    tensors = {t.name: t for t in GGUFReader(tmp_path / "m.gguf").tensors}
    assert "output.weight" not in tensors  # tied: the embedding serves as head
    ours, _ = hf_tensors(wide)
    embedding = tensors["token_embd.weight"]
    assert embedding.tensor_type.name == kind.upper()
    expected = ours["model.embed_tokens.weight"].numpy()
    got = dequantize(embedding.data, embedding.tensor_type)
    assert np.abs(got - expected).max() <= tolerance * np.abs(expected).max()
    norm = tensors["blk.1.attn_norm.weight"]
    assert norm.tensor_type == GGMLQuantizationType.F32
    assert np.array_equal(norm.data, ours["model.layers.1.input_layernorm.weight"].numpy())


def test_q8_0_logits_stay_close(wide: Path, tmp_path: Path) -> None:
    write_gguf(wide, tmp_path / "q8.gguf", "q8_0", "wide", SHA)
    write_gguf(wide, tmp_path / "f32.gguf", "f32", "wide", SHA)
    exact, rough = logits_of_gguf(tmp_path / "f32.gguf"), logits_of_gguf(tmp_path / "q8.gguf")
    relative = float((exact - rough).square().mean().sqrt() / exact.square().mean().sqrt())
    assert 0 < relative < 0.05  # half a percent in each matrix, through two layers


def test_rows_that_do_not_fill_a_block_fall_back_to_f16(tiny_llama: Path, tmp_path: Path) -> None:
    write_gguf(tiny_llama, tmp_path / "m.gguf", "q8_0", "tiny", SHA)
    types = {t.name: t.tensor_type.name for t in GGUFReader(tmp_path / "m.gguf").tensors}
    assert types["blk.0.attn_q.weight"] == "F16"  # 48 columns
    assert types["blk.0.ffn_down.weight"] == "Q8_0"  # 96


def test_an_untied_head_and_biases_are_written(tiny_qwen2: Path, tmp_path: Path) -> None:
    write_gguf(tiny_qwen2, tmp_path / "m.gguf", "f32", "tiny", SHA)
    reader = GGUFReader(tmp_path / "m.gguf")
    tensors = {t.name: t for t in reader.tensors}
    ours, tied = hf_tensors(tiny_qwen2)
    assert not tied and np.array_equal(tensors["output.weight"].data, ours["lm_head.weight"].numpy())
    bias = ours["model.layers.0.self_attn.q_proj.bias"].numpy()
    assert np.array_equal(tensors["blk.0.attn_q.bias"].data, bias)  # Qwen2 rotates halves as we do: no permutation


def test_header_holds_tokenizer_template_and_ids(tiny_llama: Path, tmp_path: Path) -> None:
    write_gguf(tiny_llama, tmp_path / "m.gguf", "f16", "tiny", SHA, "apache-2.0")
    fields = {name: field.contents() for name, field in GGUFReader(tmp_path / "m.gguf").fields.items()}
    vocab = json.loads((tiny_llama / "tokenizer.json").read_text())["model"]["vocab"]
    tokens = fields["tokenizer.ggml.tokens"]
    assert all(tokens[token_id] == text for text, token_id in vocab.items())
    assert fields["tokenizer.ggml.pre"] == "gpt-2"
    assert fields["tokenizer.chat_template"] == (tiny_llama / "chat_template.jinja").read_text()
    assert tokens[fields["tokenizer.ggml.eos_token_id"]] == "<|im_end|>"
    assert fields["tokenizer.ggml.token_type"][tokens.index("<|im_start|>")] == 3
    assert fields["tokenizer.ggml.add_bos_token"] is False
    assert fields["general.license"] == "apache-2.0"
    assert fields["llama.rope.freq_base"] == load_config(tiny_llama).rope_base


def test_llama3_rope_factors_are_those_of_transformers(tmp_path: Path) -> None:
    scaling = {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    folder = make_llama(tmp_path / "scaled", rope_parameters=scaling)
    checkpoint = convert(folder, tmp_path / "checkpoints")
    config = LlamaConfig.from_pretrained(folder)
    inv_freq, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    dims = torch.arange(0, config.head_dim, 2) / config.head_dim
    plain = 1.0 / 500000.0**dims
    factors = rope_factors(load_config(checkpoint))
    assert np.allclose(factors, (plain / inv_freq).numpy(), rtol=1e-5)
    assert len(set(factors.tolist())) > 2  # all three bands occur

    write_gguf(checkpoint, tmp_path / "m.gguf", "f32", "scaled", SHA)
    tensors = {t.name: t for t in GGUFReader(tmp_path / "m.gguf").tensors}
    assert np.array_equal(tensors["rope_freqs.weight"].data, factors)


def test_a_finished_file_is_known_again_and_a_cut_one_is_not(tiny_llama: Path, tmp_path: Path) -> None:
    file = tmp_path / "m.gguf"
    assert not is_gguf_of(file, SHA, "f16")
    write_gguf(tiny_llama, file, "f16", "tiny", SHA)
    assert is_gguf_of(file, SHA, "f16")
    assert not is_gguf_of(file, "1" * 64, "f16")
    assert not is_gguf_of(file, SHA, "q8_0")
    whole = file.read_bytes()
    for cut in (0, 10, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:cut])
        assert not is_gguf_of(file, SHA, "f16"), cut


def test_a_weight_beyond_float16_is_refused_and_nothing_is_left(tiny_llama: Path, tmp_path: Path) -> None:
    checkpoint = shutil.copytree(tiny_llama, tmp_path / "big")
    weights = torch.load(checkpoint / "lit_model.pth", weights_only=True)
    weights["transformer.h.0.mlp.fc_1.weight"][0, 0] = 1e5
    torch.save(weights, checkpoint / "lit_model.pth")
    with pytest.raises(UserError, match="beyond float16's range"):
        write_gguf(checkpoint, tmp_path / "out" / "m.gguf", "f16", "big", SHA)
    assert list((tmp_path / "out").iterdir()) == []
    write_gguf(checkpoint, tmp_path / "out" / "m.gguf", "bf16", "big", SHA)


def test_a_full_disk_leaves_the_old_file_and_one_message(tiny_llama: Path, tmp_path: Path) -> None:
    file = tmp_path / "m.gguf"
    file.write_bytes(b"what was there")
    with file_size_limit(60_000), pytest.raises(UserError, match=r"Could not write .*m.gguf"):
        write_gguf(tiny_llama, file, "f32", "m", SHA)
    assert file.read_bytes() == b"what was there"
    assert [p.name for p in tmp_path.iterdir()] == ["m.gguf"]


@pytest.mark.checkpoint
def test_memory_stays_at_a_few_tensors(embedded_checkpoint: Path, tmp_path: Path) -> None:
    largest = max(t.nbytes for t in hf_tensors(embedded_checkpoint)[0].values())
    with PeakMemory() as before:
        pass
    with PeakMemory() as peak:
        write_gguf(embedded_checkpoint, tmp_path / "m.gguf", "q8_0", "smollm2", SHA)
    assert peak.bytes - before.bytes <= 3 * largest + 60_000_000  # the constant: 49,152 tokens and their merges


SPLITS = {
    "llama-bpe": (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
        r"|\s+(?!\S)|\s+",
        True,
    ),
    "qwen2": (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
        r"|\s+(?!\S)|\s+",
        False,
    ),
}


def split_definition(pattern: str, ignore_merges: bool) -> dict:
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    return {
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
        "model": {"type": "BPE", "byte_fallback": False, "ignore_merges": ignore_merges},
    }


@pytest.mark.parametrize("name", SPLITS)
def test_pre_tokenizers_are_recognised_by_their_definition(name: str) -> None:
    assert pre_tokenizer_name(split_definition(*SPLITS[name])) == name


def test_unknown_tokenizers_are_refused(tiny_llama: Path, tmp_path: Path) -> None:
    pattern, ignore_merges = SPLITS["llama-bpe"]
    other = [
        split_definition(pattern, not ignore_merges),
        split_definition(r"\w+", False),
        {**split_definition(pattern, ignore_merges), "normalizer": {"type": "Lowercase"}},
        {"model": {"type": "BPE", "byte_fallback": True}, "pre_tokenizer": None},
        {"model": {"type": "WordPiece"}, "pre_tokenizer": {"type": "BertPreTokenizer"}},
    ]
    for definition in other:
        with pytest.raises(ValueError, match=r"llama.cpp|byte-level"):
            pre_tokenizer_name(definition)

    tokenizer = json.loads((tiny_llama / "tokenizer.json").read_text())
    file = tmp_path / "tokenizer.json"
    for broken, message in ((tokenizer | {"model": {"type": "BPE"}}, "not a complete"), ({}, "not a complete")):
        file.write_text(json.dumps(broken))
        with pytest.raises(UserError, match=message):
            read_tokenizer(file, 400)
    with pytest.raises(UserError, match="do not belong together"):
        read_tokenizer(tiny_llama / "tokenizer.json", 10)


def test_qwen2_with_a_padded_vocabulary(tmp_path: Path) -> None:
    folder = make_qwen2(tmp_path / "padded", vocab_size=400)
    checkpoint = convert(folder, tmp_path / "checkpoints")
    write_gguf(checkpoint, tmp_path / "m.gguf", "f32", "padded", SHA)
    fields = GGUFReader(tmp_path / "m.gguf").fields
    tokens, types = (fields[f"tokenizer.ggml.{key}"].contents() for key in ("tokens", "token_type"))
    assert len(tokens) == 400 and tokens[399] == "[PAD399]" and types[399] == 5
    assert (logits_of_gguf(tmp_path / "m.gguf") - logits_of_hf(folder)).abs().max() <= 1e-5
