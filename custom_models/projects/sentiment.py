"""`make sentiment`: is a sentence of a movie review for or against the film?

From scratch (`--encoder scratch`): a vocabulary and an encoder of our own, trained on the sentences alone. Or from the
weights of a pretrained encoder: MiniLM (`--encoder minilm`), or a BERT, RoBERTa or DistilBERT by its folder or Hub id.
Beside it a linear classifier of words and pairs of words, trained in the same run: what is had without any order.
"""

import statistics
import textwrap
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import lightning as L
from tokenizers import Tokenizer

from custom_models.encoder import Encoder, non_embedding_parameters
from custom_models.encoder_checkpoint import encoder_directory, load_encoder, tokenizer_of
from custom_models.projects.answers import commonest
from custom_models.projects.classifier import (
    ClassifierTask,
    TextClassifier,
    confusion,
    encode_splits,
    fit_classifier,
    macro_f1,
    over_seeds,
    share_right,
    steps_of,
)
from custom_models.projects.fitting import FitArgs, seed_problems
from custom_models.projects.keeping import kept_until_done
from custom_models.projects.pictures import draw_confusion, draw_curves
from custom_models.projects.shape import Shape
from custom_models.projects.texts import read_labelled
from custom_models.projects.vocabulary import MASK, PAD, learn_vocabulary
from workflows.checkpoint import metric, share_metric, versions, write_metrics
from workflows.errors import report_all
from workflows.measure import PeakMemory, hardware, seconds_of_step, step_began

SCRATCH = "scratch"


