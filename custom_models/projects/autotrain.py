"""Hugging Face's AutoTrain in an environment of its own: installed once, told by a file what to do, and looked after.

AutoTrain pins packages of early 2025 that cannot share an environment with ours. The pins here were tried together:
torchvision and timm, which it brings along, clash with a torch of today and are not needed by its texts. What it would
fetch from the Hub while it runs it finds beside it: nltk's punkt_tab, a ROUGE metric, and the base model, which the
caller has fetched. So it runs offline, and without anybody else's code.
"""

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import yaml
from filelock import FileLock

from custom_models.projects.fitting import FitArgs, fast_precision
from data_prep.rows import Row, write_rows
from workflows.errors import UserError
from workflows.files import no_room_explained, read_json, read_text, write_text
from workflows.lifetime import PR_SET_PDEATHSIG, end_with_parent
from workflows.wheels import CACHE, LLAMA_INDEX, open_wheel

HOME = Path(".tools/autotrain")
"""Where its environment is, relative to the project's root."""
PINS = ("autotrain-advanced==0.8.36", "torch==2.13.0")
CLASHING = ("torchvision", "timm")
ROOM = 6_000_000_000
"""Bytes that must be free for its environment with the CPU build of torch."""
RESULT = "model"
"""AutoTrain's name for the project: the folder of its result."""
LOG = "autotrain.log"
_END_WITH_PARENT = f"import ctypes; ctypes.CDLL(None).prctl({PR_SET_PDEATHSIG}, {int(signal.SIGKILL)})\n"
"""What every Python of the environment runs as it starts, see `end_with_parent`."""
_PUNKT = "llama_index/core/_static/nltk_cache/tokenizers/punkt_tab/"


def install_commands(home: Path, pip_args: Sequence[str]) -> list[list[str]]:
    """The commands that build the environment, in turn."""
    pip = [str(home.absolute() / "bin" / "python"), "-m", "pip"]
    return [
        [sys.executable, "-m", "venv", "--clear", str(home)],
        [*pip, "install", "--disable-pip-version-check", *pip_args, *PINS],
        [*pip, "uninstall", "--yes", *CLASHING],
    ]


def install(home: Path = HOME, pip_args: str = "", cache: Path = CACHE) -> None:
    """Build AutoTrain's environment unless it is there.

    Args:
        home: Its folder; what of it is half built is built again.
        pip_args: Further options of `pip install`, as on a command line.
        cache: The folder of downloaded wheels.

    Raises:
        UserError: If there is no room or no network, pip fails, or its options have a quotation mark too few.
    """
    try:
        options = shlex.split(pip_args)
    except ValueError as e:
        raise UserError(f"--pip_args is no list of options: {e} in {pip_args!r}.") from None
    done, pinned = home / ".installed", "\n".join([*PINS, LLAMA_INDEX.requirement]) + "\n"
    home.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(home.with_name(f".{home.name}.lock")):  # a second process waits, and finds it done
        if done.is_file() and done.read_text() == pinned:
            return
        if (free := shutil.disk_usage(home.parent).free) < ROOM:
            raise UserError(
                f"AutoTrain's environment needs {ROOM / 1e9:.0f} GB, and only {free / 1e9:.1f} GB are free in "
                f"{home.parent}. Free some space and run again."
            )
        log = home.with_name(f"{home.name}-install.log")
        print(f"installing AutoTrain into {home}, which takes minutes; pip's words are in {log}", flush=True)
        with open(log, "w", encoding="utf-8") as file:
            for command in install_commands(home, options):
                if subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, preexec_fn=_end()).returncode != 0:
                    raise UserError(_pip_failed(log))
        with no_room_explained(home), open_wheel(LLAMA_INDEX, cache) as wheel:
            for member in wheel.namelist():
                if member.startswith(_PUNKT) and not member.endswith("/"):
                    target = home / "nltk_data" / "tokenizers" / PurePosixPath(member).relative_to(Path(_PUNKT).parent)
                    target.parent.mkdir(parents=True, exist_ok=True)
                    target.write_bytes(wheel.read(member))
        if sys.platform == "linux":  # AutoTrain starts others that train, and does not look after them
            (site,) = home.glob("lib/python*/site-packages")
            write_text(site / "end_with_parent.pth", _END_WITH_PARENT)
        write_text(done, pinned)


def _pip_failed(log: Path) -> str:
    text = log.read_text(encoding="utf-8", errors="replace")
    if "No space left on device" in text:
        return f"AutoTrain could not be installed: the disk is full. Free some space and run again. All pip said: {log}"
    lines = [line for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("ERROR")] or lines or ["pip gave no reason"]
    return (
        f"AutoTrain could not be installed: {errors[-1]}\nCheck the connection and run again; if pip found no version, "
        f"make .venv with Python 3.11, which AutoTrain was tried with. All pip said: {log}"
    )


