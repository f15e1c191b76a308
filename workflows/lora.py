"""`make lora`: supervised fine-tuning with LoRA, QLoRA or full weights, on tree-packed batches.

The result, `OUT_DIR/final`, is a LitGPT checkpoint directory: `litgpt generate`, `chat` and `evaluate` run on it.
"""

import json
import math
import sys
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
import yaml

from data_prep.chat_data import ChatData, replayed
from data_prep.rows import iterate_jsonl, row_problem
from workflows.chat_template import ChatTemplate, EncodedChat
from workflows.checkpoint import (
    check_checkpoint_dir,
    copy_companions,
    write_hyperparameters,
    write_metrics,
    write_provenance,
)
from workflows.checkpoint_checks import checkpoint_problems
from workflows.errors import UserError, report_all
from workflows.files import atomic_dir
from workflows.lifetime import run_child
from workflows.measure import seconds_of_step, step_began
from workflows.prompt_style import replace_chat_template
from workflows.training.batch import PackedBatch, Tree, pack
from workflows.training.length import length_text, limited_to
from workflows.training.loop import Objective, TrainArgs, step_indices
from workflows.training.model import GPT
from workflows.training.step import RunArgs, check_base, decided, done_before, run_step, sources

REPLAY_SHARE = 0.125
_REPLAY_CURE = (
    "Name a folder with messages rows, e.g. a model's own answers: `python -m workflows teach --checkpoint_dir BASE "
    "--data data/general` writes data/general_taught."
)


