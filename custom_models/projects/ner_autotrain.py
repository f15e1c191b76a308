"""`make ner-autotrain`: a T5 learns to name entities by Hugging Face's AutoTrain, on the same lists as `make ner`.

The project's sentences become AutoTrain's rows, {"text", "target"}; `autotrain.py` writes its configuration and runs it
in an environment of its own. What it leaves is loaded by transformers here, and scored as every other model of
`make ner`, beside the dictionary of the training data's mentions. AutoTrain begins at a T5 from the Hub, at a folder
with one, or at `--model scratch`: our small T5, untrained or (`--pretrain.max_epochs`) after span corruption on the
training sentences, in Hugging Face's form.
"""

import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

from custom_models.encoder_decoder_checkpoint import load_encoder_decoder, save_hf
from custom_models.projects import autotrain
from custom_models.projects.entity_scores import Tagged
from custom_models.projects.entity_text import list_of
from custom_models.projects.fitting import FitArgs, seed_problems, too_small
from custom_models.projects.keeping import kept_until_done
from custom_models.projects.ner import SCRATCH, pretrained_t5
from custom_models.projects.ner_hf import save_entity_t5
from custom_models.projects.ner_model import Asking, Codec, EntityModel, load_entity_model
from custom_models.projects.ner_report import Round, encode, read_splits, report
from custom_models.projects.seq2seq import T5Shape
from custom_models.projects.texts import drawn
from custom_models.weights import UNREADABLE, quiet_transformers
from data_prep.iob import entities_of
from workflows.errors import UserError, first_line, report_all
from workflows.files import read_json, write_json
from workflows.measure import step_began
from workflows.progress import watched


@kept_until_done
def setup(
    data: Path = Path("data/hpo_entities"),
    model: str = SCRATCH,
    out_dir: Path = Path("out/ner-autotrain/hpo_entities/scratch"),
    shape: T5Shape = T5Shape(),
    pretrain: FitArgs = FitArgs(batch_size=64, learning_rate=2e-3, max_epochs=0),
    unlabelled: list[Path] | None = None,
    max_unlabelled: int = 4000,
    fit: FitArgs = FitArgs(batch_size=16, learning_rate=2e-3, max_epochs=25),
    constrained: bool = True,
    n_beam: int = 4,
    longest: int = 256,
    seeds: list[int] | None = None,
    validation_rows: int | None = 1000,
    max_rows: int | None = None,
    home: Path = autotrain.HOME,
    pip_args: str = "",
) -> None:
    """Teach a T5 to name entities by AutoTrain.

    Args:
        data: A data directory of {"tokens", "tags"} rows, from `make data DATA=bc5cdr` and its like.
        model: "scratch", the folder of a T5 (Hugging Face's, or what `make pretrain-t5` left), or its id on the Hub.
        out_dir: Where everything goes: `base` is what AutoTrain begins at, `autotrain` has what else it reads and says,
            `final` is the model.
        shape: The T5, if it is made from scratch.
        pretrain: How it is pretrained by span corruption before, from scratch only; no epochs, no pretraining.
        unlabelled: Text files to pretrain on besides the training sentences; the Human Phenotype Ontology's definitions
            if null.
        max_unlabelled: At most so many of their lines, drawn at random.
        fit: How AutoTrain trains.
        constrained: Whether the decoder can write nothing but a list of the sentence's own words when it is scored.
        n_beam: Beams when it is scored; 1 is greedy search.
        longest: The longest sentence in tokens; words beyond it are not read.
        seeds: One training for each; [1] if null. The first one's model is kept.
        validation_rows: Sentences that AutoTrain looks at after each epoch, drawn at random; all if null.
        max_rows: Train on the first so many sentences only.
        home: AutoTrain's environment, which is built if it is not there.
        pip_args: Further options of the `pip install` that builds it.

    Raises:
        UserError: If an argument, the data or the model is not usable, or AutoTrain cannot be installed or fails.
    """
    began = step_began()
    seeds = [1] if seeds is None else seeds
    problems = fit.problems() + seed_problems(*seeds)
    problems += too_small(n_beam=(n_beam, 1), longest=(longest, 3), max_rows=(max_rows, 1),
                          validation_rows=(validation_rows, 1), max_unlabelled=(max_unlabelled, 0))  # fmt: skip
    if model == SCRATCH and pretrain.max_epochs:
        problems += pretrain.problems("pretrain")
    if fit.ema_decay:
        problems.append("--fit.ema_decay is for models that we train; AutoTrain has no such average.")
    report_all(problems)
    splits, types = read_splits(data, max_rows)
    some = {**splits, "validation": drawn(splits["validation"], validation_rows)}
    loaded = None if model == SCRATCH else load_encoder_decoder(model)
    autotrain.install(home, pip_args)
    if loaded is None:
        t5, codec = pretrained_t5(splits, types, shape, pretrain, unlabelled, max_unlabelled, longest, seeds[0],
                                  out_dir)  # fmt: skip
    else:
        t5, codec = loaded[0], Codec(loaded[1], types, loaded[0].config.end_id)
    base = out_dir / "base"
    save_hf(t5, codec.tokenizer, base)  # whatever form it had, its tokenizer ends lists now
    asking = Asking("text", constrained, n_beam, 0.0, longest)
    trained = _train(base, codec, data.name, some, fit, asking, seeds, out_dir, home)
    settings = {"trainer": autotrain.PINS[0], "shape": asdict(shape) if model == SCRATCH else None,
                "pretrain": asdict(pretrain) if model == SCRATCH else None, "fit": asdict(fit),
                "max_rows": max_rows}  # fmt: skip
    report(
        trained, splits, data, f"{model} by AutoTrain", asking, validation_rows, 0.0, seeds, out_dir, began, settings
    )
    print(f"{out_dir}/final, autotrain, metrics.json")


