"""`make pretrain`: teach an encoder a language by hiding tokens from it, RoBERTa's way or BERT's.

* `--style roberta`: texts one after the other, whole sentences of them in each piece, masks drawn anew each time.
* `--style bert`: two sentences of a text, half of the time the second one from another text; whether it follows is
  asked, too (next-sentence prediction).

What the model says of held-out texts stands beside the simplest guess, the commonest token.
"""

import math
import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
from tokenizers import Tokenizer
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from custom_models.demo import read
from custom_models.encoder import Encoder
from custom_models.encoder_checkpoint import save_encoder
from custom_models.masked_language_model import IGNORED, MaskedLanguageModel, mask_tokens
from custom_models.projects.fitting import FitArgs, device_of, fit_best, seed_problems
from custom_models.projects.keeping import kept_until_done
from custom_models.projects.shape import Shape
from custom_models.projects.vocabulary import END, MASK, PAD, START, learn_vocabulary
from custom_models.tokenization.words import sentences
from workflows.checkpoint import metric, share_metric, versions, write_metrics
from workflows.errors import UserError, report_all
from workflows.measure import PeakMemory, hardware, seconds_of_step, step_began

Style = Literal["roberta", "bert"]


@dataclass(frozen=True)
class Pieces:
    """A batch of texts to hide tokens in.

    Attributes:
        ids: (B, T).
        lengths: (B,).
        segments: (B, T), or None without sentence pairs.
        follows: Whether the second sentence followed the first, (B,), or None.
    """

    ids: Tensor
    lengths: Tensor
    segments: Tensor | None = None
    follows: Tensor | None = None

    def to(self, device: torch.device) -> "Pieces":
        """The same on a device."""
        return Pieces(*(None if part is None else part.to(device) for part in vars(self).values()))  # type: ignore[arg-type]


