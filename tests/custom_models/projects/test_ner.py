"""Naming entities: ids and back, both heads, a T5 of transformers', the command line, bad input."""

import json
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from tokenizers import Tokenizer

from custom_models.__main__ import PROJECTS
from custom_models.encoder_decoder import EncoderDecoder
from custom_models.projects.entity_scores import majority_dictionary, score
from custom_models.projects.fitting import FitArgs
from custom_models.projects.ner import _texts, find, predict, setup
from custom_models.projects.ner_model import (
    Asking,
    Codec,
    EntityModel,
    EntityTask,
    Head,
    Sentence,
    batch_of,
    by_both,
    by_text,
    load_entity_model,
)
from custom_models.projects.seq2seq import T5Shape, text_loss
from data_prep.iob import Entity, entities_of, tags_of
from data_prep.rows import write_rows
from workflows.__main__ import main
from workflows.errors import UserError

TINY = T5Shape(vocab_size=420, width=32, n_layer=1, n_head=2, inner_width=32, dropout=0.0)
words = st.text(st.characters(exclude_categories=["Z", "C"]), min_size=1, max_size=6).filter(lambda w: w.split() == [w])
special = st.sampled_from(["<end>", "<pad>", "<extra_id_0>", "</s>", "<unk>"])


@given(st.booleans(), st.lists(words | special, min_size=1, max_size=8), st.data())
@settings(max_examples=200, deadline=None)
def test_ids_lead_back_to_the_entities(codec, tiny_t5, ours, words, data):
    if not ours:  # a tokenizer that knows few letters: to it all others are one
        codec = Codec(Tokenizer.from_file(str(tiny_t5 / "tokenizer.json")), codec.types, 1)
    start = data.draw(st.integers(0, len(words) - 1))
    entities = [Entity("Disease", start, data.draw(st.integers(start + 1, len(words))))]
    row = codec.encode(words, tags_of(entities, len(words)), 500)
    assert codec.entities(row.target, words) == (entities, 0)
    grammar = codec.grammar(words)
    for place, token in enumerate(row.target):
        assert token in grammar.allowed(row.target[:place])


def test_a_word_that_a_tokenizer_makes_a_part_of_the_list_of_is_told_apart(codec, tiny_t5):
    codec = Codec(Tokenizer.from_file(str(tiny_t5 / "tokenizer.json")), codec.types, 1)
    words = ["a", "\uff1b", "i", "\uff20\uff12", "\uff1b\u00a8", "a"]  # to NFKC a semicolon, @2, and one with an accent
    for start in range(len(words)):
        for end in range(start + 1, len(words) + 1):
            entities = [Entity("Disease", start, end)]
            row = codec.encode(words, tags_of(entities, len(words)), 500)
            assert codec.entities(row.target, words) == (entities, 0)


def test_types_that_a_list_could_not_tell_apart_are_refused(codec, data, tmp_path):
    with pytest.raises(UserError, match="types GENE and gene differ in case only"):
        Codec(codec.tokenizer, ["DNA", "GENE", "gene"], codec.end_id)


def test_words_beyond_the_limit_are_not_read(codec):
    words, tags = ["aspirin", "causes", "fever"], ["B-Chemical", "O", "B-Disease"]
    whole = codec.encode(words, tags, 100)
    assert whole.words == words and codec.entities(whole.target, words)[0] == entities_of(tags)
    cut = codec.encode(words, tags, whole.firsts[2] + 1)
    assert cut.words == words[:2] and cut.source == [*whole.source[: whole.firsts[2]], codec.end_id]
    assert codec.entities(cut.target, words)[0] == [Entity("Chemical", 0, 1)] and len(cut.tags) == 2


@pytest.mark.parametrize("head", get_args(Head))
def test_a_sentence_of_which_nothing_can_be_read_has_no_entity(codec, head):
    torch.manual_seed(0)
    model = EntityModel(EncoderDecoder(TINY.config(codec.tokenizer)), codec.types).eval()
    unread = codec.encode(["ACGT" * 150, "fever"], ["B-Chemical", "B-Disease"], 64)
    assert unread.words == [] and unread.source == unread.target == [codec.end_id]
    read = codec.encode(["fever"], ["B-Disease"], 64)
    for sentences in ([unread], [read, unread]):
        assert find(model, codec, sentences, Asking(head, True, 2, 0.5, 100)).entities[-1] == []
        loss, right, n = EntityTask(model, FitArgs(), 1, head, 1.0).losses(batch_of(sentences, 0))
        assert loss.isfinite() and 0 <= float(right / n) <= 1


