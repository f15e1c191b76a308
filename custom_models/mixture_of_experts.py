"""DeepSeekMoE: many small feed-forward layers, of which each token goes through a few, and one that all go through.

With the numbers of DeepSeek-V3's report (arXiv 2412.19437, section 2.1.2), for the token u_t:

    h_t    = shared experts' FFN(u_t) + sum_i g_i,t FFN_i(u_t)                  (12, without the residual u_t)
    g_i,t  = g'_i,t / sum_j g'_j,t                                              (13)
    g'_i,t = s_i,t if s_i,t + b_i is among the top k of s_j,t + b_j, else 0     (16; 14 without b)
    s_i,t  = sigmoid(u_t . e_i)                                                 (15)

What is DeepSeek's in that:

* Small experts and many of them, so that a token's mixture can be a fitting one, and a shared expert for what all
  tokens need, so that the others need not learn it each (Dai et al. 2024, arXiv 2401.06066).
* Group-limited routing: experts live in groups, each on a machine of its own, and a token may visit the experts of a
  few groups only, so that it need not be sent to more machines (V3's "node-limited routing"). Groups are ranked by the
  sum of their two best s + b.
* Balance without an auxiliary loss (Wang et al. 2024, arXiv 2408.15664): where nothing is done, few experts get ever
  more of the tokens, and so learn ever more. A loss that punishes this also disturbs what the model is to learn. Here
  the bias b_i grows while an expert has less than its share and shrinks while it has more. It decides who is chosen,
  not how much the chosen count (equation 16), so no gradient knows of it.

Left out: V3's sequence-wise auxiliary loss (equations 17 to 20), which it adds with a weight of 0.0001 against texts
that are lopsided each by itself. The decoder around this layer is `deepseek.py`.

See it at work: python -m custom_models expert-load
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from custom_models.layers import GatedFeedForward
from workflows.errors import report_all


@dataclass(frozen=True)
class ExpertsConfig:
    """The shape of a mixture of experts.

    Attributes:
        n_routed: Experts to choose from.
        n_active: How many of them a token goes through.
        inner_width: Of each expert, between its matrices.
        n_shared: Experts that every token goes through.
        n_group: Groups of experts; 1 for no limit.
        n_active_group: How many groups a token may visit.
        normalise: Whether the gates of a token's experts are divided by their sum (equation 13).
        scale: What the gates are multiplied by after that (V3: 2.5).
    """

    n_routed: int = 256
    n_active: int = 8
    inner_width: int = 2048
    n_shared: int = 1
    n_group: int = 1
    n_active_group: int = 1
    normalise: bool = True
    scale: float = 1.0

    def __post_init__(self) -> None:
        names = ("n_routed", "n_active", "inner_width", "n_shared", "n_group", "n_active_group")
        report_all([f"The mixture's {name} must be at least 1, not {getattr(self, name)}."
                    for name in names if getattr(self, name) < 1])  # fmt: skip
        size, problems = self.n_routed // self.n_group, []
        if self.n_routed % self.n_group or (self.n_group > 1 and size < 2):
            problems.append(
                f"{self.n_routed} experts do not make {self.n_group} equal groups of at least 2. Choose other numbers."
            )
        elif self.n_active_group > self.n_group:
            problems.append(f"A token cannot visit {self.n_active_group} groups of {self.n_group}.")
        elif self.n_active > self.n_active_group * size:
            problems.append(
                f"{self.n_active_group} groups of {size} experts have fewer than the {self.n_active} that a token goes "
                "through. Choose fewer (n_active), or let it visit more groups (n_active_group)."
            )
        report_all(problems)


class Router(nn.Module):
    """Decides which experts a token goes through, and how much each counts.

    Scores are computed in float32, whatever the weights are: 16 bits would make ties. Train with the weights in float32
    (and autocast for 16-bit work), since the bias moves in steps that 16 bits round away.

    Args:
        width: Of the tokens' vectors.
        config: The mixture's shape.
    """

    def __init__(self, width: int, config: ExpertsConfig) -> None:
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.randn(config.n_routed, width) * 0.02)  # row i is e_i, the expert's centroid
        self.bias: Tensor
        self.register_buffer("bias", torch.zeros(config.n_routed))  # (n_routed,); saved, but no parameter
        self.load: Tensor
        self.register_buffer("load", torch.zeros(config.n_routed, dtype=torch.long), persistent=False)
        """How many of the last call's tokens each expert got, (n_routed,)."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Choose experts.

        Args:
            x: Tokens, (N, width).

        Returns:
            The numbers of each token's experts and their gates, (N, n_active) each.
        """
        config = self.config
        wide = torch.promote_types(x.dtype, torch.float32)
        scores = F.linear(x.to(wide), self.weight.to(wide)).sigmoid()  # (N, n_routed); equation 15
        wanted = scores.detach() + self.bias  # (N, n_routed); a choice has no gradient
        if config.n_group > 1:
            groups = wanted.unflatten(-1, (config.n_group, -1))  # (N, n_group, n_routed / n_group)
            worth = groups.topk(2, dim=-1).values.sum(dim=-1)  # (N, n_group)
            visited = torch.zeros_like(worth, dtype=torch.bool)  # (N, n_group)
            visited.scatter_(-1, worth.topk(config.n_active_group, dim=-1).indices, True)
            wanted = groups.masked_fill(~visited[..., None], -math.inf).flatten(1)  # (N, n_routed)
        experts = wanted.topk(config.n_active, dim=-1).indices  # (N, n_active); equation 16
        gates = scores.gather(-1, experts)  # (N, n_active); without the bias
        if config.normalise:
            gates = gates / (gates.sum(dim=-1, keepdim=True) + 1e-20)  # (N, n_active); equation 13
        self.load = torch.bincount(experts.flatten(), minlength=config.n_routed)  # (n_routed,)
        return experts, gates * config.scale


class MixtureOfExperts(nn.Module):
    """A feed-forward layer of shared and routed experts, equation 12.

    Args:
        width: Of the tokens' vectors.
        config: The mixture's shape.
    """

    def __init__(self, width: int, config: ExpertsConfig) -> None:
        super().__init__()
        self.router = Router(width, config)
        self.experts = nn.ModuleList(GatedFeedForward(width, config.inner_width) for _ in range(config.n_routed))
        # Several shared experts are one that is as much wider: their sum is over its inner numbers.
        self.shared = GatedFeedForward(width, config.n_shared * config.inner_width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, width) -> (B, T, width)."""
        tokens = x.flatten(0, -2)  # (N, width)
        chosen, gates = self.router(tokens)  # (N, n_active) each
        routed = torch.zeros_like(tokens)  # (N, width)
        for number, expert in enumerate(self.experts):
            token, place = torch.where(chosen == number)  # (n,) each: whose it is, and as its how manieth
            if len(token):
                made = expert(tokens[token]) * gates[token, place, None].to(x.dtype)  # (n, width)
                routed.index_add_(0, token, made)  # (N, width)
        return self.shared(x) + routed.view_as(x)  # (B, T, width)


def routers(model: nn.Module) -> list[Router]:
    """The routers of a model's mixtures, from the first layer to the last."""
    return [module for module in model.modules() if isinstance(module, Router)]


@torch.no_grad()
def balance(model: nn.Module, speed: float = 0.001) -> None:
    """After a training step: b_i = b_i + speed * sign(mean load - load of i), in every mixture of a model.

    Algorithm 1 of arXiv 2408.15664, whose best speed is 0.001; V3 has the same, and 0 for its last tokens. With several
    processes let the loads be summed over them first.

    Args:
        model: It has just seen a batch.
        speed: How far a bias moves in a step.
    """
    for router in routers(model):
        load = router.load.float()  # (n_routed,)
        router.bias += speed * torch.sign(load.mean() - load)  # (n_routed,)


def max_violation(load: Tensor) -> float:
    """MaxVio = (max_i Load_i - mean Load) / mean Load: 0 is balance, 1 an expert with twice its share.

    Section 4.1 of arXiv 2408.15664, which calls it MaxVio_batch for one batch's load and MaxVio_global for that of a
    whole validation set.

    Args:
        load: How many tokens each expert got, (n_routed,); at least one got some.
    """
    mean = float(load.float().mean())
    return (float(load.max()) - mean) / mean
