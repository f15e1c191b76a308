"""The sentiment and distillation projects on a made-up language that a tiny encoder learns in seconds."""

import json
import random
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from sklearn.metrics import f1_score
from tokenizers.processors import TemplateProcessing

from custom_models.__main__ import PROJECTS
from custom_models.encoder import Encoder, bert, mean_over_tokens
from custom_models.encoder_checkpoint import encoder_directory, save_encoder, tokenizer_of
from custom_models.projects import distill, sentiment
from custom_models.projects.classifier import ClassifierTask, TextClassifier, load_classifier, macro_f1, predict
from custom_models.projects.fitting import FitArgs
from custom_models.projects.sentiment import bag_of_bigrams
from custom_models.projects.shape import Shape
from custom_models.projects.texts import encode
from tests.custom_models.projects.test_texts import write
from workflows.__main__ import main
from workflows.errors import UserError

pytestmark = pytest.mark.long

GOOD, BAD = ["warm", "witty", "fresh", "moving"], ["stale", "dull", "silly", "long"]
REST = ["film", "plot", "scene", "actor", "a", "the", "with", "and"]
SHAPE = Shape(vocab_size=300, width=32, n_layer=2, n_head=2, inner_width=32, n_position=16, dropout=0.1)
FIT = FitArgs(batch_size=16, learning_rate=3e-3, max_epochs=6, patience=6, ema_decay=0.8)


def review(chance: random.Random) -> dict[str, str]:
    label = chance.choice(["negative", "positive"])
    words = chance.choices(REST, k=chance.randint(3, 8)) + chance.choices(GOOD if label == "positive" else BAD, k=2)
    chance.shuffle(words)
    return {"text": " ".join(words), "label": label}


@pytest.fixture(scope="module")
def reviews(tmp_path_factory: pytest.TempPathFactory) -> Path:
    chance, folder = random.Random(0), tmp_path_factory.mktemp("data") / "reviews"
    for split, count in (("train", 200), ("validation", 60), ("test", 60)):
        write(folder, [review(chance) for _ in range(count)], split)
    return folder


