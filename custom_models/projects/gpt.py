"""`make gpt`: train a GPT on any text by Lightning's Trainer; `make gpt-sample PROMPT="…"`: let it write on.

A run that was stopped goes on from its last checkpoint and ends as if it had never been stopped: what a batch holds and
what dropout drops depend on the batch's number alone; weights, both optimizers and the schedule are in the checkpoint.
It may go on with another number of devices (`--devices`, `--num_nodes`: Lightning starts the processes and averages
their gradients), since a batch's rows are dealt out to however many there are.
"""

import math
import re
import time
import warnings
from dataclasses import asdict, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint, TQDMProgressBar
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_only

from custom_models.generation import Generated, generate
from custom_models.gpt import GPT, GPTConfig, count_parameters, modern
from custom_models.gpt_checkpoint import Tokenizer, load_gpt, save_gpt
from custom_models.projects.fitting import device_of, fast_precision, seed_problems
from custom_models.projects.gpt_data import Kind, TokenData, TokenFiles, encoder_of, read_corpus, token_files
from custom_models.projects.gpt_training import GPTFit, GPTTask
from custom_models.tokenization.bpe import SpecialBPE
from custom_models.tokenization.characters import CharacterTokenizer
from custom_models.tokenization.gpt2_files import END_OF_TEXT
from workflows.checkpoint import metric, write_metrics
from workflows.errors import UserError, first_line, report_all
from workflows.measure import PeakMemory, hardware, seconds_of_step, step_began
from workflows.progress import note, watched
from workflows.training.processes import Accelerator, device_problems
from workflows.training.resume import Resume
from workflows.training.stopping import Stopping

CHECKPOINTS = "checkpoints"
tell = rank_zero_only(print)


class Bar(TQDMProgressBar):
    """Lightning's progress bar, which knows its end when a run goes on, too, and says nothing of log folders."""

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self.train_progress_bar.total = self.total_train_batches

    def get_metrics(self, trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, Any]:
        return {name: value for name, value in super().get_metrics(trainer, pl_module).items() if name != "v_num"}


