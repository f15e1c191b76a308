"""`make ner`: which entities are named in a sentence? A T5 writes their list: "Chemical: aspirin ; Disease: ulcer".

* `--model scratch`: a vocabulary and a small T5 of our own, pretrained by span corruption on the training sentences and
  on other text, and then taught to write lists (`--head text`), to tag each word by its encoder (`--head tokens`), or
  both (`--head both`).
* `--model google-t5/t5-small`, or the folder of a T5: taught to write lists by transformers' Seq2SeqTrainer.

Beside it the dictionary of the training data's mentions. What counts is strict F1: type, first and last word.
"""

import random
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import lightning as L

from custom_models import demo
from custom_models.encoder_decoder import EncoderDecoder
from custom_models.projects.entity_scores import Tagged
from custom_models.projects.fitting import FitArgs, fit_best, no_shares, seed_problems, too_small
from custom_models.projects.keeping import kept_until_done
from custom_models.projects.ner_model import (
    Asking,
    Codec,
    EntityModel,
    EntityTask,
    Head,
    Sentence,
    batch_of,
    load_entity_model,
)
from custom_models.projects.ner_report import Round, encode, find, read_splits, report
from custom_models.projects.pictures import draw_curves
from custom_models.projects.seq2seq import (
    PairBatch,
    Seq2SeqTask,
    T5Shape,
    begin_by_copying,
    begin_by_looking_near,
    corruption_loader,
    learn_t5_vocabulary,
    pieces_of,
    row_loader,
)
from custom_models.projects.texts import drawn
from custom_models.projects.vocabulary import PAD
from custom_models.tokenization.merge_dropout import MergeDropout
from data_prep.entities import WORD
from data_prep.iob import OUTSIDE
from data_prep.normalisation import normalise, words_of
from data_prep.splits import Phrases
from workflows.errors import UserError, report_all
from workflows.measure import step_began
from workflows.training.processes import choose_accelerator

SCRATCH = "scratch"
_TELLING = 5
"""A held-out sentence of so many words may not stand in any text that is pretrained on, shorter ones may."""


