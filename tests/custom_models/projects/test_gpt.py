"""Training a GPT: a stopped run ends as one never stopped, two processes as one; it learns, and writes on."""

import csv
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import yaml

from bench.gpt import read_recipe
from custom_models.generation import Generated
from custom_models.gpt import GPT, GPTConfig, modern
from custom_models.gpt_checkpoint import load_gpt
from custom_models.muon import Together
from custom_models.projects import gpt
from custom_models.projects.gpt_training import GPTFit, GPTTask
from tests.conftest import ROOT
from workflows.errors import UserError
from workflows.status import status_of

SENTENCES = [f"the {a} {b} is {c}.\n" for a in ("red", "blue", "cold") for b in ("sun", "sea") for c in ("up", "low")]
MODEL = modern(vocab_size=270, context=16, width=32, n_layer=2, n_head=2)
FIT = GPTFit(max_steps=12, batch_size=4, warmup_steps=2, eval_interval=4, save_interval=5, log_interval=1)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    (tmp_path / "text.txt").write_text("".join(SENTENCES) * 20)
    return tmp_path / "text.txt"


def train(text: Path, out_dir: Path, **changes: Any) -> dict[str, torch.Tensor]:
    """Train, and give the weights."""
    settings = {"tokenizer": "characters", "model": MODEL, "fit": FIT, **changes}
    gpt.setup(str(text), tokens_dir=text.parent / "tokens", out_dir=out_dir, **settings)
    return safetensors.torch.load_file(out_dir / "final" / "model.safetensors")


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def logged(out_dir: Path, column: str) -> dict[int, str]:
    """A column of the logs by step, those of all parts of a run."""
    files = sorted(out_dir.glob("logs/from-step-*/metrics.csv"))
    rows = [row for file in files for row in csv.DictReader(file.read_text().splitlines())]
    return {int(row["step"]): row[column] for row in rows if row.get(column)}


@pytest.mark.long
@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_stopped_run_ends_as_one_that_was_never_stopped(text, tmp_path, monkeypatch, optimizer, accumulate):
    fit = replace(FIT, optimizer=optimizer, accumulate=accumulate)
    model = replace(MODEL, dropout=0.1 if accumulate == 1 else 0.0)
    whole = train(text, tmp_path / "whole", fit=fit, model=model)

    with monkeypatch.context() as patched:
        step = GPTTask.training_step

        def dies(self: GPTTask, batch: Any, batch_idx: int) -> Any:
            if self.global_step == 7:
                raise RuntimeError("the machine went down")
            return step(self, batch, batch_idx)

        patched.setattr(GPTTask, "training_step", dies)
        with pytest.raises(RuntimeError, match="went down"):
            train(text, tmp_path / "stopped", fit=fit, model=model)
    assert [file.name for file in (tmp_path / "stopped" / "checkpoints").iterdir()] == ["step-5.ckpt"]
    assert same(train(text, tmp_path / "stopped", fit=fit, model=model), whole)
    for column in ("val_loss", "train_loss", "rate"):
        assert logged(tmp_path / "stopped", column) == logged(tmp_path / "whole", column)
    assert list(logged(tmp_path / "whole", "val_loss")) == [3, 7, 11, 12]  # every fourth step, and at the end
    assert len(logged(tmp_path / "whole", "train_loss")) == 12
    assert not list((tmp_path / "stopped" / "checkpoints").iterdir())


@pytest.mark.long
@pytest.mark.parametrize("step", [2, 6, 11])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_ctrl_c_loses_no_step(text, tmp_path, monkeypatch, step, accumulate):
    fit = replace(FIT, accumulate=accumulate)
    whole = train(text, tmp_path / "whole", fit=fit)
    train_step, out_dir = GPTTask.training_step, tmp_path / "stopped"

    def pressed(self: GPTTask, batch: Any, batch_idx: int) -> Any:
        if batch_idx == step * accumulate:
            os.kill(os.getpid(), signal.SIGINT)
        return train_step(self, batch, batch_idx)

    with monkeypatch.context() as patched:
        patched.setattr(GPTTask, "training_step", pressed)
        try:
            with pytest.raises(KeyboardInterrupt):
                train(text, out_dir, fit=fit)
        finally:
            signal.signal(signal.SIGINT, signal.default_int_handler)  # Lightning ignores further ones
    status = status_of(out_dir, tmp_path)
    assert status.total == 12 and status.loss is not None
    assert max(map(gpt.step_of, (out_dir / "checkpoints").iterdir())) == step + 1
    assert same(train(text, out_dir, fit=fit), whole)
    assert status_of(out_dir, tmp_path).state == "finished" and not list((out_dir / "checkpoints").iterdir())


