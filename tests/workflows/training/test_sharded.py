"""Sharded runs (FSDP2) of two CPU processes on a tiny Llama 3: they follow one process, their checkpoints are shards
that any number of processes goes on from, and what is damaged is told."""

import csv
import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch

from tests.children import Outcome, limits
from tests.conftest import convert, make_llama
from tests.workflows import alignment
from tests.workflows.test_lora import write_rows
from tests.workflows.two_processes import TwoProcesses
from workflows import dpo, grpo, lora, ppo, reward
from workflows.checkpoint import load_weights
from workflows.errors import UserError
from workflows.training import resume, shards
from workflows.training.loop import TrainArgs
from workflows.training.rewards import WeightedReward
from workflows.training.whole import whole

pytestmark = pytest.mark.long

TRAIN = TrainArgs(
    max_steps=5,
    global_batch_size=5,  # one process has three samples, the other two
    row_tokens=128,
    max_seq_length=128,
    lr_warmup_steps=0,
    learning_rate=1e-3,
    eval_interval=5,
    save_interval=1,
)
LLAMA3 = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0}
LLAMA3 |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 64}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model of Llama 3.1's architecture: its scaled rotary embedding, an untied head."""
    folder = tmp_path_factory.mktemp("llama3")
    return convert(make_llama(folder / "tiny-llama-3", tied=False, rope_parameters=LLAMA3), folder / "lit")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("data") / "toy"
    directory.mkdir()
    write_rows(directory / "train.jsonl", 30)
    write_rows(directory / "validation.jsonl", 4, offset=100)
    (directory / "manifest.json").write_text("{}")
    return directory


@pytest.fixture(scope="module")
def two() -> Iterator[TwoProcesses]:
    processes = TwoProcesses()
    yield processes
    processes.stop()


def train(step: str, checkpoint: Path, data: Path, out_dir: Path, stop_at: int | None = None, **options: Any) -> None:
    """Run a step in this process, which may be one of two; stop before a step of training if asked to."""
    module = {"lora": lora, "dpo": dpo, "grpo": grpo, "ppo": ppo, "reward": reward}[step]
    sharded = {"strategy": "fsdp", "devices": 2} if torch.distributed.is_torchelastic_launched() else {}
    objective = lora.SFT.batches

    def stopping(self: Any, step: int, rank: int, world_size: int) -> Any:
        if step == stop_at:
            raise UserError("stop here")
        return objective(self, step, rank, world_size)

    lora.SFT.batches = stopping  # type: ignore[method-assign]
    try:
        places = {"checkpoint_dir": checkpoint, "data": data, "out_dir": out_dir}
        module.setup(**places, **{"precision": "32-true", "lora_r": 4, **sharded, **options})
    finally:
        lora.SFT.batches = objective  # type: ignore[method-assign]


def train_on_a_full_disk(checkpoint: Path, data: Path, out_dir: Path) -> None:
    with limits(1 << 40, 20_000):
        train("lora", checkpoint, data, out_dir, train=TRAIN)


def train_in_two(two: TwoProcesses, step: str, *args: Any, **options: Any) -> None:
    outcomes = two.run(_train, (step, *args), options)
    assert [outcome.how for outcome in outcomes] == ["returned"] * 2, outcomes


def _train(args: tuple[Any, ...], options: dict[str, Any]) -> None:
    train(*args, **options)


def losses(out_dir: Path) -> list[float]:
    return [float(row["loss"]) for row in csv.DictReader((out_dir / "metrics.csv").read_text().splitlines())]


OPTIONS = {"adapters": {}, "all weights": {"lora_r": 0}, "adapters over bfloat16": {"precision": "bf16-true"}}


@pytest.mark.parametrize("kind", OPTIONS)
def test_two_sharded_processes_follow_one(kind, two, llama, data, tmp_path):
    train("lora", llama, data, tmp_path / "one", train=TRAIN, **OPTIONS[kind])
    train_in_two(two, "lora", llama, data, tmp_path / "two", train=TRAIN, **OPTIONS[kind])
    close = 1e-2 if kind == "adapters over bfloat16" else 1e-4
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), abs=close)
    one, both = (load_weights(tmp_path / name / "final") for name in ("one", "two"))
    assert one.keys() == both.keys()
    for name, weight in one.items():
        torch.testing.assert_close(both[name], weight, atol=2e-3, rtol=0)
    assert not (tmp_path / "two" / "checkpoints").exists()


