"""The bench of the distilled student: what it reads, and what it says without one."""

import json

import pytest
import torch

from bench import distill, harness
from custom_models.encoder import Encoder, bert
from custom_models.encoder_checkpoint import encoder_directory, tokenizer_of
from custom_models.projects.classifier import TextClassifier
from data_prep.rows import write_rows
from workflows.errors import UserError


@pytest.fixture
def folders(tmp_path):
    """A teacher of two layers, a student of one, and texts."""
    torch.manual_seed(0)
    tokenizer = tokenizer_of(encoder_directory("minilm"))
    for name, n_layer in (("teacher", 2), ("student", 1)):
        model = TextClassifier(Encoder(bert(width=32, n_layer=n_layer, n_head=2, inner_width=32)), ["bad", "good"])
        model.save(tokenizer, tmp_path / name, "texts")
    (tmp_path / "texts").mkdir()
    rows = [{"text": f"a {word} film", "label": word} for word in ("good", "bad") * 10]
    write_rows(tmp_path / "texts" / "test.jsonl", rows)
    return tmp_path


def test_both_read_the_same_texts(folders, monkeypatch, capsys):
    def alternate(module, contenders, arguments, rounds):
        given = dict(zip(arguments[::2], arguments[1::2], strict=True))
        places = {"ours": folders / "student", "teacher": folders / "teacher"}
        assert {str(places["ours"]), str(places["teacher"])} == {given["--student_dir"], given["--teacher_dir"]}
        texts = int(given["--texts"])
        return {name: [{**distill.read(places[name], folders / "texts", texts), "peak_bytes": 1}] * rounds
                for name in contenders}  # fmt: skip

    monkeypatch.setattr(distill, "alternate", alternate)
    monkeypatch.setattr(harness, "REPORTS", folders)
    distill.setup(folders / "student", folders / "teacher", folders / "texts", texts=12, rounds=2)
    reported = json.loads((folders / "distill.json").read_text())
    assert reported["settings"] == {"data": "texts", "texts": 12, "rounds": 2}
    sizes = reported["non_embedding_parameters"]
    assert 0.45 < sizes["ours"] / sizes["teacher"] < 0.6
    assert all(round(share * 12) == pytest.approx(share * 12) for share in reported["accuracy"].values())
    assert "times as fast (promised: 1.6)" in capsys.readouterr().out


def test_without_a_student_it_says_how_to_get_one(tmp_path):
    with pytest.raises(UserError, match="run make distill first"):
        distill.setup(tmp_path / "none", tmp_path / "none either")
