"""AutoTrain: the rows and the configuration that it gets, how it is run and what goes wrong, its result's scores."""

import json
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from subprocess import PIPE

import psutil
import pytest
import torch
import yaml
from tokenizers import Tokenizer

from custom_models.__main__ import PROJECTS
from custom_models.encoder_decoder import EncoderDecoder
from custom_models.encoder_decoder_checkpoint import save_encoder_decoder
from custom_models.projects import autotrain
from custom_models.projects.entity_text import entities_in
from custom_models.projects.fitting import FitArgs
from custom_models.projects.ner import predict
from custom_models.projects.ner_autotrain import kept, most_tokens, rows_of, setup
from custom_models.projects.ner_model import Asking, Codec, by_text, load_entity_model
from custom_models.projects.ner_report import read_tagged
from custom_models.projects.seq2seq import T5Shape
from workflows.__main__ import main
from workflows.errors import UserError

TYPES = ["Chemical", "Disease"]
LEARNS = """
import json, os, shutil, sys, yaml
assert sys.argv[1:] == ["--config", "config.yml"], sys.argv
config = yaml.safe_load(open("config.yml"))
assert os.path.isfile("rouge/rouge.py") and os.path.isfile("data/train.jsonl")
shutil.copytree(config["base_model"], "model")
for step, losses in ((3, [2.0]), (12, [2.0, 1.5])):
    os.mkdir(f"model/checkpoint-{step}")
    log = [{"loss": 9.0}, *({"eval_loss": loss, "eval_rouge1": 50.0} for loss in losses)]
    json.dump({"log_history": log}, open(f"model/checkpoint-{step}/trainer_state.json", "w"))
json.dump(dict(os.environ), open("environment.json", "w"))
open("model/README.md", "w").write("card")
"""
"""An AutoTrain that learns nothing: its result is the model that it began at."""


def fake(home: Path, program: str) -> Path:
    """An environment whose `autotrain` is this program."""
    (home / "bin").mkdir(parents=True)
    script = home / "bin" / "autotrain"
    script.write_text(f"#!{sys.executable}\n{program}")
    script.chmod(0o755)
    (home / ".installed").write_text("\n".join([*autotrain.PINS, autotrain.LLAMA_INDEX.requirement]) + "\n")
    return home


@pytest.fixture
def codec_of_t5(tiny_t5) -> Codec:
    return Codec(Tokenizer.from_file(str(tiny_t5 / "tokenizer.json")), TYPES, 1)


@pytest.mark.parametrize("ours", [True, False])
def test_a_row_has_the_ids_that_our_own_training_reads(data, codec, codec_of_t5, ours):
    codec = codec if ours else codec_of_t5
    strange = ["\uff1b", "¨", "\uff20\uff12", "\uff1b¨", "ACGT"]  # T5's normalizer makes other words of them, or two
    tagged = read_tagged(data, "train")[:20] + [(["No", "@2", "or", ";", "aspirin"], ["O"] * 3 + ["B-Disease", "O"])]
    tagged.insert(0, (strange, ["B-Disease", "I-Disease", "B-Chemical", "B-Disease", "O"]))
    rows = rows_of(tagged, codec, 100)
    for row, (words, tags) in zip(rows, tagged, strict=True):
        sentence = codec.encode(words, tags, 100)
        assert codec.tokenizer.encode(row["text"], add_special_tokens=False).ids == sentence.source[:-1]
        assert codec.tokenizer.encode(row["target"], add_special_tokens=False).ids == sentence.target[:-1]
    small = {column: text.lower() for column, text in rows[-1].items()}  # as our own tokenizer's letters are
    assert small == {"text": "no @2 or ; aspirin", "target": "disease: /;"}
    longest = max(len(codec.encode(words, tags, 100).target) for words, tags in tagged)
    assert most_tokens([row["target"] for row in rows], codec) == longest
    (cut,) = rows_of([(["Oral", "aspirin"], ["O", "B-Chemical"])], codec, len(codec.ids_of("Oral")) + 1)
    assert cut["text"].lower() == "oral" and cut["target"] == ""


