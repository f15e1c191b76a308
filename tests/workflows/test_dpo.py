"""The DPO step on a tiny model: TRL's losses, a reference that is kept, every loss learns, bad data is counted."""

import csv
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.workflows.peft_twin import peft_twin
from workflows import dpo
from workflows.chat_template import ChatTemplate
from workflows.checkpoint import check_checkpoint_dir
from workflows.errors import UserError
from workflows.training import reference
from workflows.training.answers import encode_answers
from workflows.training.batch import Tree, pack_row
from workflows.training.loop import TrainArgs, fit, step_indices
from workflows.training.model import LoRAArgs, adapters_off, load_model
from workflows.training.pairs import DPO, PairSettings
from workflows.training.processes import make_fabric

WORDS = ["fever", "cough", "pain", "rash", "chill", "ache", "sweat", "spasm"]
TRAIN = TrainArgs(
    max_steps=6,
    global_batch_size=4,
    row_tokens=256,
    max_seq_length=256,
    lr_warmup_steps=0,
    lr_schedule="constant",
    learning_rate=1e-2,
    eval_interval=3,
    save_interval=2,
)
LORA = LoRAArgs(r=4, alpha=8)


def pair(number: int) -> dict[str, Any]:
    word = WORDS[number % 8]
    return {
        "prompt": [{"role": "user", "content": f"What is {word} number {number}?"}],
        "chosen": [{"role": "assistant", "content": f"It is {word}, a finding."}],
        "rejected": [{"role": "assistant", "content": f"It is {WORDS[(number + 3) % 8]} or so {number % 5}."}],
    }


def labelled(number: int) -> dict[str, Any]:
    row = pair(number)
    side = "rejected" if number % 3 == 0 else "chosen"
    return {"prompt": row["prompt"], "completion": row[side], "label": side == "chosen"}


