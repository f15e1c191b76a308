"""Texts become token files once; batches are what they are said to be; texts that are too short or missing are told."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch

from custom_models.projects import gpt_data
from custom_models.projects.gpt_data import Corpus, Rows, TokenData, Windows, read_corpus, token_files
from workflows.errors import UserError


def corpus(*documents: str, held_out: str = "so on", identity: str = "1", ended: bool = True) -> Corpus:
    return Corpus("some", {"train": list(documents), "validation": [held_out]}, identity, ended)


def test_characters_of_one_text_are_nanogpts(tmp_path):
    (tmp_path / "a.txt").write_text("hello world, hello")
    files = token_files(read_corpus(str(tmp_path / "a.txt")), "characters", 0, tmp_path)
    tokenizer = files.tokenizer
    assert tokenizer.characters == " ,dehlorw" and files.vocab_size == 9
    whole = [*files.read("train"), *files.read("validation")]
    assert tokenizer.decode(whole) == "hello world, hello"
    assert files.tokens == {"train": 16, "validation": 2} == files.characters  # the first nine tenths


def test_tinyshakespeare_is_split_as_nanogpt_does(tmp_path):
    folder = os.environ.get("WORKFLOW_DATA")
    if not folder:
        pytest.skip("WORKFLOW_DATA is not set: no tinyshakespeare here")
    files = token_files(read_corpus("tinyshakespeare"), "characters", 0, tmp_path)
    assert files.vocab_size == 65 and files.tokens == {"train": 1_003_854, "validation": 111_540}
    assert files.read("train").dtype == np.uint16 and (files.folder / "train.bin").stat().st_size == 2 * 1_003_854
    assert files.tokenizer.decode(files.read("train")[:14]) == "First Citizen:"


@pytest.mark.parametrize("kind", ["characters", "bpe"])
def test_documents_end_and_may_look_like_the_end(tmp_path, kind):
    texts = corpus("a fine liver", "a <|endoftext|> liver", held_out="fine")
    files = token_files(texts, kind, 260, tmp_path)
    tokenizer, ids = files.tokenizer, files.read("train").tolist()
    end = "\n" if kind == "characters" else "<|endoftext|>"
    assert tokenizer.decode(ids) == f"a fine liver{end}a <|endoftext|> liver{end}"
    assert ids.count(tokenizer.encode(end, special="parse")[0] if kind == "bpe" else tokenizer.ids["\n"]) == 2
    assert files.characters["train"] == len("a fine liver") + len("a <|endoftext|> liver") + 2


def test_files_are_made_anew_only_if_text_or_tokenizer_are_others(tmp_path, monkeypatch):
    learned: list[str] = []
    learn = gpt_data._learn
    monkeypatch.setattr(gpt_data, "_learn", lambda *args: learned.append(args[1]) or learn(*args))
    texts = corpus("a liver, a lever, a river")
    first = token_files(texts, "bpe", 262, tmp_path)
    assert token_files(texts, "bpe", 262, tmp_path) == first and learned == ["bpe"]
    token_files(texts, "bpe", 263, tmp_path)
    token_files(texts, "characters", 0, tmp_path)
    assert learned == ["bpe", "bpe", "characters"]
    other = token_files(corpus("rivers and livers", identity="2"), "bpe", 262, tmp_path)
    assert learned[3:] == ["bpe"] and other.tokens != first.tokens
    assert token_files(texts, "bpe", 262, tmp_path).tokens == first.tokens and len(learned) == 5
    (first.folder / "train.bin").unlink()  # lost: made anew, too
    assert len(token_files(texts, "bpe", 262, tmp_path).read("train")) == first.tokens["train"]


def test_a_writing_that_was_stopped_leaves_what_was_there(tmp_path, monkeypatch):
    texts = corpus("a liver")
    token_files(texts, "characters", 0, tmp_path)
    before = {file.name: file.read_bytes() for file in (tmp_path / "some-characters").iterdir()}

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(gpt_data, "_write", stop)
    with pytest.raises(KeyboardInterrupt):
        token_files(corpus("a river", identity="2"), "characters", 0, tmp_path)
    assert {file.name: file.read_bytes() for file in (tmp_path / "some-characters").iterdir()} == before
    assert [file.name for file in tmp_path.iterdir() if file.is_dir()] == ["some-characters"]


def test_large_vocabularies_take_four_bytes():
    assert gpt_data._dtype(65_536) is np.uint16 and gpt_data._dtype(65_537) is np.uint32


def test_a_file_that_was_cut_short_is_told(tmp_path):
    files = token_files(corpus("a liver"), "characters", 0, tmp_path)
    (files.folder / "train.bin").write_bytes(b"\0\0")
    with pytest.raises(UserError, match=r"holds 1 tokens, not 8\. Delete"):
        files.read("train")


def test_definitions_are_shuffled_and_split(tmp_path, english):
    found = read_corpus("definitions")
    train, held = (list(found.splits[split]) for split in ("train", "validation"))
    assert sorted(train + held) == sorted(english.splitlines())
    assert len(held) == len(english.splitlines()) // 10 and held != english.splitlines()[-len(held) :]
    few = token_files(read_corpus("definitions", max_texts=20), "characters", 0, tmp_path)
    assert few.tokens["train"] == sum(map(len, train[:20])) + 20


def stories(folder: Path, column: str = "text", splits: tuple[str, ...] = ("train", "validation")) -> Path:
    """A folder laid out as roneneldan/TinyStories is on the Hub."""
    import datasets

    (folder / "data").mkdir(parents=True)
    for split in splits:
        rows = {column: [f"One day, {name} had a {split} story." for name in ("Lily", "Tom", "Ben")]}
        datasets.Dataset.from_dict(rows).to_parquet(folder / "data" / f"{split}-00000-of-00001.parquet")
    return folder


def test_stories_are_read_from_the_hubs_layout(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = stories(tmp_path / "stories")
    found = read_corpus(str(folder))
    assert list(found.splits["train"])[1] == "One day, Tom had a train story."
    assert list(found.splits["validation"]) == list(found.splits["validation"])  # to be gone through again
    asked: list[str] = []

    def from_hub(hub_id: str) -> tuple[datasets.DatasetDict, str]:
        asked.append(hub_id)
        return datasets.load_dataset(str(folder)), "commit"

    monkeypatch.setattr(gpt_data, "hub_splits", from_hub)
    hub = read_corpus("tinystories", max_texts=2)
    assert asked == ["roneneldan/TinyStories"] and hub.identity == "commit 2"
    assert hub.splits["train"] == list(found.splits["train"])[:2]
    files = token_files(hub, "bpe", 270, tmp_path / "tokens")
    assert files.tokenizer.decode(files.read("train")).count("<|endoftext|>") == 2


def test_stories_without_what_is_needed_are_told(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    with pytest.raises(UserError, match="folder without Parquet files"):
        read_corpus(str(tmp_path))
    with pytest.raises(UserError, match="no split train and no split validation with a column `text`"):
        read_corpus(str(stories(tmp_path / "other", column="story")))
    with pytest.raises(UserError, match="has no split validation"):
        read_corpus(str(stories(tmp_path / "half", splits=("train",))))


def test_batches_depend_on_seed_and_number_and_are_dealt_out():
    ids = np.arange(1000, dtype=np.uint16)
    rows = Rows(ids, context=8, batch_size=6, batches=5, seed=3)
    inputs, targets = rows[2]
    assert inputs.shape == targets.shape == (6, 8) and torch.equal(inputs + 1, targets)
    assert torch.equal(rows[2][0], inputs) and not torch.equal(rows[1][0], inputs)
    assert not torch.equal(Rows(ids, 8, 6, 5, seed=4)[2][0], inputs)
    dealt = [Rows(ids, 8, 6, 5, 3, rank, 2)[2][0] for rank in range(2)]
    assert torch.equal(torch.stack(dealt, dim=1).flatten(0, 1), inputs)
    last = Rows(np.arange(9), context=8, batch_size=2, batches=1, seed=0)[0]  # the only place there is
    assert torch.equal(last[1][0], torch.arange(1, 9))


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("length", [2, 8, 9, 10, 50, 57])
def test_validation_predicts_every_token_once(length, world_size):
    parts = [Windows(np.arange(length), context=8, rows=2, rank=r, world_size=world_size) for r in range(world_size)]
    assert len({len(part) for part in parts}) == 1  # processes that work together do as many steps
    targets = [t for part in parts for i in range(len(part)) for t in part[i][1].flatten().tolist()]
    assert sorted(targets) == list(range(1, length))
    for part in parts:
        for i in range(len(part)):
            inputs, following = part[i]
            assert torch.equal(inputs + 1, following) and inputs.shape[1] <= 8


def test_texts_that_are_too_short_are_told(tmp_path):
    (tmp_path / "empty.txt").touch()
    with pytest.raises(UserError, match=r"empty\.txt is empty"):
        read_corpus(str(tmp_path / "empty.txt"))
    with pytest.raises(UserError, match="does not exist"):
        read_corpus(str(tmp_path / "none.txt"))
    (tmp_path / "short.txt").write_text("hello world, hello")
    files = token_files(read_corpus(str(tmp_path / "short.txt")), "characters", 0, tmp_path)
    TokenData(files, context=15, batch_size=1, batches=1)
    with pytest.raises(
        UserError, match=r"train text in .* has 16 tokens, and at least 17 are needed for a context of 16"
    ):
        TokenData(files, context=16, batch_size=1, batches=1)
    (tmp_path / "tiny.txt").write_text("hello")
    tiny = token_files(read_corpus(str(tmp_path / "tiny.txt")), "characters", 0, tmp_path)
    with pytest.raises(UserError, match=r"validation text in .* has 1 tokens"):
        TokenData(tiny, context=2, batch_size=1, batches=1)


def test_settings_that_cannot_be_are_told(tmp_path, monkeypatch):
    monkeypatch.delenv("WORKFLOW_DATA", raising=False)
    with pytest.raises(UserError, match="WORKFLOW_DATA, which is not set"):
        read_corpus("tinyshakespeare")
    with pytest.raises(UserError, match="vocab_size must be at least 257"):
        token_files(corpus("a liver"), "bpe", 256, tmp_path)
    assert not list(tmp_path.glob("*/meta.json"))


def test_the_first_of_many_texts_are_not_asked_for_of_a_single_one(tmp_path):
    (tmp_path / "a.txt").write_text("hello world, hello")
    with pytest.raises(UserError, match=r"--max_texts takes the first of many texts, and .*a\.txt is a single one"):
        read_corpus(str(tmp_path / "a.txt"), max_texts=3)
