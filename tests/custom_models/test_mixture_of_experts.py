"""Routing is the paper's, token by token; the bias decides who is chosen and nothing else; balancing evens the load."""

import math

import pytest
import torch

from custom_models.layers import GatedFeedForward
from custom_models.mixture_of_experts import ExpertsConfig, MixtureOfExperts, Router, balance, max_violation, routers
from workflows.errors import UserError

GROUPS = ExpertsConfig(n_routed=12, n_active=3, inner_width=6, n_group=4, n_active_group=2, scale=2.5)
PLAIN = ExpertsConfig(n_routed=12, n_active=3, inner_width=6, normalise=False)


def router(config: ExpertsConfig, bias: float = 0.2) -> Router:
    torch.manual_seed(0)
    made = Router(8, config)
    made.weight.data = torch.randn(12, 8)
    made.bias += bias * torch.randn(12)
    return made


def tokens(n: int = 50) -> torch.Tensor:
    return torch.randn(n, 8, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("config", [GROUPS, PLAIN], ids=["groups", "plain"])
def test_the_papers_routing_token_by_token(config):
    gate = router(config)
    chosen, gates = gate(tokens())
    size = 12 // config.n_group
    for u, experts, found in zip(tokens(), chosen.tolist(), gates.tolist(), strict=True):
        s = [1 / (1 + math.exp(-float(u @ e))) for e in gate.weight.detach()]  # 15
        wanted = [a + float(b) for a, b in zip(s, gate.bias, strict=True)]
        worth = [sum(sorted(wanted[g * size : (g + 1) * size])[-2:]) for g in range(config.n_group)]
        visited = sorted(range(config.n_group), key=worth.__getitem__)[-config.n_active_group :]
        best = sorted((i for i in range(12) if i // size in visited), key=wanted.__getitem__)[-3:]  # 16
        assert sorted(experts) == sorted(best)
        total = sum(s[i] for i in best) if config.normalise else 1  # 13
        assert found == pytest.approx([config.scale * s[i] / total for i in experts], rel=1e-5)


def test_a_token_visits_no_more_groups_than_it_may():
    chosen, _ = router(GROUPS)(tokens(500))
    visited = [set((row // 3).tolist()) for row in chosen]
    assert max(map(len, visited)) == 2
    free, _ = router(ExpertsConfig(n_routed=12, n_active=3, inner_width=6))(tokens(500))
    assert max(len(set((row // 3).tolist())) for row in free) == 3  # without the limit some visit three


def test_the_limit_holds_even_where_all_scores_are_below_zero():
    gate = router(GROUPS)
    before, _ = gate(tokens(500))
    gate.bias -= 5  # with zeros in place of the hidden scores the groups that lost would win
    chosen, _ = gate(tokens(500))
    assert torch.equal(chosen.sort().values, before.sort().values)


def test_the_bias_decides_who_is_chosen_but_not_how_much_they_count():
    gate, x = router(PLAIN, bias=0.0), tokens()
    scores = (x @ gate.weight.T).sigmoid()
    before, _ = gate(x)
    assert not (before == 5).any(dim=1).all()
    gate.bias[5] = 10.0
    chosen, gates = gate(x)
    assert (chosen == 5).any(dim=1).all()
    torch.testing.assert_close(gates, scores.gather(1, chosen))
    assert "bias" in gate.state_dict() and "load" not in gate.state_dict()
    assert [name for name, _ in gate.named_parameters()] == ["weight"]


def test_scores_of_sixteen_bit_weights_are_computed_in_float32():
    half, single = router(GROUPS).bfloat16(), router(GROUPS)
    single.load_state_dict({name: value.float() for name, value in half.state_dict().items()})
    x = tokens().bfloat16()
    ours, expected = half(x), single(x.float())
    assert torch.equal(ours[0], expected[0]) and torch.equal(ours[1], expected[1])
    assert MixtureOfExperts(8, GROUPS).bfloat16()(x[None]).dtype == torch.bfloat16


@pytest.mark.parametrize("n_shared", [1, 2])
def test_the_mixture_is_the_sum_over_experts(n_shared):
    torch.manual_seed(0)
    config = ExpertsConfig(n_routed=12, n_active=3, inner_width=6, n_shared=n_shared)
    layer, x = MixtureOfExperts(8, config), tokens(12).view(3, 4, 8)
    found = layer(x)
    chosen, gates = layer.router(x.flatten(0, 1))
    shared = []  # the wide one is as many narrow ones
    for rows in torch.arange(6 * n_shared).split(6):
        narrow = GatedFeedForward(8, 6)
        narrow.gate.weight.data, narrow.up.weight.data = layer.shared.gate.weight[rows], layer.shared.up.weight[rows]
        narrow.down.weight.data = layer.shared.down.weight[:, rows]
        shared.append(narrow)
    for i, u in enumerate(x.flatten(0, 1)):
        routed = sum(g * layer.experts[int(e)](u) for e, g in zip(chosen[i], gates[i], strict=True))
        expected = sum(expert(u) for expert in shared) + routed  # 12
        torch.testing.assert_close(found.flatten(0, 1)[i], expected, atol=1e-6, rtol=1e-5)


def test_gradients_reach_the_router_and_those_who_were_chosen():
    torch.manual_seed(0)
    layer = MixtureOfExperts(8, GROUPS)
    layer.router.bias -= 10 * (torch.arange(12) == 7)  # nobody goes to expert 7
    layer(tokens(100)[None]).square().sum().backward()
    for name, parameter in layer.named_parameters():
        assert (parameter.grad is None) == name.startswith("experts.7."), name
        assert parameter.grad is None or parameter.grad.abs().sum() > 0, name


def test_the_load_is_counted_and_the_bias_moves_against_it():
    layer = MixtureOfExperts(8, GROUPS)
    chosen, _ = layer.router(tokens())
    assert layer.router.load.tolist() == [int((chosen == i).sum()) for i in range(12)]
    assert routers(torch.nn.Sequential(layer, layer.shared)) == [layer.router]
    layer.router.load = torch.tensor([9, 0, 4, 4, 3, 5, 4, 4, 4, 4, 4, 3])  # the mean is 4
    balance(layer, 0.01)
    steps = torch.tensor([-1.0, 1, 0, 0, 1, -1, 0, 0, 0, 0, 0, 1])
    torch.testing.assert_close(layer.router.bias, 0.01 * steps)
    assert max_violation(torch.tensor([9, 0, 3, 4])) == 1.25 and max_violation(torch.tensor([2, 2])) == 0


def test_balancing_evens_the_load_of_lopsided_tokens():
    generator = torch.Generator().manual_seed(2)
    violations = {}
    for speed in (0.0, 0.01):
        gate = router(GROUPS, bias=0.0)
        for _ in range(200):
            gate(torch.randn(200, 8, generator=generator) + 1.0)  # all tokens lean to one side, so to some experts
            balance(gate, speed)
        gate(torch.randn(5000, 8, generator=torch.Generator().manual_seed(3)) + 1.0)
        violations[speed] = max_violation(gate.load)
    assert violations[0.0] > 1.5 and violations[0.01] < 0.25, violations


def test_what_makes_no_sense_is_told():
    with pytest.raises(UserError, match="2 problems"):
        ExpertsConfig(n_routed=0, n_shared=0)
    with pytest.raises(UserError, match="12 experts do not make 5 equal groups"):
        ExpertsConfig(n_routed=12, n_group=5)
    with pytest.raises(UserError, match="12 experts do not make 12 equal groups of at least 2"):
        ExpertsConfig(n_routed=12, n_group=12)
    with pytest.raises(UserError, match="cannot visit 5 groups of 4"):
        ExpertsConfig(n_routed=12, n_group=4, n_active_group=5)
    with pytest.raises(UserError, match="2 groups of 3 experts have fewer than the 7"):
        ExpertsConfig(n_routed=12, n_active=7, n_group=4, n_active_group=2)