@kept_until_done
def setup(
    data: Path = Path("data/hpo_entities"),
    model: str = SCRATCH,
    head: Head | None = None,
    out_dir: Path = Path("out/ner/hpo_entities/scratch"),
    shape: T5Shape = T5Shape(width=128, dropout=0.2),
    pretrain: FitArgs = FitArgs(batch_size=64, learning_rate=2e-3, max_epochs=0),
    unlabelled: list[Path] | None = None,
    max_unlabelled: int = 4000,
    fit: FitArgs = FitArgs(batch_size=32, learning_rate=2e-3, max_epochs=20, patience=20, precision=None),
    merge_dropout: float = 0.1,
    tag_weight: float = 1.0,
    constrained: bool = True,
    n_beam: int = 4,
    tag_share: float = 0.75,
    longest: int = 256,
    seeds: list[int] | None = None,
    validation_rows: int | None = 1000,
    max_rows: int | None = None,
) -> None:
    """Teach a T5 to name entities.

    Args:
        data: A data directory of {"tokens", "tags"} rows, from `make data DATA=bc5cdr` and its like.
        model: "scratch", the folder of a T5, or its id on the Hub.
        head: "text": the decoder writes a list; "tokens": the encoder tags each word; "both": the likeliest list by
            the two together. If null, both, and for a T5 from elsewhere text, which is all that it can.
        out_dir: Where the picture and numbers go; the model is in its `final` folder.
        shape: The T5, if it is trained from scratch.
        pretrain: How it is pretrained by span corruption before, from scratch only; no epochs, no pretraining.
        unlabelled: Text files to pretrain on besides the training sentences; the Human Phenotype Ontology's definitions
            if null.
        max_unlabelled: At most so many of their lines, drawn at random.
        fit: How it is trained on entities.
        merge_dropout: So many of the vocabulary's merges are left out at random in training, from scratch only, so that
            a word is seen in ever other pieces (BPE-dropout).
        tag_weight: Of the encoder's tags as an auxiliary task where the decoder answers.
        constrained: Whether the decoder can write nothing but a list of the sentence's own words.
        n_beam: Beams; 1 is greedy search, which a grammar leads astray: it goes on where nothing likely may follow.
        tag_share: How much the encoder's tags count beside the decoder's tokens, with the head "both".
        longest: The longest sentence in tokens; words beyond it are not read.
        seeds: One fine-tuning for each; [1] if null. The first one's model is kept.
        validation_rows: Sentences that are looked at after each epoch, drawn at random; all if null.
        max_rows: Train on the first so many sentences only.

    Raises:
        UserError: If an argument, the data or the model is not usable.
    """
    began = step_began()
    seeds = [1] if seeds is None else seeds
    head = head or ("both" if model == SCRATCH else "text")
    problems = fit.problems() + seed_problems(*seeds)
    problems += too_small(n_beam=(n_beam, 1), longest=(longest, 3), max_rows=(max_rows, 1),
                          validation_rows=(validation_rows, 1), max_unlabelled=(max_unlabelled, 0),
                          tag_weight=(tag_weight, 0))  # fmt: skip
    if model == SCRATCH and pretrain.max_epochs:
        problems += pretrain.problems("pretrain")
    problems += no_shares(merge_dropout=merge_dropout, tag_share=tag_share)
    if head != "text" and model != SCRATCH:
        problems.append(
            f"--head {head} is for --model scratch; a T5 from elsewhere answers by its decoder: --head text."
        )
    if head == "both" and not tag_weight:
        problems.append("--head both needs an encoder that has learned to tag: --tag_weight above 0, or --head text.")
    if fit.ema_decay and model != SCRATCH:
        problems.append("--fit.ema_decay is for --model scratch; transformers' trainer has no such average.")
    report_all(problems)
    splits, types = read_splits(data, max_rows)
    asking = Asking(head, constrained, n_beam, tag_share, longest)
    trained = (
        _from_scratch(data, splits, types, shape, pretrain, unlabelled, max_unlabelled, fit, merge_dropout, asking,
                      tag_weight, validation_rows, seeds, out_dir)
        if model == SCRATCH
        else _from_hf(model, data, splits, types, fit, asking, validation_rows, seeds, out_dir)
    )  # fmt: skip
    settings = {"shape": asdict(shape) if model == SCRATCH else None,
                "pretrain": asdict(pretrain) if model == SCRATCH else None, "fit": asdict(fit),
                "merge_dropout": merge_dropout, "tag_weight": tag_weight, "max_rows": max_rows}  # fmt: skip
    tagging = tag_weight if model == SCRATCH else 0.0
    rounds = report(trained, splits, data, model, asking, validation_rows, tagging, seeds, out_dir, began, settings)
    draw_curves([done.epochs for done in rounds], out_dir / "curves.png", f"{model}, {head}, on {data.name}", "token")
    print(f"{out_dir}/final, curves.png, metrics.json")


