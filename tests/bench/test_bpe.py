"""The bench of byte-pair encoding: its contenders do the same work, and what it asks of ours is computed as it says."""

import json

import pytest

from bench import bpe, harness
from workflows.errors import UserError

TEXT = "To be, or not to be, that is the question: whether 'tis nobler in the mind to suffer.\n" * 30


@pytest.fixture
def here(monkeypatch, tmp_path):
    """Contenders run in this process, on a small text, and the report goes to a folder of the test's."""

    def run(module, contender, arguments):
        given = dict(zip(arguments[::2], arguments[1::2], strict=True))
        encoding = given.get("--task") == "encode"
        done = bpe.encode_once(contender, TEXT) if encoding else bpe.train_once(contender, TEXT, int(given["--merges"]))
        return {**json.loads(json.dumps(done)), "peak_bytes": 1}

    def alternate(module, contenders, arguments, rounds):
        return {name: [run(module, name, arguments) for _ in range(rounds)] for name in contenders}

    monkeypatch.setattr(bpe, "english", lambda megabytes: (TEXT, "a test's"))
    monkeypatch.setattr(bpe, "run_contender", run)
    monkeypatch.setattr(bpe, "alternate", alternate)
    monkeypatch.setattr(harness, "REPORTS", tmp_path)
    monkeypatch.setattr(bpe, "LEAST_FASTER_THAN_TEXTBOOK", 0)
    monkeypatch.setattr(bpe, "MOST_SLOWER_THAN_TOKENIZERS", 10**9)
    return tmp_path


def test_all_learn_and_encode_the_same_and_the_report_says_how_fast(here):
    bpe.setup(merges=40, rounds=2)
    reported = json.loads((here / "bpe.json").read_text())
    seconds = reported["seconds"]
    assert reported["settings"]["bytes"] == len(TEXT) and set(reported["ratio"]) == {"textbook", "tokenizers"}
    assert reported["peers"]["textbook"]["median"] == pytest.approx(len(TEXT) / 1e6 / seconds["textbook"][0])
    assert reported["vocabulary_shared"]["tokenizers"] > 0.9  # ties are broken in another way
    assert set(reported["encoding"]["peers"]) == {"tiktoken", "tokenizers"}


def test_a_slow_training_and_other_merges_are_told(here, monkeypatch):
    monkeypatch.setattr(bpe, "LEAST_FASTER_THAN_TEXTBOOK", 10**9)
    with pytest.raises(UserError, match=r"x the textbook loop and .*x tokenizers; at least 1000000000x"):
        bpe.setup(merges=10, rounds=1)
    monkeypatch.setattr(bpe, "learn_textbook", lambda merges: lambda text: ([(1, 2)], []))
    with pytest.raises(UserError, match="learned different merges"):
        bpe.setup(merges=10, rounds=1)


def test_a_text_that_is_not_there_is_told(monkeypatch):
    monkeypatch.delenv("WORKFLOW_DATA", raising=False)
    with pytest.raises(UserError, match=r"--megabytes must be above 0 and at most \d\.\d\d, the size of definitions"):
        bpe.english(1000.0)
