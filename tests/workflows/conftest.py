"""One private Ollama server for all tests that need a real one, and tiny models whose answers can be compared."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

from tests.conftest import convert, make_llama
from tests.workflows.alignment import TRAIN, pair, question, write
from workflows import reward
from workflows.ollama.install import install, is_supported
from workflows.ollama.server import OllamaServer


@pytest.fixture(autouse=True)
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that hangs fails one test in two minutes, not in the half hour that a user's long answer may take."""
    monkeypatch.setattr("workflows.ollama.client._ANSWER_SECONDS", 120.0)


@pytest.fixture(scope="session")
def ollama_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OllamaServer]:
    """A running server of ours; skips where the private copy cannot run."""
    if not is_supported():
        pytest.skip("the private Ollama is for Linux on x86-64")
    with OllamaServer.start(install(), tmp_path_factory.mktemp("ollama")) as server:
        yield server


@pytest.fixture
def export_to_it(ollama_server: OllamaServer, monkeypatch: pytest.MonkeyPatch) -> OllamaServer:
    """Let the export step use that server, and not stop it."""

    @contextmanager
    def shared(port: int | None = None) -> Iterator[OllamaServer]:
        yield ollama_server

    monkeypatch.setattr("workflows.export.open_server", shared)
    return ollama_server


def speak_ascii(folder: Path) -> Path:
    """Keep a random model from tokens that are parts of characters: text would not tell which ones it said."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        for token_id in range(tokenizer.get_vocab_size()):
            text = tokenizer.decode([token_id], skip_special_tokens=False)
            if not (text.isascii() and text.isprintable()) or text == "<|endoftext|>":
                model.lm_head.weight[token_id] = 0
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def speaking_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama that speaks ASCII, whose rows fill blocks of 32, as a LitGPT checkpoint directory."""
    folder = tmp_path_factory.mktemp("speaking")
    return convert(speak_ascii(make_llama(folder / "wide", hidden_size=64, intermediate_size=128)), folder / "lit")


@contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """Writing more than `size` bytes into a file fails, as on a full disk."""
    resource = pytest.importorskip("resource", reason="file-size limits are a Unix thing")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.fixture(scope="session")
def hpo_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of prepared data with real questions in `hpo_mcq`."""
    from data_prep.prepare import setup

    directory = tmp_path_factory.mktemp("data")
    setup("hpo", out_dir=directory)
    return directory


@pytest.fixture(scope="session")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Made-up preferences."""
    train, validation, test = ([pair(n) for n in numbers] for numbers in (range(20), range(50, 56), range(60, 68)))
    return write(tmp_path_factory.mktemp("data") / "pairs", train=train, validation=validation, test=test)


@pytest.fixture(scope="session")
def questions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Made-up questions with answers."""
    train, validation, test = ([question(n) for n in numbers] for numbers in (range(16), range(50, 54), range(60, 66)))
    return write(tmp_path_factory.mktemp("data") / "questions", train=train, validation=validation, test=test)


@pytest.fixture(scope="session")
def judge(tiny_llama: Path, pairs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A reward model that has learned what a chosen answer is like."""
    out_dir = tmp_path_factory.mktemp("reward")
    reward.setup(tiny_llama, pairs, out_dir, train=replace(TRAIN, max_steps=12), precision="32-true", lora_r=4)
    return out_dir / "final"
