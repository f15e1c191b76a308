"""`make lora-scratch`: our own Llama fine-tuned with our own LoRA, beside all of its weights and beside LitGPT's road.

The model, its weights' reader and the adapters are this folder's; the prompts, the rows and the loop are the road's
(`make lora`), so that the same rows in the same order with the same rates are learned from, and what differs is what is
compared: adapters or all weights, our arithmetic or LitGPT's. From the same seed ours and LitGPT draw the very same A
matrices, so their losses are equal, step by step, up to rounding.

* `--method lora`: adapters; they are left in OUT_DIR/adapter, in peft's format and under transformers' names.
* `--method full`: all weights; they are left in OUT_DIR/final, in Hugging Face's form.
* `--method both`: the two in turn, each in a process of its own, since a peak of memory belongs to a process.
* `--road true`: `python -m workflows lora` with the same settings, too.
"""

import json
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
import yaml
from torch import Tensor

from custom_models.llama import Llama
from custom_models.llama_checkpoint import check_vocabulary, hf_module_names, load_llama, save_llama, smollm2_directory
from custom_models.lora import add_lora, problems_of, save_lora, trainable_parameters
from custom_models.projects.fitting import seed_problems
from data_prep.chat_data import ChatData, encode_rows
from workflows.chat_template import ChatTemplate, EncodedChat
from workflows.checkpoint import LORA_WEIGHTS, load_weights, metric, plain, write_metrics
from workflows.errors import UserError, report_all
from workflows.files import read_json, write_text
from workflows.lifetime import run_child
from workflows.measure import PeakMemory, hardware, seconds_of_step, step_began
from workflows.progress import result_is_there, watched
from workflows.training.length import length_text, limited_to
from workflows.training.loop import Objective, TrainArgs, fit, step_indices
from workflows.training.processes import Accelerator, device_problems, launched, make_fabric
from workflows.training.step import run_identity

Method = Literal["lora", "full", "both"]
ALL_LAYERS = ["layers.*"]
"""All linear layers of all layers, but not the head: what `make lora` adapts, too."""
TITLES = {"lora": "LoRA", "full": "all weights", "road": "LoRA, LitGPT"}


@dataclass
class Adapters:
    """LoRA's settings."""

    rank: int = 16
    """Of the change of each layer."""
    alpha: int = 32
    """The change is scaled by alpha / rank."""
    dropout: float = 0.0
    """Share of what an adapter reads that is set to zero in training."""
    rslora: bool = False
    """Scale by alpha / sqrt(rank) instead."""
    targets: list[str] = field(default_factory=lambda: [*ALL_LAYERS])
    """Patterns of the adapted layers' names, such as "*.attention.[qv]"."""


@dataclass(frozen=True)
class Chats:
    """Conversations of like length, padded at their ends, with the tokens that are learned.

    Attributes:
        ids: All tokens but the last of each, which predicts nothing, (B, T).
        predict: Where the next token is one that is learned, (B, T).
        targets: Those next tokens, (N,).
        real_tokens: Tokens without padding.
    """

    ids: Tensor
    predict: Tensor
    targets: Tensor
    real_tokens: int

    def to(self, device: torch.device) -> "Chats":
        """The same on a device."""
        return Chats(self.ids.to(device), self.predict.to(device), self.targets.to(device), self.real_tokens)


def pad(rows: Sequence[EncodedChat]) -> Chats:
    """Lay conversations below each other, the shorter ones padded to the length of the longest."""
    texts = [row.prompt + row.completion for row in rows]
    width = max(len(text) - 1 for text in texts)
    ids = torch.zeros(len(rows), width, dtype=torch.long)  # (B, T)
    predict = torch.zeros(len(rows), width, dtype=torch.bool)  # (B, T)
    targets = []
    for number, (row, text) in enumerate(zip(rows, texts, strict=True)):
        ids[number, : len(text) - 1] = torch.tensor(text[:-1])
        learned = torch.tensor(row.loss_mask)  # (length of the completion,)
        begin = len(row.prompt) - 1  # the prompt's last token predicts the completion's first
        predict[number, begin : begin + len(learned)] = learned
        targets.append(torch.tensor(row.completion)[learned])
    return Chats(ids, predict, torch.cat(targets), sum(map(len, texts)))


