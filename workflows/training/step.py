"""What every training step is around its loss: common arguments, what identifies a run, the folder that it ends with.

A step file has a `setup` with arguments of its own and `**run`, which are the fields of `RunArgs`; it checks both, says
how its `Objective` is made, and calls `run_step`.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch

from workflows.chat_template import Reasoning
from workflows.checkpoint import (
    LORA_WEIGHTS,
    PROVENANCE,
    WEIGHTS,
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
from workflows.checkpoint_checks import checkpoint_problems
from workflows.errors import report_all
from workflows.evaluation.compare import with_interval
from workflows.files import atomic_dir, read_json, recover_dir, sha256
from workflows.measure import PeakMemory, gigabytes, seconds_of_step, step_began
from workflows.merge import write_merged
from workflows.progress import result_is_there, watched
from workflows.prompt_style import replace_chat_template
from workflows.training.identity import STEPS, result_changes, result_settings
from workflows.training.length import length_text, limited_to, validation_text
from workflows.training.loop import FitResult, Objective, Report, TrainArgs, fit
from workflows.training.mixed_precision import dithered
from workflows.training.model import DTYPES, LoRAArgs, Precision, load_model
from workflows.training.processes import (
    Accelerator,
    StrategyName,
    choose_accelerator,
    default_precision,
    device_problems,
    launched,
    make_fabric,
)
from workflows.training.qlora import Quantize, quantize_frozen
from workflows.training.resume import Resume, ResumeMode, clear, clear_finished, may_be_longer, trained_weights

MOST_RANK = 1 << 16


@dataclass
class RunArgs:
    """Arguments that all training steps take besides their own; names are LitGPT's where LitGPT has them."""

    precision: Precision | None = None
    """Precision: "bf16-true", "32-true" or "16-true". In 16 bits the trained weights (adapters, or with lora_r 0
    masters of all weights) are float32, and float16's loss is scaled. Null takes bfloat16 where the device computes in
    it, else float32."""
    quantize: Quantize | None = None
    """Keep the frozen weights in 4 bits (QLoRA); needs bitsandbytes."""
    accelerator: Accelerator = "auto"
    """One of "cuda", "cpu" and "mps"; "auto" takes CUDA where there is a GPU, else the CPU."""
    devices: int | str = 1
    """Devices per machine, or "auto" for all."""
    num_nodes: int = 1
    """Machines."""
    strategy: StrategyName = "auto"
    """One of "ddp" (whole model on each device), "fsdp" (sharded), and "auto"."""
    lora_r: int = 16
    """Rank of the update; 0 trains the full weights."""
    lora_alpha: int = 32
    """The update is scaled by lora_alpha / lora_r."""
    lora_dropout: float = 0.0
    """Dropout on the adapters' input; off in grpo and ppo, whose ratios it would make noise."""
    lora_query: bool = True
    """Adapt the query projection."""
    lora_key: bool = True
    """Adapt the key projection."""
    lora_value: bool = True
    """Adapt the value projection."""
    lora_projection: bool = True
    """Adapt the attention's output projection."""
    lora_mlp: bool = True
    """Adapt the MLP's layers."""
    lora_head: bool = False
    """Adapt the language-model head (a tied head is untied by that)."""
    resume: Resume = "auto"
    """Resume from the newest checkpoint in out_dir: "auto" if there is one; true needs one; false trains from step
    0."""
    loggers: list[Literal["tensorboard", "wandb"]] | None = None
    """Log to these besides metrics.csv."""
    reasoning: Reasoning = "keep"
    """The reasoning before answers (`reasoning_content`, `<think>`): "keep" it as the data has it, "drop" it from the
    data, or "none": drop it and switch thinking off in the chat template, here and in all that is made from the
    result."""
    seed: int = 1337
    """Seed of the adapters, the data order, dropout and sampling."""

    @property
    def lora(self) -> LoRAArgs:
        """The adapters' settings."""
        return LoRAArgs.from_settings(vars(self))

    @property
    def on_gpu(self) -> bool:
        """Whether the run computes on a CUDA GPU."""
        return choose_accelerator(self.accelerator) == "cuda"

    def problems(self, train: TrainArgs, checkpoint_dir: Path) -> list[str]:
        """Everything that is wrong with these and the training settings for a checkpoint, as messages."""
        context = load_config(checkpoint_dir).block_size
        problems = self.problems_anywhere(train)
        problems += device_problems(
            self.accelerator, self.devices, self.num_nodes, self.strategy, train.global_batch_size
        )
        if train.max_seq_length > context:
            problems.append(f"--train.max_seq_length {train.max_seq_length} exceeds the model's context of {context}.")
        if self.quantize is not None and find_spec("bitsandbytes") is None:
            problems.append("--quantize needs bitsandbytes: `.venv/bin/pip install -e '.[qlora]'`.")
        return problems

    def problems_anywhere(self, train: TrainArgs) -> list[str]:
        """What is wrong with these and the training settings whatever the machine and the checkpoint, as messages."""
        problems = train.problems()
        if not 0 <= self.lora_r <= MOST_RANK:
            problems.append(f"--lora_r must be from 0 (full weights) to {MOST_RANK:,}, not {self.lora_r}.")
        if self.lora_alpha < 1:
            problems.append(f"--lora_alpha must be at least 1, not {self.lora_alpha}.")
        if not 0 <= self.lora_dropout < 1:
            problems.append(f"--lora_dropout must be from 0 to below 1, not {self.lora_dropout}.")
        if not 0 <= self.seed < 1 << 32:
            problems.append(f"--seed must be from 0 to {(1 << 32) - 1}, not {self.seed}.")
        adapted = (self.lora_query, self.lora_key, self.lora_value, self.lora_projection, self.lora_mlp, self.lora_head)
        if self.lora_r > 0 and not any(adapted):
            problems.append(
                "No layer is adapted: switch on at least one of --lora_query … --lora_head, or use --lora_r 0."
            )
        if self.quantize is not None and self.lora_r == 0:
            problems.append("--quantize freezes the weights; it needs --lora_r of at least 1.")
        if self.quantize is not None and self.strategy == "fsdp":
            problems.append("--quantize: 4-bit weights cannot be sharded; use --strategy ddp.")
        return problems


