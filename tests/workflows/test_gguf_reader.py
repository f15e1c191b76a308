"""A GGUF file becomes a checkpoint with llama.cpp's token ids and transformers' logits; a cut file is refused."""

import json
import random
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Quant
from litgpt import GPT
from safetensors.torch import load_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM

from tests.conftest import CHATML, TEXT, make_llama, make_qwen2
from workflows.checkpoint import load_config, load_weights
from workflows.conversion import write_checkpoint
from workflows.download import embedded_gguf
from workflows.errors import UserError
from workflows.gguf_reader import read_gguf

GGUF_NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5


def gguf_name(name: str) -> str:
    if name in GGUF_NAMES:
        return GGUF_NAMES[name]
    _, _, layer, *part, kind = name.split(".")
    return f"blk.{layer}.{GGUF_NAMES['.'.join(part)]}.{kind}"


def quantized(values: np.ndarray, quant: Quant) -> np.ndarray:
    """The bytes of a matrix. The library cannot write k-quants: those get random blocks with modest scales."""
    if values.ndim == 1 or quant == Quant.F32:
        return values
    if quant not in (Quant.Q4_K, Quant.Q6_K):
        return gguf.quants.quantize(values, quant)
    block, size = gguf.GGML_QUANT_SIZES[quant]
    generator = np.random.default_rng(values.size)
    blocks = generator.integers(0, 256, (values.shape[0], values.shape[1] // block, size), dtype=np.uint8)
    scale = np.array([0.002], dtype=np.float16).view(np.uint8)
    if quant == Quant.Q4_K:  # the two 16-bit scales come first
        blocks[..., 0:4] = np.tile(scale, 2)
    else:  # Q6_K: one 16-bit scale at the end, after 16 signed 8-bit ones
        blocks[..., -2:] = scale // 4
        blocks[..., -18:-2] //= 16
    return blocks.reshape(values.shape[0], -1)


def write_gguf(
    hf_dir: Path,
    file: Path,
    quant: Quant = Quant.F32,
    pre: str = "llama-bpe",
    edit: Callable[[gguf.GGUFWriter, dict[str, np.ndarray]], None] | None = None,
) -> Path:
    """A tiny Hugging Face model as GGUF, in the way of llama.cpp's own converter."""
    config = json.loads((hf_dir / "config.json").read_text())
    tokenizer = json.loads((hf_dir / "tokenizer.json").read_text())
    arch = config["model_type"]
    writer = gguf.GGUFWriter(file, arch)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])

    specials = {token["content"] for token in tokenizer["added_tokens"]}
    vocab = tokenizer["model"]["vocab"] | {token["content"]: token["id"] for token in tokenizer["added_tokens"]}
    tokens = sorted(vocab, key=vocab.__getitem__)
    rows = config["vocab_size"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list([*tokens, *(f"[PAD{i}]" for i in range(len(tokens), rows))])
    types = [CONTROL if token in specials else NORMAL for token in tokens]
    writer.add_token_types([*types, *[UNUSED] * (rows - len(tokens))])
    writer.add_token_merges([" ".join(pair) for pair in tokenizer["model"]["merges"]])
    writer.add_bos_token_id(vocab["<|im_start|>"])
    writer.add_eos_token_id(vocab["<|im_end|>"])
    writer.add_chat_template(CHATML)

    weights = {name: tensor.float().numpy() for name, tensor in load_file(hf_dir / "model.safetensors").items()}
    if edit is not None:
        edit(writer, weights)
    for name, values in weights.items():
        if arch == "llama" and (".q_proj." in name or ".k_proj." in name):
            heads = config["num_attention_heads" if ".q_proj." in name else "num_key_value_heads"]
            halves = values.reshape(heads, 2, values.shape[0] // heads // 2, -1)
            values = halves.swapaxes(1, 2).reshape(values.shape)
        data = np.ascontiguousarray(quantized(values, quant))
        writer.add_tensor(
            gguf_name(name) if "model." in name or "lm_head" in name else name,
            data,
            raw_dtype=Quant.F32 if values.ndim == 1 else quant,
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


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


def lines(specials: list[str], count: int = 1000) -> list[str]:
    """Text of many kinds: prose, unicode, digits, code, whitespace, and special tokens written inside it."""
    rng = random.Random(0)
    words = TEXT.split() + [
        "the",
        "don't",
        "WE'LL",
        "it's",
        "I'M",
        "x_1",
        "naïve",
        "co-operate",
        "e.g.",
        "3.14",
        "10,000",
        "2024-11-24",
        "O'Neil",
    ]
    blocks = [(0x20, 0x7E), (0xA1, 0x24F), (0x370, 0x3FF), (0x400, 0x4FF), (0x5D0, 0x5EA), (0x620, 0x64A)]
    blocks += [(0x905, 0x939), (0xE01, 0xE3A), (0x2010, 0x2027), (0x2150, 0x218B), (0x3041, 0x30FE), (0x4E00, 0x9FA5)]
    blocks += [(0xAC00, 0xD7A3), (0xFF10, 0xFF5A), (0x1F300, 0x1F64F), (0x1D400, 0x1D454)]
    spaces = [" ", "  ", "   ", "\t", "\n", "\n\n", "\r\n", " \n ", "\u00a0", "\u3000", "\u200b", "\v", " \t "]
    code = ["def f(x):\n    return x**2  # π\n", "for (int i=0;i<10;++i){a[i]+=1;}", '{"a": [1, 2.5e-3, null]}\n']
    code += ["<div class='x'>&amp;</div>", "SELECT * FROM t WHERE a<>'b';\n\n\n", "\t\tif __name__ == '__main__':"]

    def piece() -> str:
        kind = rng.randrange(7)
        if kind == 0:
            return " ".join(rng.choices(words, k=rng.randint(1, 8)))
        if kind == 1:
            first, last = rng.choice(blocks)
            return "".join(chr(rng.randint(first, last)) for _ in range(rng.randint(1, 6)))
        if kind == 2:
            return str(rng.randrange(10 ** rng.randint(1, 12)))
        if kind == 3:
            return rng.choice(code)
        if kind == 4:
            return "".join(rng.choices(spaces, k=rng.randint(1, 4)))
        if kind == 5:
            return rng.choice(specials)
        return rng.choice(["e\u0301", "👩‍🔬", "🇫🇷", "'S", "’t", "…", "--", "!!!\n", "¿", "ﬁ", "½", "²", "Ⅷ", "٣", "१२"])

    return ["".join(rng.choices(["", " "])[0] + piece() for _ in range(rng.randint(1, 12))) for _ in range(count)]


@contextmanager
def llama_cpp(file: Path) -> Iterator[Callable[[str], list[int]]]:
    """llama.cpp's own tokenizer, asked through the server that its Python package starts on the loopback."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = str(file)
    params.n_ctx, params.n_parallel, params.warmup, params.cpuparams.n_threads = 64, 1, False, 1
    server = xllamacpp.Server(params)

    def tokenize(text: str) -> list[int]:
        body = json.dumps({"content": text, "add_special": False, "parse_special": True}).encode()
        request = urllib.request.Request(
            server.listening_address + "/tokenize", data=body, headers={"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request) as response:
            return json.load(response)["tokens"]

    yield tokenize


@pytest.mark.checkpoint
def test_embedded_token_ids_equal_llama_cpps(embedded_checkpoint):
    tokenizer = Tokenizer.from_file(str(embedded_checkpoint / "tokenizer.json"))
    texts = lines(["<|im_start|>", "<|im_end|>", "<|endoftext|>", "<repo_name>", "<|im_start|>user\n", "<|im_end"])
    with llama_cpp(embedded_gguf()) as expected:
        differing = [text for text in texts if tokenizer.encode(text).ids != expected(text)]
    assert len(texts) == 1000
    assert not differing, differing[:3]
    for text in texts[:200]:
        assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text


@pytest.mark.parametrize("pre", ["llama-bpe", "qwen2", "deepseek-r1-qwen", "smollm"])
def test_token_ids_equal_llama_cpps_for_each_pre_tokenizer(pre, tmp_path):
    """A vocabulary of our own under each of llama.cpp's pre-tokenizers; one token can't be reached by merges."""
    make = make_qwen2 if "qwen" in pre else make_llama
    hf_dir = make(tmp_path / "tiny", vocab_size=1500)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r" ?\p{L}+|\p{N}{1,3}|\s+|[^\s\p{L}\p{N}]+"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1300,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
    )
    tokenizer.train_from_iterator(lines(["<"], 400), trainer)
    contents = json.loads(tokenizer.to_str())
    contents["model"]["vocab"]["ĠTachypnea."[:-1] + "zzz"] = len(contents["model"]["vocab"])
    (hf_dir / "tokenizer.json").write_text(json.dumps(contents))
    file = write_gguf(hf_dir, tmp_path / "tiny.gguf", pre=pre)

    ours = Tokenizer.from_str(read_gguf(file).tokenizer_json)
    texts = [*lines(["<|im_start|>", "<|im_end|>\n"]), "a Tachypneazzz b"]
    # Qwen2's own tokenizer composes accents first (NFC); llama.cpp leaves that out.
    texts = [text for text in texts if "qwen" not in pre or ours.normalizer.normalize_str(text) == text]
    assert len(texts) > 700
    with llama_cpp(file) as expected:
        differing = [text for text in texts if ours.encode(text, add_special_tokens=False).ids != expected(text)]
    assert not differing, differing[:3]


def test_bos_is_added_to_plain_text_where_llama_cpp_adds_it(tmp_path):
    hf_dir = make_llama(tmp_path / "tiny")
    by_default = Tokenizer.from_str(read_gguf(write_gguf(hf_dir, tmp_path / "a.gguf")).tokenizer_json)
    bos = by_default.token_to_id("<|im_start|>")
    assert by_default.encode("hello").ids[0] == bos
    off = write_gguf(hf_dir, tmp_path / "b.gguf", edit=lambda writer, _: writer.add_add_bos_token(False))
    assert Tokenizer.from_str(read_gguf(off).tokenizer_json).encode("hello").ids[0] != bos


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