@pytest.mark.parametrize("precision", ["bf16-true", "16-true"])
@pytest.mark.parametrize("strategy", ["fsdp", "ddp"])
def test_all_weights_in_16_bits_follow_one_process(precision, strategy, two, llama, data, tmp_path):
    options = {"precision": precision, "lora_r": 0, "train": replace(TRAIN, max_steps=6)}
    train("lora", llama, data, tmp_path / "one", **options)
    train_in_two(two, "lora", llama, data, tmp_path / "two", strategy=strategy, **options)
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), abs=1e-2)
    one, both = (load_weights(tmp_path / name / "final") for name in ("one", "two"))
    assert one.keys() == both.keys()
    for name, weight in one.items():
        torch.testing.assert_close(both[name], weight, atol=1e-2, rtol=1e-2)


@pytest.mark.parametrize("strategy", ["fsdp", "ddp"])
def test_all_weights_in_bfloat16_stopped_and_resumed_end_bit_identical(strategy, two, llama, data, tmp_path):
    options = {"precision": "bf16-true", "lora_r": 0, "strategy": strategy, "train": TRAIN}
    train_in_two(two, "lora", llama, data, tmp_path / "whole", **options)
    outcomes = two.run(_train, ("lora", llama, data, tmp_path / "stopped"), {"stop_at": 3, **options})
    assert [outcome.text for outcome in outcomes] == ["stop here"] * 2
    masters = resume.trained_weights(tmp_path / "stopped" / "checkpoints")
    assert {weight.dtype for weight in masters.values()} == {torch.float32}
    train_in_two(two, "lora", llama, data, tmp_path / "stopped", resume=True, **options)
    whole, stopped = (load_weights(tmp_path / name / "final") for name in ("whole", "stopped"))
    assert whole.keys() == stopped.keys() and {weight.dtype for weight in whole.values()} == {torch.bfloat16}
    assert all(torch.equal(stopped[name], weight) for name, weight in whole.items())
    assert losses(tmp_path / "stopped") == losses(tmp_path / "whole")


def keep_weights(file: Path, *args: Any, **options: Any) -> None:
    """Train, and write the gathered weights as they are at the end, when they have been validated."""
    report = lora.SFT.report

    def keeping(self: Any, model: Any) -> Any:
        with whole(model) as gathered_model:
            gathered = {name: weight.clone() for name, weight in gathered_model.named_parameters()}
        torch.save(gathered, file.with_suffix(f".{torch.distributed.get_rank()}"))
        return report(self, model)

    lora.SFT.report = keeping  # type: ignore[method-assign]
    try:
        train(*args, **options)
    finally:
        lora.SFT.report = report  # type: ignore[method-assign]


def test_sharded_weights_are_written_as_they_were_validated(two, llama, data, tmp_path):
    settings = {"precision": "bf16-true", "lora_r": 0, "train": replace(TRAIN, max_steps=2, eval_interval=2)}
    outcomes = two.run(_keep_weights, (tmp_path / "kept", "lora", llama, data, tmp_path), settings)
    assert [outcome.how for outcome in outcomes] == ["returned"] * 2, outcomes
    validated, written = torch.load(tmp_path / "kept.0"), load_weights(tmp_path / "final")
    assert {name.replace(".linear.", ".") for name in validated} == written.keys()
    for name, weight in validated.items():
        assert torch.equal(written[name.replace(".linear.", ".")], weight), name


def _keep_weights(args: tuple[Any, ...], options: dict[str, Any]) -> None:
    keep_weights(*args, **options)