def _from_scratch(
    data: Path,
    splits: dict[str, list[Tagged]],
    types: list[str],
    shape: T5Shape,
    pretrain: FitArgs,
    unlabelled: list[Path] | None,
    max_unlabelled: int,
    fit: FitArgs,
    merge_dropout: float,
    asking: Asking,
    tag_weight: float,
    validation_rows: int | None,
    seeds: list[int],
    out_dir: Path,
) -> Iterator[Round]:
    """A T5 of our own, pretrained once and fine-tuned for each seed; the first one is kept."""
    longest = asking.longest
    pretrained, codec = pretrained_t5(splits, types, shape, pretrain, unlabelled, max_unlabelled, longest, seeds[0],
                                      out_dir)  # fmt: skip
    config = pretrained.config
    weights = {name: tensor.clone() for name, tensor in pretrained.state_dict().items()}
    rows = {}
    for split in ("train", "validation"):
        rows[split], cut = encode(splits[split], codec, longest)
        print(f"{data / split}.jsonl: {len(rows[split]):,} sentences; {cut:,} cut: over {longest} tokens")
    validation = drawn(rows["validation"], validation_rows)
    for number, seed in enumerate(seeds):
        L.seed_everything(seed, verbose=False)
        started = time.perf_counter()
        model = EntityModel(EncoderDecoder(config), types)
        model.t5.load_state_dict(weights)
        varied = _varied(codec, longest, merge_dropout, seed)
        train = row_loader(splits["train"], [len(row.source) for row in rows["train"]], fit.batch_size, varied, seed)
        looked = row_loader(validation, [len(row.source) for row in validation], 4 * fit.batch_size,
                            partial(batch_of, pad_id=config.pad_id), None)  # fmt: skip
        task = EntityTask(model, fit, len(train) * fit.max_epochs, asking.head, tag_weight)
        epochs = fit_best(task, train, looked, out_dir, fit)
        if number == 0:
            model.save(codec.tokenizer, out_dir / "final", asking, data.name)
        yield Round(model, codec, epochs, time.perf_counter() - started)


def _varied(codec: Codec, longest: int, merge_dropout: float, seed: int) -> Callable[[list[Tagged]], PairBatch]:
    """Makes a batch of sentences, each time in other pieces; within a sentence a word has the same ones everywhere."""
    dropout, chance = MergeDropout(codec.tokenizer), random.Random(f"{seed} merges")

    def encoded(words: Sequence[str], tags: Sequence[str]) -> Sentence:
        pieces = lru_cache(maxsize=None)(lambda word: dropout.ids_of(word, merge_dropout, chance))
        return codec.encode(words, tags, longest, pieces if merge_dropout else None)

    return lambda rows: batch_of([encoded(*row) for row in rows], codec.tokenizer.token_to_id(PAD))


def pretrained_t5(
    splits: dict[str, list[Tagged]],
    types: Sequence[str],
    shape: T5Shape,
    pretrain: FitArgs,
    unlabelled: list[Path] | None,
    max_unlabelled: int,
    longest: int,
    seed: int,
    out_dir: Path,
) -> tuple[EncoderDecoder, Codec]:
    """A T5 of our own with a vocabulary of its own, after span corruption; arguments as for `setup`."""
    texts = _texts(splits, unlabelled, max_unlabelled)
    formats = " ".join(f"{kind}:" for kind in types)
    tokenizer = learn_t5_vocabulary([*(" ".join(words) for words in texts), formats], shape.vocab_size)
    config = shape.config(tokenizer)
    codec = Codec(tokenizer, types, config.end_id)
    L.seed_everything(seed, verbose=False)
    model = EncoderDecoder(config)
    begin_by_copying(model)
    begin_by_looking_near(model)
    if pretrain.max_epochs:
        _pretrain(model, texts, codec, pretrain, longest, seed, out_dir)
    return model, codec


def _texts(splits: dict[str, list[Tagged]], unlabelled: list[Path] | None, most: int) -> list[list[str]]:
    """The training sentences' words, then those of other texts; none with a sentence of validation or test in it."""
    held = [" ".join(words) for split in ("validation", "test") for words, _ in splits[split]]
    # "Methods:" stands in every abstract, and says nothing of the test.
    telling = Phrases(text for text in held if len(words_of(text)) >= _TELLING)
    same = set(map(normalise, held))
    files: list[Path | None] = [*unlabelled] if unlabelled else [None]
    lines = [line for file in files for line in demo.read(file).splitlines()]
    kept = [line for line in lines if normalise(line) not in same and not telling.found_in(line)]
    others = [words for line in kept if (words := WORD.findall(line))]
    others = random.Random(0).sample(others, min(most, len(others)))
    return [*(words for words, _ in splits["train"]), *others]


