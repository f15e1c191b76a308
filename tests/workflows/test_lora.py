"""The LoRA step on a tiny model: its output is a checkpoint, stopping loses nothing, mistakes are explained."""

import csv
import io
import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import lm_eval.evaluator
import pytest
import torch
import yaml
from litgpt.eval.evaluate import convert_and_evaluate
from litgpt.tokenizer import Tokenizer

from data_prep.chat_data import replayed
from tests.conftest import convert, make_llama
from tests.litgpt_command import run_litgpt
from workflows import lora as lora_step
from workflows.chat_template import ChatTemplate
from workflows.checkpoint import check_checkpoint_dir
from workflows.errors import UserError
from workflows.evaluate import setup as evaluate
from workflows.evaluation.tasks import load_tasks
from workflows.files import sha256
from workflows.merge import setup as merge
from workflows.prompt_style import read_prompt_style
from workflows.training.batch import Tree, pack_row
from workflows.training.loop import TrainArgs
from workflows.training.model import LoRAArgs, load_model
from workflows.training.step import run_identity

pytestmark = pytest.mark.long

TRAIN = TrainArgs(
    max_steps=6,
    global_batch_size=4,
    row_tokens=256,
    max_seq_length=256,
    lr_warmup_steps=2,
    learning_rate=1e-2,
    eval_interval=3,
    save_interval=2,
)

WORDS = ["fever", "cough", "pain", "rash", "chill", "ache", "sweat", "spasm"]


def write_rows(path, count, offset=0):
    lines = []
    for i in range(offset, offset + count):
        question = f"What is {WORDS[i % 8]} number {i}?"
        answer = f"It is {WORDS[(i * 3) % 8]} {i % 5}."
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        lines.append(json.dumps({"messages": messages, "kind": "even" if i % 2 == 0 else "odd"}))
    path.write_text("\n".join(lines) + "\n")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    directory = tmp_path_factory.mktemp("data") / "toy"
    directory.mkdir()
    write_rows(directory / "train.jsonl", 30)
    write_rows(directory / "validation.jsonl", 6, offset=100)
    (directory / "manifest.json").write_text("{}")
    return directory


def train(checkpoint, data, out_dir, **changes):
    settings = {
        "checkpoint_dir": checkpoint,
        "data": data,
        "out_dir": out_dir,
        "precision": "32-true",
        "train": TRAIN,
        "lora_r": 4,
        **changes,
    }
    lora_step.setup(**settings)
    return out_dir / "final"


@pytest.fixture(scope="module")
def trained(tiny_llama, data, tmp_path_factory):
    return train(tiny_llama, data, tmp_path_factory.mktemp("lora"))


def adapters(final):
    return torch.load(final / "lit_model.pth.lora", weights_only=True)["model"]


def logprobs(model, seed=0):
    ids = torch.randint(0, 300, (12,), generator=torch.Generator().manual_seed(seed)).tolist()
    return model(pack_row([Tree(ids[:5], [ids[5:]])])).detach()


def test_output_is_a_complete_checkpoint_directory(trained, tiny_llama):
    assert check_checkpoint_dir(trained) == trained
    assert ChatTemplate.from_checkpoint(trained).source == ChatTemplate.from_checkpoint(tiny_llama).source
    metrics = json.loads((trained / "metrics.json").read_text())
    assert metrics["metrics"][0]["name"] == "val_loss" and metrics["tokens_per_second"] > 0
    provenance = json.loads((trained / "provenance.json").read_text())
    assert set(provenance["files"]) == {"lit_model.pth", "lit_model.pth.lora"}
    assert provenance["sources"]["base"]["path"] == str(tiny_llama)
    assert yaml.safe_load((trained / "hyperparameters.yaml").read_text())["lora_r"] == 4


THOUGHTS = Path("workflows/recipes/default/chatml-thoughts.jinja")