@pytest.mark.parametrize("begun", ["one file", "shards"])
def test_masters_go_from_one_file_to_shards_and_back(begun, two, llama, data, tmp_path):
    options: dict[str, Any] = {"precision": "bf16-true", "lora_r": 0, "train": TRAIN}
    train("lora", llama, data, tmp_path / "whole", **options)
    if begun == "one file":
        with pytest.raises(UserError, match="stop here"):
            train("lora", llama, data, tmp_path / "run", stop_at=3, **options)
        train_in_two(two, "lora", llama, data, tmp_path / "run", resume=True, **options)
    else:
        two.run(_train, ("lora", llama, data, tmp_path / "run"), {"stop_at": 3, **options})
        train("lora", llama, data, tmp_path / "run", resume=True, **options)
    assert losses(tmp_path / "run") == pytest.approx(losses(tmp_path / "whole"), abs=1e-2)


def test_a_float32_head_beside_sharded_16_bit_weights_is_trained(two, llama, pairs, questions, tmp_path):
    train_args = replace(alignment.TRAIN, max_steps=2, max_seq_length=128, learning_rate=1e-4)
    options: dict[str, Any] = {"precision": "bf16-true", "lora_r": 0, "train": train_args}
    train("reward", llama, pairs, tmp_path / "one", **options)
    train_in_two(two, "reward", llama, pairs, tmp_path / "two", **options)
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), abs=1e-2)
    asked = {"rewards": [WeightedReward(f"{alignment.__name__}.early_letters")], "max_new_tokens": 8, "max_val_rows": 2}
    train_in_two(two, "ppo", llama, questions, tmp_path / "ppo", **options, **asked, frozen_reference=True)
    assert len(losses(tmp_path / "ppo")) == 2


@pytest.mark.parametrize("step", ["dpo", "grpo", "ppo"])
def test_alignment_of_a_sharded_model_follows_one_process(step, two, llama, pairs, questions, tmp_path):
    # small steps: a number that rounds the other way must not sample another token
    train_args = replace(alignment.TRAIN, max_steps=4, max_seq_length=128, learning_rate=1e-3)
    options: dict[str, Any] = {"train": train_args, "max_new_tokens": 8, "max_test_rows": 4}
    if step != "dpo":
        options |= {"rewards": [WeightedReward(f"{alignment.__name__}.early_letters")], "max_val_rows": 2}
    rows = pairs if step == "dpo" else questions
    train(step, llama, rows, tmp_path / "one", **options)
    train_in_two(two, step, llama, rows, tmp_path / "two", **options)
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), abs=1e-4)
    one, both = (json.loads((tmp_path / name / "final" / "metrics.json").read_text()) for name in ("one", "two"))
    assert both["shown"] == one["shown"] and len(one["shown"]) == 3
    values = [{row["name"]: row["value"] for row in found["metrics"]} for found in (one, both)]
    assert values[1] == pytest.approx(values[0], abs=5e-3)
    assert {"chosen_logprob_before", "chosen_logprob", "greedy_right_before", "greedy_right"} <= values[0].keys()
    assert both["warnings"] == one["warnings"]


