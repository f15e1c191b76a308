"""A training run's logs: `metrics.csv` always, TensorBoard and W&B where asked for."""

import csv
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from workflows.errors import UserError
from workflows.files import no_room_explained, read_text, write_text

if TYPE_CHECKING:  # `status` reads logs, and is to be quick
    import lightning as L


class MetricsLog:
    """`metrics.csv`, always; TensorBoard and W&B where asked for. Rows after the step resumed from are dropped."""

    def __init__(self, fabric: "L.Fabric", out_dir: Path, start: int, loggers: Iterable[str]) -> None:
        """Open the logs; only the first process writes.

        Args:
            fabric: A launched Fabric.
            out_dir: The run's folder.
            start: Steps that were done before.
            loggers: "tensorboard", "wandb".
        """
        self.active = fabric.global_rank == 0
        self.path = out_dir / "metrics.csv"
        self.columns: list[str] = []
        self.others = [_make_logger(name, out_dir) for name in loggers] if self.active else []
        rows = []
        if self.active and self.path.is_file() and start:
            try:
                rows = self._rows_until(start)
            except (ValueError, TypeError, KeyError, csv.Error):  # of a run that can go on all the same
                fabric.print(f"{self.path} is damaged: the steps before step {start} are missing in it from now on")
        if self.active:
            self._rewrite(rows)

    def _rows_until(self, step: int) -> list[dict[str, str]]:
        whole = self.path.read_text(encoding="utf-8").rpartition("\n")[0]  # a killed run may leave half a line
        rows = list(csv.DictReader(whole.splitlines(), strict=True))
        if not all(isinstance(value, str) for row in rows for value in row.values()):
            raise ValueError("a row has more or fewer cells than there are columns")
        return [row for row in rows if int(row["step"]) <= step]

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """Add one row; the file is rewritten only when a column is new."""
        if not self.active:
            return
        row = {"step": str(step), **{name: f"{value:.6g}" for name, value in metrics.items()}}
        if set(row) <= set(self.columns):
            with no_room_explained(self.path), open(self.path, "a", encoding="utf-8") as f:
                f.write(self._line(row))
        else:
            with open(self.path, encoding="utf-8") as f:
                self._rewrite([*csv.DictReader(f), row])
        for logger in self.others:
            logger.log_metrics(metrics, step)

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Let the loggers write what they still hold."""
        for logger in self.others:
            logger.finalize("success" if kind is None else "failed")

    def _line(self, row: dict[str, str]) -> str:
        return ",".join(row.get(name) or "" for name in self.columns) + "\n"

    def _rewrite(self, rows: list[dict[str, str]]) -> None:
        self.columns = list(dict.fromkeys(name for row in rows for name in row))
        header = {name: name for name in self.columns}
        write_text(self.path, "".join(map(self._line, [header, *rows])) if rows else "")


def read_log(file: Path) -> list[dict[str, float]]:
    """The rows of a `metrics.csv`, which may just be growing: step and numbers, empty cells and half a line left out.

    A number may be infinite or none at all, for a run may have measured that; its step may not.

    Raises:
        UserError: If the file is none.
    """
    if not file.is_file():
        return []
    whole = read_text(file).rpartition("\n")[0]
    try:
        rows = [
            {name: float(value) for name, value in row.items() if value}
            for row in csv.DictReader(whole.splitlines(), restkey="too many")
        ]
        return [{**row, "step": int(row["step"])} for row in rows]
    except (ValueError, TypeError, KeyError, OverflowError, csv.Error):
        raise UserError(f"{file} is not a log of training steps; delete it, or run the step again.") from None


def _make_logger(name: str, out_dir: Path) -> Any:
    """A Lightning logger by name.

    Raises:
        UserError: If its package is not installed.
    """
    try:
        if name == "tensorboard":
            from lightning.fabric.loggers import TensorBoardLogger

            return TensorBoardLogger(root_dir=out_dir, name="tensorboard")
        from lightning.pytorch.loggers import WandbLogger

        return WandbLogger(project="own-language-model", save_dir=out_dir)
    except ModuleNotFoundError:
        raise UserError(f"--loggers {name} needs a package: `.venv/bin/pip install {name}`.") from None