def test_an_untrained_decoder_can_write_nothing_but_lists(codec, data):
    torch.manual_seed(0)
    model = EncoderDecoder(TINY.config(codec.tokenizer)).eval()
    rows = [json.loads(line) for line in (data / "test.jsonl").read_text().splitlines()]
    sentences = [codec.encode(row["tokens"], row["tags"], 100) for row in rows]
    for n_beam in (1, 3):
        assert by_text(model, codec, sentences, constrained=True, n_beam=n_beam).malformed == 0
    free = by_text(model, codec, sentences, constrained=False, max_new_tokens=30)
    assert free.malformed + free.unfinished > 0


def test_tags_are_a_valid_sequence(codec, data):
    torch.manual_seed(0)
    model = EntityModel(EncoderDecoder(TINY.config(codec.tokenizer)), codec.types)
    torch.nn.init.normal_(model.tag_head.weight)
    rows = [json.loads(line) for line in (data / "test.jsonl").read_text().splitlines()]
    found = model.by_tags([codec.encode(row["tokens"], row["tags"], 100) for row in rows], batch_size=3)
    for row, entities in zip(rows, found.entities, strict=True):
        assert entities_of(tags_of(entities, len(row["tokens"]))) == entities


def test_by_both_the_likeliest_list_wins(codec, data):
    torch.manual_seed(0)
    model = EntityModel(EncoderDecoder(TINY.config(codec.tokenizer)), codec.types).eval()
    torch.nn.init.normal_(model.tag_head.weight)
    rows = [json.loads(line) for line in (data / "test.jsonl").read_text().splitlines()]
    sentences = [codec.encode(row["tokens"], row["tags"], 100) for row in rows]

    @torch.no_grad()
    def logprob(sentence: Sentence, entities: list[Entity], tag_share: float) -> float:
        tags = tags_of(entities, len(sentence.words))
        batch = batch_of([codec.encode(sentence.words, tags, 100)], 0)
        by_tags, _, n_tagged = EntityTask(model, FitArgs(), 1, "tokens", 1.0).losses(batch)
        by_tokens, _, n = text_loss(model.t5, batch)
        return float(-tag_share * by_tags * n_tagged - (1 - tag_share) * by_tokens * n)

    written = by_text(model.t5, codec, sentences, n_beam=3)
    others = [written.entities, model.by_tags(sentences).entities]
    chosen = {share: by_both(model, codec, sentences, written, share).entities for share in (0.0, 0.5, 1.0)}
    for share, found in chosen.items():
        for number, sentence in enumerate(sentences):
            best = max(logprob(sentence, other[number], share) for other in others)
            assert logprob(sentence, found[number], share) >= best - 1e-3
    assert chosen[0.0] != chosen[1.0]


def test_the_dictionary_knows_the_majority():
    train = [(["Lead", "is", "lead"], ["B-X", "O", "B-X"]), (["lead", "on"], ["O", "O"]), (["ion"], ["B-Y"]),
             (["a"], ["B-X"]), (["a"], ["O"]), (["a"], ["O"])]  # fmt: skip
    names = majority_dictionary(train)
    assert names.names == {("lead",): "X", ("ion",): "Y"}  # "a" is an entity once in three times
    assert names.find(["LEAD", "ion", "a"]) == [Entity("X", 0, 1), Entity("Y", 1, 2)]


def test_an_entity_counts_if_type_and_both_ends_are_right():
    wanted = [(["a", "b", "c"], ["B-X", "I-X", "O"]), (["d"], ["B-Y"]), (["e"], ["O"])]
    right = [[Entity("X", 0, 2)], [Entity("Y", 0, 1)], []]
    assert score(wanted, right).f1 == 1 and score(wanted, right).n == 2
    for wrong in ([Entity("X", 0, 1)], [Entity("Y", 0, 2)], [], [Entity("X", 0, 1), Entity("X", 1, 2)]):
        found = score(wanted, [wrong, *right[1:]])
        assert found.recall == 0.5 and found.by_type == {"X": 0.0, "Y": found.by_type["Y"]}
    assert score([(["e"], ["O"])], [[]]).f1 == 0.0


