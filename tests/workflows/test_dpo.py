"""The DPO step on a tiny model: TRL's losses, a reference that is kept, every loss learns, bad data is counted."""

import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from tests.workflows.alignment import TRAIN, log_of, on_test_split, pair, write
from tests.workflows.peft_twin import peft_twin
from workflows import dpo
from workflows.chat_template import ChatTemplate
from workflows.checkpoint import check_checkpoint_dir
from workflows.errors import UserError
from workflows.training import reference
from workflows.training.answers import Labelled, encode_answers
from workflows.training.batch import Tree, pack_row
from workflows.training.loop import fit, step_indices
from workflows.training.model import LoRAArgs, adapters_off, load_model
from workflows.training.pairs import DPO, PairSettings
from workflows.training.processes import make_fabric
from workflows.training.unpaired import KTO, KTOSettings, add_mismatched_completions, label_balance

pytestmark = pytest.mark.long

LORA = LoRAArgs(r=4, alpha=8)


def labelled(number: int) -> dict[str, Any]:
    row = pair(number)
    side = "rejected" if number % 3 == 0 else "chosen"
    return {"prompt": row["prompt"], "completion": row[side], "label": side == "chosen"}


def align(checkpoint: Path, data: Path, out_dir: Path, **changes: Any) -> list[dict[str, float]]:
    """Run the step; returns the rows of its log."""
    settings = {"precision": "32-true", "train": TRAIN, "lora_r": 4, **changes}
    dpo.setup(checkpoint_dir=checkpoint, data=data, out_dir=out_dir, **settings)
    return log_of(out_dir)


