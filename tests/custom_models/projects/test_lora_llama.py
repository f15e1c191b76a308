"""Our Llama with our LoRA learns what LitGPT's road learns from the same rows, loss by loss; its files can be used."""

import csv
import json
import re
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

from custom_models.__main__ import PROJECTS
from custom_models.llama import main as ask
from custom_models.llama_checkpoint import hf_module_names, load_llama
from custom_models.lora import add_lora, load_lora, lora_layers
from custom_models.projects import lora_llama
from custom_models.projects.lora_llama import Adapters, FineTuning, batches_of, pad, setup, table
from workflows.__main__ import main
from workflows.chat_template import ChatTemplate, EncodedChat
from workflows.errors import UserError
from workflows.lora import SFT
from workflows.training.loop import TrainArgs, fit
from workflows.training.model import LoRAArgs, load_model
from workflows.training.processes import make_fabric

pytestmark = pytest.mark.long

TEXT = "fever cough pain of the left arm with a rash that spreads slowly over days and weeks 12 34"
WORDS = TEXT.split(" ")
TRAIN = TrainArgs(max_steps=6, global_batch_size=4, row_tokens=256, max_seq_length=200, learning_rate=1e-2,
                  lr_warmup_steps=1)  # fmt: skip
IDS = torch.tensor([[5, 70, 12, 200, 33, 9, 141, 7]])


def talk(number: int, turns: int = 1) -> list[dict[str, str]]:
    """A conversation whose answers follow from their questions."""
    words = [WORDS[(number * 5 + i) % len(WORDS)] for i in range(3 + number % 9)]
    turn = [{"role": "user", "content": " ".join(words)}, {"role": "assistant", "content": " ".join(words[:2])}]
    return turn * turns


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "talks"
    folder.mkdir()
    for split, numbers in (("train", range(24)), ("validation", range(24, 32))):
        lines = [json.dumps({"messages": talk(n), "kind": "odd" if n % 2 else "even"}) for n in numbers]
        (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture(scope="module")
def chats(tiny_llama) -> list[EncodedChat]:
    template = ChatTemplate.from_checkpoint(tiny_llama)
    return [template.encode_chat(talk(n, turns=1 + n % 2)) for n in range(24)]


def numbers(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "metrics.json").read_text())


def test_a_padded_batch_predicts_the_assistants_tokens_and_no_others(chats):
    batch = pad(chats[:5])
    assert batch.ids.shape == (5, max(len(c.prompt) + len(c.completion) for c in chats[:5]) - 1)
    learned = iter(batch.targets.tolist())
    for ids, predict, chat in zip(batch.ids.tolist(), batch.predict.tolist(), chats, strict=False):
        text = chat.prompt + chat.completion
        assert ids[: len(text) - 1] == text[:-1] and not any(ids[len(text) - 1 :])
        wanted = [False] * len(chat.prompt) + chat.loss_mask
        assert predict == wanted[1:] + [False] * (len(predict) - len(text) + 1)
        assert [next(learned) for _ in range(sum(chat.loss_mask))] == [
            token for token, mask in zip(text, wanted, strict=True) if mask
        ]
    assert next(learned, None) is None
    assert not all(all(chat.loss_mask) for chat in chats[:5])  # some have two turns: what lies between is not learned
    assert batch.real_tokens == sum(len(c.prompt) + len(c.completion) for c in chats[:5])


def test_groups_hold_every_row_once_and_no_more_places_than_fit(chats):
    groups = batches_of(chats, 200)
    assert len(groups) > 3 and sum(len(group.ids) for group in groups) == len(chats)
    assert all(group.ids.numel() <= 200 or len(group.ids) == 1 for group in groups)
    assert sum(group.real_tokens for group in groups) == sum(len(c.prompt) + len(c.completion) for c in chats)
    assert [len(group.ids) for group in batches_of(chats, 1)] == [1] * len(chats)


INSIDE = {
    "attn.qkv": ["attention.q", "attention.k", "attention.v"],
    "attn.proj": ["attention.out"],
    "mlp.fc_1": ["feed_forward.gate"],
    "mlp.fc_2": ["feed_forward.up"],
    "mlp.proj": ["feed_forward.down"],
}
"""LitGPT's adapted modules and ours."""


def adapted(directory: Path, rank: int = 4, alpha: int = 8) -> tuple[Any, Any]:
    """Our model and the road's, adapted from the same seed."""
    torch.manual_seed(5)
    ours = load_llama(directory)
    add_lora(ours, ["layers.*"], rank, alpha)
    torch.manual_seed(5)
    return ours, load_model(directory, LoRAArgs(r=rank, alpha=alpha))


