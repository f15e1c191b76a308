"""Fixtures that several test files share: tiny random models in Hugging Face's form, and the real 135M checkpoint."""

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # as `python -m workflows` does, before torch loads
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if workers := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):  # they share the cores, and so do the commands they start
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // int(workers))))
if (
    os.environ.get("WORKFLOW_TEST_GPU") != "1"
):  # parity is a matter of the CPU's float32; `make test-gpu` tests the rest
    os.environ["CUDA_VISIBLE_DEVICES"] = ""

import hypothesis
import pytest
import torch
from filelock import FileLock
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from tests.children import Child

# The same examples every time, so that results are the same; `--hypothesis-profile=default` looks for new ones.
hypothesis.settings.register_profile("same-examples", derandomize=True)
hypothesis.settings.load_profile("same-examples")

ROOT = Path(__file__).resolve().parent.parent
LONG = ("checkpoint", "ollama", "rough", "long")
EMBEDDED = ROOT / "checkpoints" / "embedded" / "smollm2-135m-instruct"

CHATML = (
    "{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}<|im_start|>system\nYou are a tiny model<|im_end|>\n{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

TEXT = (
    "Which clinical finding does this describe? An abnormally increased rate of breathing. Tachypnea. "
    "The presence of a leiomyoma of the uterus. A reduction of the density of hemoglobin in the blood: anemia.\n"
)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Tests marked slow run only when asked for by `-m slow`; the summary shows them as deselected.

    Where several processes share the tests, a file stays whole for its fixtures' sake (`--dist loadfile`), and those
    that take long come first, so that no process is left with one of them at the end.
    """
    if "slow" not in (config.getoption("-m") or ""):
        slow = [item for item in items if item.get_closest_marker("slow")]
        config.hook.pytest_deselected(items=slow)
        items[:] = [item for item in items if item not in slow]
    if hasattr(config, "workerinput"):
        takes_long = {item.path for item in items for mark in LONG if item.get_closest_marker(mark)}
        items.sort(key=lambda item: item.path not in takes_long)


@pytest.fixture(autouse=True, scope="session")
def project_root() -> None:
    """Relative defaults (`checkpoints/`, `.tools/`) mean the project's own folders, wherever pytest was started."""
    os.chdir(ROOT)


@pytest.fixture(autouse=True, scope="session")
def ctrl_c() -> None:
    """Some tests press Ctrl-C; a job that a shell started in the background would ignore it."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def child() -> Iterator[Child]:
    """A process under limits, in which hostile input may do its worst and a disk may be full."""
    process = Child()
    yield process
    process.stop()


@pytest.fixture(scope="session")
def embedded_checkpoint() -> Path:
    """The real SmolLM2-135M-Instruct (4-bit weights) as a LitGPT checkpoint; made once, then reused."""
    with FileLock(ROOT / "checkpoints" / ".tests.lock"):  # one of several processes makes it
        if not (EMBEDDED / "provenance.json").is_file():
            from workflows.download import setup

            setup()
    return EMBEDDED


@pytest.fixture(scope="session")
def embedded_hf(embedded_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The real checkpoint in Hugging Face's form, as our own export writes it: the reference of several test files."""
    from workflows.hf_export import write_hf

    directory = tmp_path_factory.mktemp("hf") / "smollm2-135m-instruct"
    write_hf(embedded_checkpoint, directory, card="test")
    return directory


def write_tokenizer(directory: Path, vocab_size: int = 384, template: str = CHATML) -> Tokenizer:
    """A small byte-level BPE tokenizer with ChatML's special tokens, in Hugging Face's files."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    specials = [AddedToken(token, special=True) for token in ("<|endoftext|>", "<|im_start|>", "<|im_end|>")]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT] * 4, trainer)
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "chat_template.jinja").write_text(template)
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": None, "eos_token": "<|im_end|>"}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    eos = tokenizer.token_to_id("<|im_end|>")
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": eos}))
    return tokenizer


def _tiny_config(directory: Path) -> dict[str, Any]:
    """Write the tokenizer, and give the fields that both architectures share."""
    tokenizer = write_tokenizer(directory)
    return {
        "vocab_size": tokenizer.get_vocab_size(),
        "hidden_size": 48,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "bos_token_id": None,
        "eos_token_id": tokenizer.token_to_id("<|im_end|>"),
        "initializer_range": 0.2,  # larger than usual, so that a random model has opinions
    }


def make_llama(directory: Path, *, tied: bool = True, seed: int = 0, **config: object) -> Path:
    """A random Llama of about 100,000 parameters in Hugging Face's form."""
    fields = {**_tiny_config(directory), "tie_word_embeddings": tied, **config}
    torch.manual_seed(seed)
    LlamaForCausalLM(LlamaConfig(**fields)).save_pretrained(directory)
    return directory


def make_qwen2(directory: Path, *, tied: bool = False, seed: int = 0, **config: object) -> Path:
    """A random Qwen2 (biases on query, key and value) in Hugging Face's form."""
    fields = {**_tiny_config(directory), "tie_word_embeddings": tied, **config}
    torch.manual_seed(seed)
    model = Qwen2ForCausalLM(Qwen2Config(**fields))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):  # transformers starts them at zero, which would hide a lost bias
            torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def tiny_llama_hf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama with tied embeddings, Hugging Face's form."""
    return make_llama(tmp_path_factory.mktemp("hf") / "tiny-llama")


@pytest.fixture(scope="session")
def tiny_qwen2_hf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Qwen2 with an untied head, Hugging Face's form."""
    return make_qwen2(tmp_path_factory.mktemp("hf") / "tiny-qwen2")


def convert(hf_dir: Path, checkpoints_dir: Path) -> Path:
    """A Hugging Face directory as a LitGPT checkpoint, made by our own download step."""
    from workflows.download import setup

    setup(model=str(hf_dir), checkpoints_dir=checkpoints_dir)
    (found,) = checkpoints_dir.glob(f"*/{hf_dir.name}")
    return found


@pytest.fixture(scope="session")
def tiny_llama(tiny_llama_hf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Llama as a LitGPT checkpoint directory."""
    return convert(tiny_llama_hf, tmp_path_factory.mktemp("checkpoints"))


@pytest.fixture(scope="session")
def tiny_qwen2(tiny_qwen2_hf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Qwen2 as a LitGPT checkpoint directory."""
    return convert(tiny_qwen2_hf, tmp_path_factory.mktemp("checkpoints"))
