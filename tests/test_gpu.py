"""What only a GPU runs, against the CPU: attention's kernel, recorded decoding, training steps, 4-bit weights."""

from pathlib import Path
from typing import Any

import pytest
import torch

from custom_models.flash_attention_triton import flash_attention_triton
from tests.workflows.alignment import TRAIN, log_of, pair, question, write
from tests.workflows.training.test_attention import GROUPS, HEADS, ROWS, SIZE, inputs_of, plain, row_of
from workflows.__main__ import main
from workflows.training import decoding
from workflows.training.batch import Tree, pack_row
from workflows.training.model import LoRAArgs, load_model
from workflows.training.rollouts import generate
from workflows.training.segments import SegmentAttention

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU, and to be run by `make test-gpu`"),
]
CUDA = torch.device("cuda")


@pytest.mark.parametrize("name", ROWS)
def test_the_kernel_equals_the_masked_row(name: str):
    batch = row_of(*ROWS[name])
    qkv, cos, sin, weight = (x.to(CUDA) for x in inputs_of(batch, torch.bfloat16))
    assert SegmentAttention.works_on(CUDA, qkv.dtype, SIZE)
    mine, exact = qkv.clone().requires_grad_(), qkv.cpu().double().requires_grad_()
    y = SegmentAttention(batch.to(CUDA))(mine, cos, sin, HEADS, GROUPS, 0.3)
    expected = plain(batch, exact, cos.cpu().double(), sin.cpu().double(), 0.3)
    (gradient,) = torch.autograd.grad(y, mine, weight.to(y.dtype))
    (reference,) = torch.autograd.grad(expected, exact, weight.cpu().double())
    for found, wanted in ((y.detach(), expected.detach()), (gradient, reference)):
        assert (found.cpu().double() - wanted).abs().max() < 0.03 * wanted.abs().max()


def adapted(directory: Path, precision: Any, device: torch.device | str) -> Any:
    torch.manual_seed(3)
    model = load_model(directory, LoRAArgs(r=4), precision)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model.to(device)


@pytest.mark.parametrize(("precision", "tolerance"), [("32-true", 1e-4), ("bf16-true", 0.05)])
@pytest.mark.parametrize("family", ["tiny_llama", "tiny_qwen2"])
def test_log_probabilities_and_gradients_are_the_cpus(family: str, precision: str, tolerance: float, request):
    directory = request.getfixturevalue(family)
    trees = [Tree([5] * 9 + [i + 20, 7, i], [[30 + i, 8, 9], [40, 41 + i]]) for i in range(6)]
    found = []
    for device in ("cpu", CUDA):
        model = adapted(directory, precision if device == CUDA else "32-true", device)
        logprobs = model(pack_row(trees, 32).to(torch.device(device)))
        logprobs.sum().backward()
        gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        found.append((logprobs.detach().cpu(), gradient.cpu()))
    for one, other in zip(*found, strict=True):
        assert (one - other).norm() < tolerance * one.norm()


@pytest.mark.parametrize("family", ["tiny_llama", "tiny_qwen2"])
def test_recorded_steps_write_what_steps_write(family: str, request, monkeypatch: pytest.MonkeyPatch):
    model = adapted(request.getfixturevalue(family), "32-true", CUDA)
    prompts = [list(range(3, 3 + n)) for n in (1, 5, 17, 3, 40, 8, 2)]
    settings: dict[str, Any] = {"max_new_tokens": 150, "stop_ids": [7, 8, 9], "temperature": 1.0, "seed": 5}
    recordings: list[int] = []
    record = decoding.record
    monkeypatch.setattr(decoding, "record", lambda run: recordings.append(1) or record(run))
    found = generate(model, prompts, **settings)
    again = generate(model, prompts, **settings, batch_size=3)
    assert recordings
    monkeypatch.setattr(decoding, "can_record", lambda device: False)
    expected = generate(model, prompts, **settings)
    for others in (found, again):
        assert [r.ids for r in others] == [r.ids for r in expected]
        for one, other in zip(others, expected, strict=True):
            assert one.logprobs == pytest.approx(other.logprobs, abs=1e-3)


def run(step: str, checkpoint: Path, data: Path, out_dir: Path, *options: str) -> list[dict[str, float]]:
    train = {**vars(TRAIN), "max_steps": 4, "learning_rate": 1e-3}
    settings = [f"--train.{name}={'null' if value is None else value}" for name, value in train.items()]
    arguments = [step, "--checkpoint_dir", str(checkpoint), "--data", str(data), "--out_dir", str(out_dir)]
    assert main([*arguments, *settings, "--lora_r", "4", "--max_val_rows", "4", *options]) == 0
    return log_of(out_dir)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("data")
    pairs, questions = [pair(i) for i in range(30)], [question(i) for i in range(30)]
    chats = [{"messages": [*row["prompt"], *row["chosen"]]} for row in pairs]
    made = {"lora": chats, "dpo": pairs, "grpo": questions}
    return {step: write(folder / step, train=rows, validation=rows[:6], test=rows[:6]) for step, rows in made.items()}


OPTIONS = {
    "lora": [],
    "dpo": ["--max_test_rows", "4"],
    "grpo": ["--max_test_rows", "4", "--max_new_tokens", "24", "--group_size", "4",
             "--rewards", "[{reward: tests.workflows.alignment.early_letters}]"],
}  # fmt: skip


@pytest.mark.parametrize("step", OPTIONS)
def test_a_step_learns_what_it_learns_on_a_cpu(step: str, tiny_llama: Path, folders: dict[str, Path], tmp_path: Path):
    logs = [
        run(step, tiny_llama, folders[step], tmp_path / device, *OPTIONS[step], "--precision", "32-true",
            "--accelerator", device)
        for device in ("cpu", "cuda")
    ]  # fmt: skip
    for one, other in zip(*logs, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=0.01, abs=1e-3)


@pytest.mark.parametrize("step", OPTIONS)
@pytest.mark.parametrize("quantize", [None, "bnb.nf4"])
def test_a_step_runs_in_bfloat16_and_in_4_bits(
    step: str, quantize: str | None, tiny_llama: Path, folders: dict[str, Path], tmp_path: Path
):
    if quantize:
        pytest.importorskip("bitsandbytes", reason="the extra `qlora` is not installed")
    more = ["--quantize", quantize] if quantize else []
    log = run(step, tiny_llama, folders[step], tmp_path / "out", *OPTIONS[step], *more)
    assert len(log) == 4 and (tmp_path / "out" / "final" / "lit_model.pth").is_file()
    assert all(row["peak_bytes"] > 0 for row in log)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("causal", [False, True])
def test_triton_kernels_equal_sdpa(dtype: torch.dtype, causal: bool):
    torch.manual_seed(0)
    shapes = (2, 4, 300, 64), (2, 2, 300, 64), (2, 2, 300, 64)
    inputs = [torch.randn(shape, dtype=dtype, device=CUDA, requires_grad=True) for shape in shapes]
    dout = torch.randn(shapes[0], dtype=dtype, device=CUDA)
    exact = [x.detach().cpu().double().requires_grad_() for x in inputs]
    theirs = torch.nn.functional.scaled_dot_product_attention(*exact, is_causal=causal, enable_gqa=True)
    ours = flash_attention_triton(*inputs, causal=causal)
    expected = [theirs, *torch.autograd.grad(theirs, exact, dout.cpu().double())]
    for one, other in zip([ours, *torch.autograd.grad(ours, inputs, dout)], expected, strict=True):
        assert (one.cpu().double() - other).abs().max() < (0.01 if dtype == torch.float32 else 0.03) * other.abs().max()
