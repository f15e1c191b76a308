"""A GGUF file becomes a checkpoint with transformers' logits; a cut file is refused."""

import json
import random
import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Quant
from litgpt import GPT
from transformers import AutoModelForCausalLM

from tests.conftest import make_llama, make_qwen2
from tests.workflows.gguf_files import write_gguf
from workflows.chat_template import ChatTemplate
from workflows.checkpoint import load_config, load_weights
from workflows.conversion import write_checkpoint
from workflows.download import embedded_gguf
from workflows.errors import UserError
from workflows.gguf_reader import read_gguf


def convert(file: Path, output: Path) -> Path:
    output.mkdir()
    write_checkpoint(read_gguf(file), output, file.stem)
    return output


@torch.inference_mode()
def largest_difference(checkpoint_dir: Path, gguf_file: Path) -> float:
    """Between LitGPT on our checkpoint and transformers on the GGUF, which it reads with code of its own."""
    hf = AutoModelForCausalLM.from_pretrained(gguf_file.parent, gguf_file=gguf_file.name, dtype=torch.float32).eval()
    lit = GPT(load_config(checkpoint_dir)).eval()
    lit.load_state_dict(load_weights(checkpoint_dir))
    lit.float()
    ids = torch.randint(0, lit.config.vocab_size, (2, 60), generator=torch.Generator().manual_seed(1))
    return (lit(ids) - hf(ids).logits).abs().max().item()


@pytest.mark.checkpoint
def test_embedded_checkpoint_has_transformers_logits(embedded_checkpoint):
    assert largest_difference(embedded_checkpoint, embedded_gguf()) <= 1e-4
    weights = load_weights(embedded_checkpoint)
    assert weights["lm_head.weight"].data_ptr() == weights["transformer.wte.weight"].data_ptr()


SIZES = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 8, "num_key_value_heads": 4}


@pytest.mark.parametrize("quant", [Quant.F32, Quant.F16, Quant.BF16, Quant.Q8_0, Quant.Q4_1, Quant.Q4_K, Quant.Q6_K])
@pytest.mark.parametrize("make", [make_llama, make_qwen2], ids=["llama", "qwen2"])
def test_logits_equal_transformers(make, quant, tmp_path, monkeypatch):
    monkeypatch.setattr("workflows.gguf_reader._CHUNK", 7 * 256)  # many chunks, whose ends fall inside heads
    hf_dir = make(tmp_path / "tiny", initializer_range=0.05, **SIZES)
    kept = {Quant.F16: torch.float16, Quant.BF16: torch.bfloat16}.get(quant, torch.float32)

    def round_vectors(writer: gguf.GGUFWriter, weights: dict[str, np.ndarray]) -> None:
        """Norms and biases are stored in 32 bits beside 16-bit matrices, but were 16-bit in the model itself."""
        weights |= {n: torch.tensor(v).to(kept).float().numpy() for n, v in weights.items() if v.ndim == 1}

    file = write_gguf(hf_dir, tmp_path / "tiny.gguf", quant, edit=round_vectors)
    checkpoint_dir = convert(file, tmp_path / "lit")
    assert largest_difference(checkpoint_dir, file) <= 1e-4
    assert {tensor.dtype for tensor in load_weights(checkpoint_dir).values()} == {kept}


def test_gguf_and_hugging_face_forms_of_a_model_give_the_same_checkpoint(tmp_path):
    from workflows.hf_reader import read_hf_dir

    for make in (make_llama, make_qwen2):
        for tied in (True, False):
            hf_dir = make(tmp_path / f"{make.__name__}-{tied}", tied=tied)
            (tmp_path / f"{hf_dir.name}-a").mkdir()
            write_checkpoint(read_hf_dir(hf_dir), tmp_path / f"{hf_dir.name}-a", "tiny")
            file = write_gguf(hf_dir, tmp_path / "tiny.gguf")
            from_hf, from_gguf = tmp_path / f"{hf_dir.name}-a", convert(file, tmp_path / f"{hf_dir.name}-b")
            assert load_config(from_hf) == load_config(from_gguf)
            expected, got = load_weights(from_hf), load_weights(from_gguf)
            assert got.keys() == expected.keys()
            assert all(torch.equal(got[name], expected[name]) for name in expected)


def test_the_ends_of_text_and_turn_both_end_an_answer(tmp_path):
    """Llama 3's files name `<|end_of_text|>` as eos and `<|eot_id|>`, which ends each answer, as eot."""
    hf_dir = make_llama(tmp_path / "tiny")
    for eot, stops in (("<|endoftext|>", ["<|endoftext|>", "<|im_end|>"]), ("<|im_end|>", ["<|im_end|>"])):
        token_id = json.loads((hf_dir / "tokenizer.json").read_text())["model"]["vocab"][eot]
        file = write_gguf(hf_dir, tmp_path / "a.gguf", edit=lambda writer, _, i=token_id: writer.add_eot_token_id(i))
        template = ChatTemplate.from_checkpoint(convert(file, tmp_path / f"lit{len(stops)}"))
        assert [template.tokenizer.id_to_token(i) for i in template.stop_ids] == stops


