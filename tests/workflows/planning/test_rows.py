"""The rows that a plan reckons with are those that the run packs."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from data_prep.chat_data import ChatData
from tests.workflows.alignment import TRAIN
from workflows.errors import UserError
from workflows.lora import SFT
from workflows.planning.rows import find_rows, scored_rows


@pytest.fixture(scope="module")
def conversations(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    rows = [
        {"messages": [{"role": "user", "content": "a word " * (n % 7 + 1)}, {"role": "assistant", "content": "b" * n}]}
        for n in range(1, 25)
    ]
    for split in ("train", "validation"):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def settings(data: Path, **others: Any) -> dict[str, Any]:
    return {"data": data, "train": TRAIN, "kinds": None, "seed": 7, **others}


@pytest.mark.parametrize("row_tokens", [64, 512])
def test_the_largest_row_is_that_of_the_run(tiny_llama: Path, conversations: Path, row_tokens: int):
    train = replace(TRAIN, row_tokens=row_tokens)
    data = ChatData(path=conversations, checkpoint_dir=tiny_llama)
    data.connect(max_seq_length=train.max_seq_length)
    objective = SFT(data.encoded("train"), data.encoded("validation"), train, 7)
    steps = [objective.batches(step, 0, 1) for step in range(train.max_steps)]
    lengths = [batch.input_ids.size(1) for batches in steps for batch in batches]
    found = find_rows("lora", settings(conversations, train=train), tiny_llama, 1, read_data=True)
    assert (found.tokens, found.rows, found.lengths) == (max(lengths), max(map(len, steps)), len(set(lengths)))
    assert found.step_tokens == sum(lengths) // train.max_steps


def test_rows_that_are_mixed_in_count(tiny_llama: Path, conversations: Path, tmp_path: Path):
    long = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "c" * 90}]
    (tmp_path / "train.jsonl").write_text(json.dumps({"messages": long}) + "\n")
    train = replace(TRAIN, max_steps=4, global_batch_size=12, row_tokens=512)  # 48 rows: each once
    alone = find_rows("lora", settings(conversations, train=train), tiny_llama, 1, read_data=True)
    mixed = settings(conversations, train=train, replay=tmp_path, replay_share=0.5)
    assert find_rows("lora", mixed, tiny_llama, 1, read_data=True).step_tokens > alone.step_tokens


def test_without_the_data_rows_are_full(tiny_llama: Path, conversations: Path):
    read = find_rows("lora", settings(conversations), tiny_llama, 1, read_data=True)
    full = find_rows("lora", settings(conversations), tiny_llama, 1, read_data=False)
    assert full.tokens == TRAIN.row_tokens > read.tokens
    assert full.rows == TRAIN.global_batch_size  # each sample fills a row
    assert find_rows("lora", settings(Path("nowhere")), tiny_llama, 1, read_data=True) == full


def test_a_pair_may_exceed_a_row_and_processes_share_a_step(tiny_llama: Path):
    pairs = find_rows("dpo", settings(Path("nowhere"), loss="sigmoid"), tiny_llama, 1, read_data=True)
    assert pairs.tokens == 2 * TRAIN.max_seq_length > TRAIN.row_tokens
    assert find_rows("dpo", settings(Path("nowhere"), loss="sigmoid"), tiny_llama, 4, True).rows == pairs.rows // 4


def test_pairs_and_questions_are_read(tiny_llama: Path, pairs: Path, questions: Path):
    of_pairs = find_rows("dpo", settings(pairs, loss="sigmoid"), tiny_llama, 1, read_data=True)
    assert str(pairs) in of_pairs.source and of_pairs.prompt == 0
    asked = settings(questions, max_new_tokens=16, group_size=4)
    of_questions = find_rows("grpo", asked, tiny_llama, 1, read_data=True)
    assert 0 < of_questions.prompt < TRAIN.max_seq_length
    more = find_rows("grpo", {**asked, "group_size": 32}, tiny_llama, 1, read_data=True)
    assert more.step_tokens > of_questions.step_tokens and more.tokens <= TRAIN.row_tokens + 32


def test_an_evaluation_packs_its_questions(tiny_llama: Path, tmp_path: Path):
    row = {"prompt": [{"role": "user", "content": "Which?"}], "choices": ["this one", "that one"], "answer": 0}
    (tmp_path / "mine_mcq").mkdir()
    (tmp_path / "mine_mcq" / "test.jsonl").write_text((json.dumps(row) + "\n") * 6)
    asked = {"checkpoint_dir": tiny_llama, "data_dir": tmp_path, "tasks": ["mine_mcq"], "limit": 4, "row_tokens": 4096}
    asked |= {"num_fewshot": None, "apply_chat_template": None, "split": "test"}
    (batch,) = scored_rows(asked)
    assert batch.completions == 8
    for other in (
        {"tasks": ["arc_easy"]},
        {"tasks": ["my_questions"]},
        {"split": "validation"},
        {"num_fewshot": 2},
        {"apply_chat_template": False},
    ):
        assert scored_rows({**asked, **other}) == []


def test_rows_that_leave_nothing_to_learn_are_told(tiny_llama: Path, conversations: Path):
    short = settings(conversations, train=replace(TRAIN, max_seq_length=4))
    with pytest.raises(UserError, match="No row is left"):
        find_rows("lora", short, tiny_llama, 1, read_data=True)