def rows_of(rows: Sequence[Tagged], codec: Codec, longest: int) -> list[dict[str, str]]:
    """Sentences and the lists of their entities, as AutoTrain reads them.

    Args:
        rows: Tagged sentences.
        codec: The ids of the model that will read them.
        longest: Words that begin beyond so many tokens are missing, and their entities too.

    Returns:
        {"text", "target"}; a sentence without an entity has the target "".
    """

    def plain(words: Sequence[str]) -> str:  # so that AutoTrain, which encodes texts, gets the ids of the words
        return " ".join(filter(None, map(codec.plain, words)))

    found = []
    for (_, tags), sentence in zip(rows, encode(rows, codec, longest)[0], strict=True):
        listed = list_of(sentence.words, entities_of(tags[: len(sentence.words)]), codec.seen)
        found.append({"text": plain(sentence.words), "target": plain(listed)})
    return found


def most_tokens(texts: Sequence[str], codec: Codec) -> int:
    """How many tokens the longest text has, its end included."""
    return 1 + max(len(codec.tokenizer.encode(text, add_special_tokens=False).ids) for text in texts)


def _train(
    base: Path,
    codec: Codec,
    data: str,
    splits: dict[str, list[Tagged]],
    fit: FitArgs,
    asking: Asking,
    seeds: Sequence[int],
    out_dir: Path,
    home: Path,
) -> Iterator[Round]:
    """One run of AutoTrain for each seed; the first one's model is kept."""
    rows = {split: rows_of(splits[split], codec, asking.longest) for split in ("train", "validation")}
    both = [*rows["train"], *rows["validation"]]
    sizes = [most_tokens([row[column] for row in both], codec) for column in ("text", "target")]
    # Texts may be one token longer than the limit that transformers 4 has by default, 20, and are padded to that limit:
    # then AutoTrain's ROUGE ends in an OverflowError. With any other limit both are the same.
    config = read_json(base / "config.json")
    ids = {name: config[name] for name in ("decoder_start_token_id", "pad_token_id", "eos_token_id")}
    write_json(base / "generation_config.json", {**ids, "max_length": max(21, 1 + sizes[1])})
    project = out_dir / "autotrain"
    with watched(out_dir, keeps="keeps what it was pretrained, if it was, and lets AutoTrain begin anew"):
        for number, seed in enumerate(seeds):
            started = time.perf_counter()
            autotrain.write_project(project, autotrain.config_of(base, fit, seed, *sizes), rows)
            result = autotrain.run(project, home, on_cpu=fit.accelerator == "cpu")
            folder = out_dir / ("final" if number == 0 else ".other")
            tagger = kept(result, codec, asking, data, folder)
            epochs = autotrain.epochs_of(result)
            shutil.rmtree(result)  # the optimizer's state is far larger than the model
            if number:
                shutil.rmtree(folder)
            yield Round(tagger, codec, epochs, time.perf_counter() - started)


def kept(result: Path, codec: Codec, asking: Asking, data: str, folder: Path) -> EntityModel:
    """AutoTrain's result, loaded by transformers and written so that `make ner-predict` can ask it.

    Args:
        result: AutoTrain's folder.
        codec: The ids of the model that it began at.
        asking: How it is asked.
        data: The name of what it learned from.
        folder: Where.

    Raises:
        UserError: If it is no T5 that transformers loads.
    """
    from transformers import T5ForConditionalGeneration

    quiet_transformers()
    try:
        model = T5ForConditionalGeneration.from_pretrained(result)
    except UNREADABLE as e:
        raise UserError(f"transformers cannot load what AutoTrain left in {result}: {first_line(e)}") from None
    save_entity_t5(model, codec.tokenizer, codec.types, asking, data, folder)
    return load_entity_model(folder)[0]
