"""Every loss equals its oracle: TRL's or torch's where they compute that very formula, else the paper's in float64."""

import math
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch

from workflows.training import losses

PAIRS, TOKENS = 5, 9
BETA = 0.3


def numbers(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Pairs:
    """Log-probabilities of completions of different lengths, as one table (chosen above rejected) and as sums."""

    def __init__(self) -> None:
        self.mask = torch.zeros(2 * PAIRS, TOKENS, dtype=torch.long)
        for row, length in enumerate([3, 8, 1, 5, 6, 2, 4, 7, 8, 1]):
            self.mask[row, 1 : 1 + length] = 1  # the first token is the prompt
        self.logprobs = -numbers(2 * PAIRS, TOKENS - 1, seed=0).exp() * self.mask[:, 1:]
        self.reference = -numbers(2 * PAIRS, TOKENS - 1, seed=1).exp() * self.mask[:, 1:]
        self.lengths = self.mask.sum(dim=1)

    def margin(self, per_token: bool = False) -> torch.Tensor:
        ratios = (self.logprobs - self.reference).sum(dim=1)
        chosen, rejected = (ratios / self.lengths if per_token else ratios).chunk(2)
        return chosen - rejected

    def means(self) -> tuple[torch.Tensor, torch.Tensor]:
        chosen, rejected = (self.logprobs.sum(dim=1) / self.lengths).chunk(2)
        return chosen, rejected


@pytest.fixture(scope="module")
def pairs() -> Pairs:
    return Pairs()


def alone() -> SimpleNamespace:
    """An accelerator of one process."""
    same = lambda x: x  # noqa: E731
    return SimpleNamespace(
        device=torch.device("cpu"), gather=same, gather_for_metrics=same, reduce=lambda x, reduction: x
    )


def trainer(**settings: object) -> SimpleNamespace:
    """What TRL's `_compute_loss` methods read of their trainer."""
    fields = {
        "model": SimpleNamespace(training=True),
        "accelerator": alone(),
        "aux_loss_enabled": False,
        "_metrics": defaultdict(lambda: defaultdict(list)),
        "_total_train_tokens": 0,
        "_tp_size": 1,
        "precompute_ref_logps": True,
        "beta": BETA,
    }
    return SimpleNamespace(**{**fields, **settings})


class Answers:
    """A model that always answers with the given log-probabilities."""

    training = True

    def __init__(self, logprobs: torch.Tensor) -> None:
        self.logprobs = logprobs

    def __call__(self, **_: object) -> SimpleNamespace:
        zeros = torch.zeros_like(self.logprobs)
        return SimpleNamespace(log_probs=self.logprobs, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool())


def trl_dpo(pairs: Pairs, loss: str, label_smoothing: float = 0.0) -> float:
    """TRL's DPOTrainer on these log-probabilities."""
    from trl import DPOTrainer

    chosen, rejected = pairs.reference.sum(dim=1).chunk(2)
    inputs = {
        "input_ids": torch.ones_like(pairs.mask),
        "attention_mask": torch.ones_like(pairs.mask),
        "completion_mask": pairs.mask,
        "ref_chosen_logps": chosen,
        "ref_rejected_logps": rejected,
    }
    settings = {
        "ld_alpha": None,
        "f_divergence_type": "reverse_kl",
        "loss_types": [loss],
        "loss_weights": [1.0],
        "label_smoothing": label_smoothing,
        "use_weighting": False,
    }
    return float(DPOTrainer._compute_loss(trainer(**settings), Answers(pairs.logprobs), inputs, False))


def trl_cpo(pairs: Pairs, loss: str, per_token: bool, **settings: float) -> float:
    """TRL's CPOTrainer, whose formulas have no reference: on log-probabilities per token, or on log-ratios."""
    from trl.experimental.cpo import CPOTrainer

    fields = {"alpha": 0.0, "label_smoothing": 0.0, "loss_type": loss, **settings}
    of = pairs.means() if per_token else (pairs.logprobs - pairs.reference).sum(dim=1).chunk(2)
    return float(CPOTrainer.cpo_loss(trainer(**fields), *of)[0].mean())


def test_dpo_is_trls(pairs):
    assert float(losses.dpo(pairs.margin(), BETA).mean()) == pytest.approx(trl_dpo(pairs, "sigmoid"), abs=1e-5)
    ours = losses.dpo(pairs.margin(per_token=True), BETA)
    assert float(ours.mean()) == pytest.approx(trl_dpo(pairs, "sigmoid_norm"), abs=1e-5)


def test_conservative_dpo_is_trls_in_its_cpo_trainer(pairs):
    # its DPOTrainer ignores label smoothing with this loss
    ours = losses.dpo(pairs.margin(), BETA, label_smoothing=0.2)
    assert float(ours.mean()) == pytest.approx(trl_cpo(pairs, "sigmoid", False, label_smoothing=0.2), abs=1e-5)
    assert float(ours.mean()) != pytest.approx(trl_dpo(pairs, "sigmoid", label_smoothing=0.2), abs=1e-3)


def test_robust_dpo_is_trls(pairs):
    ours = losses.robust_dpo(pairs.margin(), BETA, label_smoothing=0.2)
    assert float(ours.mean()) == pytest.approx(trl_dpo(pairs, "robust", label_smoothing=0.2), abs=1e-5)


def test_hinge_is_trls(pairs):
    assert float(losses.hinge(pairs.margin(), BETA).mean()) == pytest.approx(trl_dpo(pairs, "hinge"), abs=1e-5)


def test_ipo_is_trls_per_token_and_the_papers_on_sums(pairs):
    ours = losses.ipo(pairs.margin(per_token=True), BETA)
    assert float(ours.mean()) == pytest.approx(trl_dpo(pairs, "ipo"), rel=1e-5)
    h = pairs.margin().double()
    torch.testing.assert_close(losses.ipo(h, BETA), (h - 1 / (2 * BETA)) ** 2, atol=1e-12, rtol=0)


def test_simpo_is_trls(pairs):
    ours = losses.simpo(*pairs.means(), beta=2.0, gamma=0.7)
    theirs = trl_cpo(pairs, "simpo", True, beta=2.0, simpo_gamma=0.7)
    assert float(ours.mean()) == pytest.approx(theirs, abs=1e-5)


def test_orpo_is_trls_and_the_papers(pairs):
    from trl.experimental.orpo import ORPOTrainer

    chosen, rejected = pairs.means()
    ours = losses.orpo(chosen, rejected)
    theirs = ORPOTrainer.odds_ratio_loss(trainer(), chosen, rejected)[0] / BETA
    torch.testing.assert_close(ours, -theirs, atol=1e-5, rtol=0)
    p, q = chosen.double().exp(), rejected.double().exp()
    ratio = (p / (1 - p)) / (q / (1 - q))
    torch.testing.assert_close(ours.double(), -(ratio / (1 + ratio)).log(), atol=1e-5, rtol=0)


def test_orpo_of_certain_answers_is_finite_with_its_gradient():
    chosen = torch.tensor([-1e-12, -20.0], requires_grad=True)
    loss = losses.orpo(chosen, torch.tensor([-5.0, -1e-12]))
    loss.sum().backward()
    assert loss.isfinite().all() and chosen.grad.isfinite().all()


@pytest.mark.parametrize("labels", [[1, 0, 1, 1, 0, 0, 1, 0, 0, 1], [1] * 10, [0] * 10])
@pytest.mark.parametrize("kl", [0.8, -0.8])
def test_kto_is_trls(pairs, labels, kl):
    from trl import KTOTrainer

    desirable = torch.tensor(labels, dtype=torch.bool)
    reference = pairs.reference.sum(dim=1)
    settings = {
        "_compute_kl_logps": lambda *_: torch.full((4,), kl),
        "calculate_KL": True,
        "loss_type": "kto",
        "desirable_weight": 1.3,
        "undesirable_weight": 0.7,
    }
    inputs = {
        "input_ids": torch.ones_like(pairs.mask),
        "attention_mask": torch.ones_like(pairs.mask),
        "completion_mask": pairs.mask,
        "label": desirable,
        "ref_logps": reference,
        "ref_KL_logps": torch.zeros(4),
    }
    theirs = float(KTOTrainer._compute_loss(trainer(**settings), Answers(pairs.logprobs), inputs, False))
    ratio = pairs.logprobs.sum(dim=1) - reference
    ours = losses.kto(ratio, desirable, max(kl, 0.0), BETA, desirable_weight=1.3, undesirable_weight=0.7)
    assert float(ours.mean()) == pytest.approx(theirs, abs=1e-5)


@pytest.mark.parametrize("loss", [losses.dpo, losses.hinge, losses.ipo])
def test_a_wider_margin_costs_less_until_it_is_reached(loss):
    cost = loss(torch.tensor([-2.0, 0.0, 1.0]), BETA)
    assert (cost.diff() < 0).all()


def test_without_a_margin_dpo_is_log_two():
    assert float(losses.dpo(torch.zeros(1), BETA)) == pytest.approx(math.log(2), abs=1e-7)
    assert float(losses.bradley_terry(torch.ones(1), torch.ones(1))) == pytest.approx(math.log(2), abs=1e-7)


def test_robust_dpo_is_unbiased_under_flipped_pairs():
    """Its mean over pairs of which a share e is flipped is DPO's loss of the unflipped ones (the paper's Lemma 3.1)."""
    h, e = torch.linspace(-3, 3, 7).double(), 0.3
    mean = (1 - e) * losses.robust_dpo(h, BETA, e) + e * losses.robust_dpo(-h, BETA, e)
    torch.testing.assert_close(mean, losses.dpo(h, BETA))


def test_sums_and_means_per_completion():
    owners = torch.tensor([2, 0, 0, 2, 2])
    values = torch.tensor([1.0, 2.0, 4.0, 8.0, 0.0])
    assert losses.per_completion(values, owners, 4).tolist() == [6.0, 0.0, 9.0, 0.0]
    assert losses.sequence_log_ratio(values, owners, 4).tolist() == [3.0, 3.0, 3.0, 3.0, 3.0]


def test_advantages_are_the_papers_and_zero_without_signal():
    rewards = torch.tensor([[1.0, 0.0, 0.5, 0.5], [0.3, 0.3, 0.3, 0.3]])
    wide = rewards.double()
    mean = wide.mean(dim=1, keepdim=True)
    deviation = ((wide - mean) ** 2).sum(dim=1, keepdim=True).div(3).sqrt()
    torch.testing.assert_close(
        losses.group_advantages(rewards).double(), (wide - mean) / (deviation + 1e-4), atol=1e-5, rtol=0
    )
    torch.testing.assert_close(losses.group_advantages(rewards, "none").double(), wide - mean, atol=1e-6, rtol=0)
    assert losses.group_advantages(rewards)[1].abs().max() < 1e-3


GRPO = {"token": "dapo", "sequence": "grpo", "constant": "dr_grpo"}


@pytest.mark.parametrize("normalisation", GRPO)
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_the_policy_loss_is_trls(normalisation, level):
    from trl import GRPOTrainer

    lengths, longest, kl_weight = [3, 6, 1, 4], 6, 0.05
    mask = torch.tensor([[1] * n + [0] * (longest - n) for n in lengths])
    logprobs, old, reference = (-numbers(4, longest, seed=s).abs() for s in (3, 4, 5))
    advantages = torch.tensor([1.2, -0.4, -1.1, 0.3])

    args = SimpleNamespace(use_bias_correction_kl=False, delta=None, steps_per_generation=1)
    settings = {
        "_get_per_token_logps_and_entropies": lambda *_, **__: (logprobs, torch.zeros_like(logprobs), None),
        "beta": kl_weight,
        "top_entropy_quantile": 1.0,
        "off_policy_mask_threshold": None,
        "importance_sampling_level": level,
        "epsilon_low": 0.2,
        "epsilon_high": 0.28,
        "loss_type": GRPO[normalisation],
        "args": args,
        "use_vllm": False,
        "_entropy_bonus_enabled": False,
        "current_gradient_accumulation_steps": 1,
        "max_completion_length": longest,
    }
    inputs = {
        "prompt_ids": torch.ones(4, 2, dtype=torch.long),
        "prompt_mask": torch.ones(4, 2, dtype=torch.long),
        "completion_ids": torch.ones(4, longest, dtype=torch.long),
        "completion_mask": mask,
        "advantages": advantages,
        "old_per_token_logps": old,
        "ref_per_token_logps": reference,
        "num_items_in_batch": mask.sum(),
    }
    accelerator = alone()
    accelerator.num_processes = 1
    fake = trainer(**settings)
    fake.accelerator = accelerator
    theirs = float(GRPOTrainer._compute_loss(fake, SimpleNamespace(training=True), inputs))

    owners, at = mask.nonzero().T
    ours_lp, ours_old, ours_ref = (x[owners, at] for x in (logprobs, old, reference))
    log_ratio = ours_lp - ours_old
    if level == "sequence":
        log_ratio = losses.sequence_log_ratio(log_ratio, owners, 4)
    policy = losses.clipped_policy_loss(log_ratio, advantages[owners], 0.2, 0.28)
    weights, units = losses.token_weights(torch.tensor(lengths), normalisation, longest)
    ours = float((weights[owners] * (policy + kl_weight * losses.k3(ours_lp, ours_ref))).sum()) / units
    assert ours == pytest.approx(theirs, abs=1e-5)

    clipped = losses.is_clipped(log_ratio, advantages[owners], 0.2, 0.28)
    table = torch.zeros(4, longest)
    table[owners, at] = clipped.float()
    share = (table * mask).sum() / mask.sum()
    if level == "token":
        assert float(share) == pytest.approx(fake._metrics["train"]["clip_ratio/region_mean"][0], abs=1e-6)
    assert 0 < float(share) < 1


def test_where_the_ratio_is_clipped_there_is_no_gradient():
    log_ratio = torch.tensor([0.5, 0.5, -0.5, -0.5, 0.01], requires_grad=True)
    advantages = torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0])
    losses.clipped_policy_loss(log_ratio, advantages, 0.2, 0.2).sum().backward()
    clipped = losses.is_clipped(log_ratio, advantages, 0.2, 0.2)
    assert clipped.tolist() == [True, False, False, True, False]
    assert (log_ratio.grad == 0).tolist() == clipped.tolist()


