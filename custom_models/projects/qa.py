"""`make qa`: the answer to a question, found in a text (`span_model.py`).

From scratch (`--encoder scratch`): a vocabulary and an encoder of our own, trained on the questions alone. Or from the
weights of a pretrained encoder: MiniLM (`--encoder minilm`), or a BERT, RoBERTa or DistilBERT by its folder or Hub id.
Beside it the answer that is right most often, and what shared words find: the phrase of the context that shares most
with the question, and the first phrase of the sentence that does.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch
from tokenizers import Tokenizer
from torch import Tensor
from torch.utils.data import DataLoader

from custom_models.encoder import Encoder, non_embedding_parameters
from custom_models.encoder_checkpoint import (
    encoder_directory,
    frame_of,
    load_encoder,
    read_own,
    save_encoder,
    tokenizer_of,
)
from custom_models.projects.answers import commonest, exact, f1, first_phrase_of_likest_sentence, likest_phrase
from custom_models.projects.classifier import over_seeds
from custom_models.projects.fitting import FitArgs, fit_best, seed_problems
from custom_models.projects.keeping import kept_until_done
from custom_models.projects.shape import Shape
from custom_models.projects.texts import LengthBatches, drawn
from custom_models.projects.vocabulary import END, PAD, START, learn_vocabulary
from custom_models.span_model import SpanBatch, SpanModel, batch_spans, begin_by_matching, best_span, stretches
from custom_models.weights import fill
from data_prep.rows import Row, read_rows
from workflows.checkpoint import metric, share_metric, versions, write_metrics
from workflows.errors import UserError, report_all
from workflows.files import read_text
from workflows.measure import PeakMemory, hardware, seconds_of_step, step_began

SCRATCH = "scratch"


@dataclass(frozen=True)
class Reader:
    """How questions become tokens.

    Attributes:
        tokenizer: Whose ids.
        frame: The ids of [CLS] and [SEP], or what stands in their places.
        longest: The most tokens of question, window and frame.

    Raises:
        UserError: If no question can be read beside a text.
    """

    tokenizer: Tokenizer
    frame: tuple[int, int]
    longest: int

    def __post_init__(self) -> None:
        if self.longest < 5:  # the frame has three
            raise UserError(f"Question and text need at least 5 positions, not {self.longest} (--shape.n_position).")

    def ids(self, text: str) -> list[int]:
        """A text's tokens, without a frame."""
        found: list[int] = self.tokenizer.encode(text, add_special_tokens=False).ids
        return found


@dataclass(frozen=True)
class Question:
    """A question in tokens.

    Attributes:
        row: As it was read; without answers if it is only asked.
        windows: Of the context: ids, where the context begins in them, and the answer's first and last token there.
        firsts: Which token of the context each window begins with.
        offsets: Where each token of the context begins and ends in its text.
        cut: Whether the question was too long to be read to its end.
    """

    row: Row
    windows: list[tuple[list[int], int, tuple[int, int]]]
    firsts: list[int]
    offsets: list[tuple[int, int]]
    cut: bool


@dataclass(frozen=True)
class Batch:
    """Windows of a batch of questions.

    Attributes:
        tokens: What the model reads.
        questions: Whose they are, each with as many windows as it has.
    """

    tokens: SpanBatch
    questions: list[Question]

    def to(self, device: torch.device) -> "Batch":
        """The same on a device (Lightning calls it)."""
        return Batch(self.tokens.to(device), self.questions)


