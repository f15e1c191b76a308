"""`make gpt-dpo`: a GPT of our own from nothing to an assistant: pretrained, taught to answer, then aligned by DPO.

1. It learns the language from definitions (`projects/gpt.py`), unless it is given a base.
2. It learns to answer: questions with their answers, of which only the answers' tokens are learned.
3. It learns which of two answers is the better one, by the loss that the road's `make dpo` has, too
   (`workflows/training/losses.py`; Rafailov et al. 2023, arXiv 2305.18290, equation 7): with h, the chosen answer's
   log pi / pi_ref less the rejected one's, -log sigmoid(beta h). The reference pi_ref is the model of step 2, whose
   log-probabilities are computed once.

The pairs are, if no others are given, each question's own answer against one that belongs to another question.

All three read training rows only. How often the chosen answer of held-out pairs is ahead of the rejected one is counted
before and after: by log-probability, and by reward, which is beta log pi / pi_ref and so a tie before.
"""

from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor

from custom_models.gpt import GPT, GPTConfig, modern
from custom_models.gpt_checkpoint import Tokenizer, load_gpt, save_gpt
from custom_models.projects import gpt
from custom_models.projects.fitting import FitArgs, device_of, fit_best, seed_problems
from custom_models.projects.gpt_answers import (
    Answered,
    Batch,
    Pair,
    answer_logprobs,
    encoded,
    fitting,
    loader,
    mismatched,
    padded,
    padded_pairs,
    token_logprobs,
)
from custom_models.projects.gpt_training import GPTFit
from custom_models.projects.keeping import KEPT, folder_named, kept_until_done
from custom_models.projects.texts import LengthBatches
from custom_models.tokenization.bpe import SpecialBPE
from data_prep.rows import Row, read_rows
from workflows.checkpoint import metric, share_metric, write_metrics
from workflows.errors import UserError, report_all
from workflows.evaluation.compare import with_interval
from workflows.files import write_text
from workflows.measure import PeakMemory, hardware, seconds_of_step, step_began
from workflows.training import losses
from workflows.training.resume import Resume

SHOWN = 3
"""Prompts that are answered to be read."""


class TuningTask(L.LightningModule):
    """Learning to answer: -log p of the answers' tokens, the mean over them."""

    def __init__(self, model: GPT, fit: FitArgs, total_steps: int) -> None:
        super().__init__()
        self.model, self.fit_args, self.total_steps = model, fit, total_steps

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The loss of a batch."""
        loss = -token_logprobs(self.model, batch)[0].mean()
        self.log("train_loss", loss, on_step=False, on_epoch=True, batch_size=len(batch.ids))
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """The same."""
        logprobs, _ = token_logprobs(self.model, batch)  # (N,)
        self.log("val_loss", -logprobs.mean(), batch_size=len(logprobs), prog_bar=True)

    def configure_optimizers(self) -> Any:
        """AdamW with the rate's schedule."""
        return self.fit_args.optimizer(self, self.total_steps)


class DPOTask(L.LightningModule):
    """Learning which answer is better, by the road's loss."""

    def __init__(self, model: GPT, fit: FitArgs, total_steps: int, beta: float) -> None:
        super().__init__()
        self.model, self.fit_args, self.total_steps, self.beta = model, fit, total_steps, beta

    def margins(self, batch: Batch) -> Tensor:
        """h, how much the policy has moved each pair apart, (pairs,)."""
        assert batch.reference is not None  # pairs have it
        log_ratios = answer_logprobs(self.model, batch) - batch.reference  # (2 * pairs,)
        return log_ratios[0::2] - log_ratios[1::2]

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The loss of a batch of pairs."""
        loss = losses.dpo(self.margins(batch), self.beta).mean()
        self.log("train_loss", loss, on_step=False, on_epoch=True, batch_size=len(batch.ids) // 2)
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """The same, and how many pairs are the right way round."""
        margins = self.margins(batch)  # (pairs,)
        self.log("val_loss", losses.dpo(margins, self.beta).mean(), batch_size=len(margins), prog_bar=True)
        won = losses.pairs_won(margins, torch.zeros_like(margins)) / len(margins)
        self.log("val_accuracy", won, batch_size=len(margins), prog_bar=True)

    def configure_optimizers(self) -> Any:
        """AdamW with the rate's schedule."""
        return self.fit_args.optimizer(self, self.total_steps)