@pytest.mark.long
def test_two_processes_are_one(text, tmp_path):
    # By AdamW: Muon rounds directions to bfloat16, so a sum in another order shows. Twelve steps of such a model on the
    # mean of two half batches' gradients differ from those on the whole by 0.06; with float32 there, by 2e-6.
    fit = replace(FIT, optimizer="adamw")
    whole = train(text, tmp_path / "one", fit=fit)
    config = {"model": vars(MODEL), "fit": vars(fit)}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(config))
    command = [sys.executable, "-m", "custom_models", "gpt", "--config", str(tmp_path / "recipe.yaml"),
               "--text", str(text), "--tokenizer", "characters", "--tokens_dir", str(tmp_path / "other"),
               "--out_dir", str(tmp_path / "two"), "--accelerator", "cpu", "--devices", "2"]  # fmt: skip
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300)
    assert result.returncode == 0, result.stderr[-3000:]
    found = safetensors.torch.load_file(tmp_path / "two" / "final" / "model.safetensors")
    for name in whole:
        torch.testing.assert_close(found[name], whole[name], atol=1e-4, rtol=0)
    one, two = (json.loads((tmp_path / run / "metrics.json").read_text())["metrics"] for run in ("one", "two"))
    assert one[0]["value"] == pytest.approx(two[0]["value"], abs=1e-4) and one[0]["n"] == two[0]["n"]
    assert result.stdout.count("in the vocabulary") == 1  # one process speaks


@pytest.mark.long
@pytest.mark.parametrize("tokenizer", ["characters", "bpe"])
def test_it_learns_and_writes_on(text, tmp_path, capsys, tokenizer):
    train(text, tmp_path, tokenizer=tokenizer, fit=replace(FIT, max_steps=120, eval_interval=60, save_interval=200))
    found = json.loads((tmp_path / "metrics.json").read_text())
    rows = {row["name"]: row for row in found["metrics"]}
    count = len("".join(SENTENCES)) * 2  # the last tenth of 20 times
    assert rows["bits_per_character"]["value"] < 1 and rows["bits_per_character"]["n"] == count
    bits = rows["val_loss"]["value"] / math.log(2) * rows["val_loss"]["n"] / count
    assert rows["bits_per_character"]["value"] == pytest.approx(bits)
    assert found["tokens_per_second"] > 0 and found["parameters"] == sum(
        p.numel() for p in load_gpt(tmp_path / "final")[0].parameters()
    )
    assert (tmp_path / "logs" / "tensorboard").is_dir() and "bits a character" in capsys.readouterr().out

    asked = {"checkpoint_dir": str(tmp_path / "final"), "prompt": "the red", "max_new_tokens": 9, "seed": 1}
    said = []
    for use_cache in (True, False):
        gpt.sample(**asked, use_cache=use_cache)
        said.append(capsys.readouterr().out)
    assert said[0].split("\n\n")[0] == said[1].split("\n\n")[0]
    assert said[0].startswith("the red s") and "9 tokens, " in said[0] and "tokens/s with the KV cache" in said[0]
    assert "tokens/s without the KV cache" in said[1]
    gpt.sample(str(tmp_path / "final"), max_new_tokens=4, temperature=0.0)  # without a prompt a text begins
    assert capsys.readouterr().out.startswith("the" if tokenizer == "characters" else "")
    gpt.sample(str(tmp_path / "final"), "the red", seed=1)  # as far as the model can read
    length = 16 - len(load_gpt(tmp_path / "final")[1].encode("the red"))
    assert int(re.search(r"(\d+) tokens, ", capsys.readouterr().out)[1]) <= length
    with pytest.raises(UserError, match=r"and 1 new ones are more than the 16 .* Shorten the prompt"):
        gpt.sample(str(tmp_path / "final"), "the red sun is up" * 9)
    with pytest.raises(UserError, match="more than the 16"):
        gpt.sample(**{**asked, "max_new_tokens": 17})
    if tokenizer == "characters":
        with pytest.raises(UserError, match="no 'X'"):
            gpt.sample(**{**asked, "prompt": "X"})