def setup(
    text: str = "definitions",
    tokenizer: Kind = "bpe",
    tokens_dir: Path = Path("data/tokens"),
    out_dir: Path = Path("out/gpt"),
    model: GPTConfig = modern(vocab_size=2048, context=128, width=192, n_layer=4, n_head=6),
    fit: GPTFit = GPTFit(),
    resume: Resume = "auto",
    accelerator: Accelerator = "auto",
    devices: int | str = 1,
    num_nodes: int = 1,
    max_texts: int | None = None,
    seed: int = 1337,
) -> None:
    """Train a GPT.

    Args:
        text: What it reads: "definitions" (of the Human Phenotype Ontology), "tinyshakespeare", "tinystories", a text
            file, or a folder of Parquet files.
        tokenizer: "characters", or "bpe" of model.vocab_size tokens.
        tokens_dir: Where texts lie as tokens; made anew only when text or tokenizer are others.
        out_dir: Where logs, checkpoints and numbers go; the model is in its `final` folder.
        model: Its shape; characters are as many as the text has.
        fit: How it is trained.
        resume: Whether to go on from the newest checkpoint: "auto" if there is one, true needs one, false begins anew.
        accelerator: What computes.
        devices: Devices of each machine.
        num_nodes: Machines.
        max_texts: Read the first so many documents of each split only.
        seed: Of the weights and the rows' places.

    Raises:
        UserError: If an argument, the text or the checkpoint is not usable.
    """
    began = step_began()
    problems = fit.problems() + ([] if max_texts is None or max_texts >= 1 else ["--max_texts must be at least 1."])
    problems += device_problems(accelerator, devices, num_nodes, "auto", fit.batch_size // max(1, fit.accumulate))
    problems += seed_problems(seed)
    report_all([problem.replace("--train.global_batch_size", "--fit.batch_size / accumulate") for problem in problems])
    files = token_files(read_corpus(text, max_texts), tokenizer, model.vocab_size, tokens_dir)
    config = replace(model, vocab_size=files.vocab_size)
    part, batches = fit.batch_size // fit.accumulate, fit.max_steps * fit.accumulate
    data = TokenData(files, config.context, part, batches, fit.accumulate, seed)
    identity = {"text": files.identity, "model": asdict(config), "fit": fit.identity(), "seed": seed}
    checkpoint = find_checkpoint(out_dir / CHECKPOINTS, resume, identity)

    L.seed_everything(seed, verbose=False)
    task = GPTTask(GPT(config), fit, identity)
    watch = Stopwatch()
    trainer = make_trainer(fit, out_dir, step_of(checkpoint), watch, accelerator, devices, num_nodes)
    tell(f"{count_parameters(task.model):,} parameters; {files.tokens['train']:,} tokens to learn from, "
         f"{files.tokens['validation']:,} held out; {config.vocab_size:,} in the vocabulary")  # fmt: skip
    if checkpoint is not None:
        tell(f"going on from {checkpoint}")
    watching = watched(out_dir, trainer.is_global_zero, keeps="goes on from its last checkpoint")
    with watching, PeakMemory() as peak, warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", ".*does not have many workers.*|.*not resumable.*|.*LeafSpec.*|.*is not empty.*"
        )
        try:
            trainer.fit(task, datamodule=data, ckpt_path=checkpoint, weights_only=True)
        except SystemExit:  # what Lightning makes of Ctrl-C
            raise KeyboardInterrupt from None
        loss = trainer.validate(task, datamodule=data, verbose=False)[0]["val_loss"]
    if not trainer.is_global_zero:
        return
    if not math.isfinite(loss):
        raise UserError(
            "The validation loss is not finite: the training diverged in its last steps. Lower --fit.learning_rate or "
            f"--fit.matrix_rate, and begin anew. {out_dir}/final is as it was."
        )
    task.cpu().eval()
    save_gpt(task.model, files.tokenizer, out_dir / "final")
    learned = (fit.max_steps - step_of(checkpoint)) * fit.batch_size * config.context
    _report(out_dir, files, task.model, loss, began, peak.bytes, learned / max(watch.seconds, 1e-9))
    for file in (out_dir / CHECKPOINTS).glob("step-*.ckpt"):
        file.unlink()
    wrote = write(task.model, files.tokenizer, "", temperature=0.8, seed=seed)
    tell(f"\n{wrote[0]}\n\n{out_dir}/final, metrics.json, logs")


class Keep(ModelCheckpoint):
    """Lightning's checkpoints, and one where Ctrl-C was pressed and at the end; `status` sees each step.

    Args:
        folder: Where they go.
        interval: Steps between two.
    """

    def __init__(self, folder: Path, interval: int) -> None:
        super().__init__(folder, "step-{step}", auto_insert_metric_name=False, every_n_train_steps=interval)
        self.folder = folder
        self._stop = Stopping()

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._stop.__enter__()
        self._first, self._began = trainer.global_step, time.time()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        loss = float(trainer.callback_metrics["train_loss"])
        note(trainer.global_step, trainer.max_steps, unit="step", first=self._first, began=self._began, loss=loss)
        if trainer.strategy.reduce_boolean_decision(self._stop.asked(), all=False):
            self._keep(trainer)
            raise KeyboardInterrupt

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_train_end(trainer, pl_module)
        self._stop.__exit__(None, None, None)
        self._keep(trainer)  # what comes now, the last validation, may be stopped, too

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        super().on_exception(trainer, pl_module, exception)
        self._stop.__exit__(None, None, None)

    def _keep(self, trainer: L.Trainer) -> None:
        file = self.folder / f"step-{trainer.global_step}.ckpt"
        if not trainer.strategy.broadcast(file.is_file()):
            trainer.save_checkpoint(file)


