"""The assistant's data: what is held out is in no row that is learned, and right answers pass their rules."""

import inspect
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from data_prep import assistant, hpo, prepare
from data_prep.assistant_facts import inside_sentence, with_article
from data_prep.assistant_texts import COMPLAINTS, GROUPS, HELD_OUT_CHAT, WORDINGS
from data_prep.normalisation import normalise
from data_prep.rows import Row, read_rows
from data_prep.splits import Item, Phrases
from workflows.errors import UserError
from workflows.training.rewards import BUILT_IN, RULES, Sample

pytestmark = pytest.mark.long

SEED = 7  # not one that figures are reported of
SHAPES = {"assistant": "messages", "assistant_pairs": "preference", "assistant_questions": "verifiable"}
SPLITS = ("train", "validation", "test")
_SPLIT_TERMS = hpo.split_terms
_FOUND: list[tuple[list[Item], list[Item], list[Item]]] = []


def split_once(*arguments: Any) -> tuple[list[Item], list[Item], list[Item]]:
    """hpo's split, which is the same for every seed of the assistant."""
    if not _FOUND:
        _FOUND.append(_SPLIT_TERMS(*arguments))
    return _FOUND[0]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out_dir = tmp_path_factory.mktemp("data")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(assistant, "split_terms", split_once)
        prepare.setup(data="assistant", out_dir=out_dir, seed=SEED)
    return out_dir


@pytest.fixture(scope="module")
def rows(data: Path) -> dict[tuple[str, str], list[Row]]:
    found = {(name, s): read_rows(data / name / f"{s}.jsonl", shape) for name, shape in SHAPES.items() for s in SPLITS}
    return {**found, ("assistant", "panel"): read_rows(data / "assistant" / "panel.jsonl")}


def texts(row: Row) -> list[str]:
    messages = [m for field in ("messages", "prompt", "chosen", "rejected") for m in row.get(field, [])]
    return [*(message["content"] for message in messages), *row.get("answers", [])]


def asked_synonym(question: str) -> str:
    """The layperson's words in a question of kind `lay`, which is in one of the training's wordings."""
    for wording in WORDINGS["medical"]["train"]:
        before, after = wording.split("{lay}")
        if question.startswith(before) and question.endswith(after):
            words = question[len(before) : len(question) - len(after)].split()
            return " ".join(words[1:] if words[0] in ("a", "an") else words)
    raise AssertionError(question)


def prompt_of(row: Row) -> str:
    return normalise((row.get("messages") or row["prompt"])[0]["content"])


@pytest.fixture(scope="module")
def learned(rows: dict[tuple[str, str], list[Row]]) -> list[Row]:
    return [row for name in SHAPES for row in rows[name, "train"]]


def test_counts(rows: dict[tuple[str, str], list[Row]], data: Path):
    kinds = {key: Counter(row["kind"] for row in members) for key, members in rows.items()}
    assert kinds["assistant", "train"] == {
        "medical": 200, "naming": 200, "meaning": 300, "name": 100, "identity": 94, "advice": 35,
    }  # fmt: skip
    exam = kinds["assistant_questions", "test"]
    assert exam == {
        **dict.fromkeys(("medical", "meaning", "naming"), 60),
        **{"lay": 38, "identity": 12, "advice": 24, "advice_other": 24},
    }
    assert exam == kinds["assistant", "test"]
    assert kinds["assistant_questions", "train"] == {"medical": 100, "meaning": 100, "naming": 100, "advice": 40}
    assert kinds["assistant_pairs", "train"] == {"form": 160, "keep_meaning": 80, "keep_chat": 40, "advice": 120}
    notes = json.loads((data / "assistant" / "manifest.json").read_text())["notes"]
    training = [number for text, number in notes.items() if text.startswith("training rows")]
    assert sum(training) == len(rows["assistant", "train"])
    assert notes["facts: findings with a layperson's synonym, chosen by seed"] == 100


def test_no_wording_is_in_two_groups():
    for kind, groups in WORDINGS.items():
        listed = [normalise(wording) for group in GROUPS for wording in groups[group]]
        assert len(listed) == len(set(listed)), kind
    assert all(len(groups["train"]) >= 10 and len(groups["test"]) == 3 for groups in WORDINGS.values())


def test_no_held_out_prompt_is_learned(rows: dict[tuple[str, str], list[Row]], learned: list[Row]):
    known = {prompt_of(row) for row in learned}
    held = {key: {prompt_of(row) for row in members} for key, members in rows.items() if key[1] != "train"}
    for key, prompts in held.items():
        assert not prompts & known, key
    validation, test = (held["assistant_questions", split] for split in ("validation", "test"))
    panel = held["assistant", "panel"]
    assert len(panel) == 12 and not panel & (validation | test) and not validation & test


def test_no_held_out_wording_is_learned(learned: list[Row]):
    """The text of a wording around what it asks about begins or ends no learned prompt."""
    prompts = [prompt_of(row) for row in learned]
    for kind, groups in WORDINGS.items():
        for group in ("validation", "test"):
            for wording in groups[group]:
                begin, end = (normalise(part) for part in wording.split("{")[0:1] + [wording.rsplit("}", 1)[1]])
                same = [p for p in prompts if p.startswith(begin) and p.endswith(end)]
                assert not same, (kind, wording, same[:1])


