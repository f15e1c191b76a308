"""A `tokenizer.json` in GGUF's terms: tokens, types, merges, and the name of the pre-tokenizer in llama.cpp."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gguf import TokenType

from workflows.errors import UserError
from workflows.files import read_json
from workflows.gguf_tokenizer import CONTRACTIONS, LLAMA3_SPLIT, QWEN2_SPLIT

_HF_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
"""Hugging Face's spelling of llama.cpp's `CONTRACTIONS`."""


@dataclass(frozen=True)
class GGUFTokenizer:
    """What `tokenizer.ggml.*` holds.

    Attributes:
        pre: llama.cpp's name of the pre-tokenizer.
        tokens: Text of every id; bytes outside printable ASCII are written as byte-level BPE does.
        types: `gguf.TokenType` of every id.
        merges: `LEFT RIGHT`, first is applied first.
    """

    pre: str
    tokens: list[str]
    types: list[int]
    merges: list[str]


def read_tokenizer(file: Path, vocab_size: int) -> GGUFTokenizer:
    """Read a byte-level BPE tokenizer.

    Args:
        file: `tokenizer.json`.
        vocab_size: Rows of the embedding; ids without a token are filled with unused ones, added tokens without a row
            are left out.

    Raises:
        UserError: If llama.cpp has no tokenizer that gives the same ids, as far as the file tells.
    """
    data = read_json(file)
    try:
        model = data["model"]
        pre = pre_tokenizer_name(data)
        texts: dict[int, str] = {token_id: text for text, token_id in model["vocab"].items()}
        types = dict.fromkeys(texts, TokenType.NORMAL)
        for added in data.get("added_tokens") or []:
            if added["id"] >= vocab_size and added["id"] not in texts:
                continue  # no row of the embedding: the model cannot read this token anyway
            texts[added["id"]] = added["content"]
            types[added["id"]] = TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED
        merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    except (KeyError, TypeError, AttributeError) as e:
        raise UserError(
            f"{file} is not a complete byte-level BPE tokenizer ({e!r}). Download the model again."
        ) from None
    except ValueError as e:
        raise UserError(f"{file}: {e}") from None
    if max(texts, default=0) >= vocab_size:
        raise UserError(
            f"{file} has the token id {max(texts)}, but the model only {vocab_size} embeddings: they do not belong "
            "together. Download the model again."
        )
    ids = range(vocab_size)
    return GGUFTokenizer(
        pre,
        [texts.get(i, f"[PAD{i}]") for i in ids],
        [int(types.get(i, TokenType.UNUSED)) for i in ids],
        merges,
    )


def pre_tokenizer_name(data: dict[str, Any]) -> str:
    """llama.cpp's name for the way a tokenizer splits text into words, recognised by its definition.

    Args:
        data: The contents of `tokenizer.json`.

    Raises:
        ValueError: If llama.cpp has no such pre-tokenizer that we know.
    """
    model = data["model"]
    if model.get("type") != "BPE" or model.get("byte_fallback"):
        raise ValueError(
            "only byte-level BPE tokenizers can be exported to GGUF (Llama 3, SmolLM2, Qwen2, GPT-2), not "
            f"{'SentencePiece ones' if model.get('byte_fallback') else model.get('type')}"
        )
    if (normalizer := (data.get("normalizer") or {}).get("type")) not in (None, "NFC"):
        raise ValueError(f"llama.cpp cannot normalize text as this tokenizer does ({normalizer})")
    steps = data.get("pre_tokenizer") or {}
    steps = steps["pretokenizers"] if steps.get("type") == "Sequence" else [steps]
    ignore_merges = bool(model.get("ignore_merges"))
    for name, (wants_ignore_merges, matches) in _KNOWN.items():
        if wants_ignore_merges == ignore_merges and matches(steps):
            return name
    raise ValueError(
        "its pre-tokenizer is none of those that llama.cpp and this project know "
        f"({', '.join(_KNOWN)}): {json.dumps(data.get('pre_tokenizer'), ensure_ascii=False)[:300]}"
    )


def _is_byte_level(step: dict[str, Any], use_regex: bool) -> bool:
    return (
        step.get("type") == "ByteLevel"
        and not step.get("add_prefix_space", True)
        and step.get("use_regex", True) == use_regex
    )


def _split_by(pattern: str) -> Callable[[list[dict[str, Any]]], bool]:
    spellings = (pattern, pattern.replace(CONTRACTIONS, _HF_CONTRACTIONS))

    def matches(steps: list[dict[str, Any]]) -> bool:
        return (
            len(steps) == 2
            and steps[0].get("type") == "Split"
            and steps[0]["pattern"].get("Regex") in spellings
            and steps[0].get("behavior") == "Isolated"
            and not steps[0].get("invert")
            and _is_byte_level(steps[1], use_regex=False)
        )

    return matches


def _is_gpt2(steps: list[dict[str, Any]]) -> bool:
    return len(steps) == 1 and _is_byte_level(steps[0], use_regex=True)


def _is_smollm(steps: list[dict[str, Any]]) -> bool:
    digits = len(steps) == 2 and steps[0].get("type") == "Digits" and steps[0].get("individual_digits")
    return bool(digits) and _is_byte_level(steps[1], use_regex=True)


# R1-Distill-Qwen's own name in llama.cpp, deepseek-r1-qwen, means the same splits as qwen2; R1-Distill-Llama's are
# Llama 3's. The boolean: whether a word that is a token as a whole is taken without merging.
_KNOWN: dict[str, tuple[bool, Callable[[list[dict[str, Any]]], bool]]] = {
    "smollm": (False, _is_smollm),
    "llama-bpe": (True, _split_by(LLAMA3_SPLIT)),
    "qwen2": (False, _split_by(QWEN2_SPLIT)),
    "gpt-2": (False, _is_gpt2),
}