def test_other_text_has_nothing_of_the_held_out_splits(tmp_path):
    (tmp_path / "more.txt").write_text("Short, one.\nNow: here is A held-out one!\nAnother, longer one.\n\n")
    held = (["here", "is", "a", "held", "out", "one", "."], ["O"] * 7)
    splits: dict[str, list[Any]] = {
        "train": [(["a"], ["O"])],
        "validation": [],
        "test": [held, (["short", "one"], ["O"] * 2)],
    }
    assert _texts(splits, [tmp_path / "more.txt"], 9) == [["a"], ["Another", ",", "longer", "one", "."]]


def metrics(folder: Path) -> dict[str, float]:
    return {row["name"]: row["value"] for row in json.loads((folder / "metrics.json").read_text())["metrics"]}


@pytest.mark.long
@pytest.mark.parametrize("head", ["text", "tokens"])
def test_a_tiny_t5_learns_to_name_entities(data, tmp_path, capsys, head):
    (tmp_path / "more.txt").write_text("Fever and ulcer are known.\n" * 20)
    setup(
        data,
        head=head,
        out_dir=tmp_path,
        shape=TINY,
        pretrain=FitArgs(16, learning_rate=5e-3, max_epochs=1),
        unlabelled=[tmp_path / "more.txt"],
        fit=FitArgs(8, learning_rate=1e-2, max_epochs=12, patience=12),
        seeds=[1, 2] if head == "tokens" else None,
        n_beam=2,
        tag_share=0.5,
    )
    told = capsys.readouterr().out
    assert "majority dictionary" in told and "span corruption on 100 texts" in told and "0 cut: over 256 tokens" in told
    assert metrics(tmp_path)["f1"] > 0.8 and (tmp_path / "curves.png").stat().st_size > 0
    assert ("f1_mean_of_seeds" in metrics(tmp_path)) == (head == "tokens")
    assert "free, 12 of validation" in told or head == "tokens"
    predict(tmp_path / "final", "Oral LITHIUM after renal failure.")
    told = capsys.readouterr().out
    assert "Chemical    LITHIUM" in told and "Disease     renal failure" in told
    predict(tmp_path / "final", "Oral lithium after renal failure.", longest=4)
    assert "words were read" in capsys.readouterr().out
    model, codec, asking = load_entity_model(tmp_path / "final")
    assert asking == Asking(head, n_beam=2, tag_share=0.5)
    model.save(codec.tokenizer, tmp_path / "short", replace(asking, longest=4), "data")
    predict(tmp_path / "short", "Oral lithium after renal failure.")
    assert "words were read" in capsys.readouterr().out


@pytest.mark.long
def test_a_t5_of_transformers_is_taught_by_its_own_trainer(data, tiny_t5, tmp_path, capsys):
    main(["ner", "--data", str(data), "--model", str(tiny_t5), "--out_dir", str(tmp_path), "--fit.max_epochs", "2",
          "--fit.learning_rate", "1e-2", "--fit.batch_size", "8", "--fit.accelerator", "cpu", "--max_rows", "40",
          "--longest", "200"],
         steps=PROJECTS, program="custom_models")  # fmt: skip
    told = capsys.readouterr().out
    assert "0 malformed entries" in told and "train: 40 sentences; 0 cut" in told
    model, codec, asking = load_entity_model(tmp_path / "final")
    assert (
        asking == Asking("text", longest=200)
        and codec.types == ["Chemical", "Disease"]
        and 0 <= metrics(tmp_path)["f1"] <= 1
    )
    assert model.t5.config.tied and not (tmp_path / ".final.runs").exists()
    config = json.loads((tmp_path / "final" / "config.json").read_text())
    assert config["model_type"] == "t5" and config["entity_types"] == codec.types