class Texts(IterableDataset[Pieces]):
    """Texts as batches, in another order, and in other pairs, each time.

    Args:
        documents: For each text the token ids of its sentences.
        style: See the module.
        longest: T.
        batch_size: Pieces in a batch.
        special: The ids of padding, start and end.
        seed: Of order and pairs; with `fixed` they are the same each time.
        fixed: For validation.
    """

    def __init__(
        self,
        documents: list[list[list[int]]],
        style: Style,
        longest: int,
        batch_size: int,
        special: tuple[int, int, int],
        seed: int,
        fixed: bool = False,
    ) -> None:
        self.documents, self.style, self.longest, self.batch_size = documents, style, longest, batch_size
        self.pad, self.start, self.end = special
        self.seed, self.fixed, self.epoch = seed, fixed, 0
        self.pairs = [
            (number, document[i], document[i + 1])
            for number, document in enumerate(documents)
            for i in range(len(document) - 1)
        ]
        if style == "bert" and len({number for number, _, _ in self.pairs}) < 2:
            raise UserError("Fewer than two texts have two sentences, so there are no pairs. Use --style roberta.")
        self.cut = sum(len(first) + len(second) > longest - 3 for _, first, second in self.pairs if style == "bert")

    def batches(self) -> int:
        """Batches of one time through, about: the order of texts decides how their sentences fill the pieces."""
        return math.ceil(sum(1 for _ in self._drawn(random.Random(self.seed))) / self.batch_size)

    def __iter__(self) -> Iterator[Pieces]:
        chance = random.Random(f"{self.seed} {0 if self.fixed else self.epoch}")
        self.epoch += 1
        batch: list[tuple[list[int], int, bool]] = []
        for piece in self._drawn(chance):
            batch.append(piece)
            if len(batch) == self.batch_size:
                yield self._padded(batch)
                batch = []
        if batch:
            yield self._padded(batch)

    def _drawn(self, chance: random.Random) -> Iterator[tuple[list[int], int, bool]]:
        return self._pairs(chance) if self.style == "bert" else self._pieces(chance)

    def _pieces(self, chance: random.Random) -> Iterator[tuple[list[int], int, bool]]:
        """All texts in a new order, as many whole sentences in a piece as fit, an end after each text.

        RoBERTa's "full sentences" (section 4.2); a sentence that is longer than a piece is cut.
        """
        room = self.longest - 1
        row: list[int] = []
        for document in chance.sample(self.documents, len(self.documents)):
            for number, sentence in enumerate(document, start=1):
                left = [*sentence, self.end] if number == len(document) else sentence
                if row and len(row) + len(left) > room:
                    yield [self.start, *row], 0, True
                    row = []
                while len(left) > room:
                    yield [self.start, *left[:room]], 0, True
                    left = left[room:]
                row += left
        if row:
            yield [self.start, *row], 0, True

    def _pairs(self, chance: random.Random) -> Iterator[tuple[list[int], int, bool]]:
        """[start] A [end] B [end]; half of the time B is a sentence of another text. Longer pairs are cut."""
        room = self.longest - 3
        for number, first, second in chance.sample(self.pairs, len(self.pairs)):
            follows = chance.random() < 0.5
            other, b = number, second
            while not follows and other == number:
                other, _, b = chance.choice(self.pairs)
            a = first[: max(room // 2, room - len(b))]
            b = b[: room - len(a)]
            yield [self.start, *a, self.end, *b, self.end], len(a) + 2, follows

    def _padded(self, batch: list[tuple[list[int], int, bool]]) -> Pieces:
        lengths = torch.tensor([len(ids) for ids, _, _ in batch])  # (B,)
        longest = int(lengths.max())
        ids = torch.tensor([[*ids, *[self.pad] * (longest - len(ids))] for ids, _, _ in batch])  # (B, T)
        if self.style == "roberta":
            return Pieces(ids, lengths)
        begins = torch.tensor([begin for _, begin, _ in batch])  # (B,)
        segments = (torch.arange(longest) >= begins[:, None]).long()  # (B, T)
        return Pieces(ids, lengths, segments, torch.tensor([follows for _, _, follows in batch]))


class PretrainingTask(L.LightningModule):
    """How it is trained: tokens are hidden anew in every batch, in validation always the same ones."""

    def __init__(
        self, model: MaskedLanguageModel, fit: FitArgs, total_steps: int, special: list[int], mask_id: int
    ) -> None:
        super().__init__()
        self.model, self.fit_args, self.total_steps, self.mask_id = model, fit, total_steps, mask_id
        self.special = special

    def hidden(self, batch: Pieces, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
        """Ids with some tokens hidden, and the targets, (B, T) each."""
        maskable = ~torch.isin(batch.ids, torch.tensor(self.special, device=batch.ids.device))  # (B, T)
        return mask_tokens(batch.ids, maskable, self.mask_id, self.model.encoder.config.vocab_size, generator)

    def training_step(self, batch: Pieces, batch_idx: int) -> Tensor:
        """The loss of the hidden tokens and of the pairs."""
        ids, targets = self.hidden(batch, None)
        loss, _ = self.model.loss(ids, targets, batch.lengths, batch.segments, batch.follows)
        self.log("train_loss", loss, on_step=False, on_epoch=True, batch_size=len(ids))
        return loss

    def validation_step(self, batch: Pieces, batch_idx: int) -> None:
        """The same, with its parts."""
        ids, targets = self.hidden(batch, torch.Generator(batch.ids.device).manual_seed(batch_idx))
        loss, told = self.model.loss(ids, targets, batch.lengths, batch.segments, batch.follows)
        self.log("val_loss", loss, batch_size=len(ids), prog_bar=True)
        asked = int((targets != IGNORED).sum())
        for name, value in told.items():
            if asked or "masked" not in name:  # a batch in which nothing is hidden has no such mean
                self.log(f"val_{name}", value, batch_size=asked if "masked" in name else len(ids))

    def configure_optimizers(self) -> Any:
        """AdamW with the rate's schedule."""
        return self.fit_args.optimizer(self, self.total_steps)


@kept_until_done
def setup(
    file: Path | None = None,
    style: Style = "roberta",
    out_dir: Path = Path("out/pretrain"),
    shape: Shape = Shape(vocab_size=4000, n_layer=2, inner_width=512, n_position=64, dropout=0.1),
    fit: FitArgs = FitArgs(batch_size=16, learning_rate=1e-3, max_epochs=8, patience=2),
    validation_size: int = 500,
    seed: int = 1,
    max_texts: int | None = None,
) -> None:
    """Pretrain an encoder on a text.

    Args:
        file: A text file, a text in each line; the definitions of the Human Phenotype Ontology if null.
        style: "roberta" or "bert".
        out_dir: Where the numbers go; the model is in its `final` folder.
        shape: The encoder.
        fit: How it is trained.
        validation_size: Texts that are held out.
        seed: Of the weights, the order, the pairs and the masks.
        max_texts: Read the first so many texts only.

    Raises:
        UserError: If an argument or the file is not usable.
    """
    began = step_began()
    problems = fit.problems() + ([] if shape.n_position >= 8 else ["--shape.n_position must be at least 8."])
    problems += [] if max_texts is None or max_texts >= 2 else [f"--max_texts must be at least 2, not {max_texts}."]
    report_all(problems + seed_problems(seed))
    L.seed_everything(seed, verbose=False)
    lines = [line for line in read(file).splitlines() if line.strip()][:max_texts]
    random.Random(seed).shuffle(lines)
    if not 1 <= validation_size < len(lines):
        raise UserError(f"--validation_size must be from 1 to {len(lines) - 1}, the number of texts less one.")
    held, kept = lines[:validation_size], lines[validation_size:]
    tokenizer = learn_vocabulary(kept, shape.vocab_size, (PAD, MASK, START, END))
    pad, mask, start, end = (tokenizer.token_to_id(token) for token in (PAD, MASK, START, END))
    train, validation = (
        Texts(
            _documents(part, tokenizer, "\n".join(kept)),
            style,
            shape.n_position,
            fit.batch_size,
            (pad, start, end),
            seed,
            fixed,
        )
        for part, fixed in ((kept, False), (held, True))
    )
    config = shape.config(n_segment=2 if style == "bert" else 0, pad_id=pad, pooler=style == "bert")
    model = MaskedLanguageModel(Encoder(config), next_sentence=style == "bert")
    task = PretrainingTask(model, fit, train.batches() * fit.max_epochs, [pad, mask, start, end], mask)
    print(f"{len(kept):,} texts, {train.batches():,} batches an epoch; {len(held):,} texts held out")
    if style == "bert":
        print(f"{train.cut + validation.cut:,} pairs of sentences cut: over {shape.n_position} tokens")
    with PeakMemory() as peak:
        train_loader, validation_loader = (DataLoader(texts, batch_size=None) for texts in (train, validation))
        epochs = fit_best(task, train_loader, validation_loader, out_dir, fit, monitor="val_loss")
    save_encoder(
        model, config, tokenizer, out_dir / "final", heads=["masked", *(["next_sentence"] if style == "bert" else [])]
    )
    best = min(epochs, key=lambda row: row["val_loss"])
    common, asked = _commonest(task, train, validation)
    told = [share_metric("masked_accuracy", best["val_masked_accuracy"], asked),
            share_metric("masked_accuracy_of_the_commonest_token", common, asked),
            metric("masked_loss", best["val_masked_loss"], n=asked, split="validation")]  # fmt: skip
    if style == "bert":
        told.append(share_metric("next_sentence_accuracy", best["val_next_sentence_accuracy"], len(validation.pairs)))
    write_metrics(out_dir / "metrics.json", [{**row, "split": "validation"} for row in told],
                  seconds=seconds_of_step(began), peak_bytes=peak.bytes,
                  data="definitions" if file is None else str(file),
                  settings={"style": style, "shape": asdict(shape), "fit": asdict(fit), "seed": seed,
                            "validation_size": validation_size, "max_texts": max_texts},
                  hardware=hardware(), versions=versions())  # fmt: skip
    print(f"\nheld-out masks filled right: {best['val_masked_accuracy']:.1%}; always the commonest token {common:.1%}")
    if style == "bert":
        print(f"whether a sentence follows: right {best['val_next_sentence_accuracy']:.1%} of the time")
    for text, hidden in _examples(held, tokenizer, shape.n_position - 2, random.Random(seed)):
        print(f"  {text}\n    {', '.join(fill_mask(model, tokenizer, text))}; it was {hidden}")
    print(f"{out_dir}/final, metrics.json")


def fill_mask(model: MaskedLanguageModel, tokenizer: Tokenizer, text: str, most: int = 3) -> list[str]:
    """The likeliest tokens for the mask in a text.

    Raises:
        UserError: If there is not one mask.
    """
    parts = text.split(MASK)
    if len(parts) != 2:
        raise UserError(f"The text must hold {MASK} once, not {len(parts) - 1} times.")
    # Encoded apart: the spaces around the mask belong to words, and are no tokens of their own.
    before, after = (tokenizer.encode(part.strip()).ids if part.strip() else [] for part in parts)
    start, mask, end = (tokenizer.token_to_id(token) for token in (START, MASK, END))
    ids = torch.tensor([[start, *before, mask, *after, end]], device=device_of(model))  # (1, T)
    with torch.no_grad():
        logits = model.eval()(ids)[0, len(before) + 1]  # (vocab_size,)
    return [tokenizer.decode([i]).strip() for i in logits.topk(most).indices.tolist()]


def _examples(texts: list[str], tokenizer: Tokenizer, longest: int, chance: random.Random) -> Iterator[tuple[str, str]]:
    """Three texts that fit, with a whole word hidden, and that word."""
    found = 0
    for text in texts:
        ids = tokenizer.encode(text).ids
        begins = [i for i, token in enumerate(ids) if tokenizer.decode([token]).startswith(" ")] + [len(ids)]
        whole = [i for i, end in pairwise(begins) if end == i + 1 and len(tokenizer.decode([ids[i]])) > 4]
        if len(ids) <= longest and whole and found < 3:
            i = chance.choice(whole)
            found += 1
            parts = (tokenizer.decode(ids[:i]), MASK, tokenizer.decode(ids[i + 1 :]).strip())
            yield " ".join(parts).strip(), tokenizer.decode([ids[i]]).strip()


def _documents(texts: list[str], tokenizer: Tokenizer, learn_from: str) -> list[list[list[int]]]:
    """The token ids of each text's sentences; what ends one is learned from a longer text."""
    found = [sentences(text, learn_from=learn_from) for text in texts]
    flat = [encoded.ids for encoded in tokenizer.encode_batch([sentence for text in found for sentence in text])]
    begins = [0]
    for text in found:
        begins.append(begins[-1] + len(text))
    return [flat[begin:end] for begin, end in pairwise(begins)]


def _commonest(task: PretrainingTask, train: Texts, validation: Texts) -> tuple[float, int]:
    """How many of the validation's hidden tokens are the training texts' commonest one, and how many are hidden."""
    counts = Counter(token for document in train.documents for sentence in document for token in sentence)
    commonest = counts.most_common(1)[0][0]
    right = asked = 0
    for number, batch in enumerate(validation):
        _, targets = task.hidden(batch, torch.Generator().manual_seed(number))
        right += int((targets == commonest).sum())
        asked += int((targets != IGNORED).sum())
    return right / max(1, asked), asked