def test_k3_is_an_unbiased_estimate_of_the_kl():
    """Its expectation under the policy, summed over a vocabulary, is the KL divergence."""
    p, q = (numbers(50, seed=s).double().log_softmax(dim=0) for s in (6, 7))
    kl = (p.exp() * (p - q)).sum()
    assert float((p.exp() * losses.k3(p, q)).sum()) == pytest.approx(float(kl), rel=1e-9)
    assert (losses.k3(p, q) >= 0).all()
    near = p + 1e-4 * numbers(50, seed=8).double()  # for neighbours both are the same
    torch.testing.assert_close(losses.k2(p, near), losses.k3(p, near), atol=1e-11, rtol=0)


def test_gae_is_the_papers_sum():
    rewards, values = numbers(7, seed=8).double(), numbers(7, seed=9).double()
    gamma, lam = 0.9, 0.8
    following = [*values[1:].tolist(), 0.0]
    deltas = [float(rewards[t]) + gamma * following[t] - float(values[t]) for t in range(7)]
    paper = [sum((gamma * lam) ** (k - t) * deltas[k] for k in range(t, 7)) for t in range(7)]
    torch.testing.assert_close(losses.gae(rewards, values, gamma, lam), torch.tensor(paper).double())
    returns = [sum(gamma ** (k - t) * float(rewards[k]) for k in range(t, 7)) for t in range(7)]
    whole = losses.gae(rewards, values, gamma, 1.0) + values  # lambda = 1: the whole return
    torch.testing.assert_close(whole, torch.tensor(returns).double())


