"""Learning byte-pair merges (Sennrich et al. 2016, arXiv 1508.07909) with tensors that count and update.

The textbook loop counts all pairs of neighbours in the whole text, merges the most frequent one everywhere, and begins
again. Here a text is its unique words, each with the number of times it occurs, and these lie one after the other in
one tensor. Each position knows which pair starts there; a table holds each pair's count and places. A merge changes the
positions that hold the merged pair and their left neighbours, nothing else. All pairs that arise contain the new token,
so they get new rows of the table: no pair is ever looked up, and no place is added to a row that there is.

    tokens      |  l  o  w  |  l  o  w  e  r  |    a separator before and after each word
    pair_at     .  1  2  .  .  1  2  3  4  .       row of the pair that starts here; one with a separator never counts
    counts      .  7  7  2  2                      "low" five times, "lower" twice

    python -m custom_models.tokenization.bpe_training --merges 1024
"""

import time
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from custom_models import demo
from workflows.errors import UserError, run_file


def learn_merges(words: Mapping[bytes, int], merges: int) -> list[tuple[int, int]]:
    """Learn merges of byte pairs within words.

    Ties: of equally frequent pairs the one that occurs first in the text is merged, as minbpe does (Python's `max` over
    a dict filled in reading order). In a run of one token, `aaa`, the pair `aa` counts twice, as it does there, and
    merges from the left.

    It runs on one thread: the tensors are small, and waking a second thread takes longer than it saves (1 MB and 1,024
    merges on two cores, one of them busy: 0.3 to 0.5 s, with two threads 1.1 to 1.2 s).

    Args:
        words: The text's words, in the order of their first occurrence, with how often each occurs.
        merges: How many merges to learn.

    Returns:
        The pairs in the order in which they were merged. Ids below 256 are bytes; merge i makes token 256 + i.

    Raises:
        UserError: If the text has fewer pairs to merge than that.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return _learn(_Pairs(words, merges), merges)
    finally:
        torch.set_num_threads(threads)


def _learn(pairs: "_Pairs", merges: int) -> list[tuple[int, int]]:
    learned: list[tuple[int, int]] = []
    for token in range(256, 256 + merges):
        row = pairs.most_frequent()
        if row is None:
            raise UserError(
                f"The text is too short for {merges:,} merges: after {len(learned):,} each word is one token. "
                f"Ask for at most {len(learned):,}, or give a longer text."
            )
        learned.append(pairs.merge(row, token))
    return learned


class _Pairs:
    """All neighbouring pairs of a text and their counts, kept up to date from merge to merge."""

    def __init__(self, words: Mapping[bytes, int], merges: int) -> None:
        self.separator = 256 + merges
        self.removed = -1
        self.base = self.separator + 1  # ids are below it; a pair is one number, left * base + right
        lengths = torch.tensor([len(word) for word in words], dtype=torch.int64)  # (W,)
        often = torch.tensor(list(words.values()), dtype=torch.int64)  # (W,)
        flat = torch.frombuffer(bytearray(b"".join([*words, b"."])), dtype=torch.uint8)[
            :-1
        ]  # (N,) "." as none is refused
        number = torch.repeat_interleave(torch.arange(len(lengths)), lengths)  # (N,) which word a byte belongs to
        place = torch.arange(len(flat)) + number + 1  # (N,) one separator before each word

        size = len(flat) + len(lengths) + 1  # P
        self.tokens = torch.full((size,), self.separator)  # (P,)
        self.tokens[place] = flat.long()
        self.weight = torch.zeros(size, dtype=torch.int64)  # (P,) how often the word occurs; a separator counts nothing
        self.weight[place] = often[number]
        self.next = torch.arange(1, size + 1)  # (P,) neighbours: those beside it, until merges remove some
        self.previous = torch.arange(-1, size - 1)  # (P,)

        self.pair_at = torch.zeros(size, dtype=torch.int64)  # (P,)
        none = torch.zeros(1, dtype=torch.int64)  # row 0 stands for no pair
        self.codes, self.counts = _Column(none), _Column(none)  # (rows,)
        # A row's positions, ascending, are places[starts[row]:ends[row]]; some may have another pair by now. As all
        # pairs of a row arise in one merge, none is ever added.
        self.starts, self.ends = _Column(none), _Column(none)  # (rows,)
        self.places = _Column(none[:0])
        self._count_new(torch.arange(size - 1))

    def _count_new(self, at: Tensor) -> None:
        """Give the pairs that start at these positions, ascending, rows of their own; none of them may have one yet."""
        codes, order = (self.tokens[at] * self.base + self.tokens[self.next[at]]).sort(stable=True)
        at = at[order]
        codes, row, sizes = torch.unique_consecutive(codes, return_inverse=True, return_counts=True)
        counts = torch.zeros_like(codes).index_add_(0, row, self.weight[at])
        counts[codes % self.base == self.separator] = 0  # the last token of a word has no pair
        self.pair_at[at] = row + self.counts.size
        ends = sizes.cumsum(0) + self.places.size
        self.codes.append(codes)
        self.counts.append(counts)
        self.starts.append(ends - sizes)
        self.ends.append(ends)
        self.places.append(at)

    def most_frequent(self) -> int | None:
        """The row of the most frequent pair, the first in the text of several; None if there is no pair left."""
        counts, places, starts = self.counts.values, self.places.values, self.starts.values
        most = counts.max()
        if most <= 0:
            return None
        best = (counts == most).nonzero().squeeze(1)  # (ties,)
        if len(best) == 1:
            return int(best)
        while True:  # the first place of each is where it was, or further on
            row = best[places[starts[best]].argmin()]
            if self.pair_at[places[starts[row]]] == row:
                return int(row)
            still = self.pair_at[places[starts[row] : self.ends.values[row]]] == row
            starts[row] += still.int().argmax()

    def merge(self, row: int, token: int) -> tuple[int, int]:
        """Merge a pair everywhere; its left positions become `token`, its right ones are no more.

        Args:
            row: The pair's row.
            token: The new token's id.

        Returns:
            The pair.
        """
        first, second = divmod(int(self.codes.values[row]), self.base)
        left = self.places.values[int(self.starts.values[row]) : int(self.ends.values[row])]
        left = left[self.pair_at[left] == row]  # (M,)
        if first == second:
            left = self._every_other(left)
        right = self.next[left]
        before, after = self.previous[left], self.next[right]
        self.tokens[left] = token
        self.tokens[right] = self.removed
        self.next[left] = after
        self.previous[after] = left
        before = before[self.tokens[before] != self.removed]  # else it is the right half of the merge before

        changed = torch.cat((before, left)).sort().values
        gone = torch.cat((changed, right))
        self.counts.values.index_add_(0, self.pair_at[gone], -self.weight[gone])
        self.pair_at[right] = 0
        self._count_new(changed)
        return first, second

    def _every_other(self, left: Tensor) -> Tensor:
        """Of the positions of a pair `aa`, those that merge when each run of `a` is paired from its left end."""
        number = torch.arange(len(left))
        begins = torch.ones(len(left), dtype=torch.bool)
        begins[1:] = self.next[left[:-1]] != left[1:]
        run = torch.where(begins, number, 0).cummax(0).values  # the number at which the run began
        return left[(number - run) % 2 == 0]


class _Column:
    """A column of numbers that grows at its end; there is room for more than it holds."""

    def __init__(self, values: Tensor) -> None:
        self.room, self.size = values.clone(), len(values)

    @property
    def values(self) -> Tensor:
        return self.room[: self.size]

    def append(self, values: Tensor) -> None:
        end = self.size + len(values)
        if end > len(self.room):
            self.room = torch.cat((self.values, self.room.new_zeros(2 * end - self.size)))
        self.room[self.size : end] = values
        self.size = end


def main(file: Path | None = None, merges: int = 1024, show: int = 40) -> None:
    """Learn merges from a text and print them.

    Args:
        file: The text; default: the definitions of the Human Phenotype Ontology.
        merges: How many merges to learn.
        show: How many of them to print.
    """
    from custom_models.tokenization.bpe import RegexBPE

    text = demo.read(file)
    tokenizer = RegexBPE()
    began = time.perf_counter()
    tokenizer.train(text, merges)
    seconds = time.perf_counter() - began
    for (first, second), token in list(tokenizer.merges.items())[:show]:
        left, right = (tokenizer.vocabulary[i].decode(errors="replace") for i in (first, second))
        print(f"{token:>6} = {first:>5} + {second:<5}  {left!r} + {right!r}")
    size, ids = len(text.encode()), len(tokenizer.encode(text))
    print(f"{merges:,} merges from {size / 1e6:.2f} MB in {seconds:.2f} s; {size / ids:.2f} bytes per token")


if __name__ == "__main__":
    run_file(main)
