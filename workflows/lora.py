"""`make lora`: supervised fine-tuning with LoRA, QLoRA or full weights, on tree-packed batches.

The result, `OUT_DIR/final`, is a LitGPT checkpoint directory: `litgpt generate`, `chat` and `evaluate` run on it.
"""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
import yaml

from data_prep.chat_data import ChatData
from workflows.chat_template import EncodedChat
from workflows.checkpoint import (
    LORA_WEIGHTS,
    PROVENANCE,
    WEIGHTS,
    check_checkpoint_dir,
    copy_companions,
    describe_source,
    is_tied,
    load_config,
    load_weights,
    metric,
    plain,
    write_hyperparameters,
    write_metrics,
    write_provenance,
)
from workflows.errors import UserError, report_all
from workflows.files import atomic_dir, read_json, recover_dir, sha256
from workflows.lifetime import end_with_parent
from workflows.measure import PeakMemory, seconds_of_step, step_began
from workflows.merge import write_merged
from workflows.training.batch import PackedBatch, Tree, pack
from workflows.training.loop import FitResult, TrainArgs, fit, step_indices
from workflows.training.model import GPT, LoRAArgs, Precision, load_model
from workflows.training.processes import (
    Accelerator,
    StrategyName,
    choose_accelerator,
    device_problems,
    launched,
    make_fabric,
)
from workflows.training.qlora import Quantize, quantize_frozen
from workflows.training.resume import Resume, ResumeMode, discard

MOST_RANK = 1 << 16


class SFT:
    """The objective of supervised fine-tuning: mean negative log-likelihood of the assistant's tokens."""

    def __init__(
        self, train_rows: list[EncodedChat], validation_rows: list[EncodedChat], train: TrainArgs, seed: int
    ) -> None:
        self.trees = [_tree(row) for row in train_rows]
        self.validation = pack([_tree(row) for row in validation_rows], train.row_tokens)
        self.train, self.seed = train, seed

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
    max_val_rows: int = 200,
    precision: Precision | None = None,
    quantize: Quantize | None = None,
    accelerator: Accelerator = "auto",
    devices: int | str = 1,
    num_nodes: int = 1,
    strategy: StrategyName = "auto",
    lora_r: int = 16,
    lora_alpha: int = 32,
    lora_dropout: float = 0.0,
    lora_query: bool = True,
    lora_key: bool = True,
    lora_value: bool = True,
    lora_projection: bool = True,
    lora_mlp: bool = True,
    lora_head: bool = False,
    train: TrainArgs = TrainArgs(),
    resume: Resume = "auto",
    loggers: list[Literal["tensorboard", "wandb"]] | None = None,
    seed: int = 1337,
    trainer: Literal["workflows", "litgpt"] = "workflows",
) -> None:
    """Fine-tune a checkpoint on conversations.

    Args:
        checkpoint_dir: The LitGPT checkpoint directory to start from.
        data: A data directory with train.jsonl and validation.jsonl (`make data`).
        out_dir: Where logs and checkpoints go; the result is its `final` folder.
        kinds: Train only on rows whose `kind` is one of these; all rows if null.
        max_val_rows: At most this many validation rows are scored each time.
        precision: "bf16-true" (weights in bfloat16, adapters in float32), "32-true", "16-true"; null takes bfloat16
            where the device computes in it, else float32.
        quantize: Keep the frozen weights in 4 bits (QLoRA); needs bitsandbytes.
        accelerator: "cuda", "cpu" or "mps"; "auto" takes CUDA where there is a GPU, else the CPU.
        devices: Devices per machine, or "auto" for all.
        num_nodes: Machines.
        strategy: "ddp" (whole model on each device), "fsdp" (sharded), or "auto".
        lora_r: Rank of the update; 0 trains the full weights.
        lora_alpha: The update is scaled by lora_alpha / lora_r.
        lora_dropout: Dropout on the adapters' input.
        lora_query: Adapt the query projection.
        lora_key: Adapt the key projection.
        lora_value: Adapt the value projection.
        lora_projection: Adapt the attention's output projection.
        lora_mlp: Adapt the MLP's layers.
        lora_head: Adapt the language-model head (a tied head is untied by that).
        train: Training settings.
        resume: "auto" goes on from the newest checkpoint in out_dir, true needs one, false starts anew.
        loggers: Log to these besides metrics.csv.
        seed: Seed of the adapters, the data order and dropout.
        trainer: "workflows" for our loop; "litgpt" runs LitGPT's own `finetune_lora` on the same data and settings.

    Raises:
        UserError: If an argument, the checkpoint or the data is not usable.
    """
    settings = dict(locals())
    checkpoint_dir = check_checkpoint_dir(checkpoint_dir)
    context = load_config(checkpoint_dir).block_size
    problems = train.problems() + device_problems(accelerator, devices, num_nodes, strategy, train.global_batch_size)
    on_gpu = choose_accelerator(accelerator) == "cuda"
    if not 0 <= lora_r <= MOST_RANK:
        problems.append(f"--lora_r must be from 0 (full weights) to {MOST_RANK:,}, not {lora_r}.")
    if lora_alpha < 1:
        problems.append(f"--lora_alpha must be at least 1, not {lora_alpha}.")
    if not 0 <= lora_dropout < 1:
        problems.append(f"--lora_dropout must be from 0 to below 1, not {lora_dropout}.")
    if max_val_rows < 1:
        problems.append(f"--max_val_rows must be at least 1, not {max_val_rows}.")
    if not 0 <= seed < 1 << 32:
        problems.append(f"--seed must be from 0 to {(1 << 32) - 1}, not {seed}.")
    if lora_r > 0 and not any((lora_query, lora_key, lora_value, lora_projection, lora_mlp, lora_head)):
        problems.append("No layer is adapted: switch on at least one of --lora_query … --lora_head, or use --lora_r 0.")
    if train.max_seq_length > context:
        problems.append(f"--train.max_seq_length {train.max_seq_length} exceeds the model's context of {context}.")
    if quantize is not None and find_spec("bitsandbytes") is None:
        problems.append("--quantize needs bitsandbytes: `.venv/bin/pip install -e '.[qlora]'`.")
    if quantize is not None and trainer == "litgpt" and not on_gpu:
        problems.append("--quantize with --trainer litgpt needs a CUDA GPU: LitGPT quantizes on no other device.")
    if quantize is not None and lora_r == 0:
        problems.append("--quantize freezes the weights; it needs --lora_r of at least 1.")
    if quantize is not None and strategy == "fsdp":
        problems.append("--quantize: 4-bit weights cannot be sharded; use --strategy ddp.")
    if trainer == "litgpt" and lora_r == 0:
        problems.append("--trainer litgpt runs `finetune_lora`; it needs --lora_r of at least 1.")
    report_all(problems)

    settings["precision"] = precision = precision or default_precision(on_gpu)
    final = out_dir / "final"
    recover_dir(final)
    if resume is not False and is_finished(final, settings):
        if (checkpoints := out_dir / "checkpoints").is_dir():
            discard(checkpoints, run_identity(settings))
        print(f"{final} is already there, made with these settings; --resume false makes it anew")
        (final / PROVENANCE).touch()  # tells make that it is up to date
        return
    if trainer == "litgpt":
        run_litgpt(settings, final)
        return

    fabric = make_fabric(devices, num_nodes, strategy, accelerator)
    with launched(fabric):
        chat_data = _chat_data(settings)
        chat_data.connect(max_seq_length=train.max_seq_length)
        rows, validation = chat_data.encoded("train"), chat_data.encoded("validation")
        fabric.print("\n".join(map(str, chat_data.reports.values())))
        lora = LoRAArgs.from_settings(settings)
        mode: ResumeMode = "matching" if resume == "auto" and final.is_dir() else resume
        main(fabric, SFT(rows, validation, train, seed), lora, settings, final, mode)