def write(directory: Path, train: list[dict[str, Any]], validation: list[dict[str, Any]]) -> Path:
    directory.mkdir()
    for split, rows in (("train", train), ("validation", validation)):
        (directory / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (directory / "manifest.json").write_text("{}")
    return directory


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(
        tmp_path_factory.mktemp("data") / "pairs", [pair(n) for n in range(20)], [pair(n) for n in range(50, 56)]
    )


def align(checkpoint: Path, data: Path, out_dir: Path, **changes: Any) -> list[dict[str, float]]:
    """Run the step; returns the rows of its log."""
    settings = {"precision": "32-true", "train": TRAIN, "lora_r": 4, **changes}
    dpo.setup(checkpoint_dir=checkpoint, data=data, out_dir=out_dir, **settings)
    rows = csv.DictReader((out_dir / "metrics.csv").read_text().splitlines())
    return [{name: float(value) for name, value in row.items() if value} for row in rows]


def test_it_begins_at_log_two_and_learns(tiny_llama, data, tmp_path):
    log = align(tiny_llama, data, tmp_path)
    assert log[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert log[0]["margin"] == pytest.approx(0, abs=1e-5) and log[0]["kl"] == pytest.approx(0, abs=1e-5)
    assert log[-1]["loss"] < 0.6 and log[-1]["margin"] > 0.1 and log[-1]["accuracy"] > 0.9 and log[-1]["kl"] > 0
    assert {"rewards_chosen", "rewards_rejected", "logprobs_chosen", "logprobs_rejected", "grad_norm"} <= set(log[0])
    assert log[-1]["val_loss"] < math.log(2)
    assert check_checkpoint_dir(tmp_path / "final") == tmp_path / "final"
    metrics = json.loads((tmp_path / "final" / "metrics.json").read_text())
    assert {row["name"] for row in metrics["metrics"]} == {
        "val_loss", "val_margin", "val_accuracy", "val_logprob_accuracy",
    }  # fmt: skip


def test_the_reference_is_read_back_and_that_of_another_model_is_not(tiny_llama, data, tmp_path, capsys, monkeypatch):
    align(tiny_llama, data, tmp_path)
    file = tmp_path / "reference.safetensors"
    written = file.stat().st_mtime_ns
    computed: list[int] = []
    pack = reference.pack
    monkeypatch.setattr(reference, "pack", lambda *args: computed.append(1) or pack(*args))
    log = align(tiny_llama, data, tmp_path, resume=False)
    assert not computed and file.stat().st_mtime_ns == written
    assert log[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)

    again = align(tmp_path / "final", data, tmp_path / "second", train=replace(TRAIN, max_steps=1))
    (tmp_path / "second" / "reference.safetensors").replace(file)  # of the tuned model
    log = align(tiny_llama, data, tmp_path, resume=False)
    assert "is of another model or other data" in capsys.readouterr().out
    assert log[0]["loss"] == again[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)


@pytest.mark.parametrize(
    "changes",
    [
        {"loss": "sigmoid", "label_smoothing": 0.1},
        {"loss": "robust", "label_smoothing": 0.1},
        {"loss": "ipo", "per_token": True},
        {"loss": "hinge"},
        {"loss": "simpo", "beta": 2.0},
        {"loss": "orpo"},
        {"loss": "sigmoid", "sft_weight": 0.5},
        {"loss": "sigmoid", "lora_r": 0, "train": replace(TRAIN, learning_rate=1e-3)},
    ],
    ids=lambda changes: "-".join(map(str, changes.values()))[:30],
)
def test_every_loss_teaches_the_chosen_answers(tiny_llama, data, tmp_path, changes):
    log = align(tiny_llama, data, tmp_path, **changes)
    assert log[-1]["loss"] < log[0]["loss"] and log[-1]["margin"] > log[0]["margin"]
    assert log[-1]["accuracy"] > 0.8
    assert (tmp_path / "reference.safetensors").is_file() == (changes["loss"] not in ("simpo", "orpo"))


@pytest.mark.parametrize("make", [pair, labelled])
def test_kto_learns_from_pairs_and_from_labels(tiny_llama, tmp_path, make):
    data = write(tmp_path / "data", [make(n) for n in range(20)], [make(n) for n in range(50, 56)])
    log = align(tiny_llama, data, tmp_path / "out", loss="kto", train=replace(TRAIN, max_steps=10))
    assert log[0]["loss"] == pytest.approx(0.5, abs=1e-5)  # no answer differs from the reference yet
    assert log[-1]["loss"] < 0.49 and log[-1]["signed_reward"] > 0.01
    assert log[-1]["val_loss"] < 0.45


def test_losses_of_five_steps_are_trls(tiny_llama, tiny_llama_hf, data, tmp_path):
    import datasets
    from torch.utils.data import SequentialSampler
    from transformers import AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    steps, seed = 5, 3
    rows = [json.loads(line) for line in (data / "train.jsonl").read_text().splitlines()]
    answers, _ = encode_answers(rows, ChatTemplate.from_checkpoint(tiny_llama), 256, "train")
    pairs = [answer.tree for answer in answers]
    torch.manual_seed(5)
    model = load_model(tiny_llama, LORA)
    adapters = {name: p.detach().clone() for name, p in model.named_parameters() if "lora_A" in name}
    train = replace(TRAIN, max_steps=steps, max_norm=None)
    objective = DPO(pairs, pairs[:2], train, seed, PairSettings(), {})
    ours = fit(make_fabric(), model, objective, train, tmp_path / "ours", seed=seed, identity={}).losses

    in_order = [pairs[i] for step in range(steps) for i in step_indices(step, len(pairs), 4, seed)]

    class InOrder(DPOTrainer):
        def _get_train_sampler(self, *_: Any) -> Any:
            return SequentialSampler(self.train_dataset)

        def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
            return dataset  # tokenized already

    config = DPOConfig(
        output_dir=str(tmp_path / "trl"), max_steps=steps, per_device_train_batch_size=4, learning_rate=1e-2,
        lr_scheduler_type="constant", weight_decay=0.0, max_grad_norm=0.0, logging_steps=1, report_to=[],
        save_strategy="no", use_cpu=True, bf16=False, gradient_checkpointing=False, max_length=256, disable_tqdm=True,
        beta=0.1,
    )  # fmt: skip
    ids = [
        {"prompt_ids": tree.prompt, "chosen_ids": tree.completions[0], "rejected_ids": tree.completions[1]}
        for tree in in_order
    ]
    trainer = InOrder(
        model=peft_twin(tiny_llama_hf, adapters, LORA), args=config, train_dataset=datasets.Dataset.from_list(ids),
        processing_class=AutoTokenizer.from_pretrained(tiny_llama_hf),
    )  # fmt: skip
    trainer.train()
    theirs = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(theirs) == steps and theirs[0] - theirs[-1] > 0.05
    assert ours == pytest.approx(theirs, abs=1e-3)


def test_with_adapters_off_a_model_is_its_base(tiny_llama):
    model = load_model(tiny_llama, LORA)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    row = pack_row([Tree([5, 6, 7], [[8, 9]])])
    base = load_model(tiny_llama)(row)
    with adapters_off(model):
        torch.testing.assert_close(model(row), base)
    assert not torch.allclose(model(row), base, atol=1e-3)


def test_a_stopped_run_goes_on_to_the_same_end(tiny_llama, data, tmp_path, monkeypatch):
    align(tiny_llama, data, tmp_path / "whole")
    original = DPO.batches

    def stopping(self: DPO, step: int, rank: int, world_size: int) -> Any:
        if step == 3:
            raise KeyboardInterrupt
        return original(self, step, rank, world_size)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(DPO, "batches", stopping)
        align(tiny_llama, data, tmp_path / "stopped")
    align(tiny_llama, data, tmp_path / "stopped")
    files = [tmp_path / run / "final" / "lit_model.pth.lora" for run in ("whole", "stopped")]
    whole, stopped = (torch.load(file, weights_only=True)["model"] for file in files)
    assert all(torch.equal(whole[name], stopped[name]) for name in whole)


def test_what_cannot_be_learned_from_is_counted(tiny_llama):
    template = ChatTemplate.from_checkpoint(tiny_llama)
    rows = [pair(1), {**pair(2), "rejected": pair(2)["chosen"]}, pair(3)]
    rows[2]["prompt"] = [{"role": "user", "content": "word " * 300}]
    cut = pair(4)
    cut["chosen"] = [{"role": "assistant", "content": "It is so. " + "pain " * 300}]
    both = pair(5)
    same = "fever " * 300
    both["chosen"], both["rejected"] = ([{"role": "assistant", "content": same + end}] for end in ("a", "b"))
    answers, told = encode_answers([*rows, cut, both], template, 200, "rows")
    assert len(answers) == 2 and "2 of 5 rows; 1 answers truncated" in told
    assert "2 dropped: chosen and rejected answer are the same" in told
    assert "1 dropped: the prompt alone fills 200 tokens" in told
    with pytest.raises(UserError, match="No row is left"):
        encode_answers([rows[1]], template, 200, "rows")


def test_all_problems_are_told_at_once(tiny_llama, data, tmp_path):
    with pytest.raises(UserError, match="4 problems") as e:
        align(tiny_llama, data, tmp_path, beta=0.0, label_smoothing=0.5, sft_weight=-1.0, max_val_rows=0)
    for option in ("--beta", "--label_smoothing", "--sft_weight", "--max_val_rows"):
        assert option in str(e.value)
    assert not (tmp_path / "final").exists()


def test_rows_without_preferences_are_refused(tiny_llama, tmp_path):
    chats = [{"messages": [*pair(n)["prompt"], *pair(n)["chosen"]]} for n in range(4)]
    data = write(tmp_path / "data", chats, chats)
    with pytest.raises(UserError, match=r"train.jsonl, line 1: has no \"prompt\""):
        align(tiny_llama, data, tmp_path / "out")
