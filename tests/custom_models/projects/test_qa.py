"""Answers found in made-up lists of names, scores as SQuAD's script counts them, and bad input."""

import json
import random
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.data.metrics.squad_metrics import compute_exact, compute_f1

from custom_models.__main__ import PROJECTS
from custom_models.encoder import Encoder, bert
from custom_models.encoder_checkpoint import encoder_directory, save_encoder, tokenizer_of
from custom_models.projects import qa
from custom_models.projects.answers import commonest, exact, f1, first_phrase_of_likest_sentence, likest_phrase
from custom_models.projects.fitting import FitArgs
from custom_models.projects.qa import Reader, encode_question
from custom_models.projects.shape import Shape
from tests.custom_models.projects.test_texts import write
from workflows.__main__ import main
from workflows.errors import UserError

pytestmark = pytest.mark.long

NAMES = ["anna", "bert", "carl", "dora", "emil", "fritz", "gerd", "hans"]
NUMBERS = ["three", "seven", "twelve", "eighty", "forty", "nine"]
SHAPE = Shape(vocab_size=290, width=32, n_layer=2, n_head=2, inner_width=64, n_position=64, dropout=0.0)
FIT = FitArgs(batch_size=16, learning_rate=5e-3, max_epochs=16, patience=16)


def register(chance: random.Random, entries: int = 6) -> dict[str, Any]:
    """Names, and among them one number, which is asked for."""
    words = chance.choices(NAMES, k=entries)
    at, number = chance.randrange(entries), chance.choice(NUMBERS)
    words[at] = number
    start = sum(len(word) + 2 for word in words[:at])
    answers = {"text": [number], "answer_start": [start]}
    return {"question": "Which number is it?", "context": ", ".join(words), "answers": answers}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    chance, folder = random.Random(0), tmp_path_factory.mktemp("data") / "registers"
    for split, count in (("train", 160), ("validation", 32), ("test", 32)):
        write(folder, [register(chance) for _ in range(count)], split)
    return folder