def encode_question(row: Row, reader: Reader) -> Question:
    """A question as windows over its context, half of each of which is new.

    A question over half of the positions is cut; the context never is.

    Raises:
        UserError: If question or context has no tokens.
    """
    asked, context = reader.ids(row["question"]), reader.tokenizer.encode(row["context"], add_special_tokens=False)
    if not asked or not context.ids:
        raise UserError("The question or its context is empty.")
    start, end = reader.frame
    most = (reader.longest - 3) // 2
    head = [start, *asked[:most], end]
    room = reader.longest - len(head) - 1
    wanted = None
    if "answers" in row:
        at = row["answers"]["answer_start"][0]
        covered = [i for i, (a, b) in enumerate(context.offsets) if a < at + len(row["answers"]["text"][0]) and b > at]
        wanted = (covered[0], covered[-1]) if covered else None
    parts = stretches(len(context.ids), room, max(1, room // 2))
    windows = []
    for begin, stop in parts:
        inside = wanted is not None and begin <= wanted[0] and wanted[1] < stop
        span = (wanted[0] - begin + len(head), wanted[1] - begin + len(head)) if wanted and inside else (0, 0)
        windows.append(([*head, *context.ids[begin:stop], end], len(head), span))
    return Question(row, windows, [begin for begin, _ in parts], context.offsets, len(asked) > most)


def read_questions(data: Path, split: str, reader: Reader, max_rows: int | None = None) -> list[Question]:
    """Read a split of a data directory, and say what in it is out of the ordinary.

    Raises:
        UserError: If the file is missing or malformed.
    """
    file = data / f"{split}.jsonl"
    found = [encode_question(row, reader) for row in drawn(read_rows(file, "spans"), max_rows)]
    several = sum(len(question.windows) > 1 for question in found)
    lost = sum(all(span == (0, 0) for _, _, span in question.windows) for question in found)
    print(f"{file}: {len(found):,} questions; {several:,} contexts read in windows: over {reader.longest} tokens; "
          f"{lost:,} answers in no window; {sum(question.cut for question in found):,} questions cut")  # fmt: skip
    return found


def loader(
    questions: Sequence[Question], pad_id: int, batch_size: int, seed: int | None = None
) -> DataLoader[Question]:
    """Batches of questions, shuffled by a seed (training) or in the order of their lengths."""

    def collate(found: Sequence[Question]) -> Batch:
        return Batch(batch_spans([window for question in found for window in question.windows], pad_id), list(found))

    order = LengthBatches([sum(len(ids) for ids, _, _ in q.windows) for q in questions], batch_size, seed)
    return DataLoader(questions, batch_sampler=order, collate_fn=collate)  # type: ignore[arg-type]


def answers_of(logits: tuple[Tensor, Tensor], questions: Sequence[Question], most: int) -> list[tuple[str, float, int]]:
    """Each question's answer, of the window that is surest of one.

    Args:
        logits: Of first and last tokens, (B, T) each, the questions' windows in turn.
        questions: Whose they are.
        most: The most tokens of an answer.

    Returns:
        The answer, log of how much likelier it is than none, and where it begins in the context.
    """
    rows = iter(zip(*logits, strict=True))
    found = []
    for question in questions:
        best = None
        for (ids, begin, _), offset in zip(question.windows, question.firsts, strict=True):
            first, last = next(rows)
            score, a, b = best_span(first[: len(ids)], last[: len(ids)], most)
            if best is None or score > best[0]:
                best = (score, question.offsets[a - begin + offset][0], question.offsets[b - begin + offset][1])
        assert best is not None
        text = question.row["context"][best[1] : best[2]]
        found.append((text.strip(), best[0], best[1] + len(text) - len(text.lstrip())))
    return found


class SpanTask(L.LightningModule):
    """How it is trained: by the cross-entropy of where answers begin and end.

    Args:
        model: What finds answers.
        fit: Rate and schedule.
        total_steps: Optimizer steps in all.
        most: The most tokens of an answer.
    """

    def __init__(self, model: SpanModel, fit: FitArgs, total_steps: int, most: int) -> None:
        super().__init__()
        self.model, self.fit_args, self.total_steps, self.most = model, fit, total_steps, most

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The loss, logged."""
        loss = self.model.loss(batch.tokens)
        self.log("train_loss", loss, on_step=False, on_epoch=True, batch_size=len(batch.questions))
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """F1 of the answers."""
        found = answers_of(self.model(batch.tokens), batch.questions, self.most)
        scores = [f1(text, q.row["answers"]["text"]) for (text, _, _), q in zip(found, batch.questions, strict=True)]
        self.log("val_f1", sum(scores) / len(scores), batch_size=len(scores), prog_bar=True)

    def configure_optimizers(self) -> Any:
        """AdamW with the rate's schedule."""
        return self.fit_args.optimizer(self, self.total_steps)


@kept_until_done
def setup(
    data: Path = Path("data/hpo_spans"),
    encoder: str = SCRATCH,
    out_dir: Path = Path("out/qa/hpo_spans/scratch"),
    shape: Shape = Shape(vocab_size=8000, inner_width=512, n_position=384, dropout=0.1),
    max_answer_tokens: int = 30,
    fit: FitArgs = FitArgs(batch_size=32, learning_rate=1e-3, max_epochs=6, patience=3),
    seeds: list[int] | None = None,
    max_rows: int | None = None,
    max_test_rows: int | None = None,
) -> None:
    """Train a model that finds answers.

    Args:
        data: A data directory of {"question", "context", "answers"} rows, from `make data DATA=squad` and its like.
        encoder: "scratch", "minilm", the folder of a BERT, RoBERTa or DistilBERT, or its id on the Hub.
        out_dir: Where the numbers go; the model is in its `final` folder.
        shape: The encoder, if it is trained from scratch.
        max_answer_tokens: The longest answer.
        fit: How it is trained.
        seeds: One training for each; [1] if null. The first one's model is kept.
        max_rows: Train on so many questions only, drawn at random.
        max_test_rows: Validate and test on so many only, likewise.

    Raises:
        UserError: If an argument, the data or the encoder is not usable.
    """
    began = step_began()
    seeds = [1] if seeds is None else seeds
    problems = fit.problems() + seed_problems(*seeds)
    problems += [f"--{name} must be at least 1, not {value}."
                 for name, value in (("max_answer_tokens", max_answer_tokens), ("max_rows", max_rows),
                                     ("max_test_rows", max_test_rows)) if value is not None and value < 1]  # fmt: skip
    report_all(problems)
    reader, make = _reader_and_maker(encoder, shape, data, max_rows)
    train, validation, test = (read_questions(data, split, reader, most) for split, most in (
        ("train", max_rows), ("validation", max_test_rows), ("test", max_test_rows)))  # fmt: skip
    runs, times, kept = [], [], None
    with PeakMemory() as peak:
        for seed in seeds:
            L.seed_everything(seed, verbose=False)
            model, started = SpanModel(make()), time.perf_counter()
            pad_id = model.encoder.config.pad_id
            steps = -(-len(train) // fit.batch_size) * fit.max_epochs
            task = SpanTask(model, fit, steps, max_answer_tokens)
            epochs = fit_best(task, loader(train, pad_id, fit.batch_size, seed),
                              loader(validation, pad_id, 2 * fit.batch_size), out_dir, fit, "val_f1")  # fmt: skip
            times.append(time.perf_counter() - started)
            runs.append(_scores([text for text, _, _ in find(model, test, max_answer_tokens)], test))
            best = max(row["val_f1"] for row in epochs)
            print(f"seed {seed}: validation F1 {best:.1%} (best of {len(epochs)} epochs), "
                  f"test exact {runs[-1][0]:.1%}, F1 {runs[-1][1]:.1%}, {times[-1]:.0f} s")  # fmt: skip
            kept = kept or model
    assert kept is not None
    save_encoder(kept, kept.encoder.config, reader.tokenizer, out_dir / "final", frame=list(reader.frame),
                 max_answer_tokens=max_answer_tokens, data=data.name)  # fmt: skip
    usual = commonest([question.row["answers"]["text"][0] for question in train])
    compared = {
        "": runs[0],
        "_commonest_answer": _scores([usual] * len(test), test),
        "_likest_phrase": _scores([likest_phrase(q.row["question"], q.row["context"]) for q in test], test),
        "_likest_sentence": _scores(
            [first_phrase_of_likest_sentence(q.row["question"], q.row["context"]) for q in test], test
        ),
    }
    told = []
    print(f"\n{data}/test.jsonl, {len(test):,} questions\n{'':<18}{'exact':>8}{'F1':>8}")
    for name, (matches, overlap) in compared.items():
        told += [
            share_metric(f"exact{name}", matches, len(test)),
            metric(f"f1{name}", overlap, n=len(test), split="test"),
        ]
        print(f"{name.strip('_').replace('_', ' ') or encoder:<18}{matches:8.1%}{overlap:8.1%}")
    told += over_seeds("exact", [matches for matches, _ in runs]) + over_seeds("f1", [overlap for _, overlap in runs])
    write_metrics(
        out_dir / "metrics.json",
        told,
        seconds=seconds_of_step(began),
        peak_bytes=peak.bytes,
        train_seconds=times,
        seeds=dict(zip(map(str, seeds), runs, strict=True)),
        parameters=sum(p.numel() for p in kept.parameters()),
        non_embedding_parameters=non_embedding_parameters(kept.encoder),
        data=data.name,
        settings={"encoder": encoder, "shape": asdict(shape) if encoder == SCRATCH else None, "fit": asdict(fit),
                  "max_answer_tokens": max_answer_tokens, "max_rows": max_rows, "max_test_rows": max_test_rows},
        hardware=hardware(),
        versions=versions(),
    )  # fmt: skip
    print(f"{out_dir}/final, metrics.json")


def _scores(texts: Sequence[str], questions: Sequence[Question]) -> tuple[float, float]:
    """Exact match and F1, the means."""
    pairs = [(text, q.row["answers"]["text"]) for text, q in zip(texts, questions, strict=True)]
    return sum(exact(*pair) for pair in pairs) / len(pairs), sum(f1(*pair) for pair in pairs) / len(pairs)


def _reader_and_maker(
    encoder: str, shape: Shape, data: Path, max_rows: int | None
) -> tuple[Reader, Callable[[], Encoder]]:
    """How questions become tokens, and a function that makes the encoder anew."""
    if encoder == SCRATCH:
        rows = drawn(read_rows(data / "train.jsonl", "spans"), max_rows)
        texts = dict.fromkeys(text for row in rows for text in (row["question"], row["context"]))
        tokenizer = learn_vocabulary(texts, shape.vocab_size, (PAD, START, END))
        pad, start, end = (tokenizer.token_to_id(token) for token in (PAD, START, END))
        config = shape.config(
            n_segment=2, pad_id=pad, norm_first=True, embedding_norm=False, pooler=False, norm_eps=1e-5
        )

        def untrained() -> Encoder:
            encoder = Encoder(config)
            begin_by_matching(encoder)
            return encoder

        return Reader(tokenizer, (start, end), shape.n_position), untrained
    directory = encoder_directory(encoder)
    tokenizer = tokenizer_of(directory)
    longest = load_encoder(directory).config.n_position
    return Reader(tokenizer, frame_of(tokenizer, directory), longest), lambda: load_encoder(directory)


@torch.no_grad()
def find(
    model: SpanModel, questions: Sequence[Question], most: int, batch_size: int = 32
) -> list[tuple[str, float, int]]:
    """What `answers_of` says of questions, in the order given."""
    model.eval()
    device = model.head.weight.device
    found: dict[int, tuple[str, float, int]] = {}
    for batch in loader(questions, model.encoder.config.pad_id, batch_size):
        answers = answers_of(model(batch.tokens.to(device)), batch.questions, most)
        found |= {id(question): answer for question, answer in zip(batch.questions, answers, strict=True)}
    return [found[id(question)] for question in questions]


def load_finder(folder: Path) -> tuple[SpanModel, Reader, int]:
    """Read a model that finds answers, how it reads, and its longest answer in tokens.

    Raises:
        UserError: If it is none of ours, or damaged.
    """
    config, shape, weights = read_own(folder)
    if "frame" not in config:
        raise UserError(f"{folder} finds no answers. Train a model that does with `make qa`.")
    match config:
        case {"frame": [int(start), int(end)], "max_answer_tokens": int(most)} if (
            0 <= min(start, end) <= max(start, end) < shape.vocab_size and most >= 1
        ):
            reader = Reader(tokenizer_of(folder), (start, end), shape.n_position)
        case _:
            raise UserError(f"{folder}/config.json is damaged: frame or max_answer_tokens. Train it again.")
    model = SpanModel(Encoder(shape))
    fill(model, weights, str(folder))
    return model.eval(), reader, most


def answer(checkpoint_dir: Path, question: str, context: Path) -> None:
    """Answer a question from a text file.

    Args:
        checkpoint_dir: A model's folder, such as out/qa/hpo_spans/minilm/final.
        question: What is asked.
        context: A UTF-8 text file of any length.

    Raises:
        UserError: If the folder holds no such model, or question or text is empty.
    """
    if not (checkpoint_dir / "config.json").is_file():
        raise UserError(f"{checkpoint_dir} holds no model. Train one with `make qa`, or name its folder.")
    if context.is_dir():
        raise UserError(f"{context} is a folder. Name a text file in it.")
    text = read_text(context)
    problems = [] if question.strip() else ["The question is empty. Ask one."]
    report_all(problems + ([] if text.strip() else [f"{context} is empty: there is nothing to answer from."]))
    model, reader, most = load_finder(checkpoint_dir)
    asked = encode_question({"question": question, "context": text}, reader)
    ((found, score, begin),) = find(model, [asked], most)
    around = text[max(0, begin - 60) : begin], text[begin + len(found) : begin + len(found) + 60]
    print(f"{found}\n\n…{' '.join(around[0].split())} >{found}< {' '.join(around[1].split())}…")
    if score < 0:
        print("\nThe model takes it for likelier that the text has no answer.")
    if asked.cut:
        print("\nThe question was read without its end: it takes more than half of what the model reads at once.")