def test_another_chat_template_is_learned_and_handed_on(tiny_llama, data, tmp_path, capsys):
    settings = {"chat_template": THOUGHTS, "train": replace(TRAIN, max_steps=2, row_tokens=128), "max_val_rows": 2}
    final = train(tiny_llama, data, tmp_path / "lora", **settings)
    template = ChatTemplate.from_checkpoint(final)
    assert template.source == THOUGHTS.read_text()
    asked = [
        {"role": "user", "content": "A"},
        {"role": "assistant", "content": "<think>x</think>\n\nB"},
        {"role": "user", "content": "C"},
    ]
    assert template.render(asked, add_generation_prompt=True) == (
        "<|im_start|>user\nA<|im_end|>\n<|im_start|>assistant\n\n\nB<|im_end|>\n<|im_start|>user\nC<|im_end|>\n"
        "<|im_start|>assistant\n<think>\n"
    )
    assert template.opens_thoughts and template.drops_thoughts and template.default_system == ""
    assert not ChatTemplate.from_checkpoint(tiny_llama).drops_thoughts
    own = Tokenizer(final).encode(read_prompt_style(final).apply("A")).tolist()
    assert own == template.prompt_ids(asked[:1])  # LitGPT's own commands
    provenance = json.loads((final / "provenance.json").read_text())
    assert provenance["sources"]["chat_template"]["sha256"] == sha256(THOUGHTS)
    train(tiny_llama, data, tmp_path / "lora", **settings)
    assert "is already there" in capsys.readouterr().out
    other = tmp_path / "other.jinja"
    other.write_text(THOUGHTS.read_text().replace("<think>", "<think>\n"))
    train(tiny_llama, data, tmp_path / "lora", **{**settings, "chat_template": other})
    assert ChatTemplate.from_checkpoint(final).source == other.read_text()


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (None, "there is no such file"),
        ("{% for", "not valid Jinja"),
        ("x", "does not write the user's message"),
        ("{% for m in messages %}{{ m.content }}{% endfor %}", r"none of the model's stop(.|\n)*--stop TOKEN"),
    ],
)
def test_a_chat_template_that_is_none_is_told(text, why, tiny_llama, data, tmp_path):
    file = tmp_path / "template.jinja"
    if text is not None:
        file.write_text(text)
    with pytest.raises(UserError, match=why):
        train(tiny_llama, data, tmp_path / "lora", chat_template=file)
    assert not (tmp_path / "lora").exists()


def test_training_lowers_the_validation_loss(trained):
    rows = (trained.parent / "metrics.csv").read_text().splitlines()
    column = rows[0].split(",").index("val_loss")
    losses = [float(row.split(",")[column]) for row in rows[1:] if row.split(",")[column]]
    assert losses[-1] < losses[0]


def test_merged_weights_equal_base_with_adapters(trained, tiny_llama):
    unmerged = load_model(tiny_llama, LoRAArgs(r=4))
    unmerged.load_state_dict(adapters(trained), strict=False)
    torch.testing.assert_close(logprobs(load_model(trained)), logprobs(unmerged), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(logprobs(load_model(tiny_llama)), logprobs(unmerged), atol=1e-3)


def test_merge_step_equals_the_merged_file(trained, tmp_path):
    alone = tmp_path / "adapters-only"
    shutil.copytree(trained, alone, ignore=shutil.ignore_patterns("lit_model.pth"))
    merge(alone, out_dir=tmp_path / "merged")
    assert torch.equal(logprobs(load_model(tmp_path / "merged")), logprobs(load_model(trained)))


@pytest.mark.parametrize("quantize", ["bnb.nf4", "bnb.fp4-dq"])
def test_qlora_trains_and_merges_into_the_unquantized_base(quantize, data, tmp_path):
    base = convert(make_llama(tmp_path / "hf", hidden_size=64, intermediate_size=128), tmp_path)
    final = train(base, data, tmp_path / "whole", quantize=quantize)
    rows = list(csv.DictReader((final.parent / "metrics.csv").open()))
    losses = [float(row["val_loss"]) for row in rows if row["val_loss"]]
    assert losses[-1] < losses[0]
    full = train(base, data, tmp_path / "full")
    assert any(not torch.equal(adapters(final)[name], adapters(full)[name]) for name in adapters(final))

    unmerged = load_model(base, LoRAArgs(r=4))  # in its own precision
    unmerged.load_state_dict(adapters(final), strict=False)
    torch.testing.assert_close(logprobs(load_model(final)), logprobs(unmerged), atol=1e-5, rtol=1e-5)


def test_there_is_nothing_to_merge_without_adapters(tiny_llama, tmp_path):
    with pytest.raises(UserError, match="nothing to merge"):
        merge(tiny_llama, out_dir=tmp_path / "merged")


def test_litgpts_own_merge_gives_the_same_weights(trained, tmp_path):
    alone = tmp_path / "adapters-only"
    shutil.copytree(trained, alone, ignore=shutil.ignore_patterns("lit_model.pth"))
    run_litgpt("merge_lora", alone)
    theirs = torch.load(alone / "lit_model.pth", weights_only=True)
    ours = torch.load(trained / "lit_model.pth", weights_only=True)
    assert set(theirs) == set(ours)
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], atol=1e-6, rtol=1e-5)