def test_it_begins_at_log_two_and_learns(tiny_llama, pairs, tmp_path):
    log = align(tiny_llama, pairs, tmp_path)
    assert log[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert log[0]["margin"] == pytest.approx(0, abs=1e-5) and log[0]["kl"] == pytest.approx(0, abs=1e-5)
    assert log[-1]["loss"] < 0.6 and log[-1]["margin"] > 0.1 and log[-1]["accuracy"] > 0.9 and log[-1]["kl"] > 0
    assert {"rewards_chosen", "rewards_rejected", "logprobs_chosen", "logprobs_rejected", "grad_norm"} <= set(log[0])
    assert log[-1]["val_loss"] < math.log(2)
    assert check_checkpoint_dir(tmp_path / "final") == tmp_path / "final"
    metrics = json.loads((tmp_path / "final" / "metrics.json").read_text())
    assert {row["name"] for row in metrics["metrics"] if row["split"] == "validation"} == {
        "val_loss", "val_margin", "val_accuracy", "val_logprob_accuracy",
    }  # fmt: skip
    test = on_test_split(tmp_path)
    assert test["pair_accuracy"]["n"] == 8 and test["pair_accuracy"]["value"] > 0.9 and test["kl"]["value"] > 0
    assert test["logprob_accuracy"]["value"] == test["logprob_accuracy_before"]["value"] == 1
    shown = metrics["shown"]
    assert [answer["question"] for answer in shown] == [pair(n)["prompt"][0]["content"] for n in (60, 61, 62)]
    assert any(answer["before"] != answer["after"] for answer in shown)
    assert shown[0]["wanted"] == pair(60)["chosen"][0]["content"]


def test_the_reference_is_read_back_and_that_of_another_model_is_not(tiny_llama, pairs, tmp_path, capsys, monkeypatch):
    align(tiny_llama, pairs, tmp_path)
    file = tmp_path / "reference.safetensors"
    written = file.stat().st_mtime_ns
    computed: list[int] = []
    pack = reference.pack
    monkeypatch.setattr(reference, "pack", lambda *args: computed.append(1) or pack(*args))
    log = align(tiny_llama, pairs, tmp_path, resume=False)
    assert not computed and file.stat().st_mtime_ns == written
    assert log[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)

    again = align(tmp_path / "final", pairs, tmp_path / "second", train=replace(TRAIN, max_steps=1))
    (tmp_path / "second" / "reference.safetensors").replace(file)  # of the tuned model
    log = align(tiny_llama, pairs, tmp_path, resume=False)
    assert "belongs to another model or other data" in capsys.readouterr().out
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
def test_every_loss_teaches_the_chosen_answers(tiny_llama, pairs, tmp_path, changes):
    log = align(tiny_llama, pairs, tmp_path, **changes)
    assert log[-1]["loss"] < log[0]["loss"] and log[-1]["margin"] > log[0]["margin"]
    assert log[-1]["accuracy"] > 0.8
    kept = safetensors.torch.load_file(tmp_path / "reference.safetensors")["logprobs"]  # some only for the test
    assert (len(kept) < 400) == (changes["loss"] in ("simpo", "orpo"))


@pytest.mark.parametrize("make", [pair, labelled])
def test_kto_learns_from_pairs_and_from_labels(tiny_llama, tmp_path, make):
    splits = {"train": range(20), "validation": range(50, 56), "test": range(60, 66)}
    data = write(tmp_path / "data", **{split: [make(n) for n in numbers] for split, numbers in splits.items()})
    log = align(tiny_llama, data, tmp_path / "out", loss="kto", train=replace(TRAIN, max_steps=10))
    assert log[0]["loss"] == pytest.approx(0.5, abs=1e-5)  # no answer differs from the reference yet
    assert log[-1]["loss"] < 0.49 and log[-1]["signed_reward"] > 0.01
    assert log[-1]["val_loss"] < 0.45
    test = on_test_split(tmp_path / "out")
    assert test["signed_reward"]["value"] > 0.01 and test["kl"]["value"] > 0
    assert test["accuracy"]["n"] == (12 if make is pair else 6)
    assert json.loads((tmp_path / "out" / "final" / "metrics.json").read_text())["shown"][0]["before"]


def test_losses_of_five_steps_are_trls(tiny_llama, tiny_llama_hf, pairs, tmp_path):
    import datasets
    from torch.utils.data import SequentialSampler
    from transformers import AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    steps, seed = 5, 3
    rows = [json.loads(line) for line in (pairs / "train.jsonl").read_text().splitlines()]
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


@pytest.mark.parametrize(("loss", "objective"), [("sigmoid", DPO), ("kto", KTO)])
def test_a_stopped_run_goes_on_to_the_same_end(tiny_llama, pairs, tmp_path, monkeypatch, loss, objective):
    align(tiny_llama, pairs, tmp_path / "whole", loss=loss)
    original = objective.batches

    def stopping(self: Any, step: int, rank: int, world_size: int) -> Any:
        if step == 3:
            raise KeyboardInterrupt
        return original(self, step, rank, world_size)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(objective, "batches", stopping)
        align(tiny_llama, pairs, tmp_path / "stopped", loss=loss)
    align(tiny_llama, pairs, tmp_path / "stopped", loss=loss)
    files = [tmp_path / run / "final" / "lit_model.pth.lora" for run in ("whole", "stopped")]
    whole, stopped = (torch.load(file, weights_only=True)["model"] for file in files)
    assert all(torch.equal(whole[name], stopped[name]) for name in whole)


def test_ktos_baseline_is_one_number_a_step_however_its_answers_fall_into_rows(tiny_llama, tmp_path):
    good = [{"prompt": pair(n)["prompt"], "completion": pair(n)["chosen"], "label": n % 5 > 0} for n in range(16)]
    data = write(tmp_path / "data", train=good, validation=good[:4])  # most answers get likelier, so the KL is above 0
    logs = [
        align(tiny_llama, data, tmp_path / str(room), loss="kto", train=replace(TRAIN, row_tokens=room))
        for room in (64, 1024)
    ]
    assert any(row["kl_mismatched"] > 0 for row in logs[0])
    for small, large in zip(*logs, strict=True):
        assert small["loss"] == pytest.approx(large["loss"], abs=1e-4)
        assert small["kl_mismatched"] == pytest.approx(large["kl_mismatched"], abs=1e-3)


def answers_of(*rows: tuple[int, list[int], bool]) -> list[Labelled]:
    """Labelled answers: each a prompt's number, the answer's ids and its label."""
    return [Labelled(Tree([1, prompt], [ids]), [label], {}) for prompt, ids, label in rows]


@pytest.mark.parametrize(
    "prompts",
    [[1, 1, 2, 2], [1, 2, 1, 2, 3], [1, 1, 1, 2, 2, 3], [1, 2, 3], [1, 2], [5, 4, 5, 3, 5, 4, 3, 2, 5], [1, 1, 2]],
    ids=str,
)
def test_a_mismatched_completion_is_another_prompts_and_all_answers_are_taken_alike(prompts):
    answers = answers_of(*((prompt, [10 * prompt, i], i % 2 == 0) for i, prompt in enumerate(prompts)))
    trees = add_mismatched_completions(answers, answers, 64)
    assert [tree.prompt for tree in trees] == [[1, prompt] for prompt in prompts]
    assert all(tree.completions[0][0] != 10 * prompt for tree, prompt in zip(trees, prompts, strict=True))
    if max(map(prompts.count, prompts)) <= len(prompts) / 2:  # each answer, good or bad, is taken once
        taken = sorted(tree.completions[0] for tree in trees)
        assert taken == sorted(answer.tree.completions[0] for answer in answers)


def test_of_pairs_chosen_and_rejected_answers_are_taken(tiny_llama):
    answers, _ = encode_answers([pair(n) for n in range(4)], ChatTemplate.from_checkpoint(tiny_llama), 256, "rows")
    trees = add_mismatched_completions(answers, answers, 256)
    following = [*answers[1:], answers[0]]
    assert [tree.completions for tree in trees] == [answer.tree.completions for answer in following]


def test_a_split_of_one_prompt_takes_the_training_rows_answers():
    train = answers_of((1, [10], True), (2, [20], False), (3, [30], True))
    trees = add_mismatched_completions(answers_of((2, [21], True), (2, [22], False)), train, 64)
    assert [tree.completions[0] for tree in trees] == [[10], [30]] and trees[0].prompt == [1, 2]


def test_kto_with_one_prompt_is_refused(tiny_llama, tmp_path):
    rows = [{**pair(1), "completion": pair(n)["chosen"], "label": n % 2 == 0} for n in range(6)]
    rows = [{name: row[name] for name in ("prompt", "completion", "label")} for row in rows]
    data = write(tmp_path / "data", train=rows, validation=rows)
    with pytest.raises(UserError, match=r"all rows have the same prompt\. Add rows with other prompts"):
        align(tiny_llama, data, tmp_path / "out", loss="kto")


def test_labels_out_of_balance_are_reported_with_the_weights_that_balance_them(tiny_llama, tmp_path, capsys):
    rows = [{"prompt": pair(n)["prompt"], "completion": pair(n)["chosen"], "label": n < 2} for n in range(20)]
    data = write(tmp_path / "data", train=rows, validation=rows[:4])
    train = replace(TRAIN, max_steps=1)
    align(tiny_llama, data, tmp_path / "out", loss="kto", train=train)
    said = capsys.readouterr().out
    assert "2 desirable and 18 undesirable answers, weighted 0.11 to 1" in said
    assert "--desirable_weight 9 (up to 12) or --undesirable_weight 0.1111 (down to 0.08333)" in said
    align(tiny_llama, data, tmp_path / "balanced", loss="kto", train=train, desirable_weight=9.0)
    assert "weighted 1.00 to 1\n" in capsys.readouterr().out


@pytest.mark.parametrize("good", [0, 5])
def test_one_label_only_is_reported(good):
    answers = answers_of(*((n, [n], good > 0) for n in range(5)))
    assert f"{good} desirable and {5 - good} undesirable answers: KTO learns from one label only" in label_balance(
        answers, KTOSettings()
    )


@pytest.mark.parametrize(("good", "bad"), [(3, 3), (4, 3), (1, 40), (40, 1), (7, 5)])
def test_the_weights_that_are_named_balance_the_labels(good, bad):
    answers = answers_of(*((n, [n], n < good) for n in range(good + bad)))
    said = label_balance(answers, KTOSettings())
    if 1 <= good / bad <= 4 / 3:
        assert "--" not in said
        return
    numbers = [float(n) for n in re.findall(r"(?:weight|up to|down to) ([\d.e+-]+\d)", said)]
    settings = [KTOSettings(desirable_weight=w) for w in numbers[:2]]
    settings += [KTOSettings(undesirable_weight=w) for w in numbers[2:]]
    assert len(settings) == 4
    for weights in settings:
        ratio = weights.desirable_weight * good / (weights.undesirable_weight * bad)
        assert 1 - 1e-3 <= ratio <= 4 / 3 + 1e-3


def test_a_run_that_taught_nothing_says_so(tiny_llama, tmp_path, capsys):
    """Hinge's loss has no gradient once each margin is wide enough, which a large beta makes them by the first step."""
    data = write(tmp_path / "data", train=[pair(n) for n in range(4)], validation=[pair(9)])
    log = align(tiny_llama, data, tmp_path / "out", loss="hinge", beta=1e4, train=replace(TRAIN, global_batch_size=4))
    still = sum(row["grad_norm"] == 0 for row in log)
    assert 0 < still < len(log)
    assert f"{still} of {len(log)} steps had nothing to learn from (the gradient was zero)" in capsys.readouterr().out
    metrics = json.loads((tmp_path / "out" / "final" / "metrics.json").read_text())
    assert metrics["steps_without_signal"] == still


def test_kto_cuts_anothers_answer_to_the_room_that_a_long_prompt_leaves(tiny_llama, tmp_path):
    rows = [pair(n) for n in range(6)]
    rows[0]["prompt"] = [{"role": "user", "content": "word " * 20}]
    rows[1]["chosen"] = [{"role": "assistant", "content": "pain " * 30}]
    data = write(tmp_path / "data", train=rows, validation=rows[:3])
    longest = replace(TRAIN, max_seq_length=128, max_steps=2)
    assert len(align(tiny_llama, data, tmp_path / "out", loss="kto", train=longest)) == 2


def test_options_of_another_loss_are_refused(tiny_llama, pairs, tmp_path):
    with pytest.raises(UserError, match="--desirable_weight"):
        align(tiny_llama, pairs, tmp_path, desirable_weight=2.0)
    with pytest.raises(UserError, match="2 problems"):
        align(tiny_llama, pairs, tmp_path, loss="kto", sft_weight=0.1, gamma=1.0)


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
    for row, cure in (
        (rows[1], "Correct the rows"),
        (rows[2], "Raise --train.max_seq_length"),
        (both, "Raise --train"),
    ):
        with pytest.raises(UserError, match=rf"(?s)No row is left.*{cure}"):
            encode_answers([row], template, 200, "rows")


def test_all_problems_are_told_at_once(tiny_llama, pairs, tmp_path):
    with pytest.raises(UserError, match="4 problems") as e:
        align(tiny_llama, pairs, tmp_path, beta=0.0, label_smoothing=0.5, sft_weight=-1.0, max_val_rows=0)
    for option in ("--beta", "--label_smoothing", "--sft_weight", "--max_val_rows"):
        assert option in str(e.value)
    assert not (tmp_path / "final").exists()


def test_rows_without_preferences_are_refused(tiny_llama, tmp_path):
    chats = [{"messages": [*pair(n)["prompt"], *pair(n)["chosen"]]} for n in range(4)]
    data = write(tmp_path / "data", train=chats, validation=chats)
    with pytest.raises(UserError, match=r"train.jsonl, line 1: has no \"prompt\""):
        align(tiny_llama, data, tmp_path / "out")
