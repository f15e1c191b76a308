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


def learn_vocabulary(
    texts: Iterable[str], size: int, special: Iterable[str] = (PAD, MASK), as_written: bool = False
) -> Tokenizer:
    """Learn a vocabulary; special tokens have the last ids.

    Every text is lower-cased and gets a space before it, so that its first word is the one that it is elsewhere.

    Args:
        texts: What to learn from.
        size: Of the vocabulary.
        special: Its special tokens; where they stand in a text, nothing is learned from them.
        as_written: Whether texts stay as they are, so that they can be written again from their tokens.

    Raises:
        UserError: If the vocabulary is to be smaller than the bytes and the special tokens are, or the texts are too
            few for its size.
    """
    special = list(special)
    if size < 256 + len(special):
        raise UserError(f"A vocabulary has 256 bytes and {len(special)} special tokens; {size} are too few.")
    bpe = SpecialBPE(special)
    written = texts if as_written else (f" {text.lower()}" for text in texts)
    bpe.train("".join(f"{text}\n" for text in written), size - 256 - len(special))
    with TemporaryDirectory() as folder:
        tokenizer_json.save(bpe, Path(folder) / "tokenizer.json")
        tokenizer = tokenizer_of(Path(folder))
    if not as_written:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Lowercase(), normalizers.Prepend(" ")])
    return tokenizer