def batches_of(rows: Sequence[EncodedChat], most_tokens: int) -> list[Chats]:
    """Group conversations of like length, so that no group has more places than `most_tokens` if it can be helped."""

    def length(row: EncodedChat) -> int:
        return len(row.prompt) + len(row.completion)

    groups: list[list[EncodedChat]] = []
    for row in sorted(rows, key=length, reverse=True):
        if groups and (len(groups[-1]) + 1) * length(groups[-1][0]) <= most_tokens:
            groups[-1].append(row)
        else:
            groups.append([row])
    return [pad(group) for group in groups]


class FineTuning(Objective):
    """Mean negative log-likelihood of the assistant's tokens; the user's are read, and not learned."""

    def __init__(
        self, rows: Sequence[EncodedChat], validation: Sequence[EncodedChat], train: TrainArgs, seed: int
    ) -> None:
        self.rows, self.train, self.seed = rows, train, seed
        self.validation = batches_of(validation, train.row_tokens)

    def batches(self, step: int, rank: int, world_size: int) -> list[Chats]:
        """The rows of a step, the same as `make lora` has them."""
        indices = step_indices(step, len(self.rows), self.train.global_batch_size, self.seed)[rank::world_size]
        return batches_of([self.rows[i] for i in indices], self.train.row_tokens)

    def units(self, batch: Chats) -> int:
        """Every learned token counts the same."""
        return batch.targets.numel()

    def loss(self, model: Any, batch: Chats) -> tuple[Tensor, dict[str, Tensor]]:
        """-sum of log p(token) over the learned tokens."""
        logits = model(batch.ids, predict=batch.predict)  # (N, vocab_size)
        return F.cross_entropy(logits.float(), batch.targets, reduction="sum"), {}

    @torch.no_grad()
    def validate(self, model: Any) -> dict[str, float]:
        """Mean loss over the learned tokens of the validation rows."""
        model.eval()
        device = next(model.parameters()).device
        total = sum(float(self.loss(model, batch.to(device))[0]) for batch in self.validation)
        model.train()
        return {"val_loss": total / sum(map(self.units, self.validation))}