def test_a_text_ends_where_the_model_ends_it(tmp_path, monkeypatch):
    from custom_models.tokenization.bpe import SpecialBPE

    tokenizer = SpecialBPE(["<|endoftext|>"])
    asked: dict[str, Any] = {}

    def generate(model: GPT, prompts: torch.Tensor, *args: Any, **settings: Any) -> Generated:
        asked.update(settings, prompts=prompts.tolist())
        return Generated([[97, 98, 256]], 1.0)

    monkeypatch.setattr(gpt, "generate", generate)
    wrote, made = gpt.write(GPT(replace(MODEL, vocab_size=257)), tokenizer, "", 5)
    assert wrote == "ab" and made.ids == [[97, 98, 256]] and asked == {"prompts": [[256]], "stop_ids": [256]}


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("linear", [1 / 3, 2 / 3, 1, 0.875, 0.5, 0.125]),
        ("cosine", [1 / 3, 2 / 3, 1, 0.96, 0.5, 0.04]),
        ("constant", [1 / 3, 2 / 3, 1, 1, 1, 1]),
        ("trapezoidal", [1 / 3, 2 / 3, 1, 1, 1, 0.25]),
    ],
)
def test_rates_follow_their_equations(schedule, expected):
    fit = GPTFit(max_steps=10, warmup_steps=2, schedule=schedule, decay=0.4)
    assert [fit.share_of_rate(step) for step in (0, 1, 2, 3, 6, 9)] == pytest.approx(expected, abs=0.01)
    floor = replace(fit, least=0.1)
    assert floor.share_of_rate(10) == pytest.approx(1.0 if schedule == "constant" else 0.1)
    assert floor.share_of_rate(2) == 1.0
    short = replace(fit, warmup_steps=6, decay=0.8)  # which falls before it has risen
    rates = [short.share_of_rate(step) for step in range(11)]
    assert schedule != "trapezoidal" or all(abs(one - other) < 0.3 for one, other in pairwise(rates))


def test_muon_steps_matrices_and_adamw_the_rest():
    model = GPT(MODEL)
    optimizer = GPTFit(weight_decay=0.1).make_optimizer(model)
    assert isinstance(optimizer, Together) and [len(g["params"]) for g in optimizer.param_groups] == [12, 2, 9]
    assert [g["weight_decay"] for g in optimizer.param_groups] == [0.1, 0.1, 0.0]
    alone = GPTFit(optimizer="adamw").make_optimizer(model)
    assert [len(g["params"]) for g in alone.param_groups] == [14, 9]


@pytest.mark.long
def test_another_configuration_is_not_gone_on_with(text, tmp_path, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr(gpt, "save_gpt", lambda *_: (_ for _ in ()).throw(RuntimeError("stopped")))
        with pytest.raises(RuntimeError, match="stopped"):
            train(text, tmp_path)
    checkpoint = tmp_path / "checkpoints" / "step-12.ckpt"  # the end: what came after it may have been long
    assert {file.name for file in checkpoint.parent.iterdir()} == {"step-10.ckpt", checkpoint.name}
    with pytest.raises(
        UserError, match=r"step-12\.ckpt is of a run with other settings: model\.width was 32, and is 48"
    ):
        train(text, tmp_path, model=replace(MODEL, width=48))
    with pytest.raises(UserError, match=r"fit\.max_steps was 12, and is 20 now; seed was 1337, and is 2 now"):
        train(text, tmp_path, fit=replace(FIT, max_steps=20), seed=2)
    (tmp_path / "other.txt").write_text("".join(SENTENCES) * 21)
    with pytest.raises(UserError, match="text or tokenizer were others"):
        train(tmp_path / "other.txt", tmp_path)
    whole = checkpoint.read_bytes()
    checkpoint.write_bytes(whole[:1000])
    with pytest.raises(UserError, match=r"is damaged .* begin anew: --resume false"):
        train(text, tmp_path)
    train(text, tmp_path, resume=False, fit=replace(FIT, max_steps=2))
    with pytest.raises(UserError, match="holds no checkpoint to go on from"):
        train(text, tmp_path / "nowhere", resume=True)


def test_compiling_is_a_flag(monkeypatch):
    compiled: list[GPT] = []
    monkeypatch.setattr(GPT, "compile", lambda self: compiled.append(self))
    model = GPT(MODEL)
    GPTTask(model, FIT, {})
    assert not compiled
    GPTTask(model, replace(FIT, compile=True), {})
    assert compiled == [model]


@pytest.mark.slow
def test_a_compiled_run_learns_the_same(text, tmp_path):
    plain = train(text, tmp_path / "plain")
    compiled = train(text, tmp_path / "compiled", fit=replace(FIT, compile=True))
    for name in plain:
        torch.testing.assert_close(compiled[name], plain[name], atol=1e-3, rtol=0)


def test_without_tensorboard_it_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpt, "find_spec", lambda name: None)
    trainer = gpt.make_trainer(FIT, tmp_path, 0, gpt.Stopwatch(), "cpu")
    assert len(trainer.loggers) == 1
    assert "TensorBoard is not installed, so there is logs/*/metrics.csv only" in capsys.readouterr().out


