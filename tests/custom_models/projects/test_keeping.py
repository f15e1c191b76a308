"""A training that is stopped ends as one that nothing stopped; one that is done is not repeated."""

import contextlib
import importlib
import json
import os
import random
import signal
import time
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import psutil
import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset

from custom_models.__main__ import PROJECTS
from custom_models.projects import keeping
from custom_models.projects.fitting import FitArgs, fit_best
from custom_models.projects.keeping import DONE, KEPT, LAST, folder_of, kept_until_done, project
from custom_models.projects.texts import LengthBatches
from workflows import lifetime
from workflows.errors import UserError
from workflows.progress import HOST
from workflows.status import status_of

ROWS = [[i % 7, i % 5, i % 3] for i in range(44)]


class Toy(L.LightningModule):
    """A model with dropout, which presses Ctrl-C before one of its steps."""

    number = signal.SIGINT

    def __init__(self, ctrl_c_before: int | None = None) -> None:
        super().__init__()
        self.layer = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.Dropout(0.3), torch.nn.Linear(8, 1))
        self.ctrl_c_before, self.seen = ctrl_c_before, []  # type: ignore[var-annotated]

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        if self.global_step == self.ctrl_c_before:
            signal.raise_signal(self.number)
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
@pytest.mark.parametrize("before", [0, 5, 9, 10, 11, 30, 32, 43])
def test_after_ctrl_c_it_goes_on_to_the_same_end(before: int, ema_decay: float, tmp_path: Path):
    """An epoch has eleven batches: in the first one, in the middle, in the last one, whose validation comes first, and
    in the very last one, after which the training is done."""
    fit = FitArgs(**{**vars(FIT), "ema_decay": ema_decay})
    undisturbed = train(tmp_path / "undisturbed", fit)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "stopped", fit, ctrl_c_before=before)
    again = train(tmp_path / "stopped", fit)
    assert_same(undisturbed, again)
    assert again[0].seen == undisturbed[0].seen[before + 1 :]
    assert callable(signal.getsignal(signal.SIGINT))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_other_signals_end_it_as_ctrl_c_does(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(lifetime.received, "_at", -float("inf"))
    undisturbed = train(tmp_path / "undisturbed")
    monkeypatch.setattr(Toy, "number", number)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "stopped", ctrl_c_before=30)
    assert_same(undisturbed, train(tmp_path / "stopped"))


def test_with_one_batch_an_epoch_ctrl_c_is_heard_too(tmp_path: Path):
    rows = ROWS[:4]
    undisturbed = train(tmp_path / "undisturbed", rows=rows)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "stopped", ctrl_c_before=1, rows=rows)
    again = train(tmp_path / "stopped", rows=rows)
    assert_same(undisturbed, again)
    assert len(again[0].seen) == 2


@pytest.mark.parametrize("before", [5, 16, 21])
def test_early_stopping_comes_when_it_would_have_come(before: int, tmp_path: Path):
    fit = FitArgs(max_epochs=20, batch_size=4, patience=1, accelerator="cpu")
    scores = [5.0, 4.0, 6.0, 7.0]

    class Worse(Toy):
        def on_validation_epoch_end(self) -> None:
            self.log("val_loss", scores[self.current_epoch])

        def validation_step(self, batch: torch.Tensor, batch_idx: int) -> None:
            pass

    found = []
    for out_dir, ctrl_c_before in (("undisturbed", None), ("stopped", before), ("stopped", None)):
        with contextlib.suppress(KeyboardInterrupt), pytest.MonkeyPatch.context() as patch:
            patch.setitem(globals(), "Toy", Worse)
            found.append(train(tmp_path / out_dir, fit, ctrl_c_before=ctrl_c_before))
    assert len(found) == 2 and [row["epoch"] for row in found[1][1]] == [0, 1, 2]
    assert_same(*found)


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


def test_what_is_done_is_not_repeated_and_other_data_are_another_training(
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
    assert len(train(tmp_path, rows=[*ROWS[:-1], [6, 6, 6]])[0].seen) == 44
    assert len(list((tmp_path / KEPT).iterdir())) == 2


def test_trainings_of_one_project_and_of_other_settings_are_kept_apart(tmp_path: Path):
    """They may begin at the same weights and read the same data: two students of one teacher, say."""
    for settings, trained in (("a", [44, 44]), ("a", [0, 0]), ("b", [44, 44]), ("a", [0, 0])):
        with contextlib.suppress(KeyboardInterrupt), project(tmp_path, settings):
            assert [len(train(tmp_path)[0].seen) for _ in range(2)] == trained
            raise KeyboardInterrupt
    assert len(list((tmp_path / KEPT).iterdir())) == 4


def test_all_arguments_of_a_project_are_its_settings(tmp_path: Path):
    trained = []

    @kept_until_done
    def setup(out_dir: Path, mixup: float = 0.2, fit: FitArgs = FIT) -> None:
        trained.append(len(train(out_dir, fit)[0].seen))
        if mixup < 1:
            raise KeyboardInterrupt

    for mixup in (0.2, 0.2, 0.1):
        with pytest.raises(KeyboardInterrupt):
            setup(tmp_path, mixup=mixup)
    assert trained == [44, 0, 44] and (tmp_path / KEPT).is_dir()
    setup(tmp_path, 1.0)
    assert not (tmp_path / KEPT).exists()


def test_what_ends_before_it_trains_leaves_nothing(tmp_path: Path):
    with pytest.raises(UserError), project(tmp_path / "out", ""):
        raise UserError("--seeds needs at least one.")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_where_another_process_is_at_work_is_left_alone(tmp_path: Path):
    other = psutil.Process(os.getppid())
    told = {"command": "make", "host": HOST, "pid": other.pid, "born": other.create_time(), "updated": time.time()}
    (tmp_path / "progress.json").write_text(json.dumps(told))
    with pytest.raises(UserError, match=f"Process {other.pid} is at work"), project(tmp_path, ""):
        raise AssertionError
    (tmp_path / "progress.json").write_text("{")
    with project(tmp_path, ""):
        pass


def test_what_was_computed_of_a_row_does_not_decide(tmp_path: Path):
    class Pair(NamedTuple):
        text: list[int]
        reference: torch.Tensor

    def folder(text: int, reference: float) -> Path:
        loader: Any = DataLoader([Pair([text], torch.tensor(reference))])  # type: ignore[arg-type]
        torch.manual_seed(0)
        return folder_of(Toy(), [loader], tmp_path)

    assert folder(1, -103.27285) == folder(1, -103.27284) != folder(2, -103.27285)


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


def test_a_project_keeps_its_trainings_until_it_ends_well(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(KeyboardInterrupt), project(tmp_path, "settings"):
        train(tmp_path)
        os.kill(os.getpid(), signal.SIGINT)
    status = status_of(tmp_path, tmp_path)
    assert (status.state, status.done, status.total, status.unit) == ("running", 44, 44, "step")
    assert (tmp_path / KEPT).is_dir() and "goes on from its last checkpoint" in (tmp_path / "progress.json").read_text()
    with project(tmp_path, "settings"):
        assert train(tmp_path)[0].seen == []
    assert list(tmp_path.iterdir()) == [] and "delete it to begin anew" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["sentiment", "distill", "pretrain", "gpt-dpo", "pretrain-t5", "ner", "ner-autotrain",
                                  "translate", "summarize", "qa"])  # fmt: skip
def test_every_project_that_trains_keeps_it_by_all_of_its_settings(name):
    module, function, _ = PROJECTS[name]
    assert hasattr(getattr(importlib.import_module(module), function), "__wrapped__")
