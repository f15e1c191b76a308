"""Multi-token prediction: besides the next token a model learns to name the one after it, and so on, D tokens further.

With the numbers of DeepSeek-V3's report (arXiv 2412.19437, section 2.2), for depth k = 1 .. D and a text t_1 .. t_T+1:

    h'^k_i    = M_k [RMSNorm(h^(k-1)_i); RMSNorm(Emb(t_i+k))]     (21)  for i = 1 .. T - k; h^0 is the model's own
    h^k_1:T-k = TRM_k(h'^k_1:T-k)                                 (22)  one more layer
    P^k_i+k+1 = OutHead(h^k_i)                                    (23)
    L^k       = -1/T sum_(i=2+k)^(T+1) log P^k_i[t_i]             (24)
    L_MTP     = lambda / D sum_k L^k                              (25)  added to the loss for the next token

Embeddings and head are the model's own. Each depth sees the true tokens up to t_i+k, so the chain of causes is whole:
depth 1 says what follows once the next token is known. For writing, the modules are thrown away, or their guesses are
used as drafts that the model confirms, several tokens a step (speculative decoding, section 5.4.3).

Three things are as in the published checkpoint rather than in the equations: M_k reads the embedding first (only the
order of its columns); each depth has a norm of its own before the shared head; and h^0 is what the model's head reads,
after the last norm, as in the engines that serve the checkpoint (the report leaves that open).

Run it: python -m custom_models.multi_token_prediction
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from custom_models.deepseek import DecoderLayer, DeepSeek, DeepSeekConfig, initialise
from custom_models.layers import RMSNorm
from workflows.errors import UserError, run_file


class PredictionModule(nn.Module):
    """One depth: what was known up to a token, and the token that came k places later, make one state.

    Args:
        config: The decoder's shape.
    """

    def __init__(self, config: DeepSeekConfig) -> None:
        super().__init__()
        self.embedding_norm = RMSNorm(config.width, config.norm_eps)
        self.state_norm = RMSNorm(config.width, config.norm_eps)
        self.join = nn.Linear(2 * config.width, config.width, bias=False)  # M_k
        self.layer = DecoderLayer(config)  # TRM_k, with a mixture of experts
        self.norm = RMSNorm(config.width, config.norm_eps)

    def forward(self, states: Tensor, embedded: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        """Equations 21 and 22.

        Args:
            states: h^(k-1) of the first T - k tokens, (B, T - k, width).
            embedded: The embeddings of the tokens k places later, (B, T - k, width).
            rope: cos and sin for T - k positions.

        Returns:
            h^k, (B, T - k, width), normalised.
        """
        both = torch.cat([self.embedding_norm(embedded), self.state_norm(states)], dim=-1)  # (B, T - k, 2 width)
        return self.norm(self.layer(self.join(both), rope))  # (B, T - k, width)


class MultiTokenPrediction(nn.Module):
    """D prediction modules for a decoder, which they are given at each call, since it is no part of them.

    Args:
        config: The decoder's shape.
        depth: D.

    Raises:
        UserError: If the depth is less than 1.
    """

    def __init__(self, config: DeepSeekConfig, depth: int = 1) -> None:
        super().__init__()
        if depth < 1:
            raise UserError(f"Multi-token prediction needs a depth of at least 1, not {depth}.")
        self.depths = nn.ModuleList(PredictionModule(config) for _ in range(depth))
        self.apply(initialise)

    def forward(self, model: DeepSeek, ids: Tensor, states: Tensor | None = None) -> list[Tensor]:
        """Guess the tokens that follow, the next one and D more.

        Args:
            model: The decoder.
            ids: Token ids t_1 .. t_T, (B, T), T above D.
            states: What `model.states` makes of them, if it is known.

        Returns:
            D + 1 tensors of logits: number k is (B, T - k, vocab_size), and at i names token i + k + 1. Number 0 is the
            decoder's own.

        Raises:
            UserError: If the text is too short or too long, or an id is no token.
        """
        length = ids.shape[1]
        if length <= len(self.depths):
            raise UserError(
                f"{len(self.depths) + 1} tokens at once cannot be predicted from a text of {length}: it needs more "
                f"than {len(self.depths)}. Take longer texts, or a smaller depth."
            )
        h = model.states(ids) if states is None else states  # (B, T, width); h^0
        embedded, logits = model.embed(ids), [model.name(h)]  # (B, T, width), (B, T, vocab_size)
        for k, module in enumerate(self.depths, start=1):
            # Positions begin at 0 at each depth: RoPE knows differences only.
            h = module(h[:, : length - k], embedded[:, k:], model.rope(0, length - k))  # (B, T - k, width)
            logits.append(model.name(h))  # (B, T - k, vocab_size); equation 23
        return logits

    def loss(self, model: DeepSeek, ids: Tensor, weight: float = 0.3) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss for the next token and, weighted, that for those after it.

        Args:
            model: The decoder.
            ids: t_1 .. t_T+1, (B, T + 1).
            weight: lambda; V3 has 0.3, later 0.1 (section 4.2).

        Returns:
            The sum, and each loss: "loss" for the next token, "loss_1" .. "loss_D" for the depths (equation 24).

        Raises:
            UserError: See `forward`.
        """
        logits, length = self(model, ids[:, :-1]), ids.shape[1] - 1  # T
        # t_i for i = 2 + k .. T + 1, where the first token is t_1; divided by T, although there are only T - k of them
        sums = [F.cross_entropy(found.flatten(0, 1), ids[:, k + 1 :].flatten(), reduction="sum")
                for k, found in enumerate(logits)]  # fmt: skip
        losses = torch.stack(sums) / (len(ids) * length)  # (D + 1,); equation 24
        total = losses[0] + weight * losses[1:].mean()  # equation 25
        return total, {"loss" if k == 0 else f"loss_{k}": value.detach() for k, value in enumerate(losses)}


