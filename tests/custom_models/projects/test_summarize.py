"""The summarisers on made-up documents, of which the sentence with the finding is the summary, and on 20 pages."""

import json
import random
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from custom_models.__main__ import PROJECTS
from custom_models.encoder import Encoder, bert
from custom_models.encoder_checkpoint import encoder_directory, load_encoder, save_encoder, tokenizer_of
from custom_models.projects import abstractive, summarize
from custom_models.projects.documents import encode_documents
from custom_models.projects.fitting import FitArgs
from custom_models.projects.summarize import freeze, load_summarizer
from custom_models.tokenization.words import _learned, punkt_is_installed
from tests.custom_models.projects.test_texts import write
from workflows.__main__ import main
from workflows.errors import UserError

pytestmark = pytest.mark.long

WORDS = ["the", "a", "of", "film", "plot", "scene", "actor", "with", "and", "then", "there", "was"]
FIT = FitArgs(batch_size=8, learning_rate=5e-3, max_epochs=8, patience=8)


def document(chance: random.Random) -> dict[str, Any]:
    sentences = [" ".join(chance.choices(WORDS, k=5)) + "." for _ in range(chance.randint(2, 5))]
    found = f"we found {chance.choice(['fever', 'pain'])} {' '.join(chance.choices(WORDS, k=2))}."
    sentences.insert(chance.randrange(len(sentences) + 1), found)
    return {"sentences": sentences, "summaries": [found]}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    chance, folder = random.Random(0), tmp_path_factory.mktemp("data") / "findings"
    write(folder, [*(document(chance) for _ in range(96)), {"sentences": ["One."], "summaries": ["One."]}], "train")
    write(folder, [document(chance) for _ in range(24)], "validation")
    write(folder, [*(document(chance) for _ in range(23)), {"sentences": ["One."], "summaries": ["One."]}], "test")
    return folder


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    made = Encoder(bert(width=32, n_layer=2, n_head=2, inner_width=32, n_position=40))
    folder = tmp_path_factory.mktemp("encoder") / "tiny"
    save_encoder(made, made.config, tokenizer_of(encoder_directory("minilm")), folder)
    return folder


