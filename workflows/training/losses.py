"""What alignment and distillation minimise: pure functions of log-probabilities, one per equation.

In here: losses of pairs (DPO and its variants), of single labelled answers (KTO), of a reward model (Bradley-Terry),
the parts of a policy-gradient objective (advantages, ratios, clipping, KL, values), which GRPO and PPO put together,
and the divergences between a student's and a teacher's distribution.

Words: the *log-probability* of a completion is the sum over its tokens; *per token* means that sum divided by their
number. A *log-ratio* is log pi(y|x) - log pi_ref(y|x). A *margin* is the chosen answer's log-ratio minus the rejected
one's. Everything is float32 (or float64, in tests); nothing here knows of models or batches.
"""

from typing import Literal

import torch
import torch.nn.functional as F


def per_completion(values: torch.Tensor, owners: torch.Tensor, completions: int) -> torch.Tensor:
    """Sums over each completion's tokens.

    Args:
        values: One number per token, shape (N,).
        owners: The completion that each token belongs to, shape (N,).
        completions: How many completions there are.

    Returns:
        Shape (completions,).
    """
    return values.new_zeros(completions).index_add(0, owners, values)


# Pairs: each function takes one number per pair, shape (pairs,), and returns one loss per pair.


def dpo(margin: torch.Tensor, beta: float, label_smoothing: float = 0.0) -> torch.Tensor:
    """-(1 - e) log sigmoid(beta h) - e log sigmoid(-beta h).

    DPO (Rafailov et al. 2023, arXiv 2305.18290, eq. 7); with label smoothing e, the share of pairs believed to be the
    wrong way round, conservative DPO (Mitchell 2023, https://ericmitchell.ai/cdpo.pdf).

    Args:
        margin: h, shape (pairs,); of log-ratios per token it is the length-normalised variant.
        beta: How dear it is to leave the reference.
        label_smoothing: e, from 0 to below 0.5.
    """
    return -(1 - label_smoothing) * F.logsigmoid(beta * margin) - label_smoothing * F.logsigmoid(-beta * margin)


def robust_dpo(margin: torch.Tensor, beta: float, label_smoothing: float) -> torch.Tensor:
    """DPO's loss, unbiased where a share e of the pairs is the wrong way round.

    (-(1 - e) log sigmoid(beta h) + e log sigmoid(-beta h)) / (1 - 2e) (Chowdhury et al. 2024, arXiv 2403.00409).

    Args:
        margin: h, shape (pairs,).
        beta: As in `dpo`.
        label_smoothing: e, from 0 to below 0.5.
    """
    right, wrong = F.logsigmoid(beta * margin), F.logsigmoid(-beta * margin)
    return (-(1 - label_smoothing) * right + label_smoothing * wrong) / (1 - 2 * label_smoothing)


def ipo(margin: torch.Tensor, beta: float) -> torch.Tensor:
    """(h - 1 / (2 beta))^2 (Azar et al. 2023, arXiv 2310.12036, eq. 17, whose tau is beta).

    Args:
        margin: h, shape (pairs,). The paper's is that of sums; its authors' experiments (and TRL) take it per token.
        beta: The smaller, the wider the margin that is aimed at.
    """
    return (margin - 1 / (2 * beta)).square()


def hinge(margin: torch.Tensor, beta: float) -> torch.Tensor:
    """max(0, 1 - beta h) (SLiC, Zhao et al. 2023, arXiv 2305.10425, with log-ratios as in RSO, Liu et al. 2023,
    arXiv 2309.06657).

    Args:
        margin: h, shape (pairs,).
        beta: As in `dpo`.
    """
    return F.relu(1 - beta * margin)


def simpo(chosen: torch.Tensor, rejected: torch.Tensor, beta: float, gamma: float) -> torch.Tensor:
    """-log sigmoid(beta (c - r) - gamma): no reference (Meng et al. 2024, arXiv 2405.14734, eq. 6).

    Args:
        chosen: c, the chosen answers' log-probabilities per token, shape (pairs,).
        rejected: r, the rejected ones', likewise.
        beta: Scale of the rewards.
        gamma: The margin that is aimed at.
    """
    return -F.logsigmoid(beta * (chosen - rejected) - gamma)


def orpo(chosen: torch.Tensor, rejected: torch.Tensor) -> torch.Tensor:
    """-log sigmoid(log odds(c) - log odds(r)), the odds-ratio part of ORPO (Hong et al. 2024, arXiv 2403.07691, eq. 7).

    ORPO adds `beta` times this to the mean negative log-likelihood of the chosen answers (eq. 6); it has no reference.

    Args:
        chosen: c, the chosen answers' log-probabilities per token, shape (pairs,), below zero.
        rejected: r, the rejected ones', likewise.
    """
    return -F.logsigmoid(_log_odds(chosen) - _log_odds(rejected))


def _log_odds(logprob: torch.Tensor) -> torch.Tensor:
    """log(p / (1 - p)), from log p; 1 - p by expm1, which is exact where p is near one."""
    tiny = torch.finfo(logprob.dtype).tiny
    return logprob - (-torch.expm1(logprob)).clamp_min(tiny).log()