def row_limit_problems(max_val_rows: int, max_test_rows: int = 0) -> list[str]:
    """What is wrong with the limits on rows that a step is validated and tested on, as messages."""
    found = [] if max_val_rows >= 1 else [f"--max_val_rows must be at least 1, not {max_val_rows}."]
    return found + ([] if max_test_rows >= 0 else [f"--max_test_rows must be at least 0, not {max_test_rows}."])


def run_step(
    step: str, settings: dict[str, Any], run: RunArgs, make_objective: Callable[[L.Fabric], Objective]
) -> None:
    """Start the run's processes, train, and write `OUT_DIR/final`.

    Args:
        step: The step's name.
        settings: All its arguments by name, those of `RunArgs` among them and the precision decided.
        run: The common ones.
        make_objective: Reads the data; called in each process.
    """
    final = Path(settings["out_dir"]) / "final"
    fabric = make_fabric(run.devices, run.num_nodes, run.strategy, run.accelerator)
    with launched(fabric), watched(final.parent, fabric.global_rank == 0):
        check_base(settings, fabric.print)
        mode: ResumeMode = "matching" if run.resume == "auto" and final.is_dir() else run.resume
        objective = make_objective(fabric)
        given: TrainArgs = settings["train"]
        objective.train = limited_to(given, objective.epoch_rows, objective.updates)
        fabric.print(length_text(given, objective.train, objective.epoch_rows, objective.updates))
        if note := validation_text(objective.train, objective.updates):
            fabric.print(note)
        _train(fabric, step, settings, run, objective, final, mode)


def check_base(settings: dict[str, Any], say: Callable[[str], None]) -> None:
    """Refuse a checkpoint that cannot be trained, and name what a later export would refuse, before the first step.

    Args:
        settings: The step's arguments.
        say: Prints a text, in one process.

    Raises:
        UserError: If the checkpoint, with the chat template that the step was given, cannot be trained.
    """
    problems = checkpoint_problems(Path(settings["checkpoint_dir"]), settings.get("chat_template"))
    report_all(problems.training)
    if notes := problems.notes_on(str(settings["checkpoint_dir"])):
        say(notes)


def _train(
    fabric: L.Fabric,
    step: str,
    settings: dict[str, Any],
    run: RunArgs,
    objective: Objective,
    final: Path,
    resume: ResumeMode,
) -> None:
    """Load the model, train it, and write the final checkpoint directory."""
    train, base = objective.train, Path(settings["checkpoint_dir"])
    began = step_began()
    torch.manual_seed(run.seed)
    with PeakMemory() as peak:
        model = load_model(base, run.lora, settings["precision"], train.max_seq_length)
        if run.quantize:
            quantize_frozen(model, run.quantize, fabric.device)
        model = objective.adapt(model)
        result = fit(
            fabric,
            model,
            objective,
            train,
            final.parent,
            seed=run.seed,
            identity=run_identity(settings, train.max_steps),
            resume=resume,
            loggers=run.loggers or (),
            peak=peak,
        )
        if fabric.global_rank == 0:
            checkpoints = final.parent / "checkpoints"
            trained = trained_weights(checkpoints, result.kept_step)
            seconds = seconds_of_step(began)
            write_final(final, step, base, trained, run.lora, settings, result, seconds, peak, objective)
            may_grow = may_be_longer(train.lr_schedule, result.steps, train.max_steps)
            clear(checkpoints, may_grow, train.keep == "best")
            if may_grow:
                size = gigabytes(sum(file.stat().st_size for file in checkpoints.rglob("*") if file.is_file()))
                print(f"{checkpoints} is kept ({size}): a larger --train.max_steps or --train.patience resumes from it")
    fabric.barrier()
    fabric.print(report_text(result.report))
    told = ", ".join(f"{name} {value:.4f}" for name, value in result.metrics.items())
    fabric.print(f"{told}, checkpoint: {final}")
    if result.report.warnings:
        fabric.print("\n  - ".join(["\nWARNING: this step has made the model worse:", *result.report.warnings]))