@pytest.fixture(scope="module")
def whole_run(llama: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One process that was never stopped."""
    out_dir = tmp_path_factory.mktemp("whole")
    train("lora", llama, data, out_dir, train=TRAIN)
    return out_dir


@pytest.fixture(scope="module")
def stopped_run(two: TwoProcesses, llama: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two sharded processes that were stopped before their fifth step."""
    out_dir = tmp_path_factory.mktemp("stopped")
    outcomes = two.run(_train, ("lora", llama, data, out_dir), {"stop_at": 4, "train": TRAIN})
    assert [outcome.text for outcome in outcomes] == ["stop here"] * 2
    return out_dir


@pytest.fixture
def stopped(stopped_run: Path, tmp_path: Path) -> Path:
    return shutil.copytree(stopped_run, tmp_path / "run")


def test_a_checkpoint_is_a_shard_of_each_process_and_their_run(stopped):
    folders = sorted((stopped / "checkpoints").iterdir())
    assert [folder.name for folder in folders] == ["step-00000003.pth", "step-00000004.pth"]
    files = sorted(file.name for file in folders[1].iterdir())
    assert len(files) == 3 and files[0] == "run.json" and all(name.endswith(".safetensors") for name in files[1:])
    run = json.loads((folders[1] / "run.json").read_text())
    assert run["step"] == 4 and run["files"] == {name: (folders[1] / name).stat().st_size for name in files[1:]}


def test_shards_put_together_are_what_one_process_has(stopped, llama, data, tmp_path):
    with pytest.raises(UserError, match="stop here"):
        train("lora", llama, data, tmp_path / "one", stop_at=4, train=TRAIN)
    one = resume.trained_weights(tmp_path / "one" / "checkpoints")
    both = resume.trained_weights(stopped / "checkpoints")
    assert one.keys() == both.keys() and all("lora_" in name for name in one)
    for name, weight in one.items():
        torch.testing.assert_close(both[name], weight, atol=1e-3, rtol=0)
    moments = shards.read_whole(stopped / "checkpoints" / "step-00000004.pth", shards.MOMENTS)
    assert len(moments) == 3 * len(one) and all(float(moments[f"{name}.step"]) == 4 for name in one)


@pytest.mark.parametrize("strategy", ["fsdp", "ddp", None])
def test_any_number_of_processes_goes_on_from_shards(strategy, two, stopped, whole_run, llama, data):
    if strategy is not None:
        train_in_two(two, "lora", llama, data, stopped, train=TRAIN, resume=True, strategy=strategy)
    else:
        train("lora", llama, data, stopped, train=TRAIN, resume=True)
    assert losses(stopped) == pytest.approx(losses(whole_run), abs=1e-4)
    assert (stopped / "final" / "lit_model.pth").is_file() and not (stopped / "checkpoints").exists()


def test_sharded_processes_go_on_from_one_file(two, whole_run, llama, data, tmp_path):
    with pytest.raises(UserError, match="stop here"):
        train("lora", llama, data, tmp_path, stop_at=3, train=TRAIN)
    train_in_two(two, "lora", llama, data, tmp_path, train=TRAIN, resume=True)
    assert losses(tmp_path) == pytest.approx(losses(whole_run), abs=1e-4)


LOSSES = {1: 3.0, 2: 1.0, 3: 2.0, 4: 2.5, 5: 4.0, 6: 0.5, 7: 0.75}


def train_judged(args: tuple[Any, ...], options: dict[str, Any]) -> None:
    """Train with a validation loss that is written down for each step."""
    validate, batches = lora.SFT.validate, lora.SFT.batches

    def counted(self: Any, step: int, rank: int, world_size: int) -> Any:
        self.step = step + 1
        return batches(self, step, rank, world_size)

    def judged(self: Any, model: Any) -> dict[str, float]:
        return {**validate(self, model), "val_loss": LOSSES[self.step]}

    lora.SFT.validate, lora.SFT.batches = judged, counted  # type: ignore[method-assign]
    try:
        train(*args, **options)
    finally:
        lora.SFT.validate, lora.SFT.batches = validate, batches  # type: ignore[method-assign]


@pytest.mark.parametrize("strategy", ["fsdp", pytest.param("ddp", marks=pytest.mark.slow)])
def test_the_best_step_is_kept_and_a_longer_run_goes_on(strategy, two, llama, data, tmp_path):
    """With shards as in one process, stopped in between, and made longer when it had ended."""
    options: dict[str, Any] = {"strategy": strategy, "lora_r": 0}
    train_args = replace(TRAIN, eval_interval=1, save_interval=2, lr_schedule="constant")

    def in_two(out_dir: Path, **more: Any) -> list[Outcome]:
        return two.run(train_judged, ("lora", llama, data, out_dir), {**options, "train": train_args, **more})

    stopped, whole, until_best = (tmp_path / name for name in ("stopped", "whole", "until_best"))
    assert [outcome.text for outcome in in_two(stopped, stop_at=4)] == ["stop here"] * 2
    for out_dir, more in ((stopped, {}), (whole, {}), (until_best, {"train": replace(train_args, max_steps=2)})):
        outcomes = in_two(out_dir, **more)
        assert [outcome.how for outcome in outcomes] == ["returned"] * 2, outcomes
    kept = [load_weights(out_dir / "final") for out_dir in (stopped, whole, until_best)]
    for weights in kept[:2]:
        assert all(torch.equal(weights[name], tensor) for name, tensor in kept[2].items())
    made = json.loads((whole / "final" / "metrics.json").read_text())
    assert (made["steps"], made["kept_step"], made["metrics"][0]["value"]) == (5, 2, 1.0)
    names = sorted(path.name for path in (whole / "checkpoints").iterdir())
    assert names == ["step-00000002.pth", "step-00000005.pth"]

    train_judged(
        ("lora", llama, data, whole), {**options, "strategy": "auto", "train": replace(train_args, max_steps=7)}
    )
    made = json.loads((whole / "final" / "metrics.json").read_text())
    assert (made["steps"], made["kept_step"], made["metrics"][0]["value"]) == (7, 6, 0.5)


def lose(folder: Path) -> None:
    min(folder.glob("*.safetensors")).unlink()


def cut(folder: Path) -> None:
    file = min(folder.glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-100])