def test_settings_that_cannot_be_are_told(text, tmp_path):
    fit = GPTFit(max_steps=0, batch_size=5, accumulate=2, matrix_rate=0, momentum=1.0, decay=2, weight_decay=-1)
    with pytest.raises(UserError, match="7 problems") as caught:
        gpt.setup(str(text), fit=fit, out_dir=tmp_path)
    for words in ("max_steps must be at least 1", "batch_size 5 cannot be cut into 2", "warmup_steps must be from 0"):
        assert words in str(caught.value)
    with pytest.raises(UserError, match=r"--fit\.batch_size / accumulate 1 is fewer samples than the 2 processes"):
        gpt.setup(str(text), fit=replace(FIT, batch_size=1), devices=2, out_dir=tmp_path)


@pytest.mark.parametrize("file", sorted((ROOT / "custom_models" / "recipes").glob("gpt*.yaml")), ids=lambda f: f.stem)
def test_recipes_are_read(file):
    recipe = yaml.safe_load(file.read_text())
    config = GPTConfig(**{"vocab_size": 65, **recipe["model"]})
    assert not GPTFit(**(recipe.get("fit") or recipe["pretrain"])).problems()
    assert not torch.isnan(GPT(replace(config, n_layer=1))(torch.zeros(1, 4, dtype=torch.long))).any()


def test_the_bench_reads_the_small_recipe():
    config, fit = read_recipe()
    recipe = yaml.safe_load((ROOT / "custom_models" / "recipes" / "gpt-shakespeare-small.yaml").read_text())
    assert config.width == recipe["model"]["width"] and fit.max_steps == recipe["fit"]["max_steps"]


@pytest.mark.parametrize("when", ["in training", "in the last step"])
def test_a_training_that_diverges_leaves_what_was_there(text, tmp_path, monkeypatch, when):
    train(text, tmp_path, fit=replace(FIT, max_steps=2))
    before = {file: file.read_bytes() for file in (tmp_path / "final").iterdir()}
    if when == "in training":
        with pytest.raises(UserError, match=r"not finite at step \d+: the training diverged\. Lower the learning rate"):
            train(text, tmp_path, fit=replace(FIT, learning_rate=1e30, matrix_rate=1e30))
    else:
        step = GPTTask.on_validation_epoch_end

        def ruined(self: GPTTask) -> None:
            self.validated += math.nan
            step(self)

        monkeypatch.setattr(GPTTask, "on_validation_epoch_end", ruined)
        with pytest.raises(UserError, match="validation loss is not finite"):
            train(text, tmp_path, fit=FIT, resume=False)
    assert {file: file.read_bytes() for file in (tmp_path / "final").iterdir()} == before


def test_the_speed_is_that_of_training_alone(text, tmp_path, monkeypatch):
    validation = GPTTask.validation_step
    seconds: list[float] = []

    def slow(self: GPTTask, *batch: Any) -> None:
        time.sleep(0.2)
        validation(self, *batch)

    monkeypatch.setattr(GPTTask, "validation_step", slow)
    monkeypatch.setattr(gpt.Stopwatch, "on_train_end", lambda self, *_: (self._stop(), seconds.append(self.seconds)))
    began = time.perf_counter()
    train(text, tmp_path, fit=replace(FIT, eval_interval=2))
    whole = time.perf_counter() - began
    assert 0 < seconds[0] < whole - 6 * 0.2
    speed = json.loads((tmp_path / "metrics.json").read_text())["tokens_per_second"]
    assert speed == pytest.approx(12 * 4 * 16 / seconds[0])
