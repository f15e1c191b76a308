"""Translation: marks for placeholders, scores and baselines, and a made-up language that is learned in seconds."""

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from sacrebleu.metrics.bleu import BLEU
from sacrebleu.metrics.chrf import CHRF

from custom_models.__main__ import PROJECTS
from custom_models.encoder_decoder import EncoderDecoder
from custom_models.projects import translate
from custom_models.projects.fitting import FitArgs
from custom_models.projects.seq2seq import text_loss
from custom_models.projects.translate import TranslatorShape, pair_loader, scores
from custom_models.projects.translation_memory import Memory
from custom_models.projects.translation_scores import placeholders_as_words, placeholders_kept, working
from custom_models.projects.translation_text import MARKS, Codec, mark, mark_as, unmark
from custom_models.projects.translator import BeamArgs, Translator
from data_prep.programs import Grammar
from data_prep.rows import write_rows
from workflows.__main__ import main
from workflows.errors import UserError

pytestmark = pytest.mark.long

WORDS = {"open": "ouvrir", "close": "fermer", "file": "fichier", "red": "rouge", "new": "neuf", "send": "envoyer"}
SHAPE = TranslatorShape(vocab_size=300, width=48, n_layer=1, n_head=4, inner_width=96, dropout=0.0)
FIT = FitArgs(batch_size=8, learning_rate=3e-3, max_epochs=10, patience=10)


def message(chance: random.Random) -> dict[str, str]:
    """Words one by one; a placeholder, which stands last in the source, stands first in the target."""
    words = chance.choices(list(WORDS), k=chance.randint(1, 3))
    source, target = " ".join(words), " ".join(WORDS[word] for word in words)
    if chance.random() < 0.4:
        name = chance.choice(["%(page)s", "{name}", "%s"])
        source, target = f"{source} {name}", f"{name} {target}"
    return {"source": source, "target": target}


