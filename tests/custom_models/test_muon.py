"""Muon's step is the orthogonal matrix that an SVD gives, nearly; it is torch's; parts are told apart, and go on."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from custom_models.gpt import GPT, GPTConfig, modern
from custom_models.muon import QUINTIC, Muon, Together, main, orthogonalise, split_parameters
from workflows.errors import UserError


@pytest.mark.parametrize("shape", [(1, 32, 32), (3, 16, 48), (2, 48, 16)])
def test_newton_schulz_keeps_directions_and_levels_sizes(shape):
    torch.manual_seed(0)
    matrix = torch.randn(*shape, dtype=torch.float64)
    u, values, vt = torch.linalg.svd(matrix, full_matrices=False)
    made = orthogonalise(matrix, steps=8)
    found = torch.diagonal(u.mT @ made @ vt.mT, dim1=-2, dim2=-1)  # singular values of the same directions
    torch.testing.assert_close(u @ torch.diag_embed(found) @ vt, made)  # and nothing beside these directions
    assert values.max() / values.min() > 2 and found.min() > 0.65 and found.max() < 1.25


def test_each_round_is_the_polynomial_of_the_singular_values():
    a, b, c = QUINTIC
    values = torch.tensor([0.9, 0.3, 0.01], dtype=torch.float64)
    values = values / values.norm()
    expected = a * values + b * values**3 + c * values**5
    made = orthogonalise(torch.diag(values)[None], steps=1)[0].diagonal()
    torch.testing.assert_close(made, expected, atol=1e-6, rtol=0)


def test_bfloat16_is_near_enough():
    torch.manual_seed(0)
    matrix = torch.randn(4, 64, 256)
    single, double = orthogonalise(matrix), orthogonalise(matrix.double())
    assert single.dtype == torch.float32
    angles = F.cosine_similarity(single.double().flatten(1), double.flatten(1))
    assert angles.min() > 0.999


def test_steps_are_torchs():
    torch.manual_seed(0)
    ours = [nn.Parameter(torch.randn(*shape)) for shape in ((8, 8), (8, 24), (24, 8), (8, 8))]
    theirs = copy.deepcopy(ours)
    mine = Muon(ours, lr=0.1, weight_decay=0.5)
    other = torch.optim.Muon(theirs, lr=0.1, weight_decay=0.5, momentum=0.95, nesterov=True)
    for _ in range(3):
        for a, b in zip(ours, theirs, strict=True):
            a.grad = torch.randn_like(a)
            b.grad = a.grad.clone()
        mine.step()
        other.step()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=0.02, rtol=0)  # theirs rounds to bfloat16 on its way


def test_small_directions_move_as_far_as_large_ones():
    matrix = nn.Parameter(torch.zeros(2, 2))
    matrix.grad = torch.diag(torch.tensor([1.0, 0.01]))
    Muon([matrix], lr=1.0).step()
    assert 0.6 < float(-matrix[1, 1].detach()) < 1.25 and 0.6 < float(-matrix[0, 0].detach()) < 1.25


def test_parameters_are_told_apart():
    config = {"vocab_size": 9, "context": 8, "width": 16, "n_layer": 2, "n_head": 2}
    matrices, tables, vectors = split_parameters(GPT(modern(**config)))
    assert len(matrices) == 2 * 6 and len(tables) == 2 and all(p.ndim == 1 for p in vectors)
    assert [len(part) for part in split_parameters(GPT(GPTConfig(**config)))] == [12, 2, 2 * (4 + 6) + 2]


def make(seed: int) -> tuple[nn.Module, Together]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 3))
    weights, biases = (
        [p for p in model.parameters() if p.ndim == 2], [p for p in model.parameters() if p.ndim == 1]
    )  # fmt: skip
    return model, Together([Muon(weights, lr=0.1), torch.optim.AdamW(biases, lr=0.01)])


def train(model: nn.Module, optimizer: Together, rates: list[float]) -> None:
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rates[min(step, len(rates) - 1)])
    for step in range(len(rates)):
        x = torch.randn(8, 6, generator=torch.Generator().manual_seed(step))
        model(x).square().sum().backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()


def test_two_optimizers_step_as_one():
    model, optimizer = make(0)
    train(model, optimizer, [1.0, 0.5, 0.0])
    apart, parts = make(0)
    for share, step in ((1.0, 0), (0.5, 1), (0.0, 2)):
        for part, rate in zip(parts.optimizers, (0.1, 0.01), strict=True):
            part.param_groups[0]["lr"] = rate * share
        x = torch.randn(8, 6, generator=torch.Generator().manual_seed(step))
        apart(x).square().sum().backward()
        for part in parts.optimizers:
            part.step()
            part.zero_grad()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), apart.parameters(), strict=True))
    assert all(p.grad is None for p in model.parameters())


def test_state_is_taken_up():
    model, optimizer = make(0)
    train(model, optimizer, [1.0, 1.0])
    state, weights = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(model.state_dict())
    train(model, optimizer, [1.0])
    again, fresh = make(1)
    again.load_state_dict(weights)
    fresh.load_state_dict(state)
    assert len(fresh.state) == 4 and fresh.param_groups[0] is fresh.optimizers[0].param_groups[0]
    train(again, fresh, [1.0])
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_settings_that_make_no_sense_are_refused():
    with pytest.raises(UserError, match=r"3 problems[\s\S]*lr must be at least 0, not -1"):
        Muon([nn.Parameter(torch.ones(2, 2))], lr=-1, momentum=1.0, weight_decay=-0.1)


def test_what_is_no_matrix_is_refused():
    with pytest.raises(UserError, match=r"shape \(3,\) is none"):
        Muon([nn.Parameter(torch.zeros(3))])


def test_the_files_command_shows_singular_values_rise(capsys):
    main(16, 16, steps=2)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4 and float(lines[3].split()[-1]) > 10 * float(lines[1].split()[-1])
