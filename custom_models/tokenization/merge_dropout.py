"""BPE-dropout: in training a word comes in ever other pieces, so that a model learns what the pieces mean.

    0%     hepat ot ox ic ity
    30%    he p at ot ox ic ity      hepat ot ox ic ity      h ep at ot ox ic ity

Each time that a merge could be made it is left out with some probability; with none the pieces are the vocabulary's own
(Provilkov et al. 2019, arXiv 1910.13267, algorithm 1). `tokenizers` knows it, too, but draws from a source of its own
that cannot be seeded.

Run it: python -m custom_models.tokenization.merge_dropout --text hepatotoxicity
"""

import json
import random
from itertools import pairwise

from tokenizers import Tokenizer

from workflows.errors import UserError, run_file


class MergeDropout:
    """A tokenizer's byte-pair merges, some of which are left out.

    Args:
        tokenizer: A byte-level BPE of `tokenizers`.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self._id_of: dict[str, int] = tokenizer.get_vocab()
        merges = json.loads(tokenizer.to_str())["model"]["merges"]
        self._rank_of = {tuple(pair): rank for rank, pair in enumerate(merges)}

    def ids_of(self, text: str, left_out: float, chance: random.Random) -> list[int]:
        """A text's tokens; special tokens in it are not seen as such.

        Args:
            text: The text.
            left_out: The probability that a merge is left out where it could be made.
            chance: Decides which.
        """
        if self.tokenizer.normalizer is not None:
            text = self.tokenizer.normalizer.normalize_str(text)
        words = self.tokenizer.pre_tokenizer.pre_tokenize_str(text)
        return [i for word, _ in words for i in self._pieces(word, left_out, chance)]

    def _pieces(self, word: str, left_out: float, chance: random.Random) -> list[int]:
        """A word's tokens: again and again the first merge of those that are not left out this time."""
        pieces = list(word)
        while True:
            ranks = [(self._rank_of[pair], i) for i, pair in enumerate(pairwise(pieces))
                     if pair in self._rank_of and chance.random() >= left_out]  # fmt: skip
            if not ranks:
                return [self._id_of[piece] for piece in pieces]
            _, i = min(ranks)
            pieces[i : i + 2] = [pieces[i] + pieces[i + 1]]


def main(text: str = "hepatotoxicity", vocab_size: int = 4000, seed: int = 1) -> None:
    """Learn a vocabulary from definitions, and cut a text with ever more of its merges left out.

    Args:
        text: The text.
        vocab_size: Of the vocabulary.
        seed: Decides which merges.

    Raises:
        UserError: If there is no text.
    """
    from custom_models import demo
    from custom_models.projects.vocabulary import learn_vocabulary

    if not text.strip():
        raise UserError('There is nothing to cut. Give a text: --text "hepatotoxicity"')
    tokenizer = learn_vocabulary(demo.read(None).splitlines(), vocab_size)
    pieces, chance = MergeDropout(tokenizer), random.Random(seed)
    for left_out in (0.0, 0.1, 0.3, 0.6):
        ways = [pieces.ids_of(text, left_out, chance) for _ in range(1 if not left_out else 4)]
        shown = (" ".join(tokenizer.decode([i]).strip() for i in ids).strip() for ids in ways)
        print(f"{left_out:>4.0%}    {'      '.join(shown)}")


if __name__ == "__main__":
    run_file(main)