class StopHere(Exception):
    pass


@pytest.mark.parametrize("stop_before", [1, 3, 5])
def test_stopped_and_resumed_ends_with_bit_identical_adapters(
    trained, tiny_llama, data, tmp_path, monkeypatch, stop_before
):
    original = lora_step.SFT.batches

    def stopping(self, step, rank, world_size):
        if step == stop_before:
            raise StopHere
        return original(self, step, rank, world_size)

    monkeypatch.setattr(lora_step.SFT, "batches", stopping)
    with pytest.raises(StopHere):
        train(tiny_llama, data, tmp_path)
    assert not (tmp_path / "final").exists()
    monkeypatch.undo()
    resumed = adapters(train(tiny_llama, data, tmp_path))
    expected = adapters(trained)
    assert set(resumed) == set(expected)
    assert all(torch.equal(resumed[name], tensor) for name, tensor in expected.items())


def test_finished_run_is_not_repeated_unless_something_changed(tiny_llama, data, tmp_path, capsys):
    final = train(tiny_llama, data, tmp_path)
    before = (final / "lit_model.pth.lora").stat().st_mtime_ns
    train(tiny_llama, data, tmp_path)
    assert "already there" in capsys.readouterr().out
    assert (final / "lit_model.pth.lora").stat().st_mtime_ns == before
    train(tiny_llama, data, tmp_path, train=replace(TRAIN, max_steps=4))
    assert json.loads((final / "metrics.json").read_text())["steps"] == 4


def test_checkpoints_of_a_finished_run_go_and_those_of_another_stay(tiny_llama, data, tmp_path, monkeypatch, capsys):
    checkpoints, kept = tmp_path / "checkpoints", tmp_path / "kept"
    rmtree = shutil.rmtree
    with monkeypatch.context() as patch:  # as if killed when the final folder was there and the checkpoints still too
        patch.setattr(shutil, "rmtree", lambda path, **more: path == checkpoints or rmtree(path, **more))
        train(tiny_llama, data, tmp_path)
    shutil.copytree(checkpoints, kept)
    (tmp_path / "progress.json").write_text("{}")
    train(tiny_llama, data, tmp_path)
    assert "already there" in capsys.readouterr().out and not checkpoints.exists()
    assert not (tmp_path / "progress.json").exists()

    other = {"train": replace(TRAIN, max_steps=4)}
    train(tiny_llama, data, tmp_path, **other)
    kept.rename(checkpoints)
    (tmp_path / "progress.json").write_text("{}")
    train(tiny_llama, data, tmp_path, **other)
    assert (tmp_path / "progress.json").exists()
    names = sorted(path.name for path in checkpoints.iterdir())  # the newest two, and the best step's
    assert "already there" in capsys.readouterr().out
    assert names == ["step-00000003.pth", "step-00000004.pth", "step-00000006.pth"]


def test_devices_and_intervals_do_not_make_another_run(tiny_llama, data, tmp_path, capsys):
    train(tiny_llama, data, tmp_path)
    train(tiny_llama, data, tmp_path, devices="auto", strategy="ddp", train=replace(TRAIN, log_interval=2))
    assert "already there" in capsys.readouterr().out


def test_a_second_run_that_was_stopped_goes_on_too(tiny_llama, data, tmp_path, monkeypatch, capfd):
    train(tiny_llama, data, tmp_path)
    other = {"train": replace(TRAIN, learning_rate=2e-2)}
    original = lora_step.SFT.batches

    def stopping(self, step, rank, world_size):
        if step == 3:
            raise StopHere
        return original(self, step, rank, world_size)

    with monkeypatch.context() as patch:
        patch.setattr(lora_step.SFT, "batches", stopping)
        with pytest.raises(StopHere):
            train(tiny_llama, data, tmp_path, **other)
    final = train(tiny_llama, data, tmp_path, **other)
    assert "resuming from" in capfd.readouterr().out
    assert json.loads((final / "provenance.json").read_text())["settings"]["train"]["learning_rate"] == 2e-2


@pytest.mark.parametrize("checkpoint", ["tiny_llama", "tiny_qwen2"])
def test_full_fine_tuning_keeps_tied_weights_tied(checkpoint, request, data, tmp_path):
    base = request.getfixturevalue(checkpoint)
    final = train(base, data, tmp_path, lora_r=0, train=replace(TRAIN, learning_rate=1e-3))
    weights = torch.load(final / "lit_model.pth", weights_only=True)
    before = torch.load(base / "lit_model.pth", weights_only=True)
    assert set(weights) == set(before)
    tied = checkpoint == "tiny_llama"
    assert torch.equal(weights["lm_head.weight"], weights["transformer.wte.weight"]) == tied
    assert not torch.equal(weights["transformer.wte.weight"], before["transformer.wte.weight"])
    assert not (final / "lit_model.pth.lora").exists()


