"""A byte-pair tokenizer as `tokenizer.json`, the file of Hugging Face's `tokenizers` library, which gives the same ids.

The file says in its own words what the ladder's classes do: where a text is cut (`Split` by a pattern), that bytes are
written as visible characters (`ByteLevel`), and the merges.

    python -m custom_models.tokenization.tokenizer_json --out_file out/tokenization/tokenizer.json
"""

from pathlib import Path
from typing import Any

from custom_models import demo
from custom_models.tokenization.bpe import GPT2_PATTERN, GPT4_PATTERN, ByteBPE, RegexBPE, SpecialBPE
from custom_models.tokenization.gpt2_files import merges_by_id, visible
from workflows.errors import UserError, run_file
from workflows.files import read_json, write_json

_BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
_PLAIN = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}


def save(tokenizer: ByteBPE, path: Path) -> None:
    """Write a tokenizer of any rung as `tokenizer.json`.

    `tokenizers` always reads a special token's text as the token: its ids equal those of `encode(special="parse")`.
    Its tables of letters and digits are older than those of `regex`: a pattern may cut beside characters that Unicode
    has had only since version 15 in another way.

    Raises:
        UserError: If there is no room for the file.
    """
    merges = [[visible(tokenizer.vocabulary[token]) for token in pair] for pair in tokenizer.merges]
    vocabulary = {visible(token): i for i, token in enumerate(tokenizer.vocabulary[: 256 + len(merges)])}
    special = tokenizer.special_tokens if isinstance(tokenizer, SpecialBPE) else {}
    cut: dict[str, Any] = _BYTE_LEVEL
    if isinstance(tokenizer, RegexBPE):
        words = {"type": "Split", "pattern": {"Regex": tokenizer.pattern}, "behavior": "Isolated", "invert": False}
        cut = {"type": "Sequence", "pretokenizers": [words, _BYTE_LEVEL]}
    model = {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": False,
        "vocab": vocabulary,
        "merges": merges,
    }
    file = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": i, "content": text, **_PLAIN} for text, i in special.items()],
        "normalizer": None,
        "pre_tokenizer": cut,
        "post_processor": None,
        "decoder": _BYTE_LEVEL,
        "model": model,
    }
    write_json(path, file)


def load(path: Path) -> ByteBPE:
    """Read a `tokenizer.json` of the kind that `save` writes.

    Args:
        path: The file.

    Returns:
        A tokenizer of the lowest rung that has all of it.

    Raises:
        UserError: If the file is missing or malformed, or does something that the ladder's classes do not.
    """
    file = read_json(path)
    try:
        model, cut, added = file["model"], file["pre_tokenizer"], file["added_tokens"]
        pattern = _pattern(cut)
        foreign = [key for key in ("normalizer", "truncation", "padding") if file.get(key) is not None]
        foreign += [key for key in ("dropout", "byte_fallback", "ignore_merges", "unk_token") if model.get(key)]
        if model["type"] != "BPE" or foreign:
            raise UserError(f"{path}: not plain byte-pair encoding ({', '.join(foreign) or model['type']}).")
        merges = [tuple(pair.split(" ") if isinstance(pair, str) else pair) for pair in model["merges"]]
        special = {token["content"]: token["id"] for token in added}
        ordinary = {token: number for token, number in model["vocab"].items() if token not in special}
        byte_ids, pairs = merges_by_id(ordinary, [(first, second) for first, second in merges], str(path))
    except (KeyError, TypeError, ValueError, AttributeError) as e:
        raise UserError(f"{path} is not a tokenizer.json of byte-pair encoding ({type(e).__name__}: {e}).") from None
    texts = sorted(special, key=special.__getitem__)
    if [special[text] for text in texts] != list(range(256 + len(pairs), 256 + len(pairs) + len(texts))):
        raise UserError(f"{path}: the special tokens' ids do not follow the merges'. Only such files are read.")
    if pattern is None:
        if special:
            raise UserError(f"{path}: special tokens, but no pattern that cuts the text. Such files are not read.")
        return ByteBPE(pairs, byte_ids)
    return SpecialBPE(texts, pattern, pairs, byte_ids) if special else RegexBPE(pattern, pairs, byte_ids)


def _pattern(cut: dict[str, Any]) -> str | None:
    """The pattern that cuts the text, None if nothing does.

    Raises:
        ValueError: If it is cut in another way.
    """
    *before, last = cut["pretokenizers"] if cut["type"] == "Sequence" else [cut]
    if last["type"] == "ByteLevel" and not last["add_prefix_space"]:
        by_itself = last.get("use_regex", True)  # cut by GPT-2's pattern, which is built in there
        if not before:
            return GPT2_PATTERN if by_itself else None
        split = before[0]
        as_ours = split["type"] == "Split" and split["behavior"] == "Isolated" and not split["invert"]
        if len(before) == 1 and as_ours and not by_itself:
            return str(split["pattern"]["Regex"])
    raise ValueError("its pre_tokenizer is neither ByteLevel nor Split and ByteLevel")


def main(
    out_file: Path = Path("out/tokenization/tokenizer.json"),
    file: Path | None = None,
    merges: int = 1024,
    text: str = "An abnormality of the liver<|endoftext|>",
) -> None:
    """Train a tokenizer, save it, and see that the `tokenizers` library gives the same ids.

    Args:
        out_file: Where to write it.
        file: The text to learn from; default: the definitions of the Human Phenotype Ontology.
        merges: How many merges to learn.
        text: What to encode.
    """
    from tokenizers import Tokenizer

    tokenizer = SpecialBPE(["<|endoftext|>"], GPT4_PATTERN)
    learned_from = demo.read(file)
    tokenizer.train(learned_from, merges)
    save(tokenizer, out_file)
    theirs = Tokenizer.from_file(str(out_file))
    ids = tokenizer.encode(text, special="parse")
    print(f"{out_file}: {len(tokenizer):,} tokens")
    print(f"ours        {ids}\ntokenizers  {theirs.encode(text).ids}")
    lines = learned_from.splitlines()
    equal = sum(tokenizer.encode(line, special="parse") == theirs.encode(line).ids for line in lines)
    print(f"equal on {equal:,} of {len(lines):,} lines of the text")


if __name__ == "__main__":
    run_file(main)