def report_text(report: Report) -> str:
    """A step's last words: answers before and after it, and what was measured on the test split."""
    lines = []
    for answer in report.shown:
        lines += ["", *(f"{name + ':':<10}{' '.join(text.split())}" for name, text in answer.items())]
    lines += ["", *(f"test {row['name']}: {with_interval(row, 4)}" for row in report.metrics)]
    for row in report.gain:
        ends = f", 95% interval {row['low']:+.4f} to {row['high']:+.4f}"
        if row["low"] == row["high"]:  # no spread in a few rows says nothing of others
            ends = ", the same in each row"
        lines.append(f"test {row['metric']}, after - before: {row['difference']:+.4f}{ends}, n = {row['n']}")
    return "\n".join(lines[:-1] if not lines[-1] else lines)


def write_final(
    final: Path,
    step: str,
    base: Path,
    trained: dict[str, torch.Tensor],
    lora: LoRAArgs,
    settings: dict[str, Any],
    result: FitResult,
    seconds: float,
    peak: PeakMemory,
    objective: Objective,
) -> None:
    """Write the checkpoint directory that a training step ends with: merged weights, adapters, and how they came to be.

    Args:
        final: The folder to write.
        step: The step's name.
        base: The checkpoint that was trained.
        trained: The trained parameters under the names of our model.
        lora: The adapters' settings; rank 0 for full weights.
        settings: The step's arguments.
        result: What the loop did.
        seconds: Wall time of the step so far.
        peak: The memory watch that is running.
        objective: What it was trained on; it may have heads to keep.
    """
    with atomic_dir(final) as temporary:
        copy_companions(base, temporary)
        replace_chat_template(temporary, settings.get("chat_template"), settings.get("reasoning", "keep"))
        trained = objective.write_heads(temporary, trained, result.metrics)
        if lora.r > 0:
            torch.save({"model": {name: tensor.clone() for name, tensor in trained.items()}}, temporary / LORA_WEIGHTS)
            write_merged(base, trained, lora, temporary)
        else:
            # the float32 masters, rounded as they were for validation
            dtype = DTYPES[settings["precision"]]
            weights = {name.replace(".linear.", "."): dithered(tensor, dtype) for name, tensor in trained.items()}
            if is_tied(base):
                # a shared parameter is saved once, under the first of its two names
                shared = weights["lm_head.weight" if "lm_head.weight" in weights else "transformer.wte.weight"]
                weights["transformer.wte.weight"] = weights["lm_head.weight"] = shared
            # What the objective had no use for stays as it was; copied, since mapped tensors share the whole file.
            untrained = {name: tensor for name, tensor in load_weights(base).items() if name not in weights}
            kept = {name: tensor.to(dtype, copy=True) for name, tensor in untrained.items()}
            torch.save({**weights, **kept}, temporary / WEIGHTS)
        write_hyperparameters(temporary, settings)
        write_metrics(
            temporary / "metrics.json",
            [metric(name, value, split="validation") for name, value in result.metrics.items()] + result.report.metrics,
            seconds=seconds,
            tokens_per_second=result.real_tokens / result.seconds,
            peak_bytes=peak.bytes,
            train_seconds=result.seconds,
            steps=result.steps,
            steps_without_signal=result.steps_without_signal,
            kept_step=result.kept_step,
            gain=result.report.gain,
            shown=result.report.shown,
            warnings=result.report.warnings,
        )
        write_provenance(temporary, step, sources(settings), settings)


def done_before(settings: dict[str, Any]) -> bool:
    """Whether `OUT_DIR/final` is there already, made from the same checkpoint and data with the same settings; then its
    left-over checkpoints are deleted, which is printed. Differences of another result are printed, too."""
    final = Path(settings["out_dir"]) / "final"
    recover_dir(final)
    if settings["resume"] is False or not _is_whole(final):
        return False
    if differing := _differing(final, settings):
        if os.environ.get("LOCAL_RANK", "0") == "0":  # of a run's processes
            print("\n  - ".join([f"{final} was made with other settings, and is replaced at the end:", *differing]))
        return False
    if (checkpoints := final.parent / "checkpoints").is_dir():
        clear_finished(checkpoints, run_identity(settings))
    if not checkpoints.is_dir():  # else it may be the progress of another run, which can still be resumed
        result_is_there(final.parent)
    print(f"{final} is already there, made with these settings; --resume false trains it again")
    (final / PROVENANCE).touch()  # tells make that it is up to date
    return True