def test_adapting_a_tied_head_unties_it(tiny_llama, data, tmp_path):
    final = train(tiny_llama, data, tmp_path, lora_head=True)
    assert json.loads((final / "config.json").read_text())["tie_word_embeddings"] is False
    weights = torch.load(final / "lit_model.pth", weights_only=True)
    assert not torch.equal(weights["lm_head.weight"], weights["transformer.wte.weight"])


def test_kinds_choose_the_rows(tiny_llama, data, tmp_path, capfd):
    train(tiny_llama, data, tmp_path, kinds=["odd"])
    assert "15 samples of 15 rows" in capfd.readouterr().out


def test_output_runs_in_litgpt_generate_from_another_folder(trained, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    question = "What is fever number 3?"
    run_litgpt("generate", trained, "--prompt", question, "--max_new_tokens", 5, "--precision", "32-true")
    assert question in capsys.readouterr().out


def test_trainer_litgpt_makes_a_complete_checkpoint_too(tiny_llama, data, tmp_path):
    command = [
        sys.executable,
        "-m",
        "workflows",
        "lora",
        "--trainer",
        "litgpt",
        "--checkpoint_dir",
        str(tiny_llama),
        "--data",
        str(data),
        "--out_dir",
        str(tmp_path),
        "--precision",
        "32-true",
        "--lora_r",
        "4",
        "--train.max_steps",
        "2",
        "--train.global_batch_size",
        "2",
        "--train.max_seq_length",
        "128",
        "--train.lr_warmup_steps",
        "1",
    ]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    final = check_checkpoint_dir(tmp_path / "final")
    assert (final / "chat_template.jinja").is_file() and (final / "provenance.json").is_file()
    assert not torch.equal(logprobs(load_model(final)), logprobs(load_model(tiny_llama)))


def test_output_runs_in_litgpt_chat(trained, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hello\n\n"))
    run_litgpt("chat", trained, "--max_new_tokens", 4, "--precision", "32-true")
    assert ">> Reply:" in capsys.readouterr().out


def test_output_scores_the_same_in_litgpt_evaluate(trained, tmp_path, monkeypatch):
    (tmp_path / "toy_mcq").mkdir()
    rows = [
        {"prompt": [{"role": "user", "content": f"Finding {i}?"}], "choices": WORDS, "answer": i % 8} for i in range(24)
    ]
    (tmp_path / "toy_mcq" / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tasks = load_tasks(["toy_mcq"], tmp_path, ChatTemplate.from_checkpoint(trained))
    original = lm_eval.evaluator.simple_evaluate
    monkeypatch.setattr(  # LitGPT's command looks tasks up by name; a task of ours is an object
        lm_eval.evaluator, "simple_evaluate", lambda **settings: original(**{**settings, "tasks": tasks})
    )
    convert_and_evaluate(str(trained), tasks="toy_mcq", out_dir=tmp_path / "out", batch_size=4, dtype="float32")
    theirs = json.loads((tmp_path / "out" / "results.json").read_text())["results"]["toy_mcq"]
    evaluate(trained, ["toy_mcq"], data_dir=tmp_path, out_dir=tmp_path / "ours", precision="32-true")
    ours = json.loads((tmp_path / "ours" / "results.json").read_text())["results"]["toy_mcq"]
    for metric in ("acc,none", "acc_norm,none"):
        assert ours[metric] == pytest.approx(theirs[metric])


def test_every_wrong_setting_is_named_at_once(tiny_llama, data, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError) as e:
        train(
            tiny_llama,
            data,
            tmp_path,
            lora_r=-1,
            quantize="bnb.nf4",
            trainer="litgpt",
            train=replace(TRAIN, max_seq_length=9999, max_steps=0, lr_warmup_steps=0),
        )
    assert all(part in str(e.value) for part in ("4 problems", "max_steps", "lora_r", "9999", "needs a CUDA GPU"))


def test_quantization_without_bitsandbytes_is_explained(tiny_llama, data, tmp_path, monkeypatch):
    monkeypatch.setattr("workflows.training.step.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"needs bitsandbytes: .*pip install"):
        train(tiny_llama, data, tmp_path, quantize="bnb.nf4")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"devices": "abc"}, "--devices must be a number or auto, not 'abc'"),
        ({"devices": 0}, "--devices must be at least 1, not 0"),
        ({"devices": 5}, "4 is fewer samples than the 5 processes"),
        ({"num_nodes": 0}, "--num_nodes must be at least 1"),
        ({"accelerator": "cuda"}, "torch sees no CUDA GPU"),
        ({"trainer": "litgpt", "lora_r": 0}, "--trainer litgpt"),
    ],
)
def test_devices_that_cannot_be_are_refused(changes, message, tiny_llama, data, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match=message):
        train(tiny_llama, data, tmp_path, **changes)


