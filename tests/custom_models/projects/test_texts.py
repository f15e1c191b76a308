"""Batches of texts: every text once, of similar length, the same for a seed; labels and lengths are checked."""

import json
from pathlib import Path

import pytest
import torch

from custom_models.projects.texts import Labelled, drawn, encode, loader, padded, read_labelled
from custom_models.projects.vocabulary import MASK, PAD, learn_vocabulary
from workflows.errors import UserError


def write(folder: Path, rows: list[dict], split: str = "train") -> Path:
    folder.mkdir(exist_ok=True)
    (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def rows(count: int = 100) -> list[Labelled]:
    lengths = torch.randint(1, 30, (count,), generator=torch.Generator().manual_seed(0)).tolist()
    return [Labelled(str(i), [i] * length, i % 2) for i, length in enumerate(lengths)]


def test_each_text_comes_once_an_epoch_in_another_order():
    batches = loader(rows(), 0, 8, seed=3)
    epochs = [[batch.ids[:, 0].tolist() for batch in batches] for _ in range(2)]
    for epoch in epochs:
        assert sorted(i for batch in epoch for i in batch) == list(range(100))
    assert epochs[0] != epochs[1] and len(batches) == 13
    assert epochs[0] == [batch.ids[:, 0].tolist() for batch in loader(rows(), 0, 8, seed=3)]
    assert epochs[0] != [batch.ids[:, 0].tolist() for batch in loader(rows(), 0, 8, seed=4)]


def test_batches_hold_texts_of_similar_length():
    waste = [1 - float(batch.lengths.sum()) / batch.ids.numel() for batch in loader(rows(), 0, 8, seed=3)]
    assert sum(waste) / len(waste) < 0.1


def test_padding_is_at_the_end():
    batch = padded([Labelled("a", [5, 6, 7], 1), Labelled("b", [8], 0)], pad_id=2)
    assert batch.ids.tolist() == [[5, 6, 7], [8, 2, 2]] and batch.lengths.tolist() == [3, 1]
    assert batch.labels.tolist() == [1, 0]


def test_a_long_text_is_cut_and_counted():
    tokenizer = learn_vocabulary(["a good film", "a bad film"] * 20, 256 + 2 + 6)
    found, cut = encode([("good " * 50, 1), ("bad", 0)], tokenizer, 10)
    assert cut == 1 and len(found[0].ids) == 10 and len(found[1].ids) < 10
    assert found[0].ids == tokenizer.encode("good " * 50).ids[:10]


def test_a_vocabulary_of_ones_own_has_its_special_tokens_last_and_knows_a_word_at_the_start():
    tokenizer = learn_vocabulary(["Film after film, a FILM"] * 5, 264)
    assert [tokenizer.token_to_id(token) for token in (PAD, MASK)] == [262, 263]
    assert tokenizer.encode("film").ids == tokenizer.encode("a Film").ids[1:]
    assert tokenizer.decode(tokenizer.encode("Ünïcode 漢字").ids) == " ünïcode 漢字"
    with pytest.raises(UserError, match="257 are too few"):
        learn_vocabulary(["a"], 257)


def test_labels_are_checked(tmp_path):
    data = write(tmp_path, [{"text": "a", "label": "good"}, {"text": "b", "label": "bad"}])
    assert read_labelled(data, "train") == ([("a", 1), ("b", 0)], ["bad", "good"])
    write(tmp_path, [{"text": "a", "label": "good"}, {"text": "b", "label": "fair"}], "test")
    with pytest.raises(UserError, match="row 2: the label 'fair' is none of bad, good"):
        read_labelled(data, "test", ["bad", "good"])
    write(tmp_path, [{"text": "a", "label": "good"}])
    with pytest.raises(UserError, match="one class only"):
        read_labelled(data, "train")
    write(tmp_path, [{"text": " ", "label": "good"}])
    with pytest.raises(UserError, match='line 1: "text" must be a text that is not empty'):
        read_labelled(data, "train")
    with pytest.raises(UserError, match="does not exist"):
        read_labelled(data, "validation")


def test_rows_are_drawn_from_all_over_and_always_the_same():
    rows = list(range(1000))
    some = drawn(rows, 50)
    assert some == drawn(rows, 50) == sorted(some) and len(set(some)) == 50
    assert max(some) > 900 and min(some) < 100
    assert drawn(rows, None) == drawn(rows, 5000) == rows