def kto(
    log_ratio: torch.Tensor,
    desirable: torch.Tensor,
    kl: torch.Tensor | float,
    beta: float,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> torch.Tensor:
    """w (1 - sigmoid(beta (r - z))) for good answers, w' (1 - sigmoid(beta (z - r))) for bad ones.

    KTO (Ethayarajh et al. 2024, arXiv 2402.01306, eq. 8).

    Args:
        log_ratio: r, shape (answers,).
        desirable: Whether each answer is a good one, booleans, shape (answers,).
        kl: z, the KL to the reference as answers of other prompts show it, at least 0; no gradient goes through it.
        beta: As in `dpo`.
        desirable_weight: w.
        undesirable_weight: w'.

    Returns:
        One loss per answer, shape (answers,).
    """
    gain = torch.where(desirable, log_ratio - kl, kl - log_ratio)
    weight = torch.where(desirable, desirable_weight, undesirable_weight)
    return weight * (1 - torch.sigmoid(beta * gain))


def bradley_terry(chosen: torch.Tensor, rejected: torch.Tensor) -> torch.Tensor:
    """-log sigmoid(c - r), a reward model's loss (Bradley & Terry 1952; Ouyang et al. 2022, arXiv 2203.02155, eq. 1).

    Args:
        chosen: Rewards of the chosen answers, shape (pairs,).
        rejected: Rewards of the rejected ones, likewise.
    """
    return -F.logsigmoid(chosen - rejected)


def pairs_won(chosen: torch.Tensor, rejected: torch.Tensor) -> torch.Tensor:
    """How many pairs are the right way round, a scalar; a tie is half of one. Both (pairs,)."""
    return (chosen > rejected).float().sum() + (chosen == rejected).float().sum() / 2


# Policy gradients: one number per token, shape (N,), unless said otherwise.

Scale = Literal["group", "none"]
Normalisation = Literal["token", "sequence", "constant"]


def group_advantages(rewards: torch.Tensor, scale: Scale = "group") -> torch.Tensor:
    """How much better each answer is than its group's mean; in units of the group's standard deviation, or as it is.

    GRPO (Shao et al. 2024, arXiv 2402.03300, sec. 4.1.2) divides by the deviation, Dr. GRPO (Liu et al. 2025, arXiv
    2503.20783, sec. 3.2) does not, since that weighs questions by how hard they are.

    Args:
        rewards: Shape (groups, G), G at least 2.
        scale: "group" divides by the group's standard deviation (of a sample: G - 1) plus 1e-4, "none" does not.

    Returns:
        Shape (groups, G); zeros where a group's rewards are all the same.
    """
    advantages = rewards - rewards.mean(dim=1, keepdim=True)
    if scale == "group":
        advantages = advantages / (rewards.std(dim=1, keepdim=True) + 1e-4)
    flat = rewards.amax(dim=1, keepdim=True) == rewards.amin(dim=1, keepdim=True)
    return advantages.masked_fill(flat, 0.0)  # a mean that rounds would leave some noise, divided by 1e-4


def k3(logprobs: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """exp(d) - d - 1 with d = log pi_ref - log pi: an estimate of KL(pi || pi_ref) that is unbiased and never negative.

    Schulman 2020, http://joschu.net/blog/kl-approx.html; GRPO's eq. 4 (arXiv 2402.03300).

    Args:
        logprobs: Of tokens sampled from the policy, shape (N,).
        reference: The reference's of the same tokens, likewise.
    """
    d = reference - logprobs
    return d.exp() - d - 1


def k2(logprobs: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """(log pi - log pi_ref)^2 / 2: how far two policies are apart on given tokens (Schulman 2020, as for `k3`).

    For tokens that neither has sampled, an answer in a data set say: k3's exponential explodes on those.

    Args:
        logprobs: Shape (N,).
        reference: The reference's of the same tokens, likewise.
    """
    return (logprobs - reference).square() / 2


def sequence_log_ratio(log_ratio: torch.Tensor, owners: torch.Tensor, completions: int) -> torch.Tensor:
    """Each token gets its completion's mean log-ratio: GSPO's sequence-level ratio (Zheng et al. 2025, arXiv
    2507.18071, eq. 7).

    Args:
        log_ratio: log pi - log pi_old, shape (N,).
        owners: The completion of each token, shape (N,).
        completions: How many there are.

    Returns:
        Shape (N,).
    """
    lengths = per_completion(torch.ones_like(log_ratio), owners, completions)
    means = per_completion(log_ratio, owners, completions) / lengths.clamp_min(1)
    return means[owners]


def clipped_policy_loss(
    log_ratio: torch.Tensor, advantages: torch.Tensor, clip_low: float, clip_high: float
) -> torch.Tensor:
    """-min(r A, clip(r, 1 - low, 1 + high) A) with r = pi / pi_old.

    PPO (Schulman et al. 2017, arXiv 1707.06347, eq. 7); the separate upper bound is DAPO's clip-higher (Yu et al. 2025,
    arXiv 2503.14476, eq. 10).

    Args:
        log_ratio: log pi - log pi_old, shape (N,).
        advantages: A, shape (N,).
        clip_low: How far below 1 the ratio still counts.
        clip_high: How far above 1.
    """
    ratio = log_ratio.exp()
    return -torch.minimum(ratio * advantages, ratio.clamp(1 - clip_low, 1 + clip_high) * advantages)


def is_clipped(log_ratio: torch.Tensor, advantages: torch.Tensor, clip_low: float, clip_high: float) -> torch.Tensor:
    """Where `clipped_policy_loss` has no gradient any more; booleans, shape (N,)."""
    ratio = log_ratio.exp()
    return ((ratio > 1 + clip_high) & (advantages > 0)) | ((ratio < 1 - clip_low) & (advantages < 0))


def token_weights(lengths: torch.Tensor, normalisation: Normalisation, longest: int) -> tuple[torch.Tensor, int]:
    """What each token of a completion weighs in the objective, and by what the sum over all tokens is divided.

    Args:
        lengths: Learned tokens of every completion, shape (completions,).
        normalisation: "token": every token counts the same (DAPO, arXiv 2503.14476, eq. 12); "sequence": every
            completion does, whatever its length (GRPO, arXiv 2402.03300, eq. 3); "constant": a completion's tokens are
            divided by the longest possible length instead of its own (Dr. GRPO, arXiv 2503.20783).
        longest: The most new tokens that sampling allows.

    Returns:
        The weight of each token of every completion, shape (completions,), and the units of these completions: their
        tokens, or their number. Both add up over the rows and processes of a step.
    """
    if normalisation == "token":
        return torch.ones(len(lengths)), int(lengths.sum())
    if normalisation == "sequence":
        return 1 / lengths.float(), len(lengths)
    return torch.full((len(lengths),), 1 / longest), len(lengths)


def gae(rewards: torch.Tensor, values: torch.Tensor, gamma: float, lam: float) -> torch.Tensor:
    """Generalised advantage estimation over one completion (Schulman et al. 2015, arXiv 1506.02438, eq. 16).

    A_t = sum over l of (gamma lam)^l d_{t+l}, d_t = r_t + gamma V_{t+1} - V_t; nothing follows the last token.

    Args:
        rewards: What each token earned, shape (T,).
        values: The value head's estimate before each token, shape (T,).
        gamma: Discount of later rewards.
        lam: How far to trust rewards over values: 1 takes the whole return, 0 one step.

    Returns:
        Shape (T,). The returns that the value head learns are advantages + values.
    """
    following = torch.cat([values[1:], values.new_zeros(1)])
    deltas = rewards + gamma * following - values
    advantages = torch.empty_like(deltas)
    last = deltas.new_zeros(())
    for t in reversed(range(len(deltas))):
        last = deltas[t] + gamma * lam * last
        advantages[t] = last
    return advantages


def clipped_value_loss(
    values: torch.Tensor, old_values: torch.Tensor, returns: torch.Tensor, clip: float
) -> torch.Tensor:
    """max((V - R)^2, (clip(V, V_old - c, V_old + c) - R)^2) / 2: PPO's loss of the value head.

    As in OpenAI's baselines; Huang et al. 2022, "The 37 Implementation Details of PPO", detail 9.

    Args:
        values: V, shape (N,).
        old_values: V_old, those at sampling, likewise.
        returns: R, likewise.
        clip: c.
    """
    near = old_values + (values - old_values).clamp(-clip, clip)
    return torch.maximum((values - returns).square(), (near - returns).square()) / 2


# Distillation: two models' logits for the same N tokens, (N, V) each; one divergence per token, (N,).


def forward_kl(student: torch.Tensor, teacher: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """T^2 KL(p || q), p and q being the teacher's and the student's softmax at temperature T.

    What Hinton et al. 2015 (arXiv 1503.02531, sec. 2) train with, but for the teacher's entropy, which has no gradient;
    T^2 keeps the gradient's size when T changes (sec. 2.1). The student is to cover all that its teacher holds likely.

    Args:
        student: Logits, shape (N, V).
        teacher: Logits, shape (N, V).
        temperature: T; above 1 the unlikely tokens count for more.

    Returns:
        Shape (N,), in nats.
    """
    log_p, log_q = (teacher / temperature).log_softmax(-1), (student / temperature).log_softmax(-1)  # (N, V)
    return temperature**2 * (log_p.exp() * (log_p - log_q)).sum(-1)


def reverse_kl(student: torch.Tensor, teacher: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """T^2 KL(q || p), q and p being the student's and the teacher's softmax at temperature T.

    MiniLLM's divergence (Gu et al. 2023, arXiv 2306.08543, eq. 1) token by token, after the data's own tokens; the
    paper's is that of whole answers that the student samples. The student is to say nothing that its teacher holds
    unlikely, and may leave out what it has no room for.

    Args:
        student: Logits, shape (N, V).
        teacher: Logits, shape (N, V).
        temperature: T.

    Returns:
        Shape (N,), in nats.
    """
    return forward_kl(teacher, student, temperature)