def is_finished(final: Path, settings: dict[str, Any]) -> bool:
    """Whether a final folder is there that was made from the same checkpoint and data with the same settings."""
    return _is_whole(final) and not _differing(final, settings)


def _is_whole(final: Path) -> bool:
    return (final / PROVENANCE).is_file() and (final / WEIGHTS).is_file()


def _differing(final: Path, settings: dict[str, Any]) -> list[str]:
    """Return what a final folder was made from or with that is another now, as lines."""
    made, now = read_json(final / PROVENANCE), sources(settings)
    kinds = [kind for kind in {**made["sources"], **now} if made["sources"].get(kind) != now.get(kind)]
    told = [f"{kind}: {_source(made['sources'].get(kind))}, now {_source(now.get(kind))}" for kind in kinds]
    return told + result_changes(result_settings(made["settings"]), result_settings(plain(settings)))


def _source(entry: dict[str, Any] | None) -> str:
    """A source in a few words: its path, and the beginning of a hash of its contents."""
    if entry is None:
        return "none"
    digests = entry.get("files") or {name: digest for name, digest in entry.items() if name != "path"}
    return f"{entry.get('path')}" + "".join(f" ({digest:.12}…)" for digest in list(digests.values())[:1])


def run_identity(settings: dict[str, Any], steps: int | None = None) -> dict[str, Any]:
    """Return what decides a run's result, as plain values: settings, data and base, not where the latter two are.

    Args:
        settings: The step's arguments.
        steps: The optimizer steps that they come to, where the rows have been counted.
    """
    data = {split: sha256(settings["data"] / f"{split}.jsonl") for split in ("train", "validation")}
    base_files = describe_source(Path(settings["checkpoint_dir"])).get("files")
    judges = [source.get("files") for source in _reward_models(settings).values()]
    teacher = {name: source.get("files") for name, source in _teacher(settings).items()}
    template = {name: source["sha256"] for name, source in _chat_template(settings).items()}
    replay = {} if settings.get("replay") is None else {"replay": sha256(settings["replay"] / "train.jsonl")}
    found = result_settings(plain(settings))
    for entry in found.get("rewards") or []:
        if "/" in entry["reward"]:  # the place of a reward model, which `reward_files` knows by its contents
            entry["reward"] = "reward model"
    return {
        **found,
        **({} if steps is None else {STEPS: steps}),
        "data": data,
        "base_files": base_files,
        **({"reward_files": judges} if judges else {}),
        **teacher,
        **template,
        **replay,
    }


def model_identity(settings: dict[str, Any]) -> dict[str, Any]:
    """Return what the model that a step starts from computes with, as plain values."""
    base_files = describe_source(Path(settings["checkpoint_dir"])).get("files")
    return {"base_files": base_files, **{name: settings[name] for name in ("precision", "quantize")}}


def sources(settings: dict[str, Any]) -> dict[str, Any]:
    """What a step is made from, as provenance.json tells it."""
    return {
        "base": describe_source(Path(settings["checkpoint_dir"])),
        "data": describe_source(Path(settings["data"])),
        **({} if settings.get("replay") is None else {"replay": describe_source(Path(settings["replay"]))}),
        **_reward_models(settings),
        **_teacher(settings),
        **_chat_template(settings),
    }


def _reward_models(settings: dict[str, Any]) -> dict[str, Any]:
    """The reward models among a step's rewards, by their folder."""
    names = [entry.reward for entry in settings.get("rewards", []) if "/" in entry.reward]
    return {name: describe_source(Path(name)) for name in names}


def _teacher(settings: dict[str, Any]) -> dict[str, Any]:
    """The checkpoint that a student learns from, if the step has one."""
    teacher = settings.get("teacher_dir")
    return {} if teacher is None else {"teacher": describe_source(Path(teacher))}


def _chat_template(settings: dict[str, Any]) -> dict[str, Any]:
    """The chat template that takes the place of the checkpoint's own, if the step was given one."""
    file = settings.get("chat_template")
    return {} if file is None else {"chat_template": {"path": str(file), "sha256": sha256(file)}}


def decided(own: dict[str, Any], run: RunArgs) -> dict[str, Any]:
    """All of a step's arguments by name, with the precision that null stands for.

    Args:
        own: The arguments of its `setup`, `run` left out.
        run: The common ones.
    """
    precision = run.precision or default_precision(run.on_gpu)
    return {**own, **vars(run), "precision": precision}