@kept_until_done
def setup(
    data: Path = Path("data/hpo"),
    pairs: Path | None = None,
    out_dir: Path = Path("out/gpt-dpo"),
    base_dir: str | None = None,
    model: GPTConfig = modern(vocab_size=2048, context=128, width=128, n_layer=4, n_head=4),
    pretrain: GPTFit = GPTFit(max_steps=600),
    tune: FitArgs = FitArgs(batch_size=32, learning_rate=2e-3, max_epochs=3, patience=1),
    align: FitArgs = FitArgs(batch_size=16, learning_rate=3e-4, max_epochs=1, patience=1),
    beta: float = 0.1,
    kinds: list[str] | None = None,
    max_rows: int = 24000,
    max_pairs: int = 12000,
    max_test_rows: int = 1000,
    max_new_tokens: int = 60,
    seed: int = 1337,
    resume: Resume = "auto",
) -> None:
    """Teach a GPT to answer, and to prefer better answers.

    Args:
        data: A data directory of {"messages"} rows.
        pairs: One of {"prompt", "chosen", "rejected"} rows, whose held-out questions are none of the others; if null,
            answers of `data` against answers to other questions.
        out_dir: Where numbers go; the model is in its `final` folder, that before DPO in `tuned`, the base in `base`.
        base_dir: A GPT with byte pairs to begin with (folder or Hub id); one is trained on `data`'s answers if null.
        model: The base's shape.
        pretrain: How it is trained.
        tune: How answering is learned.
        align: How preferring is learned.
        beta: How dear it is to leave the reference.
        kinds: Rows of these kinds are learned from; definitions and names if null, all where rows have no kinds.
        max_rows: At most so many rows are.
        max_pairs: At most so many pairs are.
        max_test_rows: At most so many held-out pairs are counted.
        max_new_tokens: Of the answers that are shown.
        seed: Of weights, order and exchanged answers.
        resume: Whether the base goes on from a checkpoint of its own, see `gpt.setup`.

    Raises:
        UserError: If an argument, the data or the base is not usable.
    """
    began = step_began()
    problems = pretrain.problems("pretrain") + tune.problems("tune") + align.problems("align") + seed_problems(seed)
    problems += [] if beta > 0 else [f"--beta must be positive, not {beta}."]
    limits = {"max_rows": max_rows, "max_pairs": max_pairs, "max_test_rows": max_test_rows,
              "max_new_tokens": max_new_tokens}  # fmt: skip
    problems += [f"--{name} must be at least 1, not {value}." for name, value in limits.items() if value < 1]
    report_all(problems)
    kinds = ["definition", "name"] if kinds is None else kinds
    splits = ("train", "validation", "test") if pairs is None else ("train", "validation")
    rows = {split: of_kinds(read_rows(data / f"{split}.jsonl"), kinds) for split in splits}
    if pairs is None:
        preferred = {split: mismatched(members, seed) for split, members in rows.items()}
    else:
        preferred = {
            split: read_rows(pairs / f"{split}.jsonl", "preference") for split in ("train", "validation", "test")
        }
    L.seed_everything(seed, verbose=False)
    with PeakMemory() as peak:
        if base_dir is None:
            base_dir = str(pretrain_base(rows["train"], out_dir, model, pretrain, seed, resume))
        policy, tokenizer = load_gpt(base_dir)
        if not isinstance(tokenizer, SpecialBPE):
            raise UserError(f"{base_dir} has no token that ends a text. Train a base with --tokenizer bpe.")
        told = [learn_to_answer(policy, tokenizer, rows, out_dir, tune, max_rows, seed)]
        save_gpt(policy, tokenizer, out_dir / "tuned")
        asked = preferred["test"][:max_test_rows]
        before = [reply(policy, tokenizer, row, max_new_tokens) for row in asked[:SHOWN]]
        found, test = learn_to_prefer(
            policy, tokenizer, preferred, out_dir, align, beta, max_pairs, max_test_rows, seed
        )
        told += found
        after = [reply(policy, tokenizer, row, max_new_tokens) for row in asked[:SHOWN]]
    save_gpt(policy, tokenizer, out_dir / "final")
    shown = [
        {"question": row["prompt"][-1]["content"], "before": first, "after": second,
         "wanted": row["chosen"][-1]["content"]}
        for row, first, second in zip(asked[:SHOWN], before, after, strict=True)
    ]  # fmt: skip
    write_metrics(out_dir / "metrics.json", told, seconds=seconds_of_step(began), peak_bytes=peak.bytes, shown=shown,
                  test_pairs=test, hardware=hardware())  # fmt: skip
    for row in told:
        print(f"  {row['name'].replace('_', ' '):<28}{with_interval(row)}")
    for answer in shown:
        print("\n".join(f"  {name + ':':<10}{text}" for name, text in answer.items()) + "\n")
    print(f"{out_dir}/final, metrics.json")


def of_kinds(rows: list[Row], kinds: list[str]) -> list[Row]:
    """Rows of some kinds; all rows where none has a kind.

    Raises:
        UserError: If there are kinds, but not these.
    """
    present = {row["kind"] for row in rows if "kind" in row}
    kept = [row for row in rows if row.get("kind") in kinds] if present else rows
    if not kept:
        raise UserError(f"There are no rows of kind {' or '.join(kinds)}; there are {', '.join(sorted(present))}.")
    return kept