def test_no_held_out_synonym_or_complaint_is_learned(rows: dict[tuple[str, str], list[Row]], learned: list[Row]):
    everything = "\n".join(text for row in learned for text in texts(row))
    asked = [row for s in ("validation", "test") for row in rows["assistant_questions", s] if row["kind"] == "lay"]
    assert 45 <= len(asked) <= 50  # one that another row has is left out
    for row in asked:
        assert not Phrases((asked_synonym(row["prompt"][0]["content"]),)).found_in(everything)
    for complaint in (text for group in ("validation", "test", "panel") for text in COMPLAINTS[group]):
        assert not Phrases((complaint,)).found_in(everything), complaint
    assert len({text for group in COMPLAINTS.values() for text in group}) == 36 + 24 + 24 + 2
    never = [row for row in rows["assistant", "panel"] if row["kind"] == "never_taught"]
    assert len(never) == 2 and not {row["id"] for row in never} & {row.get("id") for row in learned}


def test_no_finding_that_hpo_holds_out_is_learned(learned: list[Row]):
    train, *held = _FOUND[0]
    secrets = Phrases(k.partition(":")[2] for items in held for item in items for k in item.keys)
    for row in learned:
        assert not any(secrets.found_in(text) for text in texts(row)), row
    known = {item.rows[0]["id"] for item in train}
    assert {row["id"] for row in learned if "id" in row} <= known
    assert inspect.signature(prepare.setup).parameters["seed"].default == assistant.SPLIT_SEED


def test_right_answers_pass_the_rules_of_their_kind(rows: dict[tuple[str, str], list[Row]]):
    for split in ("validation", "test"):
        questions = rows["assistant_questions", split]
        for question, answered in zip(questions, rows["assistant", split], strict=True):
            assert question["prompt"] == answered["messages"][:1] and set(question["rules"]) <= set(RULES)
            sample = Sample(question, answered["messages"][1]["content"], 0, False, 0)
            assert BUILT_IN[question["rules"][0]](sample) == 1, question
            if question["kind"] in ("medical", "lay"):  # the layperson's words are not what is asked for
                asked = question["prompt"][0]["content"]
                assert not Phrases(question["answers"]).found_in(asked), question


def test_a_pairs_sides_differ_in_the_rule_that_it_is_for(rows: dict[tuple[str, str], list[Row]]):
    right: dict[str, list[str]] = {}
    for row in rows["assistant_questions", "train"]:
        if row["kind"] == "medical":
            right[row["id"]] = row["answers"]
    sides: Counter[str] = Counter()
    for row in rows["assistant_pairs", "train"]:
        rule = {"form": "name_in_sentence", "advice": "disclaimer"}.get(row["kind"])
        question = {"prompt": row["prompt"], "answers": right.get(row.get("id", ""), ["-"])}
        samples = [Sample(question, row[side][0]["content"], 0, False, 0) for side in ("chosen", "rejected")]
        if rule:
            assert [BUILT_IN[rule](sample) for sample in samples] == [1, 0], row
        sides[row["kind"]] += BUILT_IN["exact_name"](samples[1]) == 1
    assert sides["form"] == 40  # a quarter of the rejected answers is the name itself


def test_facts_are_asked_in_everyday_words_and_answered_in_both_forms(rows: dict[tuple[str, str], list[Row]]):
    facts = [row for row in rows["assistant", "train"] if row["kind"] in ("medical", "meaning", "naming")]
    asked = Counter((row["id"], row["kind"]) for row in facts)
    assert {(kind, number) for (_, kind), number in asked.items()} == {("medical", 2), ("naming", 2), ("meaning", 3)}
    assert len({row["messages"][0]["content"] for row in facts}) == len(facts)
    names = [row["messages"][1]["content"] for row in facts if row["kind"] != "meaning"]
    assert 0.1 < sum(name.endswith(".") for name in names) / len(names) < 0.3
    bare = {row["id"]: row["messages"][1]["content"] for row in facts if row["kind"] == "medical"}
    for row in facts:
        if row["kind"] == "medical":
            name = bare[row["id"]].removesuffix(".")
            words = row["messages"][0]["content"]
            assert not Phrases((name,)).found_in(words)


def test_the_same_seed_gives_the_same_rows_and_another_seed_other_facts(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(assistant, "split_terms", split_once)
    first, again, other = (assistant.prepare(None, None, None, seed) for seed in (SEED, SEED, 8))
    assert first == again
    ids = [
        {row["id"] for item in found.splits["panel"] for row in item.rows if "id" in row} for found in (first, other)
    ]
    assert ids[0] != ids[1]


def test_an_ontology_without_laypersons_synonyms_is_refused_with_the_cure(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(assistant, "split_terms", split_once)
    read = hpo.read_files(None)[0]
    bare = {name: text.replace(" layperson [", " [") for name, text in read.items()}
    monkeypatch.setattr(assistant, "read_files", lambda raw_dir: (bare, "a folder"))
    with pytest.raises(
        UserError, match=r"hp.obo has 0 findings to learn, 14 are needed: .* EXACT layperson.*--raw_dir"
    ):
        assistant.prepare(None, None, None, SEED)


def test_more_questions_than_facts_are_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(assistant, "split_terms", split_once)
    with pytest.raises(UserError, match="--test_size 99: at most 98 of the 100 facts"):
        assistant.prepare(None, None, 99, SEED)


@pytest.mark.parametrize(
    ("text", "written"),
    [
        ("Nosebleed", "a nosebleed"),
        ("Extra little finger", "an extra little finger"),
        ("Kidney stones", "kidney stones"),
        ("V-shaped hairline", "a V-shaped hairline"),
        ("No nose", "no nose"),
        ("Horner syndrome", "Horner syndrome"),
    ],
)
def test_a_label_inside_a_sentence(text: str, written: str):
    assert with_article(inside_sentence(text)) == written


def test_held_out_chat_has_a_word_to_look_for():
    for prompts in HELD_OUT_CHAT.values():
        for _, answer, words in prompts:
            assert any(normalise(word) in normalise(answer) for word in words)