def test_the_configuration_is_what_was_asked_for(tmp_path):
    fit = FitArgs(8, learning_rate=1e-2, warmup=0.2, weight_decay=0.3, max_norm=2.0, max_epochs=5, patience=3,
                  precision="bf16-mixed")  # fmt: skip
    rows = {"train": [{"text": "a", "target": ""}], "validation": [{"text": "é", "target": "X: é"}]}
    (tmp_path / "project" / "model").mkdir(parents=True)  # of an earlier run
    autotrain.write_project(tmp_path / "project", autotrain.config_of(tmp_path / "base", fit, 7, 90, 40), rows)
    config = yaml.safe_load((tmp_path / "project" / "config.yml").read_text())
    assert config["task"] == "seq2seq" and config["backend"] == "local" and "hub" not in config
    assert config["base_model"] == str(tmp_path / "base") and config["data"]["path"] == "data"
    assert config["data"]["column_mapping"] == {"text_column": "text", "target_column": "target"}
    asked = {"epochs": 5, "batch_size": 8, "lr": 1e-2, "warmup_ratio": 0.2, "weight_decay": 0.3, "max_grad_norm": 2.0,
             "early_stopping_patience": 3, "seed": 7, "max_seq_length": 90, "max_target_length": 40,
             "mixed_precision": "bf16", "peft": False}  # fmt: skip
    assert asked.items() <= config["params"].items()
    assert (tmp_path / "project" / "data" / "validation.jsonl").read_text() == '{"text": "é", "target": "X: é"}\n'
    assert not (tmp_path / "project" / "model").exists()


def test_its_rouge_is_rouge_scores(tmp_path):
    import evaluate
    from rouge_score.rouge_scorer import RougeScorer

    autotrain.write_project(tmp_path / "project", {}, {})
    found = ["Disease: renal failures", "", "Chemical: lithium"]
    wanted = ["Disease: renal failure", "Disease: fever", "Chemical: lithium"]
    metric = evaluate.load(str(tmp_path / "project" / "rouge"), cache_dir=str(tmp_path / "cache"))
    told = metric.compute(predictions=found, references=wanted, use_stemmer=True)
    scorer = RougeScorer(["rouge1"], use_stemmer=True)
    scores = [scorer.score(a, b)["rouge1"].fmeasure for a, b in zip(wanted, found, strict=True)]
    assert scores == [1.0, 0.0, 1.0] and told["rouge1"] == pytest.approx(2 / 3)
    assert set(told) == {"rouge1", "rouge2", "rougeL", "rougeLsum"}


@pytest.mark.parametrize("n_beam", [1, 4])
@torch.no_grad()
def test_a_result_is_asked_as_transformers_asks_it(data, tiny_t5, codec_of_t5, tmp_path, n_beam):
    from transformers import T5ForConditionalGeneration

    result = tmp_path / "result"
    shutil.copytree(tiny_t5, result)
    theirs = T5ForConditionalGeneration.from_pretrained(result).eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in theirs.parameters():  # random models agree on everything; this one gets opinions
        parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    theirs.save_pretrained(result)
    model = kept(result, codec_of_t5, Asking(), "mine", tmp_path / "final")
    assert model.types == TYPES and json.loads((tmp_path / "final" / "config.json").read_text())["data"] == "mine"
    named = 0
    for words, tags in read_tagged(data, "test")[:4]:
        sentence = codec_of_t5.encode(words, tags, 100)
        grammar = codec_of_t5.grammar(sentence.words)
        ids = theirs.generate(
            torch.tensor([sentence.source]), max_new_tokens=60, do_sample=False, num_beams=n_beam,
            prefix_allowed_tokens_fn=lambda _, ids, grammar=grammar: grammar.allowed(ids[1:].tolist()) or [1],
        )[0, 1:].tolist()  # fmt: skip
        expected, malformed = entities_in(codec_of_t5.text(ids), words, TYPES, codec_of_t5.seen)
        found = by_text(model.t5, codec_of_t5, [sentence], n_beam=n_beam, max_new_tokens=60)
        assert found.entities == [expected] and found.malformed == malformed
        named += len(expected)
    assert named > 0