class SFT(Objective):
    """The objective of supervised fine-tuning: mean negative log-likelihood of the assistant's tokens."""

    def __init__(
        self, train_rows: list[EncodedChat], validation_rows: list[EncodedChat], train: TrainArgs, seed: int
    ) -> None:
        self.trees = [_tree(row) for row in train_rows]
        self.validation = pack([_tree(row) for row in validation_rows], train.row_tokens)
        self.train, self.seed, self.epoch_rows = train, seed, len(self.trees)

    def batches(self, step: int, rank: int, world_size: int) -> list[PackedBatch]:
        """The rows of one step for one process; samples are dealt out in turn."""
        indices = step_indices(step, len(self.trees), self.train.global_batch_size, self.seed)[rank::world_size]
        return [batch for _, batch in pack([self.trees[i] for i in indices], self.train.row_tokens)]

    def units(self, batch: PackedBatch) -> int:
        """Every learned token counts the same."""
        return batch.targets.numel()

    def loss(self, model: GPT, batch: PackedBatch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """-sum of log p(token) over the learned tokens of a row."""
        return -model(batch).sum(), {}

    @torch.no_grad()
    def validate(self, model: GPT) -> dict[str, float]:
        """Mean loss over the validation rows; every process computes all of it."""
        model.eval()
        device = next(model.parameters()).device
        total = sum(float(self.loss(model, batch.to(device))[0]) for _, batch in self.validation)
        model.train()
        return {"val_loss": total / sum(self.units(batch) for _, batch in self.validation)}


def _tree(row: EncodedChat) -> Tree:
    return Tree(row.prompt, [row.completion], [row.loss_mask])


def setup(
    checkpoint_dir: Path,
    data: Path = Path("data/hpo"),
    out_dir: Path = Path("out/lora"),
    kinds: list[str] | None = None,
    replay: Path | None = None,
    replay_share: float = REPLAY_SHARE,
    chat_template: Path | None = None,
    max_val_rows: int = 200,
    train: TrainArgs = TrainArgs(),
    trainer: Literal["workflows", "litgpt"] = "workflows",
    **run: Any,
) -> None:
    """Fine-tune a checkpoint on conversations.

    Args:
        checkpoint_dir: The LitGPT checkpoint directory to start from.
        data: A data directory with train.jsonl and validation.jsonl (`make data`).
        out_dir: Where logs and checkpoints go; the result is its `final` folder.
        kinds: Train only on rows whose `kind` is one of these; all rows if null.
        replay: A second data directory whose training rows are mixed in, e.g. a model's own answers to general prompts
            (`teach`), which keep what it could do before.
        replay_share: Share of an epoch's rows that are of `replay`; larger values keep more and teach less. Rows are
            drawn by the seed; each is taken once before any is taken again.
        chat_template: A Jinja file that takes the place of the checkpoint's chat template, here and in all that is made
            from the result; for a base model, which has none, or to teach another form of conversation.
        max_val_rows: At most this many validation rows are scored each time.
        train: Training settings.
        trainer: "workflows" for our loop; "litgpt" runs LitGPT's own `finetune_lora` on the same data and settings.
        **run: What all training steps take (`workflows.training.step.RunArgs`).

    Raises:
        UserError: If an argument, the checkpoint or the data is not usable.
    """
    own = {name: value for name, value in locals().items() if name != "run"}
    own["checkpoint_dir"] = checkpoint_dir = check_checkpoint_dir(checkpoint_dir)
    common = RunArgs(**run)
    problems = common.problems(train, checkpoint_dir)
    if max_val_rows < 1:
        problems.append(f"--max_val_rows must be at least 1, not {max_val_rows}.")
    if trainer == "litgpt" and common.quantize is not None and not common.on_gpu:
        problems.append("--quantize with --trainer litgpt needs a CUDA GPU: LitGPT quantizes on no other device.")
    if trainer == "litgpt" and common.lora_r == 0:
        problems.append("--trainer litgpt runs `finetune_lora`; it needs --lora_r of at least 1.")
    if chat_template is not None and not chat_template.is_file():
        problems.append(f"--chat_template {chat_template}: there is no such file.")
    else:
        problems += checkpoint_problems(checkpoint_dir, chat_template).training
    problems += _replay_problems(replay, replay_share, trainer)
    report_all(problems)
    template = ChatTemplate.from_checkpoint(checkpoint_dir, chat_template).with_reasoning(common.reasoning)
    report_all(template.problems())

    settings = decided(own, common)
    if done_before(settings):
        return
    if trainer == "litgpt":
        run_litgpt(settings)
        return

    def make_objective(fabric: L.Fabric) -> SFT:
        return SFT(*conversations(fabric, settings), train, common.seed)

    run_step("lora", settings, common, make_objective)


def conversations(fabric: L.Fabric, settings: dict[str, Any]) -> tuple[list[EncodedChat], list[EncodedChat]]:
    """A step's rows for training and for validation, encoded; says what was truncated or dropped.

    Raises:
        UserError: If the data is not usable.
    """
    chat_data = _chat_data(settings)
    chat_data.connect(max_seq_length=settings["train"].max_seq_length)
    rows, validation = chat_data.encoded("train"), chat_data.encoded("validation")
    reports = list(chat_data.reports.values())
    if settings.get("replay"):
        others = ChatData(Path(settings["replay"]), checkpoint_dir=Path(settings["checkpoint_dir"]))
        others.chat_template, others.reasoning = settings["chat_template"], settings["reasoning"]
        others.connect(max_seq_length=settings["train"].max_seq_length)
        mixed = replayed(others.encoded("train"), len(rows), settings["replay_share"], settings["seed"])
        reports += others.reports.values()
        fabric.print(replay_text(len(rows), len(mixed), reports[-1].kept, settings["replay"]))
        rows = rows + mixed
    fabric.print("\n".join(map(str, reports)))
    return rows, validation


def replay_text(rows: int, mixed: int, others: int, directory: Path) -> str:
    """Say how many rows are mixed in."""
    times = f", each {mixed / others:.1f} times on average" if mixed > others else ""
    return (
        f"replay: {mixed:,} of an epoch's {rows + mixed:,} rows ({mixed / (rows + mixed):.1%}) are of {directory}, "
        f"which has {others:,}{times}"
    )


def _replay_problems(replay: Path | None, share: float, trainer: str) -> list[str]:
    """What is wrong with the rows to be mixed in, as messages."""
    if replay is None:
        return [] if share == REPLAY_SHARE else ["--replay_share belongs to --replay, which names the rows to mix in."]
    problems = [] if 0 < share < 1 else [f"--replay_share must be between 0 and 1, not {share}."]
    if trainer == "litgpt":
        problems.append("--replay is not for --trainer litgpt, which reads one data directory.")
    missing = [name for name in ("train.jsonl", "validation.jsonl") if not (replay / name).is_file()]
    if missing:
        problems.append(f"--replay {replay} is not a data directory, it lacks {' and '.join(missing)}. {_REPLAY_CURE}")
    elif problem := row_problem(next((row for _, row in iterate_jsonl(replay / "train.jsonl")), {}), "messages"):
        problems.append(f"--replay {replay} has no conversations to learn: a row {problem}. {_REPLAY_CURE}")
    return problems


def _chat_data(settings: dict[str, Any]) -> ChatData:
    return ChatData(
        path=Path(settings["data"]),
        kinds=settings["kinds"],
        max_val_rows=settings["max_val_rows"],
        checkpoint_dir=Path(settings["checkpoint_dir"]),
        chat_template=settings.get("chat_template"),
        reasoning=settings["reasoning"],
    )


def run_litgpt(settings: dict[str, Any]) -> None:
    """Run LitGPT's own `finetune_lora` on the same data module and settings, then complete its output directory.

    LitGPT has no packing, clipping or resume, and its batch is padded; one sample is a micro-batch. Its warm-up must be
    at least one step, its schedule is a cosine to zero, its loggers are its own.

    Raises:
        UserError: If LitGPT ends with an error (its own output stands above the message).
    """
    began = step_began()
    check_base(settings, print)
    train: TrainArgs = settings["train"]
    base, final = Path(settings["checkpoint_dir"]), Path(settings["out_dir"]) / "final"
    unfinished = final.parent / "litgpt"
    rows = len(_chat_data(settings).rows("train"))
    given, train = train, limited_to(train, rows)
    print(length_text(given, train, rows))
    unused = {"max_norm": train.max_norm, "min_lr": train.min_lr or None, "loggers": settings["loggers"]}
    unused |= {name: settings[name] for name in ("strategy", "accelerator") if settings[name] != "auto"}
    unused |= {"keep": train.keep if train.keep != "last" else None, "patience": train.patience}
    unused["lr_schedule"] = train.lr_schedule if train.lr_schedule != "cosine" else None
    if told := [f"{name} {value}" for name, value in unused.items() if value is not None]:
        print(f"LitGPT's finetune_lora has no use for: {', '.join(told)}")
    adamw = {
        "lr": train.learning_rate,
        "weight_decay": train.weight_decay,
        "betas": [train.beta1, train.beta2],
    }
    arguments: dict[str, Any] = {
        "data": "data_prep.ChatData",
        "data.path": settings["data"],
        "data.checkpoint_dir": base,
        "data.max_val_rows": settings["max_val_rows"],
        "data.reasoning": settings["reasoning"],
        "out_dir": unfinished,
        "precision": settings["precision"],
        "devices": settings["devices"],
        "num_nodes": settings["num_nodes"],
        "train.global_batch_size": train.global_batch_size,
        "train.micro_batch_size": 1,
        "train.max_steps": train.max_steps,
        "train.epochs": math.ceil(train.max_steps * train.global_batch_size / rows) + 1,
        "train.lr_warmup_steps": max(1, train.lr_warmup_steps),
        "train.max_seq_length": train.max_seq_length,
        "train.save_interval": train.save_interval,
        "eval.interval": train.eval_interval,
        "optimizer": json.dumps({"class_path": "torch.optim.AdamW", "init_args": adamw}),
        "seed": settings["seed"],
        **{name: value for name, value in settings.items() if name.startswith("lora_")},
    }
    command = [sys.executable, "-m", "litgpt", "finetune_lora", str(base)]
    command += [part for name, value in arguments.items() for part in (f"--{name}", str(value))]
    if settings["quantize"]:
        command += ["--quantize", settings["quantize"]]
    if settings["chat_template"]:
        command += ["--data.chat_template", str(settings["chat_template"])]
    if settings["kinds"]:
        command += ["--data.kinds", yaml.safe_dump(settings["kinds"], default_flow_style=True).strip()]
    if run_child(command) != 0:
        raise UserError("`litgpt finetune_lora` failed; its message stands above.")
    with atomic_dir(final) as temporary:
        for path in (unfinished / "final").iterdir():
            path.rename(temporary / path.name)
        copy_companions(base, temporary)  # LitGPT leaves out the chat template
        replace_chat_template(temporary, settings["chat_template"], settings["reasoning"])
        write_hyperparameters(temporary, settings)
        write_metrics(temporary / "metrics.json", [], seconds=seconds_of_step(began))
        write_provenance(temporary, "lora", sources(settings), settings)
    print(f"checkpoint: {final}")
