"""`make pretrain-t5`: a small T5 learns a language by span corruption: it writes what was cut out of a text.

The share of held-out tokens that it gets right stands beside the simplest guess: the first sentinel at the beginning,
and then always the commonest token.
"""

import random
from collections import Counter
from dataclasses import asdict
from pathlib import Path

import lightning as L
import torch
from tokenizers import Tokenizer
from torch.utils.data import DataLoader

from custom_models.demo import read
from custom_models.encoder_decoder import EncoderDecoder
from custom_models.encoder_decoder_checkpoint import save_encoder_decoder
from custom_models.generation import generate
from custom_models.projects.fitting import FitArgs, device_of, fit_best, seed_problems
from custom_models.projects.keeping import kept_until_done
from custom_models.projects.pictures import draw_curves
from custom_models.projects.seq2seq import (
    Seq2SeqTask,
    T5Shape,
    corruption_loader,
    learn_t5_vocabulary,
    pieces_of,
)
from custom_models.projects.vocabulary import PAD
from workflows.checkpoint import metric, versions, write_metrics
from workflows.errors import UserError, report_all
from workflows.measure import PeakMemory, hardware, seconds_of_step, step_began


@kept_until_done
def setup(
    file: Path | None = None,
    out_dir: Path = Path("out/pretrain-t5"),
    shape: T5Shape = T5Shape(),
    fit: FitArgs = FitArgs(batch_size=64, learning_rate=1e-3, max_epochs=8, patience=2),
    longest: int = 128,
    validation_size: int = 500,
    seed: int = 1,
    max_texts: int | None = None,
) -> None:
    """Pretrain a T5 on a text.

    Args:
        file: A text file, a text in each line; the definitions of the Human Phenotype Ontology if null.
        out_dir: Where the picture and numbers go; the model is in its `final` folder.
        shape: The model.
        fit: How it is trained.
        longest: Longer texts go in pieces of at most so many tokens.
        validation_size: Texts that are held out.
        seed: Of the weights, the order and the spans.
        max_texts: Read the first so many texts only.

    Raises:
        UserError: If an argument or the file is not usable.
    """
    began = step_began()
    problems = fit.problems()
    problems += [] if longest >= 3 else [f"--longest must be at least 3, not {longest}."]
    problems += [] if max_texts is None or max_texts >= 1 else [f"--max_texts must be at least 1, not {max_texts}."]
    report_all(problems + seed_problems(seed))
    L.seed_everything(seed, verbose=False)
    different = dict.fromkeys(line for line in read(file).splitlines() if line.strip())
    lines = [*different][:max_texts]
    random.Random(seed).shuffle(lines)
    if not 1 <= validation_size < len(lines):
        raise UserError(f"--validation_size must be from 1 to {len(lines) - 1}, the number of texts less one.")
    held, kept = lines[:validation_size], lines[validation_size:]
    tokenizer = learn_t5_vocabulary(kept, shape.vocab_size)
    loaders = []
    for name, texts, size in (("training", kept, fit.batch_size), ("held out", held, 4 * fit.batch_size)):
        ids = [encoded.ids for encoded in tokenizer.encode_batch(texts)]
        pieces = [piece for text in ids for piece in pieces_of(text, longest)]
        left_out = sum(len(text) < 2 for text in ids)
        if not pieces:
            raise UserError(f"All {name} texts are of under two tokens: no span can be cut out of them.")
        print(
            f"{name}: {len(texts):,} texts, {len(pieces):,} pieces of at most {longest} tokens; {left_out:,} "
            "texts left out: under two tokens"
        )
        loaders.append(corruption_loader(pieces, tokenizer, size, seed, fixed=name == "held out"))
    model = EncoderDecoder(shape.config(tokenizer))
    task = Seq2SeqTask(model, fit, len(loaders[0]) * fit.max_epochs)
    with PeakMemory() as peak:
        epochs = fit_best(task, loaders[0], loaders[1], out_dir, fit, monitor="val_loss")
    save_encoder_decoder(model, model.config, tokenizer, out_dir / "final")
    draw_curves([epochs], out_dir / "curves.png", "span corruption", "token")
    best = min(epochs, key=lambda row: row["val_loss"])
    guess, n = simplest_guess(loaders[0], loaders[1], tokenizer)
    told = [metric("accuracy", best["val_accuracy"], n=n, split="validation"),
            metric("accuracy_of_the_simplest_guess", guess, n=n, split="validation"),
            metric("loss", best["val_loss"], n=n, split="validation")]  # fmt: skip
    write_metrics(
        out_dir / "metrics.json",
        told,
        seconds=seconds_of_step(began),
        peak_bytes=peak.bytes,
        parameters=sum(p.numel() for p in model.parameters()),
        settings={
            "file": file and str(file),
            "shape": asdict(shape),
            "fit": asdict(fit),
            "longest": longest,
            "seed": seed,
        },
        hardware=hardware(),
        versions=versions(),
    )
    print(f"\nheld-out tokens right: {best['val_accuracy']:.1%}; by the simplest guess {guess:.1%}")
    for source, written, target in examples(model, tokenizer, loaders[1]):
        print(f"  {source}\n    {written}\n    it was {target}")
    print(f"{out_dir}/final, curves.png, metrics.json")


def simplest_guess(
    train: DataLoader[list[int]], validation: DataLoader[list[int]], tokenizer: Tokenizer
) -> tuple[float, int]:
    """How many of the held-out targets' tokens one gets right without reading, and how many tokens they have.

    The first token of a target is always the first sentinel; all others are taken for the commonest token.
    """
    pad_id = tokenizer.token_to_id(PAD)
    counts: Counter[int] = Counter(i for batch in train for row in batch.target[:, 1:].tolist() for i in row)
    del counts[pad_id]
    commonest = counts.most_common(1)[0][0]
    right = n = 0
    for batch in validation:
        target = batch.target  # (B, T)
        right += len(target) + int((target[:, 1:] == commonest).sum())
        n += int((target != pad_id).sum())
    return right / n, n


def examples(
    model: EncoderDecoder, tokenizer: Tokenizer, validation: DataLoader[list[int]], most: int = 3
) -> list[tuple[str, str, str]]:
    """Held-out texts with gaps, what the model writes into them, and what stood there."""
    batch = next(iter(validation))
    config = model.config

    def text(ids: list[int]) -> str:
        return tokenizer.decode([i for i in ids if i not in (config.pad_id, config.end_id)], skip_special_tokens=False)

    with torch.no_grad():
        read = batch.to(device_of(model))
        writer = model.eval().writer(read.source[:most], read.lengths[:most])
        written = generate(writer, writer.prompts, batch.target.shape[1] + 8, stop_ids=[config.end_id])
    return [
        (text(source), text(ids), text(target))
        for source, ids, target in zip(batch.source[:most].tolist(), written.ids, batch.target.tolist(), strict=False)
    ]
