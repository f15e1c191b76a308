"""`make expert-load`: how a mixture's experts share out the tokens while a small DeepSeek learns, balanced and not.

The same decoder is trained twice on the same batches: once with the bias that evens out the experts' loads
(`mixture_of_experts.balance`), once without. The picture shows for every mixture each expert's share of the tokens'
choices over training. Printed are MaxVio of the training batches and of held-out text, and the held-out loss.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from custom_models.deepseek import DeepSeek, DeepSeekConfig
from custom_models.demo import read
from custom_models.mixture_of_experts import ExpertsConfig, balance, max_violation, routers
from workflows.errors import UserError, report_all
from workflows.files import atomic_file

VOCAB_SIZE = 512
LENGTH = 64
"""Tokens of a training text; T."""

BATCH = 16
LEARNING_RATE = 3e-3
_SMOOTH = 10
"""So many steps make a point of the picture."""


@dataclass(frozen=True)
class Course:
    """What a training run left.

    Attributes:
        loads: Tokens of each expert, by step and mixture, (steps, n_mixture, n_routed).
        held_out: The same for the held-out text, (n_mixture, n_routed).
        loss: On the held-out text, nats a token.
    """

    loads: Tensor
    held_out: Tensor
    loss: float

    def violations(self) -> tuple[float, float]:
        """MaxVio, the mean over mixtures: of batches (mean over the last quarter of them), and of the held-out text."""
        last = self.loads[-max(1, len(self.loads) // 4) :].flatten(0, 1)  # (steps / 4 * n_mixture, n_routed)
        of_batches = [max_violation(load) for load in last]
        of_text = [max_violation(load) for load in self.held_out]
        return sum(of_batches) / len(of_batches), sum(of_text) / len(of_text)


def setup(
    steps: int = 300,
    speed: float = 0.003,
    seed: int = 0,
    file: Path | None = None,
    out_file: Path = Path("out/deepseek/expert-load.png"),
) -> None:
    """Train twice, and draw and print what became of the loads.

    Args:
        steps: Of each training; a step reads 16 texts of 64 tokens.
        speed: How far the balancing bias moves in a step. The paper's 0.001 is for courses of many thousand steps.
        seed: Of the first weights and of the batches.
        file: A UTF-8 text to learn; the definitions of the Human Phenotype Ontology if not given.
        out_file: The picture.

    Raises:
        UserError: If the text is too short or cannot be had, or a setting makes no sense.
    """
    problems = [] if steps >= 1 else [f"steps must be at least 1, not {steps}."]
    problems += [] if speed > 0 else [f"speed must be above 0, not {speed}."]
    report_all(problems)
    train, held_out = tokens_of(file)
    config = small_config()
    print(f"{config.n_layer - config.n_dense} mixtures of {config.experts.n_routed} experts, {config.experts.n_active} "
          f"for each token; {steps} steps of {BATCH} x {LENGTH} tokens\n")  # fmt: skip
    print(f"{'balancing':<12}{'MaxVio, batches':>17}{'MaxVio, held out':>18}{'held-out loss':>15}")
    courses = {}
    for name, rate in {"off": 0.0, "on": speed}.items():
        courses[name] = course = fit(config, train, held_out, steps, rate, seed)
        of_batches, of_text = course.violations()
        print(f"{name:<12}{of_batches:>17.2f}{of_text:>18.2f}{course.loss:>15.3f}")
    draw_loads({name: course.loads for name, course in courses.items()}, out_file)
    print(f"\n{out_file}")


def small_config() -> DeepSeekConfig:
    """A decoder of 3 layers, two of them with 16 experts in 4 groups, that learns something in a minute."""
    experts = ExpertsConfig(n_routed=16, n_active=2, inner_width=64, n_group=4, n_active_group=2)
    return DeepSeekConfig(
        VOCAB_SIZE, width=64, n_layer=3, n_dense=1, inner_width=192, experts=experts, n_head=4, q_rank=None,
        kv_rank=32, nope_size=16, rope_size=8, value_size=16, max_length=LENGTH,
    )  # fmt: skip


def tokens_of(file: Path | None) -> tuple[Tensor, Tensor]:
    """A text's token ids in pairs of bytes learned from it: the first nine tenths, and the last.

    Raises:
        UserError: If the text cannot be had or is too short.
    """
    from custom_models.projects.vocabulary import END, learn_vocabulary

    lines = read(file).splitlines()
    tokenizer = learn_vocabulary(lines, VOCAB_SIZE, (END,))
    end = tokenizer.token_to_id(END)
    ids = torch.tensor([i for line in tokenizer.encode_batch(lines) for i in [*line.ids, end]])  # (N,)
    cut = len(ids) * 9 // 10
    if len(ids) - cut <= LENGTH:
        raise UserError(f"The text has {len(ids)} tokens; at least {11 * LENGTH} are needed. Name a longer file.")
    return ids[:cut], ids[cut:]


def draw(ids: Tensor, generator: torch.Generator) -> Tensor:
    """A batch of pieces of a text, from anywhere in it: (N,) -> (BATCH, LENGTH + 1)."""
    starts = torch.randint(len(ids) - LENGTH, (BATCH, 1), generator=generator)  # (BATCH, 1)
    return ids[starts + torch.arange(LENGTH + 1)]  # (BATCH, LENGTH + 1)


def fit(config: DeepSeekConfig, train: Tensor, held_out: Tensor, steps: int, speed: float, seed: int) -> Course:
    """Train a decoder, and keep each step's loads.

    Args:
        config: Its shape.
        train: Token ids, (N,).
        held_out: Others, (M,), of which some pieces are read in the end.
        steps: How many.
        speed: Of the balancing; 0 for none.
        seed: Of weights and batches.
    """
    torch.manual_seed(seed)
    model, chance = DeepSeek(config), torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.1)
    loads = []
    for _ in range(steps):
        batch = draw(train, chance)  # (BATCH, LENGTH + 1)
        loss = F.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        loads.append(torch.stack([router.load for router in routers(model)]))  # (n_mixture, n_routed)
        balance(model, speed)
    seen, losses, chance = torch.zeros_like(loads[0]), [], torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _ in range(20):
            batch = draw(held_out, chance)  # (BATCH, LENGTH + 1)
            losses.append(F.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten()))
            seen += torch.stack([router.load for router in routers(model)])  # (n_mixture, n_routed)
    return Course(torch.stack(loads), seen, float(torch.stack(losses).mean()))


def draw_loads(loads: dict[str, Tensor], file: Path) -> None:
    """Draw each expert's share of what tokens choose: a row for each mixture, a column for each run, steps along it.

    Args:
        loads: For balancing "off" and "on" tokens of each expert, (steps, n_mixture, n_routed).
        file: The picture.
    """
    from matplotlib.figure import Figure

    _, n_mixture, n_routed = next(iter(loads.values())).shape
    figure = Figure(figsize=(4.8 * len(loads), 2.8 * n_mixture + 0.6), layout="constrained")
    rows = figure.subplots(n_mixture, len(loads), sharex=True, sharey=True, squeeze=False)
    for column, (name, counts) in enumerate(loads.items()):
        points = counts.float().split(_SMOOTH)
        shares = torch.stack([part.sum(0) / part[:, 0].sum() for part in points])  # (points, n_mixture, n_routed)
        x = [min(_SMOOTH * (i + 1), len(counts)) for i in range(len(points))]
        for mixture in range(n_mixture):
            axes = rows[mixture][column]
            axes.plot(x, 100 * shares[:, mixture], linewidth=1)
            axes.axhline(100 / n_routed, color="black", linestyle="--", linewidth=1)
            axes.set_title(f"mixture {mixture + 1}, balancing {name}", fontsize=9)
            axes.grid(alpha=0.3)
    figure.supxlabel("training step", fontsize=9)
    figure.supylabel("share of the tokens' choices (%)", fontsize=9)
    figure.suptitle(f"The load of each of {n_routed} experts; dashed: an even share", fontsize=10)
    with atomic_file(file) as temporary:
        figure.savefig(temporary, dpi=130)
