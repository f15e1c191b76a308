"""`make attention-map TEXT="…"`: what each head of a real model looks at, as one picture.

A row of squares for each layer, a square for each head; in a square, row i shows how token i shares out its attention.
Heads that look at the next or the previous token are diagonals beside the middle; a bright column is a token that many
look at, often the first, the last or the full stop, where a head has nothing to do (Clark et al. 2019, arXiv
1906.04341).
"""

from pathlib import Path

import torch
from torch import Tensor

from custom_models.encoder_checkpoint import encoder_directory, load_encoder, tokenizer_of
from workflows.errors import UserError
from workflows.files import atomic_file

_MOST_TOKENS = 64
"""Squares of more tokens than this show nothing at the size of a page."""


def setup(
    text: str = "The patient has a fever, but no cough.",
    encoder: str = "minilm",
    out_file: Path = Path("out/attention-map/heads.png"),
) -> None:
    """Draw the attention of all heads for a text.

    Args:
        text: What the model reads.
        encoder: "minilm", the folder of an encoder, or the id of a BERT, RoBERTa or DistilBERT on the Hub.
        out_file: The picture.

    Raises:
        UserError: If the text is empty or too long, or the encoder cannot be had.
    """
    directory = encoder_directory(encoder)
    model, encoded = load_encoder(directory).eval(), tokenizer_of(directory).encode(text)
    if not text.strip() or not encoded.ids:
        raise UserError('There is nothing to attend to in an empty text: make attention-map TEXT="…".')
    if len(encoded.ids) > _MOST_TOKENS:
        raise UserError(f"The text has {len(encoded.ids)} tokens; a picture of the heads takes {_MOST_TOKENS} at most.")
    with torch.no_grad():
        weights = torch.stack(model(torch.tensor([encoded.ids]), return_weights=True).weights)[:, 0]
    draw_heads(weights, encoded.tokens, out_file, f"{directory.name}: {text}")
    kinds = {
        "the previous token": weights.diagonal(-1, -2, -1).mean(-1),
        "itself": weights.diagonal(0, -2, -1).mean(-1),
        "the next token": weights.diagonal(1, -2, -1).mean(-1),
        "the first token": weights[..., 0].mean(-1),
        "the last token": weights[..., -1].mean(-1),
    }  # each (n_layer, n_head); fmt: skip
    print(
        f"{weights.shape[0]} layers of {weights.shape[1]} heads, {len(encoded.ids)} tokens. The heads that look most at"
    )
    for kind, shares in kinds.items():
        layer, head = divmod(int(shares.argmax()), shares.shape[1])
        print(f"  {kind:<19} layer {layer + 1}, head {head + 1}: {float(shares.max()):.0%} of its attention")
    print(out_file)


def draw_heads(weights: Tensor, tokens: list[str], file: Path, title: str) -> None:
    """Draw a square for each head.

    Args:
        weights: (n_layer, n_head, T, T); each row sums to 1.
        tokens: The T tokens.
        file: The picture.
        title: Above it.
    """
    from matplotlib.figure import Figure

    n_layer, n_head, length, _ = weights.shape
    side = max(1.1, 0.11 * length)  # inches
    figure = Figure(figsize=(n_head * side + 1.2, n_layer * side + 1.4), layout="constrained")
    squares = figure.subplots(n_layer, n_head, squeeze=False)
    for layer in range(n_layer):
        for head in range(n_head):
            axes = squares[layer][head]
            axes.imshow(weights[layer, head], cmap="magma", vmin=0, vmax=1)
            axes.set_xticks(range(length), tokens if layer == n_layer - 1 else [], rotation=90, fontsize=6)
            axes.set_yticks(range(length), tokens if head == 0 else [], fontsize=6)
            axes.tick_params(length=0)
            if layer == 0:
                axes.set_title(f"head {head + 1}", fontsize=8)
            if head == n_head - 1:
                axes.yaxis.set_label_position("right")
                axes.set_ylabel(f"layer {layer + 1}", fontsize=8)
    figure.suptitle(title, fontsize=10)
    figure.supylabel("from this token", fontsize=8)
    figure.supxlabel("to that token", fontsize=8)
    with atomic_file(file) as temporary:
        figure.savefig(temporary, dpi=130)