@pytest.fixture(scope="module")
def trained(reviews: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out_dir = tmp_path_factory.mktemp("sentiment")
    sentiment.setup(reviews, out_dir=out_dir, shape=SHAPE, fit=FIT, hidden_tokens=0.05, seeds=[1, 2])
    return out_dir


def numbers(out_dir: Path) -> dict[str, Any]:
    found = json.loads((out_dir / "metrics.json").read_text())
    return {**found, **{row["name"]: row["value"] for row in found["metrics"]}}


def test_a_classifier_from_scratch_learns_and_leaves_its_pictures(trained):
    found = numbers(trained)
    assert found["accuracy"] > 0.9 and found["accuracy_bag_of_bigrams"] > 0.9 and set(found["seeds"]) == {"1", "2"}
    assert found["accuracy_mean_of_seeds"] == pytest.approx(sum(found["seeds"].values()) / 2)
    assert 0.4 < found["accuracy_majority"] < 0.6
    assert found["parameters"] > found["non_embedding_parameters"] > 0
    for picture in ("curves.png", "confusion.png"):
        assert (trained / picture).read_bytes().startswith(b"\x89PNG") and (trained / picture).stat().st_size > 5000
    assert not (trained / "checkpoints").exists()


def test_a_saved_model_reloads_to_the_same_logits_and_predicts(trained, capsys):
    model, tokenizer = load_classifier(trained / "final")
    texts = ["a warm witty film", "the dull and silly plot with a long long scene"]
    found, cut = model.predict(texts, tokenizer)
    assert found[0]["positive"] > 0.9 > 0.1 > found[1]["positive"] and cut == 0
    assert sum(found[0].values()) == pytest.approx(1)
    (trained / "again").mkdir(exist_ok=True)
    model.save(tokenizer, trained / "again", "reviews")
    again, other = load_classifier(trained / "again")
    assert again.predict(texts, other) == (found, cut)
    predict(trained / "final", texts[0])
    assert re.match(r"positive +9\d\.\d%\nnegative", capsys.readouterr().out)
    predict(trained / "final", "film " * 30)
    assert "only the first 16 tokens were read" in capsys.readouterr().out
    with pytest.raises(UserError, match="empty text"):
        predict(trained / "final", " ")


def test_the_same_seed_gives_the_same_model(trained, reviews, tmp_path):
    sentiment.setup(reviews, out_dir=tmp_path, shape=SHAPE, fit=FIT, hidden_tokens=0.05, seeds=[1])
    one, two = ((folder / "final" / "model.safetensors").read_bytes() for folder in (trained, tmp_path))
    assert one == two


def test_weights_of_a_pretrained_encoder_are_where_training_begins(reviews, tmp_path):
    torch.manual_seed(0)
    encoder = Encoder(bert(width=32, n_layer=2, n_head=2, inner_width=32, n_position=24))
    save_encoder(encoder, encoder.config, tokenizer_of(encoder_directory("minilm")), tmp_path / "encoder")
    fit = FitArgs(16, learning_rate=3e-3, max_epochs=3)
    sentiment.setup(reviews, str(tmp_path / "encoder"), tmp_path / "out", hidden_tokens=0.0, fit=fit)
    assert numbers(tmp_path / "out")["accuracy"] > 0.8
    assert load_classifier(tmp_path / "out" / "final")[0].encoder.config == encoder.config


def test_a_student_learns_from_its_teacher(trained, reviews, tmp_path, capsys):
    fit = FitArgs(16, learning_rate=1e-3, max_epochs=2)
    distill.setup(trained / "final", reviews, tmp_path, fit=fit)
    found = numbers(tmp_path)
    assert "trained before" not in capsys.readouterr().out  # with the teacher and without are two trainings
    assert found["accuracy"] > 0.9 * found["accuracy_teacher"] and 0 <= found["accuracy_without_teacher"] <= 1
    assert found["fewer_non_embedding_parameters"] == pytest.approx(0.5, abs=0.01)  # the last norm stays
    student, _ = load_classifier(tmp_path / "final")
    assert student.encoder.config.n_layer == 1 and (tmp_path / "curves.png").is_file()
    other = reviews.rename(reviews.with_name("others"))
    try:  # whose test sentences the teacher may have learned
        with pytest.raises(UserError, match=r"learned from reviews, not from others\. Train one on the same data"):
            distill.setup(trained / "final", other, tmp_path, fit=fit)
    finally:
        other.rename(reviews)


def test_a_long_text_keeps_its_beginning_and_an_end_that_every_text_has(trained):
    _, tokenizer = load_classifier(trained / "final")
    ids = tokenizer.encode("warm film plot scene").ids
    rows, cut = encode([("warm film plot scene", 0), ("warm", 0)], tokenizer, len(ids) - 1)
    assert cut == 1 and rows[0].ids == ids[:-1]
    start, end = tokenizer.token_to_id("<pad>"), tokenizer.token_to_id("<mask>")
    tokenizer.post_processor = TemplateProcessing("<pad> $A <mask>", special_tokens=[("<pad>", start), ("<mask>", end)])
    rows, cut = encode([("warm film plot scene", 0)], tokenizer, 4)
    assert cut == 1 and rows[0].ids == [start, *ids[:2], end]


def test_the_student_is_pulled_to_the_teacher(trained):
    teacher, tokenizer = load_classifier(trained / "final")
    student = TextClassifier(Encoder(teacher.encoder.config), teacher.labels)
    task = distill.DistillationTask(student, teacher, distill.Weights(soft=1.0, hard=0.0, cosine=1.0), FIT, 10)
    batch = next(iter(distill_batches(tokenizer)))
    before = task.loss(batch)
    before.backward()
    assert all(p.grad is None for p in teacher.parameters())
    assert not any(name.startswith("_teacher") for name in task.state_dict())
    student.load_state_dict(teacher.state_dict())
    assert float(task.eval().loss(batch)) == pytest.approx(0, abs=1e-5)
    assert float(before) > 0.1


def test_mixed_texts_are_classified_by_their_shares(trained):
    model, tokenizer = load_classifier(trained / "final")
    batch = next(iter(distill_batches(tokenizer)))
    vectors = mean_over_tokens(model.encoder(batch.ids, batch.lengths).last, batch.lengths)
    found = []
    for seed in range(8):
        torch.manual_seed(seed)
        found.append(float(ClassifierTask(model, FIT, 10, mixup=1.0).loss(batch)))
        torch.manual_seed(seed)
        share, other = float(torch.distributions.Beta(1.0, 1.0).sample()), torch.randperm(2).tolist()
        wanted = 0.0
        for i, j in enumerate(other):
            logprobs = model.head(share * vectors[i] + (1 - share) * vectors[j]).log_softmax(dim=-1)
            wanted -= share * float(logprobs[batch.labels[i]]) + (1 - share) * float(logprobs[batch.labels[j]])
        assert found[-1] == pytest.approx(wanted / 2, abs=1e-6)
    assert max(found) - min(found) > 0.01  # other shares, other losses


def distill_batches(tokenizer: Any) -> Any:
    from custom_models.projects.texts import encode, loader

    rows, _ = encode([("a warm film", 1), ("a dull plot", 0)], tokenizer, 16)
    return loader(rows, tokenizer.token_to_id("<pad>"), 2)


def test_a_bag_of_words_knows_words_and_not_more():
    texts = {split: [("good film", 1), ("bad film", 0)] * 5 for split in ("train", "validation", "test")}
    assert bag_of_bigrams(texts) == 1.0


def test_bad_settings_are_told_at_once(reviews, tmp_path, capsys):
    with pytest.raises(UserError, match="6 problems"):
        sentiment.setup(
            reviews, out_dir=tmp_path, hidden_tokens=1.0, mixup=-1.0, seeds=[], max_rows=1,
            fit=FitArgs(batch_size=0, learning_rate=-1.0),
        )  # fmt: skip
    with pytest.raises(UserError, match="2 problems"):
        distill.setup(weights=distill.Weights(soft=0.0, hard=0.0, temperature=0.0))
    with pytest.raises(UserError, match=r"no config\.json: it is no checkpoint"):
        distill.setup(tmp_path / "none", reviews, tmp_path)
    assert main(["predict", "--checkpoint_dir", str(tmp_path), "--text", "x"], PROJECTS, "custom_models") == 1
    assert capsys.readouterr().err.startswith("error: ")
    assert main(["--help"], PROJECTS, "custom_models") == 0
    assert "python -m custom_models STEP" in capsys.readouterr().out


def test_macro_f1_is_scikit_learns():
    generator = torch.Generator().manual_seed(0)
    wanted, found = torch.randint(0, 3, (2, 200), generator=generator)
    counts = torch.zeros(3, 3, dtype=torch.long)
    counts.index_put_((wanted, found), torch.ones(200, dtype=torch.long), accumulate=True)
    assert macro_f1(counts) == pytest.approx(f1_score(wanted, found, average="macro"))