def test_a_clipped_value_counts_as_the_worse_of_both():
    old, returns = torch.zeros(3), torch.ones(3)
    values = torch.tensor([0.1, 0.5, 3.0])
    near = torch.tensor([0.1, 0.2, 0.2])
    expected = torch.maximum((values - 1) ** 2, (near - 1) ** 2) / 2
    torch.testing.assert_close(losses.clipped_value_loss(values, old, returns, 0.2), expected)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_divergences_are_torchs_kl_div(temperature):
    student, teacher = (3 * numbers(7, 50, seed=s).double() for s in (10, 11))
    q, p = ((logits / temperature).log_softmax(-1) for logits in (student, teacher))

    def kl_div(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        """KL(first || second) of each row; torch's takes them the other way round."""
        return torch.nn.functional.kl_div(second, first, log_target=True, reduction="none").sum(-1)

    for ours, theirs in (
        (losses.forward_kl(student, teacher, temperature), kl_div(p, q)),
        (losses.reverse_kl(student, teacher, temperature), kl_div(q, p)),
    ):
        torch.testing.assert_close(ours, temperature**2 * theirs, atol=1e-6, rtol=0)
        assert (ours > 0).all()


@pytest.mark.parametrize("divergence", [losses.forward_kl, losses.reverse_kl])
def test_a_student_that_equals_its_teacher_has_nothing_to_learn(divergence):
    student = numbers(7, 50, seed=12).double().requires_grad_()
    loss = divergence(student, student.detach().clone(), 2.0)
    loss.sum().backward()
    assert torch.equal(loss, torch.zeros(7).double())
    torch.testing.assert_close(student.grad, torch.zeros_like(student), atol=1e-15, rtol=0)


def test_forward_kls_gradient_keeps_its_size_at_high_temperature():
    """Hinton et al. 2015, eq. 4: at a high temperature it is (z_i - v_i) / V for logits of mean zero, T^2 included."""
    student, teacher = (x - x.mean() for x in (numbers(50, seed=s).double() for s in (13, 14)))
    student.requires_grad_()
    losses.forward_kl(student, teacher, 1e4).backward()
    torch.testing.assert_close(student.grad, (student.detach() - teacher) / 50, atol=1e-4, rtol=1e-3)