def main(steps: int = 200, depth: int = 2, seed: int = 0, file: Path | None = None) -> None:
    """Train a small decoder to predict several tokens, and see how many of its drafts it would confirm.

    Args:
        steps: Of the training.
        depth: Tokens besides the next one.
        seed: Of the first weights and of the batches.
        file: A UTF-8 text to learn; the definitions of the Human Phenotype Ontology if not given.
    """
    from custom_models.expert_load import LEARNING_RATE, draw, small_config, tokens_of
    from custom_models.mixture_of_experts import balance

    train, held_out = tokens_of(file)
    torch.manual_seed(seed)
    config = small_config()
    model, prediction = DeepSeek(config), MultiTokenPrediction(config, depth)
    parameters, chance = [*model.parameters(), *prediction.parameters()], torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(parameters, LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.1)
    print("step   next token" + "".join(f"   {k} further" for k in range(1, depth + 1)) + "   (training loss)")
    for step in range(1, steps + 1):
        loss, told = prediction.loss(model, draw(train, chance))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        balance(model, 0.003)
        balance(prediction, 0.003)
        if step == 1 or step % max(1, steps // 4) == 0:
            further = "".join(f"{told[f'loss_{k}']:>12.2f}" for k in range(1, depth + 1))
            print(f"{step:>4} {told['loss']:>12.2f}{further}")
    with torch.no_grad():
        own, *drafts = prediction(model, draw(held_out, chance)[:, :-1])  # (B, T, vocab_size), (B, T - k, vocab_size)
    for k, draft in enumerate(drafts, start=1):
        confirmed = own[:, k:].argmax(-1) == draft.argmax(-1)  # (B, T - k)
        share = float(confirmed.float().mean())
        print(f"Held-out text: of the drafts {k} further, the model itself says the same in {share:.0%}.")


if __name__ == "__main__":
    run_file(main)
