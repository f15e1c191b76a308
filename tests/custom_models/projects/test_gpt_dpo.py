"""A GPT of our own is taught to answer and aligned: the road's loss, padding that changes nothing, pairs that turn."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from custom_models.gpt import GPT, modern
from custom_models.gpt_checkpoint import load_gpt, save_gpt
from custom_models.projects import gpt_dpo
from custom_models.projects.fitting import FitArgs
from custom_models.projects.gpt_answers import Answered, Pair, answer_logprobs, mismatched, padded, padded_pairs
from custom_models.projects.gpt_dpo import DPOTask, scores, setup
from custom_models.projects.gpt_training import GPTFit
from custom_models.tokenization.bpe import SpecialBPE
from custom_models.tokenization.characters import CharacterTokenizer
from tests.workflows.alignment import WORDS, write
from workflows.errors import UserError
from workflows.training import losses

MODEL = modern(vocab_size=262, context=64, width=32, n_layer=2, n_head=2)
PRETRAIN = GPTFit(max_steps=20, batch_size=4, warmup_steps=2)
TUNE = FitArgs(batch_size=8, learning_rate=5e-3, max_epochs=3)
ALIGN = FitArgs(batch_size=8, learning_rate=1e-3, max_epochs=2)


def opinionated(seed: int = 0) -> GPT:
    torch.manual_seed(seed)
    model = GPT(MODEL).eval()
    for parameter in model.parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def some(length: int, answer: int, seed: int) -> Answered:
    ids = torch.randint(262, (length + answer,), generator=torch.Generator().manual_seed(seed)).tolist()
    return Answered(ids[:length], ids[length:])


def test_an_answers_logprob_is_the_sum_over_its_tokens_however_it_is_padded():
    model = opinionated()
    texts = [some(3, 9, 1), some(12, 2, 2), some(1, 1, 3)]
    with torch.no_grad():
        found = answer_logprobs(model, padded(texts))
        for text, value in zip(texts, found, strict=True):
            logprobs = model(torch.tensor([text.prompt + text.answer]))[0].log_softmax(-1)
            begin = len(text.prompt)
            expected = sum(float(logprobs[begin - 1 + i, token]) for i, token in enumerate(text.answer))
            assert float(value) == pytest.approx(expected, abs=1e-4)


def test_its_loss_is_the_roads():
    model, reference = opinionated(0), opinionated(1)
    pairs = [Pair(some(4, 5, i), some(4, 7, i + 10), torch.zeros(2)) for i in range(3)]
    pairs = [Pair(p.chosen, p.rejected, both) for p, both in zip(pairs, scores(reference, pairs), strict=True)]
    task, batch = DPOTask(model, ALIGN, 1, beta=0.3), padded_pairs(pairs)
    task.log = lambda *_, **__: None  # type: ignore[method-assign]
    with torch.no_grad():
        ours, theirs = (answer_logprobs(m, batch).view(-1, 2) for m in (model, reference))
        margin = (ours - theirs)[:, 0] - (ours - theirs)[:, 1]
        torch.testing.assert_close(task.training_step(batch, 0), losses.dpo(margin, 0.3).mean())
        torch.testing.assert_close(task.training_step(batch, 0), -(0.3 * margin).sigmoid().log().mean())
        task.model = reference
        assert float(task.training_step(batch, 0)) == pytest.approx(math.log(2), abs=1e-5)


def rows(numbers: range) -> list[dict[str, Any]]:
    """Preferences for the word that was asked for."""
    return [
        {
            "prompt": [{"role": "user", "content": f"What is {WORDS[n % 8]} number {n}?"}],
            "chosen": [{"role": "assistant", "content": f"It is {WORDS[n % 8]} {n}, so."}],
            "rejected": [{"role": "assistant", "content": f"It is {WORDS[(n + 3) % 8]}, or so {n % 5}."}],
        }
        for n in numbers
    ]


@pytest.fixture
def data(tmp_path: Path) -> dict[str, Path]:
    splits = {"train": rows(range(80)), "validation": rows(range(80, 90)), "test": rows(range(90, 110))}
    told = {
        split: [{"messages": row["prompt"] + row["chosen"], "kind": "definition"} for row in members]
        for split, members in splits.items()
    }
    return {"data": write(tmp_path / "rows", **told), "pairs": write(tmp_path / "pairs", **splits)}


@pytest.mark.long
def test_preferences_are_learned_and_counted(data, tmp_path, capsys):
    out_dir = tmp_path / "out"
    settings = {"out_dir": out_dir, "tune": TUNE, "align": ALIGN, "max_new_tokens": 12}
    setup(**data, **settings, model=MODEL, pretrain=PRETRAIN)
    found = json.loads((out_dir / "metrics.json").read_text())
    told = {row["name"]: row for row in found["metrics"]}
    assert told["pair_accuracy_before"]["value"] == 0.5 and told["pair_accuracy"]["value"] > 0.9
    assert told["logprob_accuracy"]["value"] >= told["logprob_accuracy_before"]["value"]
    assert told["margin"]["value"] > 0.01 and told["margin"]["n"] == 20 == told["pair_accuracy"]["n"]
    assert told["answer_loss"]["value"] < 3  # it is 1.7; of a model that knows nothing over 5
    assert [answer["wanted"] for answer in found["shown"]] == [f"It is {WORDS[n % 8]} {n}, so." for n in (90, 91, 92)]
    assert all(answer["before"] and answer["question"] for answer in found["shown"])
    assert "pair accuracy before        0.500" in capsys.readouterr().out
    text = (out_dir / "base" / "answers.txt").read_text().splitlines()
    assert len(text) == 80 and not any(f" {n}," in line for line in text for n in range(80, 110))

    (tuned, _), (final, _) = (load_gpt(out_dir / name) for name in ("tuned", "final"))
    assert not all(torch.equal(a, b) for a, b in zip(tuned.parameters(), final.parameters(), strict=True))
    shown = gpt_dpo.reply(final, load_gpt(out_dir / "final")[1], rows(range(90, 91))[0], 12)
    assert shown == found["shown"][0]["after"]

    setup(**data, **settings, base_dir=str(out_dir / "tuned"), max_pairs=8)  # goes on from a base that is there
    assert "learning to prefer: 8 pairs" in capsys.readouterr().out

    other = {**settings, "pretrain": replace(PRETRAIN, max_steps=21)}
    (out_dir / "base" / "checkpoints").mkdir(exist_ok=True)
    torch.save({"run": {"seed": 0}}, out_dir / "base" / "checkpoints" / "step-5.ckpt")
    with pytest.raises(UserError, match=r"of a run with other settings: .* or begin anew: --resume false"):
        setup(data["data"], **other, model=MODEL)
    setup(data["data"], **other, model=MODEL, resume=False, max_pairs=8)  # and its own pairs
    assert "learning to prefer: 8 pairs" in capsys.readouterr().out


def test_without_pairs_an_answer_stands_against_that_to_another_question():
    told = [
        {"messages": row["prompt"] + row["chosen"], "kind": f"kind {n % 2}"} for n, row in enumerate(rows(range(9)))
    ]
    pairs = mismatched([*told, {**told[0]}], seed=1)
    kinds = {row["messages"][-1]["content"]: row["kind"] for row in told}
    own = {row["messages"][0]["content"]: row["messages"][-1]["content"] for row in told}
    chosen, rejected = ([pair[side][0]["content"] for pair in pairs] for side in ("chosen", "rejected"))
    assert chosen == [own[pair["prompt"][0]["content"]] for pair in pairs] and 8 <= len(pairs) <= 10
    assert all(one != other and kinds[one] == kinds[other] for one, other in zip(chosen, rejected, strict=True))
    assert sorted(rejected) == sorted(chosen)  # no answer is better by itself
    assert mismatched(told, seed=2) != mismatched(told, seed=1) == mismatched(told, seed=1)


def test_what_cannot_be_is_told(data, tmp_path):
    with pytest.raises(UserError, match=r"5 problems[\s\S]*--pretrain\.max_steps[\s\S]*--tune\.batch_size"):
        setup(**data, beta=0, max_rows=0, tune=FitArgs(batch_size=0), seed=-1,
              pretrain=GPTFit(max_steps=0, warmup_steps=0))  # fmt: skip
    with pytest.raises(UserError, match="no rows of kind signs; there are definition"):
        setup(**data, kinds=["signs"], out_dir=tmp_path)
    with pytest.raises(UserError, match=r"validation\.jsonl does not exist"):
        (data["data"] / "validation.jsonl").unlink()
        setup(**data, out_dir=tmp_path)


def test_a_base_that_does_not_fit_is_told(data, tmp_path):
    save_gpt(
        GPT(modern(vocab_size=3, context=8, width=16, n_layer=1, n_head=2)), CharacterTokenizer("abc"), tmp_path / "c"
    )
    with pytest.raises(UserError, match="no token that ends a text"):
        setup(**data, base_dir=str(tmp_path / "c"), out_dir=tmp_path)
    short = GPT(modern(vocab_size=257, context=8, width=16, n_layer=1, n_head=2))
    save_gpt(short, SpecialBPE(["<|endoftext|>"]), tmp_path / "short")
    with pytest.raises(UserError, match="None of the train rows fits into 8 tokens"):
        setup(**data, base_dir=str(tmp_path / "short"), out_dir=tmp_path)
