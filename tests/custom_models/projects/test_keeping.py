"""A training that is stopped ends as one that nothing stopped; one that is done is not repeated."""

import contextlib
import os
import random
import signal
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset

from custom_models.projects import keeping
from custom_models.projects.fitting import FitArgs, fit_best
from custom_models.projects.keeping import DONE, KEPT, LAST, kept_until_done
from custom_models.projects.texts import LengthBatches
from workflows.status import status_of

ROWS = [[i % 7, i % 5, i % 3] for i in range(44)]


class Toy(L.LightningModule):
    """A model with dropout, which presses Ctrl-C before one of its steps."""

    def __init__(self, ctrl_c_before: int | None = None) -> None:
        super().__init__()
        self.layer = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.Dropout(0.3), torch.nn.Linear(8, 1))
        self.ctrl_c_before, self.seen = ctrl_c_before, []  # type: ignore[var-annotated]

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        if self.global_step == self.ctrl_c_before:
            signal.raise_signal(signal.SIGINT)
        self.seen.append(batch.tolist())
        return (self.layer(batch) - batch.sum(1, keepdim=True)).square().mean()

    def validation_step(self, batch: torch.Tensor, batch_idx: int) -> None:
        self.log("val_loss", (self.layer(batch) - batch.sum(1, keepdim=True)).square().mean(), batch_size=len(batch))

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=0.01)


FIT = FitArgs(max_epochs=4, batch_size=4, accelerator="cpu")


def train(out_dir: Path, fit: FitArgs = FIT, ctrl_c_before: int | None = None, rows: Any = ROWS) -> tuple[Toy, Any]:
    L.seed_everything(1, verbose=False)
    task, chance = Toy(ctrl_c_before), random.Random(3)

    def varied(found: list[list[int]]) -> torch.Tensor:
        return torch.tensor([[x + chance.random() for x in row] for row in found])

    batches: Any = LengthBatches([1 + row[0] for row in rows], 4, seed=5)
    loader: Any = DataLoader(rows, batch_sampler=batches, collate_fn=varied)
    validation: Any = DataLoader([[1.0, 2.0, 3.0], [0.0, 1.0, 0.0]], batch_size=2, collate_fn=torch.tensor)
    epochs = fit_best(task, loader, validation, out_dir, fit, monitor="val_loss")
    return task, epochs


def assert_same(one: tuple[Toy, Any], other: tuple[Toy, Any]) -> None:
    for a, b in zip(one[0].state_dict().values(), other[0].state_dict().values(), strict=True):
        assert torch.equal(a, b)
    assert [row["val_loss"] for row in one[1]] == [row["val_loss"] for row in other[1]]


@pytest.mark.parametrize("ema_decay", [0.0, 0.9])
@pytest.mark.parametrize("before", [0, 5, 9, 10, 11, 30, 43])
def test_after_ctrl_c_it_goes_on_to_the_same_end(before: int, ema_decay: float, tmp_path: Path):
    """An epoch has eleven batches: in the first one, in the middle, in the last one, whose validation comes first."""
    fit = FitArgs(**{**vars(FIT), "ema_decay": ema_decay})
    undisturbed = train(tmp_path / "undisturbed", fit)
    if before < 43:
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path / "stopped", fit, ctrl_c_before=before)
    again = train(tmp_path / "stopped", fit, ctrl_c_before=None if before < 43 else 43)
    assert_same(undisturbed, again)
    done = before + 1 + (before % 11 == 10)  # after an epoch's last batch the next one's first is learned from, too
    assert again[0].seen == undisturbed[0].seen[done if before < 43 else 0 :]
    assert callable(signal.getsignal(signal.SIGINT))


class Stream(IterableDataset[torch.Tensor]):
    """Batches in another order each time, of which nobody knows how many there are."""

    def __init__(self) -> None:
        self.documents, self.epoch = ROWS, 0

    def __iter__(self) -> Any:
        chance = random.Random(self.epoch)
        self.epoch += 1
        yield from torch.tensor(chance.sample(self.documents, len(ROWS))).float().split(4)


@pytest.mark.parametrize("before", [3, 10, 27])
def test_a_stream_goes_on_to_the_same_end(before: int, tmp_path: Path):
    found = []
    for out_dir, ctrl_c_before in (("undisturbed", None), ("stopped", before), ("stopped", None)):
        L.seed_everything(1, verbose=False)
        task, loader = Toy(ctrl_c_before), DataLoader(Stream(), batch_size=None)
        validation: Any = DataLoader([[1.0, 2.0, 3.0]], collate_fn=torch.tensor)
        with contextlib.suppress(KeyboardInterrupt):
            found.append((task, fit_best(task, loader, validation, tmp_path / out_dir, FIT, monitor="val_loss")))
    assert len(found) == 2 and len(found[1][0].seen) < 44
    assert_same(*found)


def test_after_a_crash_it_goes_on_from_the_last_minute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    undisturbed = train(tmp_path / "undisturbed")
    monkeypatch.setattr(keeping, "INTERVAL", 0.0)
    monkeypatch.setattr(Toy, "validation_step", lambda *_: (_ for _ in ()).throw(OSError("the power is gone")))
    with pytest.raises(OSError, match="power"):
        train(tmp_path / "crashed")
    monkeypatch.undo()
    again = train(tmp_path / "crashed")
    assert_same(undisturbed, again)
    assert len(again[0].seen) == 34  # ten of the first epoch's eleven batches were kept


def test_what_is_done_is_not_repeated_and_other_settings_or_data_are_another_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    first = train(tmp_path)
    torch.rand(3)
    after = torch.rand(1)
    again = train(tmp_path)
    torch.rand(3)
    assert torch.equal(torch.rand(1), after)  # what is drawn after it is the same, too
    assert_same(first, again)
    assert again[0].seen == [] and "trained before: 4 epochs" in capsys.readouterr().out
    assert len(train(tmp_path, FitArgs(**{**vars(FIT), "learning_rate": 1e-3}))[0].seen) == 44
    assert len(train(tmp_path, rows=[*ROWS[:-1], [6, 6, 6]])[0].seen) == 44
    assert len(list((tmp_path / KEPT).iterdir())) == 3


@pytest.mark.parametrize("damage", [b"", b"nothing", None])
def test_a_damaged_file_is_told_and_the_training_begins_anew(
    damage: bytes | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    undisturbed = train(tmp_path / "undisturbed")
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "stopped", ctrl_c_before=5)
    for name in (LAST, DONE):
        (file,) = (tmp_path / ("stopped" if name == LAST else "undisturbed") / KEPT).glob(f"*/{name}")
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2] if damage is None else damage)
        assert_same(undisturbed, train(file.parents[2]))
        assert "is damaged" in capsys.readouterr().out


def test_a_project_keeps_its_trainings_until_it_ends_well(tmp_path: Path):
    with pytest.raises(KeyboardInterrupt), kept_until_done(tmp_path):
        train(tmp_path)
        os.kill(os.getpid(), signal.SIGINT)
    status = status_of(tmp_path, tmp_path)
    assert (status.state, status.done, status.total, status.unit) == ("running", 44, 44, "step")
    assert (tmp_path / KEPT).is_dir() and "goes on from its last checkpoint" in (tmp_path / "progress.json").read_text()
    with kept_until_done(tmp_path):
        assert train(tmp_path)[0].seen == []
    assert list(tmp_path.iterdir()) == []