def test_a_seed_draws_the_same_adapters_as_on_the_road(tiny_llama):
    ours, theirs = adapted(tiny_llama)
    layers = lora_layers(ours)
    for number, block in enumerate(theirs.transformer.h):
        for module, names in INSIDE.items():
            rows = torch.cat([layers[f"layers.{number}.{name}"].A for name in names])
            assert torch.equal(block.get_submodule(module).lora_A, rows)


@pytest.mark.parametrize("most_tokens", [64, 4096])
def test_every_loss_is_the_roads_from_the_same_beginning(chats, tiny_llama, tmp_path, most_tokens):
    train = TrainArgs(**{**vars(TRAIN), "row_tokens": most_tokens})
    found = [
        fit(make_fabric(), model, kind(chats[:20], chats[20:], train, 7), train, tmp_path / name, seed=7, identity={})
        for name, model, kind in zip(("ours", "road"), adapted(tiny_llama), (FineTuning, SFT), strict=True)
    ]  # fmt: skip
    assert found[0].losses[0] - found[0].losses[-1] > 0.1  # it does learn
    assert found[0].losses == pytest.approx(found[1].losses, abs=1e-4)
    assert found[0].metrics["val_loss"] == pytest.approx(found[1].metrics["val_loss"], abs=1e-4)
    assert found[0].real_tokens == found[1].real_tokens


def test_the_real_model_learns_what_it_learns_on_the_road(embedded_checkpoint, tmp_path):
    template = ChatTemplate.from_checkpoint(embedded_checkpoint)
    rows = [template.encode_chat(talk(n)) for n in range(8)]
    train = TrainArgs(**{**vars(TRAIN), "max_steps": 3, "global_batch_size": 2, "learning_rate": 1e-3})
    found = [
        fit(make_fabric(), model, kind(rows[:6], rows[6:], train, 7), train, tmp_path / name, seed=7, identity={})
        for name, model, kind in zip(("ours", "road"), adapted(embedded_checkpoint), (FineTuning, SFT), strict=True)
    ]  # fmt: skip
    assert found[0].losses == pytest.approx(found[1].losses, abs=2e-3)  # float32 over thirty layers
    assert found[0].metrics["val_loss"] == pytest.approx(found[1].metrics["val_loss"], abs=2e-3)


def test_adapters_are_trained_and_left_for_us_and_for_peft(data, tiny_llama, tiny_llama_hf, tmp_path, capsys):
    setup(tiny_llama, data, tmp_path / "out", max_val_rows=8, lora=Adapters(rank=4, alpha=8), train=TRAIN)
    made = numbers(tmp_path / "out")["methods"]["lora"]
    linear = [module for module in load_llama(tiny_llama).modules() if isinstance(module, torch.nn.Linear)]
    assert made["trainable_parameters"] == sum(4 * (layer.in_features + layer.out_features) for layer in linear)
    assert made["val_loss"] < made["val_loss_before"] - 0.2
    assert made["peak_bytes"] > 1e8 and made["seconds"] > 0 and made["tokens_per_second"] > 0
    rows = {row["name"]: row["value"] for row in numbers(tmp_path / "out")["metrics"]}
    assert rows == {"val_loss_before": made["val_loss_before"], "val_loss_lora": made["val_loss"]}
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["adapter", "metrics.csv", "metrics.json"]
    said = capsys.readouterr().out
    assert "train: 24 samples of 24 rows" in said and re.search(r"LoRA +[\d,]+ +\d+\.\d%", said)

    model = load_llama(tiny_llama).eval()
    before = model(IDS)
    load_lora(model, tmp_path / "out" / "adapter", hf_module_names(2))
    assert (model(IDS) - before).abs().max() > 0.05
    hf = AutoModelForCausalLM.from_pretrained(tiny_llama_hf, dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(hf, tmp_path / "out" / "adapter").eval()
    torch.testing.assert_close(model(IDS), theirs(IDS).logits, atol=1e-4, rtol=0)
    ask("fever cough", tiny_llama, tmp_path / "out" / "adapter", max_new_tokens=4)
    assert "both wrote the same text" in capsys.readouterr().out


def test_all_weights_are_trained_and_left_as_a_checkpoint(data, tiny_llama, tmp_path):
    setup(tiny_llama, data, tmp_path / "out", method="full", train=TRAIN, full_learning_rate=2e-3, kinds=["odd"])
    made = numbers(tmp_path / "out")["methods"]["full"]
    assert made["trainable_parameters"] == made["parameters"] and made["val_loss"] < made["val_loss_before"] - 0.1
    model, before = load_llama(tmp_path / "out" / "final").eval(), load_llama(tiny_llama).eval()
    assert model.config == before.config
    assert (model(IDS) - before(IDS)).abs().max() > 0.05
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "final").eval()
    torch.testing.assert_close(model(IDS), theirs(IDS).logits, atol=1e-4, rtol=0)
    assert ChatTemplate.from_checkpoint(tmp_path / "out" / "final").stop_ids
    assert not (tmp_path / "out" / "checkpoints").exists()


