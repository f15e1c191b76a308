"""Finished results survive a kill, and never outlive the model they belong to."""

import pytest

from tests.workflows.conftest import file_size_limit
from workflows.errors import UserError
from workflows.evaluation.cache import ResultCache, request_key

IDENTITY = {"model": "abc", "precision": "32-true"}


def filled(path):
    cache = ResultCache(path, IDENTITY)
    cache.add({"a": [-1.5, True], "b": [-0.1, False]}, seconds=2.0, tokens=30)
    cache.add({"c": "text\nwith lines"}, seconds=1.0, tokens=12)
    return cache


def test_a_reopened_cache_is_the_same(tmp_path):
    filled(tmp_path / "cache.jsonl")
    again = ResultCache(tmp_path / "cache.jsonl", IDENTITY)
    assert (len(again), again["a"], again["c"]) == (3, [-1.5, True], "text\nwith lines")
    assert (again.seconds, again.tokens) == (3.0, 42)
    assert again.has(["a", "b"]) and not again.has(["a", "d"])


@pytest.mark.parametrize("cut", [1, 10, 40])
def test_a_half_written_last_line_is_cut_off(tmp_path, cut):
    path = tmp_path / "cache.jsonl"
    filled(path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-cut])
    again = ResultCache(path, IDENTITY)
    assert again.has(["a", "b"]) and not again.has(["c"])
    assert again.tokens == 30
    again.add({"c": "text\nwith lines"}, seconds=1.0, tokens=12)
    assert path.read_bytes() == whole


@pytest.mark.parametrize("damage", [b"", b"not json\n", b'{"identity": {"model": "other"}}\n', b"\x00\xff"])
def test_a_file_of_something_else_is_replaced(tmp_path, damage):
    path = tmp_path / "cache.jsonl"
    filled(path)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(damage + b"".join(lines[1:]))
    assert len(ResultCache(path, IDENTITY)) == 0
    assert len(path.read_bytes().splitlines()) == 1


def test_delete_and_memory_only(tmp_path):
    cache = filled(tmp_path / "cache.jsonl")
    cache.delete()
    assert not list(tmp_path.iterdir())
    assert filled(None).has(["a", "b"])


def test_a_unit_of_other_requests_is_another_one(tmp_path):
    cache = filled(tmp_path / "cache.jsonl")
    assert not cache.has(["a"]) and not cache.has(["a", "b", "c"])
    cache.add({"a": [-1.4999, True]}, seconds=1.0, tokens=10)  # alone in its row, it differs in the last bits
    again = ResultCache(tmp_path / "cache.jsonl", IDENTITY)
    assert again["a"] == [-1.4999, True]
    assert again.has(["a", "b"]) and again["a"] == [-1.5, True]
    assert again.has(["a"]) and again["a"] == [-1.4999, True]


def test_keys_tell_requests_apart():
    keys = {request_key("loglikelihood", [1, 2], [3]), request_key("loglikelihood", [1], [2, 3])}
    keys |= {request_key("generate", [1, 2], [3]), request_key("generate", [1, 2], {"top_p": 1.0})}
    assert len(keys) == 4


def test_a_full_disk_is_one_message_and_what_was_finished_stays(tmp_path):
    path = tmp_path / "cache.jsonl"
    cache = filled(path)
    with file_size_limit(path.stat().st_size + 20), pytest.raises(UserError, match=r"Could not write .*cache\.jsonl"):
        cache.add({"d": "x" * 50_000}, seconds=1.0, tokens=1)
    again = ResultCache(path, IDENTITY)
    assert len(again) == 3 and again.has(["a", "b"]) and again.has(["c"])