def test_missing_data_is_explained(tiny_llama, tmp_path):
    with pytest.raises(UserError, match="make data"):
        train(tiny_llama, tmp_path / "nowhere", tmp_path / "out")


@pytest.fixture(scope="module")
def others(data, tmp_path_factory):
    """A second data directory, of which rows are mixed in."""
    directory = tmp_path_factory.mktemp("others") / "general_taught"
    directory.mkdir()
    write_rows(directory / "train.jsonl", 4, offset=200)
    write_rows(directory / "validation.jsonl", 2, offset=300)
    return directory


def test_replay_mixes_a_share_of_another_data_directory_into_an_epoch(tiny_llama, data, others, tmp_path, capsys):
    first = train(tiny_llama, data, tmp_path / "a", replay=others, replay_share=0.25)
    out = capsys.readouterr().out
    assert f"replay: 10 of an epoch's 40 rows (25.0%) are of {others}, which has 4, each 2.5 times on average" in out
    assert "of 40 rows" in out
    again = train(tiny_llama, data, tmp_path / "b", replay=others, replay_share=0.25)
    assert sha256(first / "lit_model.pth") == sha256(again / "lit_model.pth")
    provenance = json.loads((first / "provenance.json").read_text())
    assert provenance["sources"]["replay"]["path"] == str(others)


def test_replayed_rows_are_the_seeds_each_once_before_any_comes_again():
    rows = [str(i) for i in range(10)]
    assert len(replayed(rows, 70, 0.125, 1)) == 10  # 10 of 80
    few = replayed(rows, 28, 0.125, 1)
    assert len(few) == len(set(few)) == 4 and few == replayed(rows, 28, 0.125, 1) != replayed(rows, 28, 0.125, 2)
    many = replayed(rows, 75, 0.25, 1)  # 25 of 100
    assert {many.count(row) for row in rows} == {2, 3}


def test_other_rows_to_mix_in_are_another_run(tiny_llama, data, others, tmp_path, capsys):
    changed = tmp_path / "general_taught"
    shutil.copytree(others, changed)
    stopped = replace(TRAIN, max_steps=4)
    train(tiny_llama, data, tmp_path / "run", replay=changed, train=stopped)
    capsys.readouterr()
    train(tiny_llama, data, tmp_path / "run", replay=changed, train=stopped)
    assert "is already there, made with these settings" in capsys.readouterr().out
    settings = {"data": data, "replay": changed, "checkpoint_dir": tiny_llama}
    before = run_identity(settings)
    write_rows(changed / "train.jsonl", 4, offset=400)
    assert run_identity(settings) != before
    train(tiny_llama, data, tmp_path / "run", replay=changed, replay_share=0.5, train=stopped)
    assert "replay_share: 0.125, now 0.5" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"replay": "missing"},
            r"--replay .*missing is not a data directory, it lacks train.jsonl and val",
        ),
        ({"replay": "prompts"}, r"--replay .*prompts has no conversations to learn: .*general_taught"),
        ({"replay": "others", "replay_share": 1.0}, "--replay_share must be between 0 and 1, not 1.0"),
        ({"replay": "others", "trainer": "litgpt"}, "--replay is not for --trainer litgpt"),
        ({"replay_share": 0.3}, "--replay_share belongs to --replay"),
    ],
)
def test_rows_that_cannot_be_mixed_in_are_refused_before_training(tiny_llama, data, others, tmp_path, changes, message):
    (tmp_path / "prompts").mkdir()
    for split in ("train", "validation"):
        (tmp_path / "prompts" / f"{split}.jsonl").write_text('{"prompt": [{"role": "user", "content": "Hi"}]}\n')
    if named := changes.get("replay"):
        changes = {**changes, "replay": others if named == "others" else tmp_path / named}
    with pytest.raises(UserError, match=message):
        train(tiny_llama, data, tmp_path / "out", **changes)
    assert not (tmp_path / "out").exists()