def test_both_methods_and_the_road_stand_in_one_table(data, tiny_llama, tmp_path, capfd, monkeypatch):
    """By the command line, each in a process of its own."""
    recipe = Path(__file__).parents[3] / "custom_models" / "recipes" / "lora-scratch.yaml"
    options = {"checkpoint_dir": tiny_llama, "data": data, "out_dir": tmp_path, "lora.rank": 4, "lora.alpha": 8,
               "train.max_steps": 6, "train.learning_rate": 0.01, "full_learning_rate": 0.002}  # fmt: skip
    given = [part for name, value in options.items() for part in (f"--{name}", str(value))]
    assert main(["lora-scratch", "--config", str(recipe), *given], PROJECTS, "custom_models") == 0
    found = numbers(tmp_path)["methods"]
    lora, full, road = (found[name] for name in ("lora", "full", "road"))
    assert lora["trainable_parameters"] == road["trainable_parameters"] < full["trainable_parameters"]
    assert lora["parameters"] == road["parameters"] == full["parameters"]
    assert lora["val_loss_before"] == pytest.approx(full["val_loss_before"])
    for numbers_of in found.values():
        assert numbers_of["val_loss"] < lora["val_loss_before"] - 0.1 and numbers_of["peak_bytes"] > 1e8
    assert lora["val_loss"] == pytest.approx(road["val_loss"], abs=1e-3)
    with open(tmp_path / "road" / "metrics.csv") as file:
        assert lora["losses"] == pytest.approx([float(row["loss"]) for row in csv.DictReader(file)], abs=1e-3)
    said = capfd.readouterr().out
    assert table(found) in said and "LoRA, LitGPT" in said
    assert (tmp_path / "lora" / "adapter").is_dir() and (tmp_path / "full" / "final").is_dir()

    def trained_again(command: list[str]) -> None:
        raise AssertionError(command)

    monkeypatch.setattr(lora_llama, "_run", trained_again)
    again = [*given, "--road", "false"]  # that step has its own way of knowing what is done
    assert main(["lora-scratch", "--config", str(recipe), *again], PROJECTS, "custom_models") == 0
    assert capfd.readouterr().out.count("trained before") == 2 and numbers(tmp_path)["methods"]["full"] == full
    with pytest.raises(AssertionError, match="lora-scratch"):
        main(["lora-scratch", "--config", str(recipe), *again, "--seed", "2"], PROJECTS, "custom_models")


def test_the_same_seed_gives_the_same_losses_and_another_does_not(data, tiny_llama, tmp_path):
    def losses(seed: int) -> list[float]:
        setup(tiny_llama, data, tmp_path, lora=Adapters(rank=2, dropout=0.1), train=TRAIN, seed=seed)
        return numbers(tmp_path)["methods"]["lora"]["losses"]

    first = losses(1)
    assert losses(1) == first != losses(2)


def test_what_cannot_be_is_told_at_once(data, tiny_llama, tiny_llama_hf, tmp_path):
    with pytest.raises(UserError, match=r"4 problems:\n.*max_steps.*\n.*rank.*\n.*max_val_rows.*\n.*--road compares"):
        setup(tiny_llama, data, tmp_path, lora=Adapters(rank=0, targets=["*.q"]), max_val_rows=0, road=True,
              train=TrainArgs(max_steps=0, lr_warmup_steps=0))  # fmt: skip
    with pytest.raises(UserError, match="full_learning_rate must be positive"):
        setup(tiny_llama, data, tmp_path, full_learning_rate=0.0)
    with pytest.raises(UserError, match=r"No linear layer is named '\*\.q_proj'; there are layers\.\*\.attention\.k"):
        setup(tiny_llama_hf, data, tmp_path, lora=Adapters(targets=["*.q_proj"]), train=TRAIN)
    with pytest.raises(UserError, match=r"nowhere is not a prepared data directory"):
        setup(tiny_llama, tmp_path / "nowhere", tmp_path, train=TRAIN)
    with pytest.raises(UserError, match=r"No row of .*train is left to use\. Raise --train\.max_seq_length"):
        setup(tiny_llama, data, tmp_path, train=TrainArgs(max_seq_length=3))
    assert not (tmp_path / "metrics.json").exists()