@pytest.fixture(scope="module")
def trained(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out_dir = tmp_path_factory.mktemp("qa")
    qa.setup(data, out_dir=out_dir, shape=SHAPE, fit=FIT, seeds=[1])
    return out_dir


def numbers(out_dir: Path) -> dict[str, float]:
    return {row["name"]: row["value"] for row in json.loads((out_dir / "metrics.json").read_text())["metrics"]}


def test_it_learns_to_find_what_no_baseline_finds(trained):
    found = numbers(trained)
    assert found["exact"] > 2 * max(found["exact_commonest_answer"], found["exact_likest_phrase"])  # 0.91, 0.25, 0.16
    assert found["f1"] >= found["exact"] and "f1_likest_sentence" in found
    settings = json.loads((trained / "metrics.json").read_text())["settings"]
    assert settings["max_answer_tokens"] == 30


def test_it_answers_from_a_file_longer_than_it_reads_at_once(trained, tmp_path, capsys):
    file = tmp_path / "context.txt"
    long = register(random.Random(3), entries=60)
    file.write_text(long["context"])
    args = [
        "answer",
        "--checkpoint_dir",
        str(trained / "final"),
        "--question",
        "Which number is it?",
        "--context",
        str(file),
    ]
    assert main([*args, "--context", str(file)], PROJECTS, "custom_models") == 0
    told, (wanted,) = capsys.readouterr().out, long["answers"]["text"]
    found = told.splitlines()[0]
    assert len(found) > 1 and wanted.startswith(found) and f">{found}<" in told  # the only number of 60 words


def test_windows_keep_every_answer_and_its_place(trained):
    _, reader, _ = qa.load_finder(trained / "final")
    chance = random.Random(0)
    for _ in range(20):
        row = register(chance, entries=40)
        question = encode_question(row, reader)
        assert len(question.windows) > 2 and not question.cut
        found = [
            (question.offsets[span[0] - begin + first][0], question.offsets[span[1] - begin + first][1])
            for (_, begin, span), first in zip(question.windows, question.firsts, strict=True)
            if span != (0, 0)
        ]
        assert found and {row["context"][a:b].strip() for a, b in found} == {row["answers"]["text"][0]}
        assert all(len(ids) <= reader.longest for ids, _, _ in question.windows)


def test_weights_of_a_pretrained_encoder_are_where_training_begins(data, tmp_path):
    torch.manual_seed(0)
    encoder = Encoder(bert(width=32, n_layer=2, n_head=2, inner_width=32, n_position=40))
    save_encoder(encoder, encoder.config, tokenizer_of(encoder_directory("minilm")), tmp_path / "encoder")
    qa.setup(
        data, str(tmp_path / "encoder"), tmp_path / "out", fit=FitArgs(16, max_epochs=1), max_rows=32, max_test_rows=8
    )
    model, reader, most = qa.load_finder(tmp_path / "out" / "final")
    assert reader.frame == (101, 102) and most == 30 and model.encoder.config.pooler is False


def test_scores_are_squads_own():
    chance = random.Random(0)
    words = ["the", "a", "Cat", "cat,", "dog", "an", "sat.", "on"]
    for _ in range(300):
        answer, wanted = (" ".join(chance.choices(words, k=chance.randint(1, 4))) for _ in range(2))
        assert exact(answer, [wanted]) == compute_exact(wanted, answer)
        assert f1(answer, [wanted]) == pytest.approx(compute_f1(wanted, answer))
    assert f1("cat", ["dog", "the cat"]) == exact("cat", ["dog", "the cat"]) == 1.0


def test_baselines():
    assert commonest(["a", "b", "b"]) == "b"
    assert (
        likest_phrase("Which sign is a fever of the brain?", "Pain (ache), a kind of sign. Brain fever.")
        == "Brain fever"
    )
    assert likest_phrase("x", "...") == first_phrase_of_likest_sentence("x", "...") == "..."
    entries = "Ataxia (also Unsteady gait), a kind of sign. Pyrexia (also Heat), a kind of raised fever.\nCramp."
    asked = "Which kind of fever is raised?"
    assert first_phrase_of_likest_sentence(asked, entries) == "Pyrexia"
    assert likest_phrase(asked, entries) == "a kind of raised fever"


@pytest.mark.parametrize(
    ("name", "value"),
    [("max_answer_tokens", None), ("max_answer_tokens", "ten"), ("frame", [1]), ("frame", [0, 100_000])],
)
def test_a_damaged_checkpoint_is_told(trained, tmp_path, name, value):
    shutil.copytree(trained / "final", tmp_path / "final")
    config = json.loads((tmp_path / "final" / "config.json").read_text())
    config = {key: entry for key, entry in {**config, name: value}.items() if entry is not None}
    (tmp_path / "final" / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"config\.json is damaged: frame or max_answer_tokens"):
        qa.load_finder(tmp_path / "final")


def test_bad_input_is_told_in_one_message(trained, data, tmp_path, capsys):
    file = tmp_path / "context.txt"
    file.write_text("anna, seven.")
    with pytest.raises(UserError, match="The question is empty"):
        qa.answer(trained / "final", " ", file)
    qa.answer(trained / "final", "which number is it " * 40, file)
    assert "read without its end" in capsys.readouterr().out
    file.write_text(" \n")
    with pytest.raises(UserError, match="is empty: there is nothing to answer from"):
        qa.answer(trained / "final", "Who?", file)
    with pytest.raises(UserError, match="holds no model"):
        qa.answer(tmp_path, "Who?", file)
    with pytest.raises(UserError, match="3 problems"):
        qa.setup(data, fit=FitArgs(batch_size=0), seeds=[], max_answer_tokens=0)
    write(tmp_path / "bad", [{**register(random.Random(0)), "answers": {"text": ["zoe"], "answer_start": [3]}}])
    with pytest.raises(UserError, match=r"train\.jsonl, line 1: the answer 'zoe' does not stand in the context at 3"):
        qa.setup(tmp_path / "bad", out_dir=tmp_path)
    with pytest.raises(UserError, match="at least 5 positions, not 4"):
        qa.setup(data, out_dir=tmp_path, shape=replace(SHAPE, n_position=4))
    reader = Reader(tokenizer_of(trained / "final"), (0, 1), 64)
    with pytest.raises(UserError, match="question or its context is empty"):
        encode_question({"question": "who", "context": ""}, reader)