@pytest.fixture(scope="module")
def trained(data: Path, encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out_dir = tmp_path_factory.mktemp("summarize")
    summarize.setup(data, encoder=str(encoder), out_dir=out_dir, n_layer=1, pooling="mean", fit=FIT, seeds=[1, 2])
    return out_dir


def numbers(out_dir: Path) -> dict[str, Any]:
    found = json.loads((out_dir / "metrics.json").read_text())
    return {**found, **{row["name"]: row for row in found["metrics"]}}


def test_it_learns_to_choose_what_the_oracle_chooses(trained):
    found = numbers(trained)
    assert found["oracle_rouge1"]["value"] == 1.0 and found["oracle_rouge1"]["n"] == 24
    assert found["extractive_rouge1"]["value"] > 0.9 > found["lead1_rouge1"]["value"]
    low, high = found["extractive_rouge1"]["interval"]
    assert low <= found["extractive_rouge1"]["value"] <= high and set(found["seeds"]) == {"1", "2"}


def test_a_text_is_summarised_with_the_chosen_sentences_marked(trained, tmp_path, capsys):
    file = tmp_path / "text.txt"
    file.write_text("The film was then there. A plot of the scene.\n\nWe found fever with film.\n\nAnd a scene was.\n")
    args = ["summary", "--checkpoint_dir", str(trained / "final"), "--file", str(file)]
    assert main(args, PROJECTS, "custom_models") == 0
    told = capsys.readouterr().out
    assert told.startswith("We found fever with film.\n\n") and "\n> We found fever with film.\n" in told
    assert "\n  And a scene was." in told and told.count("\n> ") == 1
    assert main([*args, "--n_sentences", "2"], PROJECTS, "custom_models") == 0
    assert capsys.readouterr().out.count("\n> ") == 2


def test_the_ontology_is_read_only_where_sentence_ends_must_be_learned(trained, tmp_path, monkeypatch, capsys):
    file, read = tmp_path / "text.txt", []
    file.write_text("The film was then there. A plot of the scene.")
    monkeypatch.setattr("custom_models.demo.definitions", lambda: read.append(1) or "It rains. ")
    summarize.summary(trained / "final", file)
    assert bool(read) != punkt_is_installed()
    read.clear()
    monkeypatch.setattr("custom_models.tokenization.words.punkt_is_installed", lambda: True)
    monkeypatch.setattr("custom_models.tokenization.words._installed", lambda language: _learned("It rains. "))
    summarize.summary(trained / "final", file)
    assert not read and "> " in capsys.readouterr().out


def test_bad_texts_are_told_in_one_message(trained, tmp_path, capsys):
    file, folder = tmp_path / "text.txt", trained / "final"
    for content, message in (("", "is empty: there is nothing to summarise"), (" \n\n", "is empty")):
        file.write_text(content)
        with pytest.raises(UserError, match=message):
            summarize.summary(folder, file)
    file.write_text("Only this one.")
    summarize.summary(folder, file)
    assert "has one sentence, so there was nothing to choose" in capsys.readouterr().out
    file.write_text("word " * 100)
    summarize.summary(folder, file)
    assert "1 sentences were read without their ends: over 40 tokens" in capsys.readouterr().out
    with pytest.raises(UserError, match="is a folder"):
        summarize.summary(folder, tmp_path)
    with pytest.raises(UserError, match="holds no summariser"):
        summarize.summary(tmp_path, file)
    with pytest.raises(UserError, match="at least 1"):
        summarize.summary(folder, file, n_sentences=0)


@pytest.mark.parametrize(
    ("name", "value"), [("n_layer", None), ("n_layer", "two"), ("pooling", "banana"), ("n_sentences", 0)]
)
def test_a_damaged_checkpoint_is_told(trained, tmp_path, name, value):
    shutil.copytree(trained / "final", tmp_path / "final")
    config = json.loads((tmp_path / "final" / "config.json").read_text())
    config = {key: entry for key, entry in {**config, name: value}.items() if entry is not None}
    (tmp_path / "final" / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=rf"config\.json.*{name}"):
        load_summarizer(tmp_path / "final")


def test_an_encoder_is_no_summariser(encoder, tmp_path):
    with pytest.raises(UserError, match="is no summariser"):
        load_summarizer(encoder)


def test_twenty_pages_are_read_in_windows_by_work_that_grows_with_them(trained):
    chance = random.Random(0)
    model, tokenizer, _ = load_summarizer(trained / "final")
    page = [" ".join(chance.choices(WORDS, k=20)) + "." for _ in range(20)]  # 400 words
    found = " ".join(["we found fever", *chance.choices(WORDS, k=2)]) + "."
    pages = {n: encode_documents([([*page * n, found], [])], tokenizer, 40)[0] for n in (5, 20)}
    ((_, chosen),) = summarize.summarize(model, pages[20], 1)
    assert chosen == [400]  # the last sentence of the last window

    def work(n: int) -> int:
        with FlopCounterMode(display=False) as counter:
            summarize.summarize(model, pages[n], 1)
        return counter.get_total_flops()

    assert work(20) < 5 * work(5)  # four times the work; sixteen times, were it quadratic


def test_what_is_frozen_stays(data, encoder, tmp_path):
    fit = FitArgs(batch_size=8, max_epochs=1)
    summarize.setup(data, encoder=str(encoder), out_dir=tmp_path, n_layer=0, frozen_layers=1, fit=fit, max_rows=16)
    before, after = load_encoder(encoder).state_dict(), load_summarizer(tmp_path / "final")[0].encoder.state_dict()
    same = {name for name, tensor in after.items() if torch.equal(tensor, before[name])}
    assert "tokens.weight" in same and all(name in same for name in after if name.startswith("layers.0."))
    assert not any(name in same for name in after if name.startswith("layers.1.") and "weight" in name)
    whole = Encoder(bert(60, width=8, n_layer=1, n_head=1, inner_width=8))
    freeze(whole, 0)
    assert all(p.requires_grad for p in whole.parameters())


def test_two_berts_learn_to_write_a_summary_and_reduce_many_windows(data, tmp_path, capsys):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    minilm = encoder_directory("minilm")
    shape = transformers.BertConfig(30522, 32, 2, 2, 48, max_position_embeddings=40, hidden_dropout_prob=0.0)
    transformers.BertModel(shape).save_pretrained(tmp_path / "bert")
    (tmp_path / "bert" / "tokenizer.json").write_bytes((minilm / "tokenizer.json").read_bytes())
    decoding = abstractive.Decoding(beams=2, max_length=10)
    fit = FitArgs(batch_size=8, learning_rate=5e-3, max_epochs=6, patience=6)
    summarize.setup(data, "abstractive", str(tmp_path / "bert"), tmp_path / "out", decoding=decoding, fit=fit,
                    max_test_rows=8)  # fmt: skip
    found = numbers(tmp_path / "out")
    assert found["settings"]["encoder"] == str(tmp_path / "bert")
    assert found["validation_loss"] < 6  # it begins above 10, the logarithm of the vocabulary
    assert 0 <= found["abstractive_rouge1"]["value"] <= 1 and found["lead1_rouge1"]["n"] == 8
    model, tokenizer = abstractive.load(tmp_path / "out" / "final")
    assert model.generation_config.num_beams == 2 and model.generation_config.no_repeat_ngram_size == 3
    long = [sentence for row in range(6) for sentence in document(random.Random(row))["sentences"]]
    calls = []
    real = abstractive.write

    def counted(*args: Any) -> list[str]:
        calls.append(len(args[2]))
        return real(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(abstractive, "write", counted)
        text, cut = abstractive.summarize(long, model, tokenizer)
    assert calls[0] > 2 and calls == sorted(calls, reverse=True) and calls[-1] == 1 and text and cut == 0
    file = tmp_path / "text.txt"
    file.write_text("We found pain with film. The scene was.")
    folder = tmp_path / "out" / "final"
    summarize.summary(folder, file)
    assert "found" in capsys.readouterr().out.splitlines()[-1]
    file.write_text("word " * 100)
    summarize.summary(folder, file)
    assert "1 sentences were read without their ends: over 40 tokens" in capsys.readouterr().out
    with pytest.raises(UserError, match="chooses no sentences: leave out --n_sentences"):
        summarize.summary(folder, file, n_sentences=2)


@pytest.fixture
def written(tmp_path: Path) -> Path:
    """A checkpoint of an abstractive summariser that has learned nothing."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    shape = transformers.BertConfig(30522, 32, 1, 2, 48, max_position_embeddings=64)
    transformers.BertModel(shape).save_pretrained(tmp_path / "bert")
    tokenizer = tokenizer_of(encoder_directory("minilm"))
    tokenizer.save(str(tmp_path / "bert" / "tokenizer.json"))
    model = abstractive.from_encoder(tmp_path / "bert", tokenizer, abstractive.Decoding(beams=1, max_length=16))
    model.save_pretrained(tmp_path / "final")
    tokenizer.save(str(tmp_path / "final" / "tokenizer.json"))
    abstractive.load(tmp_path / "final")
    return tmp_path / "final"


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("model.safetensors", b"short", "that transformers can read.*Train it again"),
        ("config.json", b'{"model_type": "encoder-decoder"}', "that transformers can read.*Train it again"),
        ("config.json", {"decoder": 3}, "that transformers can read.*Train it again"),
        ("config.json", {"encoder": {"model_type": "bert", "hidden_size": 48}}, "that transformers can read"),
        ("generation_config.json", b"{", r"generation_config\.json, line 1: not valid JSON"),
        ("generation_config.json", None, r"generation_config\.json does not exist"),
        ("generation_config.json", {"max_length": 0}, r"max_length must be at least 4, not 0"),
        ("generation_config.json", {"max_length": 60}, r"at most a quarter of the 64 positions"),
        ("generation_config.json", {"max_length": "9"}, r"generation_config\.json has '9' for max_length"),
        ("generation_config.json", {"num_beams": 2.5}, r"generation_config\.json has 2\.5 for num_beams"),
        ("tokenizer.json", b"{}", "is no tokenizer"),
    ],
)
def test_a_damaged_abstractive_checkpoint_is_told(written, tmp_path, capsys, file, content, message):
    place = written / file
    if isinstance(content, dict):
        content = json.dumps({**json.loads(place.read_text()), **content}).encode()
    place.unlink() if content is None else place.write_bytes(content)
    text = tmp_path / "text.txt"
    text.write_text("We found pain. The scene was.")
    args = ["summary", "--checkpoint_dir", str(written), "--file", str(text)]
    assert main(args, PROJECTS, "custom_models") == 1
    told = capsys.readouterr().err
    assert re.search(message, told) and told.startswith("error: ") and told.count("\n") == 1


def test_summaries_that_are_no_shorter_than_their_text_end_in_a_message(monkeypatch):
    monkeypatch.setattr(abstractive, "positions_of", lambda model: 64)
    monkeypatch.setattr(abstractive, "write", lambda model, tokenizer, rows: ["word " * 50] * len(rows))
    with pytest.raises(UserError, match="parts are as long as the parts"):
        abstractive.summarize(["word " * 40 + "."] * 10, None, tokenizer_of(encoder_directory("minilm")))


def test_a_document_is_read_as_it_was_in_training(monkeypatch):
    tokenizer, read = tokenizer_of(encoder_directory("minilm")), []
    monkeypatch.setattr(abstractive, "positions_of", lambda model: 40)
    monkeypatch.setattr(abstractive, "write", lambda model, tokenizer, rows: read.append(rows) or ["fever"] * len(rows))
    sentences = ["We found fever.", "A scene was.", "word " * 50, "And pain."]
    for texts in (sentences[:2], sentences):  # one window, several
        read.clear()
        _, cut = abstractive.summarize(texts, None, tokenizer)
        documents, over = encode_documents([(texts, ["Fever."])], tokenizer, 40)
        (pair,), _ = abstractive.pairs_of(documents, tokenizer, 40, 10)
        assert read[0] == abstractive.window_ids(documents[0].ids, 40) and read[0][0] == pair.ids and cut == over
        assert all(row.count(102) == 1 for row in read[0])  # one [SEP] a window, and none between its sentences


def test_bad_settings_are_told_at_once(data, encoder, tmp_path):
    with pytest.raises(UserError, match="6 problems"):
        summarize.setup(
            data, fit=FitArgs(batch_size=0), n_sentences=0, seeds=[], max_rows=0, n_layer=-1, frozen_layers=-1
        )
    with pytest.raises(UserError, match="trains once"):
        summarize.setup(data, "abstractive", str(encoder), tmp_path, seeds=[1, 2])
    with pytest.raises(UserError, match="as a decoder serve bert and roberta"):
        summarize.setup(data, "abstractive", str(encoder), tmp_path)
    assert len(abstractive.Decoding(beams=0, no_repeat_ngram=-1, max_length=20).problems(40)) == 3
    write(tmp_path / "single", [{"sentences": ["One."], "summaries": ["One."]}], "train")
    for split in ("validation", "test"):
        write(tmp_path / "single", [document(random.Random(0))], split)
    with pytest.raises(UserError, match="no document of two sentences"):
        summarize.setup(tmp_path / "single", encoder=str(encoder), out_dir=tmp_path)
