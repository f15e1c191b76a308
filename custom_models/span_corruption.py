"""Span corruption, T5's pretraining: spans of a text are cut out, and the model writes what is missing.

    source   The inquisitive <extra_id_0> for the <extra_id_1> .
    target   <extra_id_0> cat looked <extra_id_1> mouse <end>

Raffel et al. 2019, arXiv 1910.10683, section 3.1.4: 15% of the tokens go, in spans of 3 on the average; each span is
replaced by a sentinel of its own, and the target names the sentinels and what stood there. It is shorter than the text,
which is why it costs less than writing the whole text anew.

Run it: python -m custom_models.span_corruption --text "Increased size of the liver that can be felt."
"""

import math
import random
from typing import NamedTuple

from workflows.errors import UserError, run_file

SENTINELS = 100
"""As many as T5 has; enough for texts of 2,000 tokens at its rates."""


def sentinel(number: int) -> str:
    """A sentinel's name, T5's own."""
    return f"<extra_id_{number}>"


class Pair(NamedTuple):
    """A text to read, and the one to write.

    Attributes:
        source: Token ids.
        target: Token ids, the end included.
    """

    source: list[int]
    target: list[int]


def _cut(total: int, parts: int, chance: random.Random) -> list[int]:
    """Sizes of `parts` pieces of at least 1 that sum up to `total`, every such cut as likely as any other."""
    places = sorted(chance.sample(range(1, total), parts - 1))
    return [b - a for a, b in zip([0, *places], [*places, total], strict=True)]


def corrupt(
    ids: list[int],
    sentinels: list[int],
    end_id: int,
    chance: random.Random,
    share: float = 0.15,
    mean_span: float = 3.0,
) -> Pair:
    """Cut spans out of a text.

    As in T5's own code, the text is cut into as many kept as lost spans, which take turns; the first one is kept.

    Args:
        ids: The text's tokens, at least 2.
        sentinels: Ids of sentinels, in order.
        end_id: What ends source and target.
        chance: Decides which spans.
        share: How much is cut out.
        mean_span: A span's length on the average.

    Raises:
        UserError: If the text is of under two tokens or has more spans than there are sentinels, or a rate makes no
            sense.
    """
    if not 0 < share < 1 or mean_span < 1:
        raise UserError(f"A share between 0 and 1 is cut out, in spans of at least 1; not {share}, {mean_span}.")
    if len(ids) < 2:
        raise UserError("A text of one token has no span that could be cut out of it. Leave it out.")
    lost = min(max(round(len(ids) * share), 1), len(ids) - 1)
    n_span = min(max(round(lost / mean_span), 1), lost, len(ids) - lost)
    if n_span > len(sentinels):
        longest = math.floor(len(sentinels) * mean_span / share)
        raise UserError(f"A text of {len(ids)} tokens has {n_span} spans, and there are {len(sentinels)} sentinels. "
                        f"Cut texts to {longest} tokens.")  # fmt: skip
    kept_sizes, lost_sizes = _cut(len(ids) - lost, n_span, chance), _cut(lost, n_span, chance)
    source: list[int] = []
    target: list[int] = []
    place = 0
    for mark, kept, gone in zip(sentinels, kept_sizes, lost_sizes, strict=False):
        source += [*ids[place : place + kept], mark]
        target += [mark, *ids[place + kept : place + kept + gone]]
        place += kept + gone
    return Pair([*source, end_id], [*target, end_id])


def main(text: str = "Increased size of the liver that can be felt below the ribs.", seed: int = 1) -> None:
    """Cut spans of words out of a text, a few times.

    Args:
        text: What is corrupted, here word by word.
        seed: Decides the first corruption.
    """
    words = text.split()
    names = [sentinel(i) for i in range(SENTINELS)]
    for number in range(4):
        pair = corrupt(
            list(range(len(words))), [-1 - i for i in range(SENTINELS)], len(words), random.Random(seed + number)
        )
        for name, ids in zip(("source", "target"), pair, strict=True):
            shown = [names[-1 - i] if i < 0 else [*words, "<end>"][i] for i in ids]
            print(f"{name:<8}{' '.join(shown)}")
        print()


if __name__ == "__main__":
    run_file(main)