def main(
    fabric: L.Fabric, objective: SFT, lora: LoRAArgs, settings: dict[str, Any], final: Path, resume: ResumeMode
) -> None:
    """Load the model, train it, and write the final checkpoint directory."""
    train, seed, base = settings["train"], settings["seed"], Path(settings["checkpoint_dir"])
    began = step_began()
    torch.manual_seed(seed)
    with PeakMemory() as peak:
        model = load_model(base, lora, settings["precision"], train.max_seq_length)
        if settings["quantize"]:
            quantize_frozen(model, settings["quantize"], fabric.device)
        result = fit(
            fabric,
            model,
            objective,
            train,
            final.parent,
            seed=seed,
            identity=run_identity(settings),
            resume=resume,
            loggers=settings["loggers"] or (),
        )
        if fabric.global_rank == 0:
            checkpoints = final.parent / "checkpoints"
            trained = load_weights(checkpoints, max(checkpoints.glob("step-*.pth")).name)
            write_final(final, base, trained, lora, settings, result, seconds_of_step(began), peak)
            shutil.rmtree(checkpoints)
    fabric.barrier()
    fabric.print(f"val_loss {result.metrics['val_loss']:.4f}, checkpoint: {final}")


def write_final(
    final: Path,
    base: Path,
    trained: dict[str, torch.Tensor],
    lora: LoRAArgs,
    settings: dict[str, Any],
    result: FitResult,
    seconds: float,
    peak: PeakMemory,
) -> None:
    """Write the checkpoint directory that a training step ends with: merged weights, adapters, and how they came to be.

    Args:
        final: The folder to write.
        base: The checkpoint that was fine-tuned.
        trained: The trained parameters under the names of our model.
        lora: The adapters' settings; rank 0 for full weights.
        settings: The step's arguments.
        result: What the loop did.
        seconds: Wall time of the step so far.
        peak: The memory watch that is running.
    """
    with atomic_dir(final) as temporary:
        copy_companions(base, temporary)
        if lora.r > 0:
            torch.save({"model": {name: tensor.clone() for name, tensor in trained.items()}}, temporary / LORA_WEIGHTS)
            write_merged(base, trained, lora, temporary)
        else:
            weights = {name.replace(".linear.", "."): tensor.clone() for name, tensor in trained.items()}
            if is_tied(base):
                # a shared parameter is saved once, under the first of its two names
                shared = weights["lm_head.weight" if "lm_head.weight" in weights else "transformer.wte.weight"]
                weights["transformer.wte.weight"] = weights["lm_head.weight"] = shared
            torch.save(weights, temporary / WEIGHTS)
        write_hyperparameters(temporary, settings)
        rows = [metric("val_loss", result.metrics["val_loss"], split="validation")]
        write_metrics(
            temporary / "metrics.json",
            rows,
            seconds=seconds,
            tokens_per_second=result.real_tokens / result.seconds,
            peak_bytes=peak.bytes,
            train_seconds=result.seconds,
            steps=result.steps,
        )
        write_provenance(temporary, "lora", _sources(settings), settings)