def llama3_factors(factor: float, theta: float, head_dim: int) -> np.ndarray:
    """As transformers computes Llama 3's frequencies: plain ones divided by scaled ones."""
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = {"rope_type": "llama3", "rope_theta": theta, "factor": factor, "low_freq_factor": 1.0}
    rope |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    config = LlamaConfig(head_dim=head_dim, rope_parameters=rope, max_position_embeddings=131072)
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    plain = 1.0 / theta ** (torch.arange(0, head_dim, 2).float() / head_dim)
    return (plain / scaled).numpy().astype(np.float32)


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama3_rotary_scaling_is_recognised_by_its_factors(factor, tmp_path):
    rope = {"rope_type": "default", "rope_theta": 500000.0}
    hf_dir = make_llama(tmp_path / "tiny", rope_parameters=rope, head_dim=64)

    def add_factors(writer: gguf.GGUFWriter, weights: dict[str, np.ndarray]) -> None:
        writer.add_key_length(64)
        weights["rope_freqs.weight"] = llama3_factors(factor, 500000.0, 64)

    source = read_gguf(write_gguf(hf_dir, tmp_path / "a.gguf", edit=add_factors))
    assert source.config["rope_scaling"] == {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }

    def add_others(writer: gguf.GGUFWriter, weights: dict[str, np.ndarray]) -> None:
        writer.add_key_length(64)
        weights["rope_freqs.weight"] = np.linspace(1, factor, 32, dtype=np.float32)

    with pytest.raises(UserError, match="rope_freqs"):
        read_gguf(write_gguf(hf_dir, tmp_path / "b.gguf", edit=add_others))


def replaced(file: Path, old: bytes, new: bytes) -> Path:
    contents = file.read_bytes()
    assert contents.count(old) == 1 and len(old) == len(new)
    file.write_bytes(contents.replace(old, new))
    return file


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (b"gpt2", b"spm2", "only byte-level BPE"),
        (b"llama-bpe", b"klingon-1", r"pre-tokenizer 'klingon-1' is not supported \(known: smollm, llama-bpe"),
        (b"tokenizer.ggml.merges", b"tokenizer.ggml.mergez", "lacks tokenizer.ggml.merges"),
        (b"llama.block_count", b"llama.block_kount", "lacks the field llama.block_count"),
        (b"token_embd.weight", b"token_embx.weight", "not a language model"),
        (b"blk.1.attn_q.weight", b"blk.1.attn_z.weight", "do not fit config.json"),
    ],
)
def test_unusable_files_are_refused(old, new, message, tiny_llama_hf, tmp_path):
    file = replaced(write_gguf(tiny_llama_hf, tmp_path / "bad.gguf"), old, new)
    with pytest.raises(UserError, match=message):
        convert(file, tmp_path / "lit")
    assert not list(tmp_path.glob("lit/*"))


def test_an_unknown_architecture_is_refused_by_name(tmp_path):
    file = tmp_path / "mamba.gguf"
    writer = gguf.GGUFWriter(file, "mamba")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(UserError, match=r"'mamba' is not supported. Supported: llama, qwen2"):
        read_gguf(file)


def test_a_file_cut_anywhere_is_refused(tiny_llama_hf, tmp_path):
    """In the counts, the names, the tokens, the tensor table and the data: one clear message, nothing written."""
    whole = write_gguf(tiny_llama_hf, tmp_path / "whole.gguf").read_bytes()
    rng = random.Random(0)
    sizes = [0, 3, 4, 8, 20, 24, 100, len(whole) // 2, len(whole) - 1, *rng.sample(range(25, len(whole)), 40)]
    cut = tmp_path / "cut.gguf"
    for size in sizes:
        cut.write_bytes(whole[:size])
        with pytest.raises(UserError, match="cut short or damaged" if size >= 4 else "not a GGUF file"):
            read_gguf(cut)
    with pytest.raises(UserError, match="cannot be read"):
        read_gguf(tmp_path / "absent.gguf")
    cut.write_bytes(b"PK\x03\x04" + whole[4:])
    with pytest.raises(UserError, match="not a GGUF file"):
        read_gguf(cut)


PEAK = """
import sys
from pathlib import Path
import psutil
from workflows.conversion import write_checkpoint
from workflows.gguf_reader import read_gguf
from workflows.measure import PeakMemory, tree_bytes
source, output = read_gguf(Path(sys.argv[1])), Path(sys.argv[2])
before = tree_bytes(psutil.Process())
with PeakMemory() as peak:
    write_checkpoint(source, output, "embedded")
print(peak.bytes - before)
"""


@pytest.mark.slow
@pytest.mark.checkpoint
@pytest.mark.skipif(torch.cuda.is_available(), reason="the meter counts the GPU's memory where there is one")
def test_peak_memory_of_the_embedded_conversion(embedded_checkpoint, tmp_path):
    """Its embedding is 113 MB of 538: three times that plus 64 MB for the tokenizer and imports."""
    (tmp_path / "lit").mkdir()
    command = [sys.executable, "-c", PEAK, str(embedded_gguf()), str(tmp_path / "lit")]
    peak = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1])
    largest = max(tensor.numel() * 4 for tensor in load_weights(embedded_checkpoint).values())
    assert peak <= 3 * largest + (64 << 20), f"{peak:,} bytes"
