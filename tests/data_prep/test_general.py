"""Everyday prompts: distinct, split without overlap, and none of those that are asked elsewhere."""

from pathlib import Path

import pytest

from data_prep import general
from data_prep.assistant_texts import CHAT, HELD_OUT_CHAT
from data_prep.normalisation import normalise
from data_prep.prepare import setup
from data_prep.rows import read_rows
from workflows.errors import UserError
from workflows.training.questions import read_questions

PROMPTS = [normalise(text) for texts in general.PROMPTS.values() for text in texts]


def test_prompts_are_distinct_and_not_those_of_the_assistant():
    assert len(PROMPTS) == len(set(PROMPTS)) == 180
    asked = [prompt for prompt, _ in CHAT] + [row[0] for rows in HELD_OUT_CHAT.values() for row in rows]
    assert not {normalise(prompt) for prompt in asked} & set(PROMPTS)


def test_splits_share_no_prompt_and_can_be_asked(tmp_path: Path):
    setup(data="general", out_dir=tmp_path)
    prompts = {
        split: [row["prompt"][-1]["content"] for row in read_rows(tmp_path / "general" / f"{split}.jsonl", "prompts")]
        for split in ("train", "validation", "test")
    }
    assert {split: len(texts) for split, texts in prompts.items()} == {"train": 130, "validation": 25, "test": 25}
    assert sorted(normalise(text) for texts in prompts.values() for text in texts) == sorted(PROMPTS)
    assert len(read_questions(tmp_path / "general" / "test.jsonl", (), None)) == 25  # what `teach` asks


def test_a_folder_of_raw_files_is_refused(tmp_path: Path):
    with pytest.raises(UserError, match="--raw_dir does not go with --data general"):
        setup(data="general", raw_dir=tmp_path, out_dir=tmp_path / "data")
    assert not (tmp_path / "data").exists()