@pytest.mark.long
def test_that_trainer_goes_on_after_ctrl_c_to_the_same_end(data, tiny_t5, tmp_path, capsys, monkeypatch):
    """Two seeds of five steps an epoch; Ctrl-C within the second epoch of each, the last checkpoint cut off once."""
    steps: list[int] = []
    at: set[int] = set()

    class Pressing(transformers.Seq2SeqTrainer):
        def training_step(self, *args, **kwargs):
            steps.append(self.state.global_step)
            if len(steps) in at:
                signal.raise_signal(signal.SIGINT)
            return super().training_step(*args, **kwargs)

    monkeypatch.setattr(transformers, "Seq2SeqTrainer", Pressing)

    def run(folder: str) -> int:
        return main(["ner", "--data", str(data), "--model", str(tiny_t5), "--out_dir", str(tmp_path / folder),
                     "--max_rows", "40", "--fit.max_epochs", "3", "--fit.patience", "1", "--fit.learning_rate", "1e-2",
                     "--fit.batch_size", "8", "--fit.accelerator", "cpu", "--longest", "200", "--seeds", "[1,2]"],
                    steps=PROJECTS, program="custom_models")  # fmt: skip

    assert run("undisturbed") == 0
    expected = list(steps)
    first = expected.index(0, 1)  # steps of the first seed
    steps.clear()
    at |= {7, first + 7}
    assert (run("stopped"), run("stopped")) == (130, 130)
    kept = tmp_path / "stopped" / ".fitting"
    newest = max(kept.glob("*/checkpoint-*"), key=lambda path: int(path.name.partition("-")[2]))
    torn = newest.with_name("checkpoint-999")
    torn.mkdir()
    assert run("stopped") == 0
    assert steps == expected and not kept.exists()
    told = capsys.readouterr().out
    assert "trained before" in told and "checkpoint-999 was not written to its end" in told
    found = [json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("undisturbed", "stopped")]
    for made in found:  # but for the mean training loss, which is that of an epoch's second part
        made["looks"] = [[{**epoch, "train_loss": None} for epoch in epochs] for epochs in made["epochs"]]
    assert found[0]["looks"] == found[1]["looks"] and found[0]["metrics"] == found[1]["metrics"]
    one, other = (load_file(tmp_path / name / "final" / "model.safetensors") for name in ("undisturbed", "stopped"))
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def test_what_cannot_be_is_told(codec, data, tmp_path, tiny_t5):
    with pytest.raises(UserError, match="--head tokens is for --model scratch"):
        setup(data, model=str(tiny_t5), head="tokens", out_dir=tmp_path)
    with pytest.raises(UserError, match="3 problems") as error:
        setup(data, out_dir=tmp_path, n_beam=0, longest=1, seeds=[])
    assert "--n_beam must be at least 1" in str(error.value) and "--seeds needs at least one" in str(error.value)
    with pytest.raises(UserError, match="There is no folder"):
        setup(data, model=str(tmp_path / "none"), out_dir=tmp_path / "out")
    bare = tmp_path / "bare"
    bare.mkdir()
    for split in ("train", "validation", "test"):
        write_rows(bare / f"{split}.jsonl", [{"tokens": ["a", "b"], "tags": ["O", "O"]}])
    with pytest.raises(UserError, match="marks no entity"):
        setup(bare, out_dir=tmp_path)
    (bare / "train.jsonl").write_text('{"tokens": ["a", "b"], "tags": ["O", "I-X"]}\n')
    with pytest.raises(UserError, match=r"train\.jsonl, line 1: \"tags\": 'I-X' must follow"):
        setup(bare, out_dir=tmp_path)
    with pytest.raises(UserError, match="holds no model that names entities"):
        predict(tmp_path, "aspirin")
    with pytest.raises(UserError, match="names no entities"):
        predict(tiny_t5, "aspirin")
    with pytest.raises(
        UserError, match=r"--n_beam must be at least 1, not 0\.\n.*--longest must be at least 3, not -5"
    ):
        predict(tiny_t5, "aspirin", n_beam=0, longest=-5)
    torch.manual_seed(0)
    model = EntityModel(EncoderDecoder(TINY.config(codec.tokenizer)), codec.types)
    model.save(codec.tokenizer, tmp_path / "fruit", Asking(), "data")
    config = json.loads((tmp_path / "fruit" / "config.json").read_text())
    for name, value, message in (("head", "banana", "has 'banana' for head; known are text, tokens, both"),
                                 ("n_beam", "4", "has '4' for n_beam"), ("tag_share", 2.0, "must be from 0 to 1"),
                                 ("longest", 0, "longest must be at least 3")):  # fmt: skip
        (tmp_path / "fruit" / "config.json").write_text(json.dumps({**config, name: value}))
        with pytest.raises(UserError, match=rf"config\.json.*{message}"):
            predict(tmp_path / "fruit", "aspirin")
    with pytest.raises(UserError, match="nothing to read"):
        predict(tiny_t5, "  ")
