"""ChatData: the tokens and masks it makes, what it reports, and LitGPT's own command running on it."""

from pathlib import Path

import pytest
import torch
import yaml
from litgpt.tokenizer import Tokenizer

from data_prep import ChatData
from data_prep.chat_data import IGNORE_INDEX, encode_rows
from data_prep.rows import Row, question_row, write_rows
from tests.litgpt_command import run_litgpt
from workflows.chat_template import ChatTemplate
from workflows.errors import UserError

TURN_END = "<|im_end|>"


def rows_for(count: int, start: int = 0) -> list[Row]:
    return [
        question_row(f"Which finding is number {i}?", f"Finding {i}, breathing", "name" if i % 2 else "definition")
        for i in range(start, start + count)
    ]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    directory = tmp_path / "own"
    directory.mkdir()
    write_rows(directory / "train.jsonl", rows_for(12))
    write_rows(directory / "validation.jsonl", rows_for(4, start=50))
    return directory


@pytest.fixture(scope="module")
def template(tiny_llama: Path) -> ChatTemplate:
    return ChatTemplate.from_checkpoint(tiny_llama)


def connected(data: Path, checkpoint_dir: Path, max_seq_length: int | None = None, **fields: object) -> ChatData:
    module = ChatData(data, checkpoint_dir=checkpoint_dir, **fields)
    module.connect(Tokenizer(checkpoint_dir), batch_size=3, max_seq_length=max_seq_length)
    return module


def test_samples_are_the_chat_templates_and_only_answers_are_learned(
    data: Path, tiny_llama: Path, template: ChatTemplate
):
    module = connected(data, tiny_llama)
    module.setup()
    assert len(module.train_dataset) == 12 and len(module.test_dataset) == 4
    for row, chat, i in zip(rows_for(12), module.encoded("train"), range(12), strict=True):
        assert chat == template.encode_chat(row["messages"])
        item = module.train_dataset[i]
        assert item["input_ids"].tolist() == chat.prompt + chat.completion
        learned = item["labels"][item["labels"] != IGNORE_INDEX].tolist()
        assert template.decode(learned, skip_special_tokens=False) == f"Finding {i}, breathing{TURN_END}"
        prompt = item["input_ids"][item["labels"] == IGNORE_INDEX].tolist()
        assert prompt == template.prompt_ids(row["messages"][:1])
        assert item["token_counts"] == {"raw": len(learned), "raw_plus_prompt_template": len(item["input_ids"])}
    assert module.reports["train"].kept == 12 and module.reports["train"].truncated == 0


def test_every_answer_of_a_conversation_is_learned(template: ChatTemplate):
    turns = [("system", "Be brief."), ("user", "A?"), ("assistant", "One."), ("user", "B?"), ("assistant", "Two.")]
    row = {"messages": [{"role": role, "content": content} for role, content in turns]}
    (chat,), report = encode_rows([row], template, 500)
    learned = [i for i, mask in zip(chat.completion, chat.loss_mask, strict=True) if mask]
    assert template.decode(learned, skip_special_tokens=False) == f"One.{TURN_END}Two.{TURN_END}"
    assert report.learned_tokens == len(learned) and report.tokens == len(chat.prompt) + len(chat.completion)