_NEUTRAL = ("resume", "loggers", "out_dir", "accelerator", "devices", "num_nodes", "strategy", "checkpoint_dir", "data")
_NEUTRAL_TRAIN = ("log_interval", "eval_interval", "save_interval")


def run_identity(settings: dict[str, Any]) -> dict[str, Any]:
    """What decides a run's result, as plain values: settings, data and base, not where the latter two are."""
    data = {split: sha256(settings["data"] / f"{split}.jsonl") for split in ("train", "validation")}
    base_files = describe_source(Path(settings["checkpoint_dir"])).get("files")
    return {**_deciding(settings), "data": data, "base_files": base_files}


def _deciding(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings that decide a run's result."""
    settings = plain(settings)
    train = {name: value for name, value in settings["train"].items() if name not in _NEUTRAL_TRAIN}
    return {**{name: value for name, value in settings.items() if name not in _NEUTRAL}, "train": train}


def _chat_data(settings: dict[str, Any]) -> ChatData:
    return ChatData(
        path=Path(settings["data"]),
        kinds=settings["kinds"],
        max_val_rows=settings["max_val_rows"],
        checkpoint_dir=Path(settings["checkpoint_dir"]),
    )


def is_finished(final: Path, settings: dict[str, Any]) -> bool:
    """Whether a final folder is there that was made from the same checkpoint and data with the same settings."""
    if not (final / PROVENANCE).is_file() or not (final / WEIGHTS).is_file():
        return False
    made = read_json(final / PROVENANCE)
    return made["sources"] == _sources(settings) and _deciding(made["settings"]) == _deciding(settings)


def _sources(settings: dict[str, Any]) -> dict[str, Any]:
    return {
        "base": describe_source(Path(settings["checkpoint_dir"])),
        "data": describe_source(Path(settings["data"])),
    }


def default_precision(on_gpu: bool) -> Precision:
    """bfloat16 where the device multiplies in it, else float32 (emulation is slow, on CPUs and older GPUs alike)."""
    if on_gpu:
        return "bf16-true" if torch.cuda.is_bf16_supported(including_emulation=False) else "32-true"
    fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return "bf16-true" if fast else "32-true"


def run_litgpt(settings: dict[str, Any], final: Path) -> None:
    """Run LitGPT's own `finetune_lora` on the same data module and settings, then complete its output directory.

    LitGPT has no packing, clipping or resume, and its batch is padded; one sample is a micro-batch. Its warm-up must be
    at least one step, its schedule is a cosine to zero, its loggers are its own.

    Raises:
        UserError: If LitGPT ends with an error (its own output stands above the message).
    """
    began = step_began()
    train: TrainArgs = settings["train"]
    base = Path(settings["checkpoint_dir"])
    unfinished = final.parent / "litgpt"
    rows = len(_chat_data(settings).rows("train"))
    unused = {"max_norm": train.max_norm, "min_lr": train.min_lr or None, "loggers": settings["loggers"]}
    unused |= {name: settings[name] for name in ("strategy", "accelerator") if settings[name] != "auto"}
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
    if settings["kinds"]:
        command += ["--data.kinds", yaml.safe_dump(settings["kinds"], default_flow_style=True).strip()]
    # Killed here, it must not go on writing beside the run that is started again.
    end = end_with_parent(signal.SIGKILL) if os.name == "posix" else None
    if subprocess.run(command, preexec_fn=end).returncode != 0:
        raise UserError("`litgpt finetune_lora` failed; its message stands above.")
    with atomic_dir(final) as temporary:
        for path in (unfinished / "final").iterdir():
            path.rename(temporary / path.name)
        copy_companions(base, temporary)  # LitGPT leaves out the chat template
        write_hyperparameters(temporary, settings)
        write_metrics(temporary / "metrics.json", [], seconds=seconds_of_step(began))
        write_provenance(temporary, "lora", _sources(settings), settings)
    print(f"checkpoint: {final}")