def forget(folder: Path) -> None:
    (folder / "run.json").unlink()


def garble(folder: Path) -> None:
    (folder / "run.json").write_text('{"identity": {"a"')


@pytest.mark.parametrize("damage", [lose, cut, forget, garble])
def test_damaged_shards_are_passed_over_for_the_older_ones(damage, stopped, whole_run, llama, data, capfd):
    older, newest = sorted((stopped / "checkpoints").iterdir())
    damage(newest)
    train("lora", llama, data, stopped, train=TRAIN)
    told = "".join(capfd.readouterr())
    assert f"{newest} is damaged and skipped" in told and f"resuming from {older}" in told
    assert losses(stopped) == pytest.approx(losses(whole_run), abs=1e-4)


def test_with_all_shards_damaged_the_cure_is_told_in_both_processes(two, stopped, llama, data):
    for folder in (stopped / "checkpoints").iterdir():
        lose(folder)
    for outcome in two.run(_train, ("lora", llama, data, stopped), {"train": TRAIN}):
        assert outcome.how == "refused", outcome
        assert "No checkpoint in" in outcome.text and "--resume false" in outcome.text


def test_a_gap_that_no_file_tells_of_is_no_silent_loss(stopped, llama, data):
    """A shard that was deleted together with its entry: torch's reader would leave what is in memory as it is."""
    older, newest = sorted((stopped / "checkpoints").iterdir())
    for folder in (older, newest):
        lose(folder)
        run = json.loads((folder / "run.json").read_text())
        run["files"] = {name: size for name, size in run["files"].items() if (folder / name).is_file()}
        (folder / "run.json").write_text(json.dumps(run))
    with pytest.raises(UserError, match=r"is damaged \((no |.* numbers of ).*Delete it"):
        train("lora", llama, data, stopped, train=TRAIN)
    with pytest.raises(ValueError, match=r"^no |numbers of"):
        shards.read_shards(newest, shards.read_whole(older) | {"model.x": torch.zeros(2)})


def test_bytes_that_are_no_tensors_are_told(stopped, llama, data):
    for folder in (stopped / "checkpoints").iterdir():
        for file in folder.glob("*.safetensors"):
            file.write_bytes(b"\0" * file.stat().st_size)
    with pytest.raises(UserError, match="is damaged"):
        train("lora", llama, data, stopped, train=TRAIN)


def test_no_room_for_a_shard_is_told_and_nothing_half_written_stays(two, llama, data, tmp_path):
    for outcome in two.run(train_on_a_full_disk, llama, data, tmp_path):
        assert outcome.how == "refused" and "Could not write" in outcome.text, outcome
    assert list((tmp_path / "checkpoints").iterdir()) == []


def test_shards_that_are_elsewhere_are_missed_when_they_are_written(tmp_path, monkeypatch):
    """The first process sees no file of another machine's where the folder is not shared."""
    fabric = L.Fabric(accelerator="cpu", devices=1)
    model = torch.nn.Linear(3, 2)
    tensors = shards.tensors_of(dict(model.named_parameters()), torch.optim.AdamW(model.parameters()))
    monkeypatch.setattr(shards.dcp, "save", lambda *_, **__: (tmp_path / "part").mkdir())
    with pytest.raises(UserError, match=r"shards of other machines.*no model\.weight.*all machines share"):
        shards.write_shards(tmp_path / "part", tensors, {}, is_first=fabric.is_global_zero)