def pretrain_base(rows: list[Row], out_dir: Path, model: GPTConfig, fit: GPTFit, seed: int, resume: Resume) -> Path:
    """Train a base on the answers of training rows, each once, in their order; returns its folder."""
    answers = dict.fromkeys(row["messages"][-1]["content"] for row in rows)
    text, final = out_dir / "base" / "answers.txt", out_dir / "base" / "final"
    written = "".join(f"{answer}\n" for answer in answers)
    # One file, so that it speaks of the base that is there, and of no other that was there before.
    made, now = out_dir / KEPT / "base.txt", folder_named([written.encode()], out_dir).name
    if resume and final.is_dir() and made.is_file() and made.read_text(encoding="utf-8") == now:
        print(f"{final}: trained before")
        return final
    made.unlink(missing_ok=True)
    write_text(text, written)
    gpt.setup(str(text), "bpe", out_dir / "base" / "tokens", out_dir / "base", model, fit, seed=seed, resume=resume)
    write_text(made, now)
    return final


def reply(model: GPT, tokenizer: Tokenizer, row: Row, max_new_tokens: int) -> str:
    """The likeliest answer to a row's prompt."""
    prompt = "".join(f"{turn['content']}\n" for turn in row["prompt"])
    room = model.max_length - len(tokenizer.encode(prompt))
    return gpt.write(model, tokenizer, prompt, min(max_new_tokens, room))[0].strip() if room > 0 else ""


def learn_to_answer(
    policy: GPT,
    tokenizer: Tokenizer,
    rows: dict[str, list[Row]],
    out_dir: Path,
    fit: FitArgs,
    max_rows: int,
    seed: int,
) -> dict[str, Any]:
    """Step 2; returns the loss of held-out answers as a row of metrics.json."""
    train, validation = (
        fitting(
            [
                encoded(tokenizer, row["messages"][:-1], row["messages"][-1]["content"])
                for row in rows[split][:max_rows]
            ],
            policy.max_length,
            f"{split} rows",
        )
        for split in ("train", "validation")
    )
    batches = loader(train, fit.batch_size, padded, seed)
    task = TuningTask(policy.train(), fit, len(batches) * fit.max_epochs)
    print(f"learning to answer: {len(train):,} rows")
    epochs = fit_best(task, batches, loader(validation, fit.batch_size, padded), out_dir, fit, "val_loss")
    return metric("answer_loss", min(row["val_loss"] for row in epochs), n=len(validation), split="validation")


def learn_to_prefer(
    policy: GPT,
    tokenizer: Tokenizer,
    rows: dict[str, list[Row]],
    out_dir: Path,
    fit: FitArgs,
    beta: float,
    max_pairs: int,
    max_test_rows: int,
    seed: int,
) -> tuple[list[dict[str, Any]], int]:
    """Step 3; returns the rows of metrics.json about the held-out pairs, and how many these are."""
    most = {"train": max_pairs, "validation": max_test_rows, "test": max_test_rows}
    pairs = {split: make_pairs(policy, tokenizer, rows[split][:number], split) for split, number in most.items()}
    batches = loader(pairs["train"], fit.batch_size, padded_pairs, seed)
    task = DPOTask(policy.train(), fit, len(batches) * fit.max_epochs, beta)
    print(f"learning to prefer: {len(pairs['train']):,} pairs")
    fit_best(task, batches, loader(pairs["validation"], fit.batch_size, padded_pairs), out_dir, fit, "val_loss")
    reference = torch.stack([pair.reference for pair in pairs["test"]])  # (pairs, 2)
    logprobs = scores(policy, pairs["test"])  # (pairs, 2)
    rewards, count = beta * (logprobs - reference), len(reference)  # (pairs, 2)
    shares = {
        "pair_accuracy_before": torch.zeros_like(rewards),
        "pair_accuracy": rewards,
        "logprob_accuracy_before": reference,
        "logprob_accuracy": logprobs,
    }
    told = [share_metric(name, float(losses.pairs_won(*of.T)) / count, count) for name, of in shares.items()]
    return [*told, metric("margin", float((rewards[:, 0] - rewards[:, 1]).mean()), n=count, split="test")], count


def make_pairs(policy: GPT, tokenizer: Tokenizer, rows: list[Row], split: str) -> list[Pair]:
    """Encode pairs, and compute the reference's log-probabilities with the policy as it is now."""

    def answer(row: Row, side: str) -> Answered:
        return encoded(tokenizer, row["prompt"], row[side][-1]["content"])

    pairs = [Pair(answer(row, "chosen"), answer(row, "rejected"), torch.zeros(2)) for row in rows]
    pairs = fitting(pairs, policy.max_length, f"{split} pairs")
    return [Pair(pair.chosen, pair.rejected, both) for pair, both in zip(pairs, scores(policy, pairs), strict=True)]


@torch.no_grad()
def scores(policy: GPT, pairs: list[Pair], at_once: int = 32) -> Tensor:
    """The log-probabilities of both answers, (pairs, 2)."""
    policy.eval()
    found = torch.zeros(len(pairs), 2)  # (pairs, 2)
    for members in LengthBatches([len(pair) for pair in pairs], at_once, None):
        batch = padded_pairs([pairs[i] for i in members]).to(device_of(policy))
        found[members] = answer_logprobs(policy, batch).view(-1, 2).cpu()
    return found
