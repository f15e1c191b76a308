"""Checkpoints in torch's format from a stranger: damaged, of other contents, or pickles that would run code."""

import io
import pickle
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from hypothesis import strategies as st

from tests.children import Child
from tests.conftest import convert, make_llama
from tests.fuzz.fuzzing import amounts, fuzz, json_values, mutations
from workflows.checkpoint import LORA_WEIGHTS, WEIGHTS, write_hyperparameters
from workflows.errors import UserError
from workflows.hf_reader import read_hf_dir
from workflows.merge import setup as merge
from workflows.training.loop import FitResult
from workflows.training.model import LoRAArgs, load_model
from workflows.training.resume import Checkpoints

pytestmark = pytest.mark.rough

LORA = {"lora_r": 2, "lora_alpha": 4}
IDENTITY = {"seed": 1}


@contextmanager
def like(folder: Path) -> Iterator[Path]:
    """A folder of links to another one's files; the weights are to be written."""
    with tempfile.TemporaryDirectory() as copy:
        for path in folder.iterdir():
            if not path.name.startswith((WEIGHTS, "model.safetensors")):
                (Path(copy) / path.name).symlink_to(path)
        yield Path(copy)


def read_weights(checkpoint: Path, data: bytes) -> None:
    with like(checkpoint) as folder:
        (folder / WEIGHTS).write_bytes(data)
        load_model(folder)


def read_adapters(checkpoint: Path, data: bytes) -> None:
    with like(checkpoint) as folder:
        (folder / LORA_WEIGHTS).write_bytes(data)
        write_hyperparameters(folder, {"checkpoint_dir": str(checkpoint), **LORA})
        merge(folder, out_dir=folder / "merged")


def read_bin(hf_dir: Path, data: bytes) -> None:
    with like(hf_dir) as folder:
        (folder / "pytorch_model.bin").write_bytes(data)
        read_hf_dir(folder)


def checkpoints(folder: Path) -> Checkpoints:
    fabric = L.Fabric(accelerator="cpu", devices=1)
    model = fabric.setup_module(torch.nn.Linear(3, 2))
    optimizer = fabric.setup_optimizers(torch.optim.AdamW(model.parameters()))
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    return Checkpoints(fabric, folder, model, optimizer, dict(model.module.named_parameters()), IDENTITY)


def resume(_: Path, data: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "step-00000001.pth").write_bytes(data)
        checkpoints(Path(folder)).restore("auto")


READERS = {
    "lit_model.pth": read_weights,
    "lit_model.pth.lora": read_adapters,
    "step-1.pth": resume,
    "model.bin": read_bin,
}


def saved(value: Any, legacy: bool = False) -> bytes:
    file = io.BytesIO()
    torch.save(value, file, _use_new_zipfile_serialization=not legacy)
    return file.getvalue()


@pytest.fixture(scope="module")
def hf_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sizes: Any = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    return make_llama(tmp_path_factory.mktemp("hf") / "tiny", **sizes)


