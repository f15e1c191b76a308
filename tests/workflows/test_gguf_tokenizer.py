"""The tokenizer built from a GGUF file gives llama.cpp's token ids, for every pre-tokenizer that we know."""

import json
import random
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from tests.conftest import TEXT, make_llama, make_qwen2
from tests.workflows.gguf_files import write_gguf
from workflows.download import embedded_gguf
from workflows.gguf_reader import read_gguf


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