def test_batches_are_padded_without_loss_and_shuffled_by_seed(data: Path, tiny_llama: Path):
    def batches(seed: int) -> list[torch.Tensor]:
        module = connected(data, tiny_llama, seed=seed)
        module.setup()
        found = list(module.train_dataloader())
        for batch in found:
            lengths = batch["token_counts"]["raw_plus_prompt_template"].flatten().tolist()  # (B,)
            assert batch["input_ids"].shape == batch["labels"].shape == (3, max(lengths))
            for row, length in zip(batch["labels"], lengths, strict=True):
                assert (row[length:] == IGNORE_INDEX).all() and row[length - 1] != IGNORE_INDEX
        return [batch["input_ids"] for batch in found]

    first, again, other = batches(1), batches(1), batches(2)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not all(a.shape == b.shape and torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_truncation_and_dropping_are_counted(template: ChatTemplate):
    rows = [question_row("Why?", "x", "name"), question_row("Why?", "breathing " * 50, "name")]
    rows.append(question_row("breathing " * 50, "x", "name"))
    (short, _, _), whole = encode_rows(rows, template, 10_000)
    assert whole.truncated == 0 and not whole.dropped
    limit = len(short.prompt) + len(short.completion)
    chats, report = encode_rows(rows, template, limit, "here")
    assert chats[0] == short  # fits exactly, with its turn end
    assert len(chats) == 2 and len(chats[1].prompt) + len(chats[1].completion) == limit
    assert template.tokenizer.token_to_id(TURN_END) not in chats[1].completion
    assert (report.rows, report.kept, report.truncated, report.longest) == (3, 2, 1, limit)
    assert dict(report.dropped) == {f"the prompt alone fills {limit} tokens": 1}
    assert "here: 2 samples of 3 rows" in str(report) and "1 answers truncated (their turn end is lost)" in str(report)
    assert f"1 dropped: the prompt alone fills {limit} tokens" in str(report)
    # A prompt that fills the context to the last token leaves no room for an answer.
    assert encode_rows(rows[:1], template, len(short.prompt))[1].kept == 0
    assert encode_rows(rows[:1], template, len(short.prompt) + 1)[1].truncated == 1


def test_the_models_context_is_the_upper_limit(data: Path, tiny_llama: Path):
    assert connected(data, tiny_llama).max_seq_length == 512
    assert connected(data, tiny_llama, 100).max_seq_length == 100
    assert connected(data, tiny_llama, 5000).max_seq_length == 512


def test_nothing_left_is_an_error_with_the_cure(data: Path, tiny_llama: Path):
    with pytest.raises(UserError, match=r"(?s)No sample is left.*12 dropped.*--train.max_seq_length"):
        connected(data, tiny_llama, 5).encoded("train")


def test_kinds_and_numbers_of_rows(data: Path, tiny_llama: Path):
    module = ChatData(data, kinds=["name"], max_train_rows=3, max_val_rows=1)
    assert {row["kind"] for row in module.rows("train")} == {"name"}
    assert len(module.rows("train")) == 3 and len(module.rows("validation")) == 1
    assert module.rows("train") == ChatData(data, kinds=["name"], max_train_rows=3).rows("train")
    assert any(ChatData(data, max_train_rows=3, seed=s).rows("train") != rows_for(3) for s in range(3))
    with pytest.raises(UserError, match=r"no training rows of kind signs; it has \['definition', 'name'\]"):
        ChatData(data, kinds=["signs"]).rows("train")
    write_rows(data / "train.jsonl", [question_row("a", "b", "signs")])
    assert len(ChatData(data, kinds=["signs"]).rows("validation")) == 4  # it has none of that kind: used whole


def test_missing_data_or_checkpoint_is_explained(data: Path, tmp_path: Path, tiny_llama: Path):
    with pytest.raises(UserError, match=r"lacks train.jsonl and validation.jsonl.*make data DATA=none"):
        ChatData(tmp_path / "none")
    with pytest.raises(UserError, match=r"name it with --data.checkpoint_dir"):
        ChatData(data).connect()
    with (data / "train.jsonl").open("a") as f:
        f.write('{"messages": [')
    with pytest.raises(UserError, match=r"train.jsonl, line 13: not valid JSON"):
        connected(data, tiny_llama).encoded("train")


def test_another_models_checkpoint_is_refused(data: Path, tiny_llama: Path, tmp_path: Path):
    from tests.conftest import write_tokenizer

    write_tokenizer(tmp_path / "other", vocab_size=300)
    module = ChatData(data, checkpoint_dir=tiny_llama)
    with pytest.raises(UserError, match=r"another tokenizer than the model in training"):
        module.connect(Tokenizer(tmp_path / "other"))


@pytest.mark.long
@pytest.mark.parametrize("how", ["by position", "in a config file"])
def test_litgpt_finetune_lora_runs_on_it(data: Path, tiny_llama: Path, tmp_path: Path, capfd, how: str):
    """LitGPT's own command: it finds the checkpoint's template, says what it encoded, trains and merges."""
    write_rows(data / "train.jsonl", [*rows_for(8), question_row("breathing " * 200, "x", "name")])
    settings = {
        "checkpoint_dir": str(tiny_llama),
        "data": {"class_path": "data_prep.ChatData", "init_args": {"path": str(data)}},
        "out_dir": str(tmp_path / "out"),
        "precision": "32-true",
        "train": {"max_steps": 2, "global_batch_size": 2, "micro_batch_size": 1, "max_seq_length": 120, "epochs": 1},
        "eval": {"max_iters": 2, "interval": 1, "max_new_tokens": 4},
    }
    settings["train"]["lr_warmup_steps"] = 1
    command = ["finetune_lora"]
    if how == "by position":
        command += [settings.pop("checkpoint_dir"), "--data", "data_prep.ChatData", "--data.path", str(data)]
        del settings["data"]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings))
    command += ["--config", str(tmp_path / "config.yaml")]
    run_litgpt(*command)
    said = capfd.readouterr().out
    assert "train: 8 samples of 9 rows" in said and "1 dropped: the prompt alone fills 120 tokens" in said
    final = tmp_path / "out" / "final"
    assert (final / "lit_model.pth").is_file() and (final / "lit_model.pth.lora").is_file()
    assert (final / "prompt_style.yaml").read_text() == (tiny_llama / "prompt_style.yaml").read_text()
    assert yaml.safe_load((final / "hyperparameters.yaml").read_text())["data"]["class_path"] == "data_prep.ChatData"