@pytest.fixture(scope="module")
def checkpoint(hf_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return convert(hf_dir, tmp_path_factory.mktemp("lit"))


@pytest.fixture(scope="module")
def wholes(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a whole file of each kind holds."""
    model = load_model(checkpoint, LoRAArgs(r=LORA["lora_r"], alpha=LORA["lora_alpha"]))
    adapters = {name: p.detach().clone() for name, p in model.named_parameters() if "lora_" in name}
    folder = tmp_path_factory.mktemp("run")
    checkpoints(folder).save(FitResult(steps=1, seconds=1.0, real_tokens=9, metrics={}).counters())
    (step,) = folder.glob("step-*.pth")
    weights = torch.load(checkpoint / WEIGHTS, weights_only=True)
    return {
        "lit_model.pth": weights,
        "lit_model.pth.lora": {"model": adapters},
        "step-1.pth": torch.load(step, weights_only=True),
        "model.bin": weights,
    }


@pytest.fixture(params=READERS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


def test_whole_files_are_read(kind: str, child: Child, hf_dir: Path, checkpoint: Path, wholes: dict[str, Any]) -> None:
    outcome = child.run(READERS[kind], hf_dir if kind == "model.bin" else checkpoint, saved(wholes[kind]))
    assert outcome.how == "returned", outcome


@amounts
def test_damaged_bytes(
    amount: str, kind: str, child: Child, hf_dir: Path, checkpoint: Path, wholes: dict[str, Any]
) -> None:
    whole = saved(wholes[kind])
    likely = [*range(2500), *range(len(whole) - 2500, len(whole))]

    def check(data: bytes) -> None:
        outcome = child.run(READERS[kind], hf_dir if kind == "model.bin" else checkpoint, data)
        assert outcome.is_graceful, outcome

    fuzz(amount, 25, mutations(whole, likely), check)


def test_a_flipped_bit_anywhere_in_a_checkpoint_to_resume_from(wholes: dict[str, Any], tmp_path: Path) -> None:
    whole = saved(wholes["step-1.pth"])
    there = checkpoints(tmp_path)
    told = set()
    for place in range(0, len(whole), 5):  # some of them in the sizes that torch checks when it reads, not when it maps
        (tmp_path / "step-00000001.pth").write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        try:
            there.restore("auto")
            told.add("resumed")
        except UserError as e:
            told.add(str(e).split("(")[0])
    assert "resumed" in told and len(told) >= 2


odd_tensors = st.sampled_from(
    [
        torch.zeros(()),
        torch.zeros(0),
        torch.zeros(1).expand(1 << 40),
        torch.zeros(1).expand(1 << 20, 1 << 20),
        torch.zeros(3, dtype=torch.int8),
        torch.zeros(3, dtype=torch.complex64),
        torch.zeros(3, dtype=torch.bool),
        torch.full((3,), float("nan")),
        torch.zeros(2, 3).to_sparse(),
        torch.empty(3, device="meta"),
        torch.zeros(2, 3).t(),
    ]
)


def edited(whole: dict[str, Any]) -> st.SearchStrategy[Any]:
    """The contents with other values under some names, at the top or one level down; or something else altogether."""
    value = odd_tensors | json_values | st.just({}) | st.lists(odd_tensors, max_size=2)
    names = st.sampled_from(list(whole)) | st.sampled_from(["model", "x", 1])
    top = st.dictionaries(names, value, min_size=1, max_size=2).map(lambda edits: {**whole, **edits})
    inner = [key for key, old in whole.items() if isinstance(old, dict) and old]
    dropped = st.sampled_from(list(whole)).map(lambda gone: {k: v for k, v in whole.items() if k != gone})
    if not inner:
        return top | dropped | value
    deep = st.sampled_from(inner).flatmap(
        lambda key: st.dictionaries(st.sampled_from(list(whole[key])), value, min_size=1, max_size=2).map(
            lambda edits: {**whole, key: {**whole[key], **edits}}
        )
    )
    return top | dropped | deep | value


@amounts
def test_other_contents(
    amount: str, kind: str, child: Child, hf_dir: Path, checkpoint: Path, wholes: dict[str, Any]
) -> None:
    def check(value: Any) -> None:
        outcome = child.run(READERS[kind], hf_dir if kind == "model.bin" else checkpoint, saved(value))
        assert outcome.is_graceful, outcome

    fuzz(amount, 20, edited(wholes[kind]), check)


class Payload:
    """What a malicious pickle carries: a call that runs when it is read."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> Any:
        return (Path.touch, (self.trace,))


@pytest.mark.parametrize("form", ["zip", "legacy", "plain pickle"])
def test_a_pickle_that_runs_code_is_refused(
    form: str, kind: str, hf_dir: Path, checkpoint: Path, wholes: dict[str, Any], tmp_path: Path
) -> None:
    """In this process, so that the payload could run; whether it would have is tried at the end."""
    trace = tmp_path / "payload-ran"
    value = {**wholes[kind], "more": Payload(trace)}
    data = pickle.dumps(value) if form == "plain pickle" else saved(value, legacy=form == "legacy")
    with pytest.raises(UserError):
        READERS[kind](hf_dir if kind == "model.bin" else checkpoint, data)
    assert not trace.exists()
    if form == "plain pickle":
        pickle.loads(data)
    else:
        torch.load(io.BytesIO(data), weights_only=False)  # our own payload: proof that it would have run
    assert trace.exists()
    shutil.rmtree(tmp_path)