class Stopwatch(Callback):
    """The seconds that training takes, without the validations in between."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._began: float | None = None

    def _start(self) -> None:
        self._began = time.perf_counter()

    def _stop(self) -> None:
        if self._began is not None:
            self.seconds += time.perf_counter() - self._began
        self._began = None

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._start()

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._stop()

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.state.fn == TrainerFn.FITTING:
            self._start()

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._stop()


def make_trainer(
    fit: GPTFit,
    out_dir: Path,
    start: int,
    watch: Stopwatch,
    accelerator: Accelerator = "auto",
    devices: int | str = 1,
    num_nodes: int = 1,
) -> L.Trainer:
    """Lightning's Trainer with logs, checkpoints, clipping and a progress bar.

    Args:
        fit: How is trained.
        out_dir: Where logs and checkpoints go.
        start: Steps that were done before; a run that goes on gets a log of its own.
        watch: Tells training from validation.
        accelerator: What computes.
        devices: Devices of each machine.
        num_nodes: Machines.
    """
    loggers: list[Logger] = [CSVLogger(out_dir, "logs", f"from-step-{start}")]
    if find_spec("tensorboard") is not None:
        loggers.append(TensorBoardLogger(out_dir, "logs", "tensorboard"))
    else:
        tell("TensorBoard is not installed, so there is logs/*/metrics.csv only: .venv/bin/pip install tensorboard")
    return L.Trainer(
        max_steps=fit.max_steps,
        accelerator=accelerator,
        devices=devices,
        num_nodes=num_nodes,
        precision=fit.precision or fast_precision(accelerator),
        gradient_clip_val=fit.max_norm,
        accumulate_grad_batches=fit.accumulate,
        val_check_interval=fit.eval_interval * fit.accumulate,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        log_every_n_steps=fit.log_interval,
        use_distributed_sampler=False,  # the data deals its rows out itself
        logger=loggers,
        callbacks=[Keep(out_dir / CHECKPOINTS, fit.save_interval), watch, Bar()],
        enable_model_summary=False,
    )


def step_of(checkpoint: Path | None) -> int:
    """The number of steps after which a checkpoint was written; 0 for none."""
    found = None if checkpoint is None else re.search(r"step-(\d+)", checkpoint.name)
    return int(found[1]) if found else 0


def find_checkpoint(folder: Path, resume: Resume, identity: dict[str, Any]) -> Path | None:
    """The newest checkpoint of a folder, if a run is to go on from it.

    Args:
        folder: Where checkpoints are.
        resume: See `setup`.
        identity: What the run depends on.

    Returns:
        The file, or None to begin anew.

    Raises:
        UserError: If one is asked for and there is none, or it is damaged or of a run with other settings.
    """
    files = sorted(folder.glob("step-*.ckpt"), key=step_of)
    if resume is True and not files:
        raise UserError(f"{folder} holds no checkpoint to go on from. Leave --resume out to begin anew.")
    if resume is False or not files:
        return None
    file = files[-1]
    try:
        before = torch.load(file, map_location="cpu", weights_only=True, mmap=True)["run"]
    except Exception as e:  # torch raises RuntimeError, UnpicklingError, EOFError, KeyError, ... for what is none
        raise UserError(f"{file} is damaged ({first_line(e)}). Delete it, or begin anew: --resume false.") from None
    if differences := list(_differences(before, identity, "")):
        raise UserError(
            f"{file} is of a run with other settings: {'; '.join(differences)}. Go on with those, choose another "
            "--out_dir, or begin anew: --resume false."
        )
    return file


def _differences(before: Any, now: Any, name: str) -> Any:
    """What has changed in nested settings, in words."""
    if isinstance(before, dict) and isinstance(now, dict):
        for key in {**before, **now}:
            yield from _differences(before.get(key), now.get(key), f"{name}.{key}".lstrip("."))
    elif name == "text" and before != now:
        yield "text or tokenizer were others"
    elif before != now:
        yield f"{name} was {before!r:.40}, and is {now!r:.40} now"


def _report(
    out_dir: Path, files: TokenFiles, model: GPT, loss: float, began: float, peak_bytes: int, rate: float
) -> None:
    """Write metrics.json and say how good the model is."""
    tokens, characters = files.tokens["validation"] - 1, files.characters["validation"]  # nothing predicts the first
    # Nats a token depend on how long tokens are; bits a character do not.
    bits = loss / math.log(2) * tokens / max(1, characters)
    told = [metric("val_loss", loss, n=tokens, split="validation"),
            metric("bits_per_character", bits, n=characters, split="validation")]  # fmt: skip
    write_metrics(
        out_dir / "metrics.json",
        told,
        seconds=seconds_of_step(began),
        tokens_per_second=rate,
        peak_bytes=peak_bytes,
        parameters=count_parameters(model),
        hardware=hardware(),
    )
    tell(f"\nvalidation loss {loss:.4f} (all {tokens:,} tokens), {bits:.3f} bits a character; "
         f"{rate:,.0f} tokens/s in training")  # fmt: skip


def sample(
    checkpoint_dir: str = "out/gpt/final",
    prompt: str = "",
    max_new_tokens: int | None = None,
    temperature: float = 0.8,
    top_k: int | None = None,
    top_p: float = 1.0,
    seed: int | None = None,
    use_cache: bool = True,
) -> None:
    """Let a GPT write on.

    Args:
        checkpoint_dir: A folder from `make gpt`, a Hugging Face folder of a GPT-2, or its id on the Hub.
        prompt: What to write on from; the beginning of a text if empty.
        max_new_tokens: At most so many tokens, as many as the model can read if null; it ends before where the model
            ends the text.
        temperature: 0 takes the likeliest token each time.
        top_k: Draw among the k likeliest tokens only.
        top_p: Draw among the fewest tokens whose probabilities reach this sum.
        seed: The same seed writes the same text.
        use_cache: Whether to keep keys and values; without, the whole text is computed again for each token.

    Raises:
        UserError: If there is no such model, or the text would be longer than it can read.
    """
    model, tokenizer = load_gpt(checkpoint_dir)
    settings: dict[str, Any] = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed}
    wrote, made = write(model, tokenizer, prompt, max_new_tokens, use_cache=use_cache, **settings)
    print(f"{prompt}{wrote}\n\n{len(made.ids[0])} tokens, {made.tokens_per_second:,.0f} tokens/s "
          f"{'with' if use_cache else 'without'} the KV cache")  # fmt: skip


def write(
    model: GPT, tokenizer: Tokenizer, prompt: str, max_new_tokens: int | None = None, **settings: Any
) -> tuple[str, Generated]:
    """Write on from a prompt until the model ends the text.

    Args:
        model: In evaluation mode.
        tokenizer: Its own.
        prompt: May be empty: then a text begins.
        max_new_tokens: At most so many; as many as the model can read beside the prompt if None.
        **settings: Of `generation.generate`.

    Returns:
        What was written, and its tokens.
    """
    ends = [tokenizer.special_tokens[END_OF_TEXT]] if isinstance(tokenizer, SpecialBPE) else []
    # A text begins where another has ended: after the token for that, or, of characters, after a line's end.
    ids = encoder_of(tokenizer)(prompt) or ends or [_line_end(tokenizer)]
    most = max(1, model.max_length - len(ids)) if max_new_tokens is None else max_new_tokens
    device = device_of(model)
    made = generate(model, torch.tensor([ids], device=device), most, stop_ids=ends, **settings)
    return tokenizer.decode([token for token in made.ids[0] if token not in ends]), made


def _line_end(tokenizer: Tokenizer) -> int:
    """The id of a line's end, or the first one of a vocabulary that has none."""
    return tokenizer.ids.get("\n", 0) if isinstance(tokenizer, CharacterTokenizer) else tokenizer.encode("\n")[0]
