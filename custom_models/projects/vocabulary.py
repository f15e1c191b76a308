"""A vocabulary of a project's own: byte-pair encoding, learned from its training texts by `tokenization/bpe.py`."""

from collections.abc import Iterable
from pathlib import Path
from tempfile import TemporaryDirectory

from tokenizers import Tokenizer, normalizers

from custom_models.encoder_checkpoint import tokenizer_of
from custom_models.tokenization import tokenizer_json
from custom_models.tokenization.bpe import SpecialBPE
from workflows.errors import UserError

PAD, MASK, START, END = "<pad>", "<mask>", "<start>", "<end>"


def learn_vocabulary(texts: Iterable[str], size: int, special: Iterable[str] = (PAD, MASK)) -> Tokenizer:
    """Learn a vocabulary of lower-cased text; special tokens have the last ids.

    Every text gets a space before it, so that its first word is the one that it is elsewhere.

    Raises:
        UserError: If the vocabulary is to be smaller than the bytes and the special tokens are, or the texts are too
            few for its size.
    """
    special = list(special)
    if size < 256 + len(special):
        raise UserError(f"A vocabulary has 256 bytes and {len(special)} special tokens; {size} are too few.")
    bpe = SpecialBPE(special)
    bpe.train("".join(f" {text.lower()}\n" for text in texts), size - 256 - len(special))
    with TemporaryDirectory() as folder:
        tokenizer_json.save(bpe, Path(folder) / "tokenizer.json")
        tokenizer = tokenizer_of(Path(folder))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Lowercase(), normalizers.Prepend(" ")])
    return tokenizer