def setup(
    checkpoint_dir: Path | None = None,
    data: Path = Path("data/hpo"),
    out_dir: Path = Path("out/lora-scratch"),
    method: Method = "lora",
    road: bool = False,
    kinds: list[str] | None = None,
    max_val_rows: int = 100,
    lora: Adapters = Adapters(),
    train: TrainArgs = TrainArgs(max_steps=38),
    full_learning_rate: float = 1e-4,
    accelerator: Accelerator = "auto",
    seed: int = 1337,
) -> None:
    """Fine-tune the Llama of this folder on conversations, and say what that took.

    Args:
        checkpoint_dir: A Llama in LitGPT's or Hugging Face's form; the embedded SmolLM2-135M-Instruct if null.
        data: A data directory with train.jsonl and validation.jsonl (`make data`).
        out_dir: Where metrics.json and what was learned go.
        method: "lora" trains adapters, "full" all weights; "both" does one after the other.
        road: Train by `python -m workflows lora` with the same settings, too.
        kinds: Use only rows whose `kind` is one of these; all rows if null.
        max_val_rows: At most this many validation rows are scored.
        lora: The adapters.
        train: Training settings; `row_tokens` bounds the places of a padded batch here.
        full_learning_rate: Peak learning rate where all weights are trained: they bear less than adapters do.
        accelerator: What computes.
        seed: Of the adapters, the order of the rows and dropout.

    Raises:
        UserError: If an argument, the checkpoint or the data is not usable.
    """
    began = step_began()
    settings = {name: value for name, value in locals().items() if name != "began"}
    problems = train.problems() + problems_of(lora.rank, lora.alpha, lora.dropout)
    problems += device_problems(accelerator, 1, 1, "auto", train.global_batch_size)
    if max_val_rows < 1:
        problems.append(f"--max_val_rows must be at least 1, not {max_val_rows}.")
    if not full_learning_rate > 0:
        problems.append(f"--full_learning_rate must be positive, not {full_learning_rate}.")
    if road and (lora.targets != ALL_LAYERS or lora.rslora):
        problems.append(
            f"--road compares adapters on {ALL_LAYERS} without rslora; leave --lora.targets and --lora.rslora."
        )
    problems += seed_problems(seed)
    report_all(problems)
    settings["checkpoint_dir"] = checkpoint_dir or smollm2_directory()
    found: dict[str, dict[str, Any]] = {}
    if method != "both" and not road:
        found[method] = _train(settings)
    else:
        for name in ("lora", "full") if method == "both" else (method,):
            found[name] = _train_apart(name, settings)
        if road:
            found["road"] = _train_on_the_road(settings)
    rows = [metric("val_loss_before", next(iter(found.values()))["val_loss_before"], split="validation")]
    rows += [metric(f"val_loss_{name}", numbers["val_loss"], split="validation") for name, numbers in found.items()]
    write_metrics(
        out_dir / "metrics.json", rows, seconds=seconds_of_step(began), methods=found, hardware=hardware(),
        identity=run_identity(settings),
    )  # fmt: skip
    print(f"\n{table(found)}\n{out_dir}/metrics.json")


def table(found: dict[str, dict[str, Any]]) -> str:
    """What each method took and gave, as text."""
    lines = [f"{'':<13}{'trained':>13}{'of all':>8}{'peak memory':>13}{'seconds':>9}{'tokens/s':>10}"
             f"{'loss before':>13}{'after':>8}"]  # fmt: skip
    for name, numbers in found.items():
        before = numbers.get("val_loss_before")
        lines.append(
            f"{TITLES[name]:<13}{numbers['trainable_parameters']:>13,}"
            f"{numbers['trainable_parameters'] / numbers['parameters']:>8.1%}"
            f"{numbers['peak_bytes'] / 1e9:>10.2f} GB{numbers['seconds']:>9.1f}{numbers['tokens_per_second']:>10,.0f}"
            f"{'' if before is None else f'{before:.4f}':>13}{numbers['val_loss']:>8.4f}"
        )
    return "\n".join(lines)


def _train(settings: dict[str, Any]) -> dict[str, Any]:
    """Train by one method in this process."""
    out_dir, directory, method = settings["out_dir"], settings["checkpoint_dir"], settings["method"]
    train, lora = settings["train"], settings["lora"]
    if method == "full":
        train = replace(train, learning_rate=settings["full_learning_rate"])
    fabric = make_fabric(accelerator=settings["accelerator"])
    with launched(fabric), watched(out_dir), PeakMemory() as peak:
        torch.manual_seed(settings["seed"])
        model = load_llama(directory)
        parameters = sum(p.numel() for p in model.parameters())
        rows, validation = _conversations(settings, model)
        if method == "lora":
            add_lora(model, lora.targets, lora.rank, lora.alpha, lora.dropout, lora.rslora)
        given, train = train, limited_to(train, len(rows))
        print(length_text(given, train, len(rows)))
        objective = FineTuning(rows, validation, train, settings["seed"])
        before = objective.validate(model.to(fabric.device))["val_loss"]
        identity = run_identity({**settings, "train": train}, train.max_steps)
        result = fit(
            fabric, model, objective, train, out_dir, seed=settings["seed"], identity=identity, resume="matching"
        )
    if method == "lora":
        names = hf_module_names(model.config.n_layer)
        save_lora(model, out_dir / "adapter", names, base=str(directory))
    else:
        save_llama(model, directory, out_dir / "final")
    shutil.rmtree(out_dir / "checkpoints")
    return {
        "trainable_parameters": trainable_parameters(model),
        "parameters": parameters,
        "peak_bytes": peak.bytes,
        "seconds": result.seconds,
        "tokens_per_second": result.real_tokens / result.seconds,
        "val_loss_before": before,
        "val_loss": result.metrics["val_loss"],
        "losses": result.losses,
    }


