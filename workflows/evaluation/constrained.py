"""Which option a model writes when it may write nothing else: LitGPT's side of what a server does under a grammar.

Ollama's API scores no given text: 0.9.3 shows no log-probabilities at all, later versions those of what the model
itself writes. What every version can do is to hold an answer to a JSON schema. `{"enum": [options]}` leaves the
options, each in quotation marks, and at temperature 0 the model takes at each step the likeliest of the tokens that
still lead to one of them. This is that, step by step, over LitGPT's logits, so that both sides measure the same.

It is not `make evaluate`'s `acc`, which sums the log-probabilities of each whole option: here the first tokens decide.
"""

import functools
import json
from collections.abc import Sequence
from typing import Any

import torch
from tokenizers import Tokenizer

from workflows.chat_template import ChatTemplate
from workflows.errors import UserError
from workflows.progress import Bar
from workflows.training.model import GPT

_SPACES = (b" ", b"\n", b"\n ", b"\n\t", b"\n\n")
"""White space that the grammar allows after the closing quotation mark; what a token may end with."""


_UNSPEAKABLE = str.maketrans({'"': "'", "\\": "/", "\n": " ", "\r": " ", "\t": " "})
"""llama.cpp's grammars (Ollama 0.9.3) escape no backslash, so that what JSON escapes makes a schema fail."""


def enum_of(options: Sequence[str]) -> dict[str, Any]:
    """The JSON schema of an answer that is one of these texts, as `speakable` has them.

    Raises:
        UserError: If two of them are then the same.
    """
    texts = [speakable(option) for option in options]
    if len(set(texts)) < len(texts):
        raise UserError(f"The options {', '.join(map(repr, options))} differ in quotation marks or white space only.")
    return {"type": "string", "enum": texts}


def speakable(option: str) -> str:
    """An option without quotation marks, backslashes and line breaks, which a grammar of Ollama's cannot hold."""
    return option.translate(_UNSPEAKABLE)


def written(option: str) -> str:
    """An option as the grammar has it."""
    return json.dumps(speakable(option), ensure_ascii=False)


@torch.no_grad()
def choose_options(
    model: GPT, template: ChatTemplate, prompts: Sequence[str], options: Sequence[Sequence[str]], progress: bool = True
) -> list[int]:
    """The option that a model writes after each prompt.

    Args:
        model: From `load_model`.
        template: Its template and tokenizer.
        prompts: Rendered conversations, up to where the answer begins.
        options: For each prompt the texts to choose from, all different.
        progress: Show a progress bar.

    Returns:
        For each prompt the index of the option.

    Raises:
        UserError: If a prompt and its options do not fit into the model's context.
    """
    model.eval()
    vocabulary = token_bytes(template.tokenizer)
    chosen = []
    asked = list(zip(prompts, options, strict=True))
    for prompt, texts in Bar(asked, desc="LitGPT", unit="question", leave=False, disable=not progress):
        ids = template.encode(prompt)
        left = {i: written(text).encode() for i, text in enumerate(texts)}  # what is still to be written of each
        if len(ids) + max(map(len, left.values())) > model.max_seq_length:
            raise UserError(
                f"A question is longer than the model's context of {model.max_seq_length}: {prompt[:80]!r}."
            )
        while len(left) > 1:
            allowed = _allowed(vocabulary, left.values())
            token, *others = allowed
            if others:
                logits = model(torch.tensor([ids], device=model.transformer.wte.weight.device))[0, -1]  # (vocab,)
                candidates = torch.tensor([token, *others], device=logits.device)
                token = int(candidates[logits[candidates].argmax()])
            piece = allowed[token]
            left = {i: rest[len(piece) :] for i, rest in left.items() if _continues(rest, piece)}
            ids.append(token)
        chosen.append(next(iter(left)))
    return chosen


def _continues(rest: bytes, piece: bytes) -> bool:
    """Whether what is left of an option begins with a token's bytes, or ends in them."""
    return rest.startswith(piece) or (piece.startswith(rest) and not piece[len(rest) :].strip())


def _allowed(vocabulary: dict[bytes, int], rests: Any) -> dict[int, bytes]:
    """The tokens that lead on to one of the options, with their bytes."""
    pieces = {rest[:end] for rest in rests for end in range(1, len(rest) + 1)}
    pieces |= {rest + space for rest in rests for space in _SPACES}
    return {vocabulary[piece]: piece for piece in pieces if piece in vocabulary}


def token_bytes(tokenizer: Tokenizer) -> dict[bytes, int]:
    """The id of each token by the bytes that it stands for; special tokens, which stand for no text, are left out."""
    special = set(tokenizer.get_added_tokens_decoder())
    byte_of = _byte_of_character()
    vocabulary = {}
    for text, token_id in tokenizer.get_vocab().items():
        if token_id not in special and all(character in byte_of for character in text):
            vocabulary[bytes(byte_of[character] for character in text)] = token_id
    return vocabulary


@functools.cache
def _byte_of_character() -> dict[str, int]:
    """How byte-level BPE writes bytes (Radford et al. 2019): printable ones as themselves, others from U+0100 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}