def _pretrain(
    model: EncoderDecoder, texts: list[list[str]], codec: Codec, fit: FitArgs, longest: int, seed: int, out_dir: Path
) -> None:
    """Span corruption; a text that is over the limit goes in pieces."""
    ids = [[i for word in words for i in codec.ids_of(word)] for words in texts]
    pieces = [piece for text in ids for piece in pieces_of(text, longest)]
    random.Random(seed).shuffle(pieces)
    held = pieces[: max(1, len(pieces) // 20)]
    train = corruption_loader(pieces[len(held) :], codec.tokenizer, fit.batch_size, seed)
    validation = corruption_loader(held, codec.tokenizer, 4 * fit.batch_size, seed, fixed=True)
    task = Seq2SeqTask(model, fit, len(train) * fit.max_epochs)
    epochs = fit_best(task, train, validation, out_dir, fit, monitor="val_loss")
    best = min(epochs, key=lambda row: row["val_loss"])
    print(f"span corruption on {len(texts):,} texts: {best['val_accuracy']:.1%} of held-out tokens right")


def _from_hf(
    model: str,
    data: Path,
    splits: dict[str, list[Tagged]],
    types: list[str],
    fit: FitArgs,
    asking: Asking,
    validation_rows: int | None,
    seeds: list[int],
    out_dir: Path,
) -> Iterator[Round]:
    """A T5 from elsewhere, fine-tuned by transformers for each seed; the first one is kept."""
    from custom_models.projects.ner_hf import fine_tune

    for number, seed in enumerate(seeds):
        started = time.perf_counter()
        folder = out_dir / ("final" if number == 0 else ".other")
        some = {**splits, "validation": drawn(splits["validation"], validation_rows)}
        epochs = fine_tune(model, some, types, fit, asking, seed, folder, data.name)
        tagger, codec, _ = load_entity_model(folder)
        tagger.to(choose_accelerator(fit.accelerator))
        if number:
            shutil.rmtree(folder)
        yield Round(tagger, codec, epochs, time.perf_counter() - started)


def predict(
    checkpoint_dir: Path,
    text: str,
    constrained: bool | None = None,
    n_beam: int | None = None,
    tag_share: float | None = None,
    longest: int | None = None,
) -> None:
    """Name the entities of a sentence; the model is asked as it was scored, unless an option says otherwise.

    Args:
        checkpoint_dir: What `make ner` left, such as out/ner/hpo_entities/scratch/final.
        text: The sentence.
        constrained: Whether the decoder can write nothing but a list of the sentence's own words.
        n_beam: Beams.
        tag_share: How much the encoder's tags count, if the model answers by both.
        longest: The longest sentence in tokens.

    Raises:
        UserError: If the folder holds no such model, an option makes no sense, or the sentence is empty.
    """
    options = {"constrained": constrained, "n_beam": n_beam, "tag_share": tag_share, "longest": longest}
    given: dict[str, Any] = {name: value for name, value in options.items() if value is not None}
    Asking(**given)  # what makes no sense is said before anything is read
    words = WORD.findall(text)
    if not words:
        raise UserError('There is nothing to read. Give a sentence: make ner-predict TEXT="…"')
    model, codec, asking = load_entity_model(checkpoint_dir)
    asking = replace(asking, **given)
    sentence = codec.encode(words, [OUTSIDE] * len(words), asking.longest)
    written = find(model, codec, [sentence], asking)
    for entity in written.entities[0]:
        print(f"{entity.type:<12}{' '.join(words[entity.start : entity.end])}")
    if not written.entities[0]:
        print("no entity")
    if written.malformed or written.unfinished:
        print(f"{written.malformed} entries of the list name nothing in the sentence"
              + ("; it was not finished" if written.unfinished else ""))  # fmt: skip
    if len(sentence.words) < len(words):
        print(f"only the first {len(sentence.words)} words were read")