def _conversations(settings: dict[str, Any], model: Llama) -> tuple[list[EncodedChat], list[EncodedChat]]:
    """The rows that `make lora` would take, encoded by the checkpoint's own template; says what became of them."""
    directory, longest = settings["checkpoint_dir"], min(settings["train"].max_seq_length, model.max_length)
    template = ChatTemplate.from_checkpoint(directory)
    check_vocabulary(model.config, template.tokenizer, directory)
    chat_data = ChatData(path=settings["data"], kinds=settings["kinds"], max_val_rows=settings["max_val_rows"])
    found = []
    for split in ("train", "validation"):
        rows, report = encode_rows(chat_data.rows(split), template, longest, str(settings["data"] / split))
        print(report)
        if not rows:
            raise UserError(f"No row of {settings['data'] / split} is left to use. Raise --train.max_seq_length.")
        found.append(rows)
    return found[0], found[1]


def _run(command: list[str]) -> None:
    if run_child(command) != 0:
        raise UserError(f"`python {' '.join(command[1:4])}` failed; its message stands above.")


def _train_apart(method: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Train by one method in a process of its own, with these settings in a file, unless that was done before."""
    folder = settings["out_dir"] / method
    own = {**settings, "method": method, "road": False, "out_dir": folder}
    write_text(folder / "settings.yaml", yaml.safe_dump(plain(own), sort_keys=False))
    print(f"\n{TITLES[method]}:", flush=True)
    made, result = folder / "metrics.json", folder / ("adapter" if method == "lora" else "final")
    before = read_json(made) if made.is_file() and result.is_dir() else {}
    if before and before.get("identity") == json.loads(json.dumps(run_identity(own))):
        result_is_there(folder)
        print(f"{folder}: trained before")
        return before["methods"][method]
    _run([sys.executable, "-m", "custom_models", "lora-scratch", "--config", str(folder / "settings.yaml")])
    return read_json(folder / "metrics.json")["methods"][method]


def _train_on_the_road(settings: dict[str, Any]) -> dict[str, Any]:
    """Train by `make lora`'s step with these settings, in float32 as ours does."""
    folder, lora = settings["out_dir"] / "road", settings["lora"]
    same = ("checkpoint_dir", "data", "kinds", "max_val_rows", "train", "accelerator", "seed")
    own = {name: settings[name] for name in same}
    own |= {"out_dir": folder, "precision": "32-true", "lora_r": lora.rank, "lora_alpha": lora.alpha}
    own |= {"lora_dropout": lora.dropout}
    write_text(folder / "settings.yaml", yaml.safe_dump(plain(own), sort_keys=False))
    print(f"\n{TITLES['road']}:", flush=True)
    _run([sys.executable, "-m", "workflows", "lora", "--config", str(folder / "settings.yaml")])
    made = read_json(folder / "final" / "metrics.json")
    trained = load_weights(folder / "final", LORA_WEIGHTS)
    whole = load_weights(settings["checkpoint_dir"])
    weights = {tensor.data_ptr(): tensor.numel() for tensor in whole.values()}  # a tied head counts once
    return {
        "trainable_parameters": sum(tensor.numel() for tensor in trained.values()),
        "parameters": sum(weights.values()),
        "peak_bytes": made["peak_bytes"],
        "seconds": made["train_seconds"],
        "tokens_per_second": made["tokens_per_second"],
        "val_loss": next(row["value"] for row in made["metrics"] if row["name"] == "val_loss"),
    }