def test_the_command_trains_by_autotrain_and_scores_its_result(data, tiny_t5, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PYTHONPATH", "/elsewhere")
    home, out = fake(tmp_path / "home", LEARNS), tmp_path / "out dir"
    code = main(["ner-autotrain", "--data", str(data), "--model", str(tiny_t5), "--out_dir", str(out), "--home",
                 str(home), "--seeds", "[1,2]", "--fit.accelerator", "cpu", "--max_rows", "30", "--longest", "60",
                 "--validation_rows", "5"], steps=PROJECTS, program="custom_models")  # fmt: skip
    told = capsys.readouterr().out
    assert not code and "majority dictionary, test: F1 1.000" in told and "AutoTrain trains" in told
    numbers = json.loads((out / "metrics.json").read_text())
    values = {row["name"]: row["value"] for row in numbers["metrics"]}
    assert values["f1_dictionary"] == 1 and 0 <= values["f1"] < 1 and set(numbers["seeds"]) == {"1", "2"}
    assert [epoch["val_loss"] for epoch in numbers["epochs"][0]] == [2.0, 1.5]
    config = yaml.safe_load((out / "autotrain" / "config.yml").read_text())
    assert config["params"]["seed"] == 2 and config["base_model"] == str(out / "base")
    rows = [json.loads(line) for line in (out / "autotrain" / "data" / "train.jsonl").read_text().splitlines()]
    assert len(rows) == 30 and rows[0]["target"].startswith("Chemical: ") and " ; Disease: " in rows[0]["target"]
    assert len((out / "autotrain" / "data" / "validation.jsonl").read_text().splitlines()) == 5
    variables = json.loads((out / "autotrain" / "environment.json").read_text())
    assert variables["PATH"].split(":")[0] == str(home / "bin") and "PYTHONPATH" not in variables
    assert variables["HF_HUB_OFFLINE"] == "1" and variables["ALLOW_REMOTE_CODE"] == "false"
    assert variables["NLTK_DATA"] == str(home / "nltk_data") and variables["CUDA_VISIBLE_DEVICES"] == ""
    assert sorted(path.name for path in out.iterdir()) == ["autotrain", "base", "final", "metrics.json"]
    assert not (out / "autotrain" / "model").exists()
    model, _, asking = load_entity_model(out / "final")
    assert asking == Asking("text", tag_share=0.0, longest=60) and model.types == TYPES
    predict(out / "final", "Oral lithium after fever.")


def test_it_may_begin_at_a_model_of_our_own_form(data, codec, tmp_path, capsys):
    torch.manual_seed(0)
    t5 = EncoderDecoder(T5Shape(vocab_size=420, width=32, n_layer=1, n_head=2, inner_width=32).config(codec.tokenizer))
    save_encoder_decoder(t5, t5.config, codec.tokenizer, tmp_path / "ours")
    setup(data, model=str(tmp_path / "ours"), out_dir=tmp_path / "out", home=fake(tmp_path / "home", LEARNS))
    base = json.loads((tmp_path / "out" / "base" / "config.json").read_text())
    assert json.loads((tmp_path / "out" / "base" / "generation_config.json").read_text())["max_length"] > 20
    assert base["model_type"] == "t5" and "scratch" not in capsys.readouterr().out
    (row,) = rows_of(read_tagged(data, "train")[:1], codec, 100)
    assert (
        Tokenizer.from_file(str(tmp_path / "out" / "base" / "tokenizer.json")).encode(row["text"]).ids[-1]
        == codec.end_id
    )


@pytest.mark.parametrize(
    ("program", "message"),
    [
        ("print('ERROR    | 2026-01-01 00:00:00 | autotrain.trainers.common:wrapper:216 - no tokenizer')",
         r"AutoTrain failed: no tokenizer\nAll it said is in .*autotrain\.log"),
        ("raise ValueError('Task is required')", "AutoTrain failed: Task is required"),
        ("import sys; sys.exit(3)", "AutoTrain failed: it gave no reason"),
        ("print('OSError: [Errno 28] No space left on device')", "AutoTrain failed: the disk is full"),
        ("import os; os.mkdir('model'); open('model/config.json', 'w').write('{}')", "it gave no reason"),
    ],
)  # fmt: skip
def test_a_failing_autotrain_is_told_with_its_log(data, tiny_t5, tmp_path, program, message):
    home = fake(tmp_path / "home", program)
    (tmp_path / "out" / "final").mkdir(parents=True)
    with pytest.raises(UserError, match=message):
        setup(data, model=str(tiny_t5), out_dir=tmp_path / "out", home=home)
    assert (tmp_path / "out" / "autotrain" / "autotrain.log").is_file()
    assert list((tmp_path / "out" / "final").iterdir()) == []  # what was there is as it was


def test_what_cannot_be_is_told(data, tiny_t5, tmp_path):
    home = fake(tmp_path / "home", LEARNS)
    with pytest.raises(UserError, match="4 problems") as error:
        setup(data, model=str(tiny_t5), seeds=[-1], n_beam=0, longest=2, fit=FitArgs(ema_decay=0.9), home=home)
    assert "--seed must be" in str(error.value) and "AutoTrain has no such average" in str(error.value)
    with pytest.raises(UserError, match="There is no folder"):
        setup(data, model=str(tmp_path / "none"), out_dir=tmp_path / "out", home=home)
    (home / "bin" / "autotrain").unlink()
    with pytest.raises(UserError, match="could not be started"):
        setup(data, model=str(tiny_t5), out_dir=tmp_path / "out", home=home)
    damaged = tmp_path / "damaged"
    shutil.copytree(tiny_t5, damaged)
    (damaged / "model.safetensors").write_bytes(b"cut short")
    with pytest.raises(UserError, match="transformers cannot load what AutoTrain left"):
        kept(
            damaged,
            Codec(Tokenizer.from_file(str(tiny_t5 / "tokenizer.json")), TYPES, 1),
            Asking(),
            "x",
            tmp_path / "final",
        )


def test_its_environment_is_built_once(tmp_path, monkeypatch):
    monkeypatch.setattr(autotrain, "ROOM", 0)
    home, wheel = tmp_path / "home", tmp_path / "punkt.zip"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("llama_index/core/_static/nltk_cache/tokenizers/punkt_tab/english/starters.txt", "the")
        archive.writestr("llama_index/core/__init__.py", "")
    monkeypatch.setattr(autotrain, "open_wheel", lambda *_: zipfile.ZipFile(wheel))
    venv, install, uninstall = autotrain.install_commands(home, ["--no-index"])
    assert venv[-3:] == ["venv", "--clear", str(home)] and uninstall[-2:] == ["torchvision", "timm"]
    assert install[-3:] == ["--no-index", "autotrain-advanced==0.8.36", "torch==2.13.0"]

    def commands(*arguments: str) -> None:
        monkeypatch.setattr(autotrain, "install_commands", lambda *_: [[sys.executable, *arguments]])

    for program, message in (("print('ERROR: no such host'); exit(1)", "ERROR: no such host\nCheck the connection"),
                             ("print('[Errno 28] No space left on device'); exit(1)", "the disk is full"),
                             ("exit(1)", "pip gave no reason")):  # fmt: skip
        commands("-c", program)
        with pytest.raises(UserError, match=message) as error:
            autotrain.install(home)
        assert "home-install.log" in str(error.value) and not (home / ".installed").exists()
    commands("-m", "venv", "--without-pip", str(home))
    autotrain.install(home)
    assert (home / "nltk_data/tokenizers/punkt_tab/english/starters.txt").read_text() == "the"
    assert not (home / "nltk_data" / "tokenizers" / "__init__.py").exists()
    commands("-c", "exit(1)")
    autotrain.install(home)  # there is nothing to do
    monkeypatch.setattr(autotrain, "PINS", ("autotrain-advanced==9",))
    with pytest.raises(UserError, match="pip gave no reason"):
        autotrain.install(home)
    monkeypatch.setattr(autotrain, "ROOM", 1 << 60)
    with pytest.raises(UserError, match="GB are free in"):
        autotrain.install(home)
    with pytest.raises(UserError, match="No closing quotation in"):
        autotrain.install(home, "--index-url 'somewhere")


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells processes that their parent has ended")
def test_what_autotrain_starts_ends_with_it(tmp_path, monkeypatch):
    monkeypatch.setattr(autotrain, "ROOM", 0)  # nothing large is installed
    home, wheel = tmp_path / "home", tmp_path / "punkt.zip"
    zipfile.ZipFile(wheel, "w").close()
    monkeypatch.setattr(autotrain, "open_wheel", lambda *_: zipfile.ZipFile(wheel))
    venv = [sys.executable, "-m", "venv", "--without-pip", str(home)]
    monkeypatch.setattr(autotrain, "install_commands", lambda *_: [venv])
    autotrain.install(home)
    waits = "print('ready', flush=True); sys.stdin.read()"
    child = f"[sys.executable, '-c', {'import sys; ' + waits!r}]"
    program = f"import subprocess, sys; print(subprocess.Popen({child}).pid, flush=True); {waits}"
    command = [home / "bin" / "python", "-c", program]
    with subprocess.Popen(command, stdin=PIPE, stdout=PIPE, text=True) as launcher:
        said = {launcher.stdout.readline().strip() for _ in range(3)}  # one number, and ready twice
        trainer = psutil.Process(int((said - {"ready"}).pop()))
        assert trainer.is_running() and trainer.ppid() == launcher.pid
        launcher.kill()
        assert not psutil.wait_procs([trainer], timeout=30)[1] or trainer.status() == psutil.STATUS_ZOMBIE


@pytest.mark.slow  # builds AutoTrain's environment of 3 GB, and waits minutes for its imports
def test_the_real_autotrain_teaches_our_own_t5(data, tmp_path, capsys):
    setup(
        data,
        out_dir=tmp_path,
        shape=T5Shape(vocab_size=420, width=32, n_layer=1, n_head=2, inner_width=32, dropout=0.0),
        pretrain=FitArgs(max_epochs=0),
        fit=FitArgs(8, learning_rate=1e-2, max_epochs=12, patience=12, accelerator="cpu"),
    )
    assert "by AutoTrain" in capsys.readouterr().out
    numbers = json.loads((tmp_path / "metrics.json").read_text())
    assert {row["name"]: row["value"] for row in numbers["metrics"]}["f1"] > 0.5
    assert numbers["epochs"][0][-1]["val_loss"] < numbers["epochs"][0][0]["val_loss"]
