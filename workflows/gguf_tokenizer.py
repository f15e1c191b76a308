"""A Hugging Face tokenizer from the tokens, merges and types inside a GGUF file.

Only byte-level BPE ("gpt2" in llama.cpp's words), with the pre-tokenizers of the Llama 3, SmolLM and Qwen2 families.
llama.cpp identifies a pre-tokenizer by a name and keeps the regular expression in its code (`llama-vocab.cpp`); the
expressions below are those.
"""

from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from workflows.errors import UserError

_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED = 1, 3, 4, 5  # llama.cpp's llama_token_type

CONTRACTIONS = "(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
LLAMA3_SPLIT = CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
QWEN2_SPLIT = LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")
_SPLITS = {"llama-bpe": LLAMA3_SPLIT, "qwen2": QWEN2_SPLIT, "deepseek-r1-qwen": QWEN2_SPLIT}
_PRE_TOKENIZERS = ("smollm", *_SPLITS)
_ADDS_BOS = ("llama-bpe",)
"""Pre-tokenizers for which llama.cpp adds a BOS token unless the file says otherwise."""


def build_tokenizer(fields: dict[str, Any], place: str) -> tuple[str, dict[str, Any]]:
    """Build `tokenizer.json` and `tokenizer_config.json`.

    Args:
        fields: The GGUF's metadata, `tokenizer.ggml.*` among it.
        place: The file, for messages.

    Returns:
        The text of `tokenizer.json` and the contents of `tokenizer_config.json`.

    Raises:
        UserError: If a field is missing, or the tokenizer is of a kind that we do not know.
    """
    needed = ("model", "pre", "tokens", "token_type", "merges", "eos_token_id")
    missing = [f"tokenizer.ggml.{key}" for key in needed if f"tokenizer.ggml.{key}" not in fields]
    if "tokenizer.ggml.model" in fields and (model := fields["tokenizer.ggml.model"]) != "gpt2":
        raise UserError(f"{place}: its tokenizer is of the kind {model!r}; only byte-level BPE ('gpt2') is supported.")
    if missing:
        raise UserError(f"{place} lacks {', '.join(missing)}: it was converted by too old a tool. Get a newer GGUF.")
    pre = fields["tokenizer.ggml.pre"]
    if pre not in _PRE_TOKENIZERS:
        raise UserError(
            f"{place}: the pre-tokenizer {pre!r} is not supported (known: {', '.join(_PRE_TOKENIZERS)}). "
            "Download the model in Hugging Face's form instead, which carries its tokenizer.json."
        )
    tokens: list[str] = fields["tokenizer.ggml.tokens"]
    types: list[int] = fields["tokenizer.ggml.token_type"]
    if len(tokens) != len(types):
        raise UserError(f"{place}: {len(tokens)} tokens but {len(types)} token types; the file is damaged.")

    tokenizer = _bpe(tokens, types, fields["tokenizer.ggml.merges"], pre, place)
    bos, eos, unk, pad = (
        _token(tokens, fields.get(f"tokenizer.ggml.{role}_token_id")) for role in ("bos", "eos", "unknown", "padding")
    )
    if fields.get("tokenizer.ggml.add_bos_token", pre in _ADDS_BOS) and bos is not None:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[bos, "$A"],
            pair=[bos, "$A", bos, "$B"],
            special_tokens=[(bos, fields["tokenizer.ggml.bos_token_id"])],
        )
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": bos,
        "eos_token": eos,
        "unk_token": unk,
        "pad_token": pad,
        "clean_up_tokenization_spaces": False,
    }
    return tokenizer.to_str(pretty=True), config


def _bpe(tokens: list[str], types: list[int], merges: list[str], pre: str, place: str) -> Tokenizer:
    # Unused ids only fill the embedding matrix up to a round number of rows; no text may become one of them.
    vocab = {token: i for i, token in enumerate(tokens) if types[i] != _UNUSED}
    pairs = [(left, right) for left, _, right in (merge.partition(" ") for merge in merges)]
    try:
        # Llama 3 takes a word that is in the vocabulary whole, even where its merges would end elsewhere.
        model = models.BPE(vocab, pairs, ignore_merges=pre == "llama-bpe")
    except Exception as e:  # tokenizers raises bare Exception for a merge of tokens that it does not know
        raise UserError(f"{place}: its merges do not fit its tokens ({e}); the file is damaged.") from None
    tokenizer = Tokenizer(model)
    if pre == "smollm":
        steps = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    else:
        split = pre_tokenizers.Split(Regex(_SPLITS[pre]), behavior="isolated")
        steps = [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    if pre in ("qwen2", "deepseek-r1-qwen"):
        tokenizer.normalizer = normalizers.NFC()  # as in the models' own tokenizer.json; llama.cpp leaves it out
    tokenizer.decoder = decoders.ByteLevel()
    added = [
        AddedToken(tokens[i], special=kind == _CONTROL, normalized=False)
        for i, kind in enumerate(types)
        if kind in (_CONTROL, _USER_DEFINED)
    ]
    tokenizer.add_tokens(added)
    return tokenizer


def _token(tokens: list[str], token_id: int | None) -> str | None:
    return tokens[token_id] if token_id is not None and 0 <= token_id < len(tokens) else None