def config_of(base: Path, fit: FitArgs, seed: int, max_source: int, max_target: int) -> dict[str, Any]:
    """What `autotrain --config` reads, for the task seq2seq (its LLM tasks train decoders only, no T5).

    Args:
        base: The folder of the model to begin at.
        fit: Batch, rate, schedule, epochs and patience; the best epoch by validation loss is kept.
        seed: Of order and dropout.
        max_source: The longest source in tokens.
        max_target: The longest target in tokens.
    """
    precision = fit.precision or fast_precision(fit.accelerator)
    return {
        "task": "seq2seq",
        "base_model": str(base.absolute()),
        "project_name": RESULT,
        "log": "none",
        "backend": "local",
        "data": {
            "path": "data",
            "train_split": "train",
            "valid_split": "validation",
            "column_mapping": {"text_column": "text", "target_column": "target"},
        },
        "params": {
            "max_seq_length": max_source,
            "max_target_length": max_target,
            "epochs": fit.max_epochs,
            "batch_size": fit.batch_size,
            "lr": fit.learning_rate,
            "warmup_ratio": fit.warmup,
            "weight_decay": fit.weight_decay,
            "max_grad_norm": fit.max_norm,
            "early_stopping_patience": fit.patience,
            "early_stopping_threshold": 0.0,
            "optimizer": "adamw_torch",
            "scheduler": "linear",
            "mixed_precision": "bf16" if precision == "bf16-mixed" else None,
            "peft": False,
            "seed": seed,
        },
    }


def write_project(folder: Path, config: dict[str, Any], rows: Mapping[str, Sequence[Row]]) -> None:
    """Make a folder for AutoTrain to run in: its configuration, its data and its metric.

    Args:
        folder: Made anew: what was there before is deleted.
        config: See `config_of`.
        rows: {"text", "target"} rows of train and validation. They are written as JSONL, for AutoTrain takes what is
            empty in a CSV file for the word "nan".
    """
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "data").mkdir(parents=True)
    with no_room_explained(folder):
        for split, written in rows.items():
            write_rows(folder / "data" / f"{split}.jsonl", written)
    write_text(folder / "rouge" / "rouge.py", read_text(Path(__file__).with_name("autotrain_rouge.py")))
    write_text(folder / "config.yml", yaml.safe_dump(config, sort_keys=False))


def environment(home: Path, on_cpu: bool) -> dict[str, str]:
    """The variables that AutoTrain runs with: its own programs and data first, no Hub, and nobody else's code."""
    ours = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    home = home.absolute()
    return {
        **ours,
        "PATH": os.pathsep.join([str(home / "bin"), os.environ.get("PATH", os.defpath)]),
        "NLTK_DATA": str(home / "nltk_data"),
        "ALLOW_REMOTE_CODE": "false",
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "HF_EVALUATE_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        **({"CUDA_VISIBLE_DEVICES": ""} if on_cpu else {}),
    }


def run(folder: Path, home: Path = HOME, on_cpu: bool = False) -> Path:
    """Run `autotrain --config` in a project's folder.

    Args:
        folder: See `write_project`.
        home: AutoTrain's environment.
        on_cpu: Whether it is to leave a GPU alone.

    Returns:
        The folder with the model.

    Raises:
        UserError: If it fails, which AutoTrain's exit code does not say: then its result is not whole.
    """
    command = [str(home.absolute() / "bin" / "autotrain"), "--config", "config.yml"]
    log, result = folder / LOG, folder / RESULT
    print(f"AutoTrain trains; what it says is in {log}", flush=True)
    try:
        with open(log, "w", encoding="utf-8") as file:
            variables = environment(home, on_cpu)
            done = subprocess.run(
                command, cwd=folder, env=variables, stdout=file, stderr=subprocess.STDOUT, preexec_fn=_end()
            )
    except OSError as e:
        raise UserError(f"{command[0]} could not be started ({e}). Delete {home} and run again.") from None
    # The card is the last thing that it writes.
    if done.returncode != 0 or not all((result / name).is_file() for name in ("config.json", "README.md")):
        raise UserError(_autotrain_failed(log))
    return result


def _autotrain_failed(log: Path) -> str:
    text = log.read_text(encoding="utf-8", errors="replace")
    if "No space left on device" in text:
        return f"AutoTrain failed: the disk is full. Free some space and run again. All it said: {log}"
    errors = re.findall(r"^(?:ERROR\b.* - |\w*(?:Error|Exception): )(.+)$", text, flags=re.MULTILINE)
    return f"AutoTrain failed: {errors[-1] if errors else 'it gave no reason'}\nAll it said is in {log}"


def epochs_of(result: Path) -> list[dict[str, float]]:
    """The numbers of each epoch's validation, by the trainer's own last account."""
    states = sorted(result.glob("checkpoint-*/trainer_state.json"), key=lambda path: int(path.parent.name[11:]))
    history = read_json(states[-1])["log_history"] if states else []
    names = {"eval_loss": "val_loss", "eval_rouge1": "val_rouge1"}
    looks = [entry for entry in history if "eval_loss" in entry]
    return [
        {"epoch": number, **{ours: entry[theirs] for theirs, ours in names.items()}}
        for number, entry in enumerate(looks)
    ]


def _end() -> Callable[[], None] | None:
    return end_with_parent(signal.SIGKILL) if os.name == "posix" else None