def write(folder: Path, rows: dict[str, list[dict[str, Any]]]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for split, found in rows.items():
        write_rows(folder / f"{split}.jsonl", found)
    return folder


@pytest.fixture(scope="module")
def messages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    chance = random.Random(0)
    sizes = {"train": 400, "validation": 40, "test": 40}
    return write(
        tmp_path_factory.mktemp("data") / "messages",
        {split: [{**message(chance), "group": i} for i in range(size)] for split, size in sizes.items()},
    )


@pytest.fixture(scope="module")
def trained(messages: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out_dir = tmp_path_factory.mktemp("translate")
    translate.setup(messages, out_dir, SHAPE, FIT, merge_dropout=0.0, longest=32, seeds=[1])
    return out_dir


def numbers(out_dir: Path) -> dict[str, Any]:
    found = json.loads((out_dir / "metrics.json").read_text())
    return {**found, **{row["name"]: row["value"] for row in found["metrics"]}}


# ---- placeholders ----


@pytest.mark.parametrize(
    ("source", "target", "marked"),
    [
        ("%(a)s of {b}", "{b} hat %(a)s", ("<0> of <1>", "<1> hat <0>")),
        ("%s of %s", "von %s: %s", ("<0> of <1>", "von <0>: <1>")),  # positional ones keep their order
        ("one {a}, {a}", "{a} {a} {a}", ("one <0>, <1>", "<0> <1> {a}")),
        ("none", "{x}", ("none", "{x}")),
        ("Press <0> for %(name)s", "%(name)s: <0>", ("Press <0> for <1>", "<1>: <0>")),
        ("<9> <1> {x}", "{x} <1> <9>", ("<0> <1> <2>", "<2> <1> <0>")),
        ("{} " * 12 + "<3>", "", ("<0> <1> <2> <3> <4> <5> <6> <7> <8> <9> {} {} <3>", "")),
        ("{} " * 12, "", ("<0> <1> <2> <3> <4> <5> <6> <7> <8> <9> {} {} ", "")),
    ],
)
def test_placeholders_become_marks_and_come_back(source: str, target: str, marked: tuple[str, str]):
    text, values = mark(source)
    assert (text, mark_as(target, values)) == marked
    assert unmark(text, values) == source and unmark(mark_as(target, values), values) == target


def test_any_text_comes_back_from_its_tokens(messages):
    codec = Codec.learn([("Open the Page", "ouvrir la page")] * 9, 280, True, 64)
    for text in ("Open", "  ", "café → 東京", "a  b\n    c", "{x}%(y)s!", "%(x)s%(x)s"):
        if text.strip():
            ids, values, cut = codec.source(text)
            assert codec.text(ids, values) == text and ids[-1] == codec.end_id and not cut
    ids, _, cut = codec.source("word " * 90)
    assert cut and len(ids) == 64 and ids[-1] == codec.end_id
    with pytest.raises(UserError, match="empty text"):
        codec.source(" \n")


def test_a_beam_ends_only_when_each_mark_is_written_once(messages):
    codec = Codec.learn([("a b", "b a")] * 9, 270, True, 64)
    sources = [codec.source(text) for text in ("{a} is {b}", "none")]
    allowed = codec.allowed([values for _, values, _ in sources])
    zero, one = codec.mark_ids[:2]
    assert {zero, one} <= set(allowed(0, [])) and codec.end_id not in allowed(0, [5])
    assert zero not in allowed(0, [zero]) and one in allowed(0, [zero])
    assert codec.end_id in allowed(0, [one, 7, zero]) and not set(codec.mark_ids) & set(allowed(0, [one, 7, zero]))
    assert codec.end_id in allowed(1, []) and not set(codec.mark_ids) & set(allowed(1, []))
    assert codec.pad_id not in allowed(1, [])


def test_a_program_is_translated_whole_and_a_limit_is_what_it_was(tmp_path, capsys):
    torch.manual_seed(0)
    codec = Codec.learn([("def f():\n    return 1", "function f() {\n  return 1;\n}")] * 9, 270, False, 128)
    Translator(EncoderDecoder(SHAPE.configuration(codec)), codec, BeamArgs(n_beam=1)).save(tmp_path / "final", "x")
    translator = Translator.load(tmp_path / "final")
    assert translator.codec.multiline and not Codec.learn([("a b", "b a")] * 9, 270, True, 24).multiline
    program = "def f():\n    return 1"
    written = translator.translate([program])
    assert written.unfinished == 1 and written.limit == 2 * len(codec.source(program)[0]) + 20 < 128
    args = ["translate-text", "--checkpoint_dir", str(tmp_path / "final"), "--text", program]
    assert main(args, PROJECTS, "custom_models") == 0
    told = capsys.readouterr().out
    assert told == f"{written.texts[0]}\nthe translation was broken off after {written.limit} tokens\n"


def test_even_an_untrained_model_keeps_placeholders():
    torch.manual_seed(0)
    codec = Codec.learn([("a b", "b a")] * 9, 270, True, 24)
    translator = Translator(EncoderDecoder(SHAPE.configuration(codec)), codec, BeamArgs(n_beam=2))
    sources = ["{a} is %(b)s", "%s", "no placeholder", "{a} {b} {c}"]
    found = translator.translate(sources)
    ended = [text for text, source in zip(found.texts, sources, strict=True) if placeholders_kept([text], [source])[1]]
    assert len(found.texts) == 4 and len(ended) == 3
    kept, asked = placeholders_kept(found.texts, sources)
    assert asked == 3 and kept >= 3 - found.unfinished  # only the limit of tokens can lose one


# ---- scores ----


def test_scores_are_sacrebleus():
    written, targets = ["the cat sat on it", "ouvrir %(a)s"], ["the cat sat on the mat", "ouvrir %(a)s maintenant"]
    rows = [{"source": f"{i} %(a)s", "target": target} for i, target in enumerate(targets)]
    found = scores(written, rows, placeholders=True)
    assert found["bleu"] == BLEU().corpus_score(written, [targets]).score
    assert found["chrf"] == CHRF().corpus_score(written, [targets]).score
    assert found["exact"] == 0 and found["placeholders_kept"] == 0.5
    as_words = [text.replace("%(a)s", "placeholder0") for text in targets]
    assert placeholders_as_words(targets, [row["source"] for row in rows]) == as_words
    assert scores(targets, rows, placeholders=False)["bleu"] == pytest.approx(100)


PAIRS = [("Delete the page %(title)s", "Supprimer la page %(title)s"), ("Edit user {name}", "Modifier {name}")]


def test_a_memory_gives_the_likest_target_with_the_placeholders_at_hand():
    found = Memory(PAIRS, placeholders=True).translate(["Delete page {x}", "edit this user"])
    assert found == ["Supprimer la page {x}", "Modifier <0>"]
    assert Memory(PAIRS, placeholders=False).translate(["Delete page {x}"]) == ["Supprimer la page %(title)s"]


def test_a_pair_never_finds_itself_or_one_of_its_group():
    pairs = [*PAIRS, ("Edit user %(x)s!", "Changer %(x)s"), ("Edit a user", "modifier {name}"), ("Edit users", "autre")]
    found = Memory(pairs, placeholders=True).likest_others([0, 1, 1, 1, 2])
    assert found[1] == found[2] == found[3] == "autre"
    assert found[4] in ("Modifier <0>", "Changer <0>", "modifier {name}")


def test_a_source_that_does_not_run_is_named():
    rows = [{"source": "def f(n):\n    return n", "target": "", "inputs": [[1]]}] * 2
    rows.append({"source": "print(1)", "target": "", "inputs": [[1]]})
    with pytest.raises(UserError, match=r"Row 3: the program does not begin with a function\. Prepare the data again"):
        working([""] * 3, rows)
    with pytest.raises(UserError, match="Row 1: the Python program does not run"):
        working([""], [{**rows[0], "inputs": 5}])


# ---- training ----


def test_label_smoothing_is_the_formula(trained, messages):
    translator = Translator.load(trained / "final")
    model, rows = translator.model, [message(random.Random(i)) for i in range(3)]
    batch = next(iter(pair_loader(rows, translator.codec, 3)))
    plain, _, n = text_loss(model, batch)
    smooth, _, _ = text_loss(model, batch, label_smoothing=0.2)
    logprobs = model(batch.source, model.shift(batch.target), batch.lengths).log_softmax(dim=-1)
    real = batch.target != model.config.pad_id
    uniform = -logprobs.mean(dim=-1)[real].sum() / n
    assert float(smooth.detach()) == pytest.approx(float((0.8 * plain + 0.2 * uniform).detach()), rel=1e-5)


def test_merges_are_left_out_in_training_only(messages):
    rows = [json.loads(line) for line in (messages / "train.jsonl").read_text().splitlines()]
    codec = Codec.learn([(row["source"], row["target"]) for row in rows], 300, True, 64)
    whole = next(iter(pair_loader(rows[:8], codec, 8)))
    loader = pair_loader(rows[:8], codec, 8, merge_dropout=0.5)
    pieces = [next(iter(loader)), next(iter(loader))]
    assert whole.source.shape[1] < pieces[0].source.shape[1] and not torch.equal(pieces[0].source, pieces[1].source)
    again = next(iter(pair_loader(rows[:8], codec, 8)))
    assert torch.equal(whole.source, again.source) and torch.equal(whole.target, again.target)
    for row in rows[:50]:  # with none left out our merges are the tokenizer's
        text = mark(row["source"]).text
        assert codec.ids_of(text, 1e-12, random.Random(0)) == codec.ids_of(text)
    texts = [sorted(codec.text(ids, []) for ids in batch.target.tolist()) for batch in (whole, pieces[0])]
    assert texts[0] == texts[1]  # other pieces of the same texts


def test_a_translator_learns_and_leaves_its_picture(trained):
    found = numbers(trained)
    assert found["exact"] > max(0.3, found["exact_copy"]) and found["bleu"] > found["bleu_copy"] + 20
    assert found["bleu_words"] > found["bleu_words_copy"] + 20 and found["chrf"] > found["chrf_copy"] + 20
    assert found["placeholders_kept"] == 1 and found["placeholders_kept_copy"] == 1
    assert found["chrf"] <= 100 and found["parameters"] > 0
    assert (trained / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_a_saved_translator_reloads_and_is_asked(trained, tmp_path, capsys):
    translator = Translator.load(trained / "final")
    texts = ["open new file", "close %(page)s", "new red file {name}"]
    found = translator.translate(texts)
    one_by_one = [translator.translate([text]).texts[0] for text in texts]
    assert found.texts == one_by_one and "%(page)s" in found.texts[1] and "{name}" in found.texts[2]
    translator.save(trained / "again", "messages")
    assert Translator.load(trained / "again").translate(texts) == found
    args = ["translate-text", "--checkpoint_dir", str(trained / "final"), "--text"]
    assert main([*args, "send %(who)s"], PROJECTS, "custom_models") == 0
    assert "%(who)s" in capsys.readouterr().out
    (tmp_path / "text").write_text("send %(who)s\n")
    assert main([*args[:-1], "--file", str(tmp_path / "text")], PROJECTS, "custom_models") == 0
    assert "%(who)s" in capsys.readouterr().out
    assert main([*args, "open " * 40], PROJECTS, "custom_models") == 0
    assert "only the first 32 tokens were read" in capsys.readouterr().out
    (tmp_path / "text").write_text("open file\n\nclose %(page)s\n" + "open " * 40)
    assert main([*args[:-1], "--file", str(tmp_path / "text")], PROJECTS, "custom_models") == 0
    first, blank, third, *_, told = capsys.readouterr().out.splitlines()
    assert [first, third] == translator.translate(["open file", "close %(page)s"]).texts and blank == ""
    assert told.startswith("1 of 4 lines: ")
    assert main([*args, " "], PROJECTS, "custom_models") == 1
    assert "nothing to translate in an empty text" in capsys.readouterr().err


@pytest.mark.parametrize(("kind", "memory"), [("transformer", False), ("t5", True)])
def test_the_same_seed_gives_the_same_model(messages, tmp_path, kind, memory):
    for name in ("one", "two"):
        shape = TranslatorShape(**{**vars(SHAPE), "kind": kind, "dropout": 0.1})
        fit = FitArgs(batch_size=32, max_epochs=1)
        translate.setup(
            messages, tmp_path / name, shape, fit, memory=memory, longest=32, max_rows=64, scored="validation"
        )
    one, two = ((tmp_path / name / "final" / "model.safetensors").read_bytes() for name in ("one", "two"))
    again = Translator.load(tmp_path / "one" / "final")
    assert (again.memory is not None) is memory and len(again.translate(["open file"]).texts) == 1
    assert one == two and {row["split"] for row in numbers(tmp_path / "one")["metrics"]} == {"validation"}
    assert numbers(tmp_path / "one")["settings"]["scored"] == "validation"


def test_programs_are_run(tmp_path, capsys):
    chance = random.Random(0)
    rows = []
    for _ in range(24):
        program, kinds = Grammar(chance).function()
        inputs = [[{"list": [1, 2], "text": "ab", "number": 3}[kind] for kind in kinds]]
        rows.append({"source": program.python, "target": program.javascript, "inputs": inputs})
    data = write(tmp_path / "programs", {"train": rows[:16], "validation": rows[16:20], "test": rows[20:]})
    args = ["translate", "--data", str(data), "--out_dir", str(tmp_path / "out"), "--placeholders", "false"]
    args += ["--shape.vocab_size", "300", "--shape.width", "16", "--shape.n_layer", "1", "--shape.n_head", "2"]
    args += ["--fit.max_epochs", "1", "--longest", "220", "--beam.n_beam", "1"]
    assert main(args, PROJECTS, "custom_models") == 0
    found, out = numbers(tmp_path / "out"), capsys.readouterr().out
    if shutil.which("node"):
        assert found["works"] == 0 and found["works_copy"] == 0 and "works" in out  # Python is no JavaScript
    else:
        assert "works" not in found and "Node.js is not installed" in out
    assert "placeholders_kept" not in found


def test_bad_settings_and_data_are_told(messages, trained, tmp_path, capsys):
    with pytest.raises(UserError, match="7 problems"):
        translate.setup(
            messages, tmp_path, label_smoothing=1.0, merge_dropout=-0.1, seeds=[], max_rows=1, longest=2,
            beam=BeamArgs(n_beam=0), fit=FitArgs(batch_size=0),
        )  # fmt: skip
    with pytest.raises(UserError, match=r"No pair of .*train\.jsonl has at most 4 tokens"):
        long = [{"source": "word " * 9, "target": "mot " * 9}] * 8
        data = write(tmp_path / "long", dict.fromkeys(("train", "validation", "test"), long))
        translate.setup(data, tmp_path, TranslatorShape(vocab_size=270), FIT, longest=4)
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "train.jsonl").write_text('{"source": "a", "target": "b"}\n{"source": "a", "target": " "}\n')
    with pytest.raises(UserError, match=r'line 2: "target" must be a text that is not empty'):
        translate.setup(tmp_path / "bad", tmp_path / "out")
    assert main(["translate-text", "--checkpoint_dir", str(tmp_path), "--text", "x"], PROJECTS, "custom_models") == 1
    assert "holds no translator. Train one with `make translate`" in capsys.readouterr().err
    shutil.copytree(trained / "final", tmp_path / "damaged")
    config = json.loads((tmp_path / "damaged" / "config.json").read_text())
    how = config["translator"]
    beam = how["beam"]
    for changed, message in (
        ({**how, "longest": "7"}, r"config\.json has '7' for longest"),
        ({**how, "longest": 10**9}, r"config\.json has 1000000000 for longest"),
        ({**how, "longest": 0}, r"config\.json: longest must be at least 4"),
        ({**how, "placeholders": 1}, r"has 1 for placeholders"),
        ({**how, "beam": {**beam, "n_beam": "4"}}, r"config\.json has '4' for n_beam"),
        ({**how, "beam": {**beam, "n_beam": 2.5}}, r"has 2\.5 for n_beam"),
        ({**how, "beam": {**beam, "n_beam": 0}}, r"n_beam must be at least 1"),
        ({**how, "beam": {**beam, "length_penalty": "x"}}, r"has 'x' for length_penalty"),
        ({**how, "beam": [1]}, "damaged"),
        ({**how, "beam": {"wings": 2}}, "damaged"),
        ({name: value for name, value in how.items() if name != "longest"}, "damaged"),
    ):
        (tmp_path / "damaged" / "config.json").write_text(json.dumps({**config, "translator": changed}))
        with pytest.raises(UserError, match=message):
            Translator.load(tmp_path / "damaged")
    assert len(MARKS) == len(set(MARKS))