@kept_until_done
def setup(
    data: Path = Path("data/movie_snippets"),
    encoder: str = SCRATCH,
    out_dir: Path = Path("out/sentiment/movie_snippets/scratch"),
    shape: Shape = Shape(),
    hidden_tokens: float = 0.5,
    mixup: float = 1.0,
    fit: FitArgs = FitArgs(weight_decay=0.05, max_epochs=12, patience=12, ema_decay=0.998),
    seeds: list[int] | None = None,
    max_rows: int | None = None,
) -> None:
    """Train a classifier of texts.

    Args:
        data: A data directory of {"text", "label"} rows, from `make data DATA=sentence_polarity` and its like.
        encoder: "scratch", "minilm", the folder of a BERT, RoBERTa or DistilBERT, or its id on the Hub.
        out_dir: Where pictures and numbers go; the model is in its `final` folder.
        shape: The encoder, if it is trained from scratch.
        hidden_tokens: Share of tokens that are hidden from the model in training.
        mixup: a: texts' vectors are mixed in pairs, by shares drawn from Beta(a, a); 0 mixes nothing.
        fit: How it is trained.
        seeds: One training for each; [1] if null. The first one's model is kept.
        max_rows: Train on the first so many texts only.

    Raises:
        UserError: If an argument, the data or the encoder is not usable.
    """
    began = step_began()
    seeds = [1] if seeds is None else seeds
    problems = fit.problems() + seed_problems(*seeds)
    problems += [] if 0 <= hidden_tokens < 1 else [f"--hidden_tokens must be from 0 to below 1, not {hidden_tokens}."]
    problems += [] if mixup >= 0 else [f"--mixup must be at least 0, not {mixup}."]
    problems += [] if max_rows is None or max_rows >= 2 else [f"--max_rows must be at least 2, not {max_rows}."]
    report_all(problems)
    train_texts, labels = read_labelled(data, "train")
    texts = {"train": train_texts[:max_rows]}
    texts |= {split: read_labelled(data, split, labels)[0] for split in ("validation", "test")}
    tokenizer, hidden_id, make = _encoder_maker(encoder, shape, [text for text, _ in texts["train"]])
    rows = encode_splits(data, texts, tokenizer, make().config.n_position)

    runs, tables, times, kept = [], [], [], None
    with PeakMemory() as peak:
        for seed in seeds:
            L.seed_everything(seed, verbose=False)
            model = TextClassifier(make(), labels)
            started = time.perf_counter()
            task = ClassifierTask(model, fit, steps_of(rows, fit), hidden_tokens, hidden_id, mixup)
            runs.append(fit_classifier(task, rows, out_dir, seed))
            times.append(time.perf_counter() - started)
            tables.append(confusion(model, rows["test"]))
            best = max(row["val_accuracy"] for row in runs[-1])
            print(f"seed {seed}: validation {best:.1%} (best of {len(runs[-1])} epochs), "
                  f"test {share_right(tables[-1]):.1%}, {times[-1]:.0f} s")  # fmt: skip
            kept = kept or model
    assert kept is not None
    kept.save(tokenizer, out_dir / "final", data.name)
    draw_confusion(tables[0], labels, out_dir / "confusion.png", f"{data.name}, test, seed {seeds[0]}")
    draw_curves(runs, out_dir / "curves.png", f"{encoder} on {data.name}")
    accuracies, n = [share_right(table) for table in tables], len(rows["test"])
    linear = bag_of_bigrams(texts)
    usual = commonest([labels[label] for _, label in texts["train"]])
    majority = sum(labels[label] == usual for _, label in texts["test"]) / n
    f1 = macro_f1(tables[0])
    told = [share_metric("accuracy", accuracies[0], n), share_metric("accuracy_bag_of_bigrams", linear, n),
            share_metric("accuracy_majority", majority, n),
            metric("macro_f1", f1, n=n, split="test")]  # fmt: skip
    told += over_seeds("accuracy", accuracies)
    write_metrics(
        out_dir / "metrics.json",
        told,
        seconds=seconds_of_step(began),
        peak_bytes=peak.bytes,
        train_seconds=times,
        seeds=dict(zip(map(str, seeds), accuracies, strict=True)),
        parameters=sum(p.numel() for p in kept.parameters()),
        non_embedding_parameters=non_embedding_parameters(kept.encoder),
        data=data.name,
        settings={
            "encoder": encoder,
            "shape": asdict(shape) if encoder == SCRATCH else None,
            "fit": asdict(fit),
            "hidden_tokens": hidden_tokens,
            "mixup": mixup,
            "max_rows": max_rows,
        },
        hardware=hardware(),
        versions=versions(),
    )
    print(f"\ntest: always {usual!r} {majority:.1%}; macro-F1 {f1:.3f}", end="")
    _tell(encoder, accuracies, linear, kept, tokenizer, out_dir, texts["test"][:: n // 2][:2])


def _tell(
    encoder: str,
    accuracies: list[float],
    linear: float,
    model: TextClassifier,
    tokenizer: Tokenizer,
    out_dir: Path,
    examples: list[tuple[str, int]],
) -> None:
    spread = (
        f" (from {min(accuracies):.1%} to {max(accuracies):.1%}, {len(accuracies)} seeds)" if accuracies[1:] else ""
    )
    print(f"\ntest accuracy: {encoder} {statistics.fmean(accuracies):.1%}{spread}; bag of bigrams {linear:.1%}")
    for text, label in examples:
        (found,), _ = model.predict([text], tokenizer)
        best = max(found, key=found.__getitem__)
        print(f"  {textwrap.shorten(text, 100)}  ->  {best} ({found[best]:.0%}); it is {model.labels[label]}")
    print(f"{out_dir}/final, curves.png, confusion.png, metrics.json")


def _encoder_maker(encoder: str, shape: Shape, texts: list[str]) -> tuple[Tokenizer, int, Any]:
    """The tokenizer, the id that stands for a hidden token, and a function that makes the encoder anew."""
    if encoder == SCRATCH:
        tokenizer = learn_vocabulary(texts, shape.vocab_size)
        config = shape.config(
            n_segment=0,
            pad_id=tokenizer.token_to_id(PAD),
            norm_first=True,
            embedding_norm=False,
            pooler=False,
            norm_eps=1e-5,
        )
        return tokenizer, tokenizer.token_to_id(MASK), lambda: Encoder(config)
    directory = encoder_directory(encoder)
    tokenizer = tokenizer_of(directory)
    masks = [tokenizer.token_to_id(token) for token in ("[MASK]", "<mask>", MASK)]
    return tokenizer, next((i for i in masks if i is not None), 0), lambda: load_encoder(directory)


def bag_of_bigrams(texts: dict[str, list[tuple[str, int]]]) -> float:
    """Test accuracy of logistic regression over the words and pairs of words that a text has.

    How strongly it is regularised is chosen on the validation texts.

    Args:
        texts: Texts with their classes, of the splits train, validation and test.
    """
    from sklearn.feature_extraction.text import CountVectorizer
    from sklearn.linear_model import LogisticRegression

    vectorizer = CountVectorizer(ngram_range=(1, 2), binary=True, token_pattern=r"\w+|[^\w\s]")
    features = {"train": vectorizer.fit_transform([text for text, _ in texts["train"]])}
    features |= {split: vectorizer.transform([t for t, _ in texts[split]]) for split in ("validation", "test")}
    classes = {split: [label for _, label in pairs] for split, pairs in texts.items()}
    fitted = [LogisticRegression(C=c, max_iter=2000).fit(features["train"], classes["train"]) for c in (0.1, 0.3, 1, 3)]
    best = max(fitted, key=lambda model: float(model.score(features["validation"], classes["validation"])))
    return float(best.score(features["test"], classes["test"]))
