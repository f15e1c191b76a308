"""What a step must not break: which answers are right, which repeat themselves, what is warned about, what is kept."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.workflows.alignment import TRAIN, early_letters, on_test_split, pair, question, write
from workflows import dpo, grpo, lora, ppo
from workflows.chat_template import ChatTemplate
from workflows.evaluation.compare import compare, wilson_interval
from workflows.training import drift
from workflows.training.answers import Labelled, encode_answers
from workflows.training.batch import Tree, pack_row
from workflows.training.drift import (
    ASKED,
    LARGEST_FALL,
    WATCHED,
    DriftCheck,
    Measured,
    judge_of,
    losses_of,
    mean_logprobs,
    probes_of_answers,
    probes_of_questions,
    repeats,
    says_right_answer,
)
from workflows.training.held_out import right_turns
from workflows.training.model import load_model
from workflows.training.pairs import DPO
from workflows.training.questions import Question
from workflows.training.rewards import Rewards, WeightedReward
from workflows.training.rollouts import Rollout

SHORT = {"answers": ["Rib fusion", "Fused ribs"]}
LONG = {"chosen": [{"role": "assistant", "content": "Complete or partial merging of adjacent ribs."}]}


@pytest.mark.parametrize(
    ("row", "text", "is_right"),
    [
        (SHORT, "Rib fusion", True),
        (SHORT, "<think>Liver?</think> Doctors call it *fused ribs*.", True),
        (SHORT, "The medical term is Rib fusion.", True),
        (SHORT, "Rib", False),
        (SHORT, "Crib fusion", False),
        (SHORT, "fusion of a rib", False),
        (SHORT, "", False),
        (LONG, "complete or partial merging of ADJACENT ribs", True),
        (LONG, "Partial merging of adjacent ribs", True),  # F1 of 5 words with 7: 10/12
        (LONG, "Merging of ribs", False),  # 6/10
        ({**LONG, "answers": ["Rib fusion"]}, "Rib fusion", True),  # "answers" come first
        ({"choices": ["no", "yes, often"], "answer": 1}, "Yes, often", True),
        ({"messages": [{"role": "assistant", "content": "<think>a</think>b c"}]}, "b c", True),
        ({"completion": [{"role": "assistant", "content": "b"}], "label": False}, "b", None),
        ({"prompt": []}, "b", None),
        ({"answers": ["…"]}, "…", None),  # punctuation alone says nothing
    ],
)
def test_an_answer_is_right_by_words_in_a_row_or_f1(row: dict[str, Any], text: str, is_right: bool | None) -> None:
    assert says_right_answer(row, text) is is_right


def test_a_reward_of_right_or_wrong_decides_where_a_step_has_one() -> None:
    row = {"choices": ["no", "yes"], "answer": 1}
    letter = judge_of(Rewards([WeightedReward("format"), WeightedReward("letter")]))
    assert letter is not None and letter(row, "The answer is B.") is True and letter(row, "yes") is False
    number = judge_of(Rewards([WeightedReward("math_answer")]))
    assert number is not None and number({"answers": ["0.5"]}, "so it is 1/2") is True
    assert judge_of(Rewards([WeightedReward("finding"), WeightedReward("brevity")])) is None


@pytest.mark.parametrize(
    ("ids", "is_repeated"),
    [
        ([1, 2, 3, 4] * 3, True),
        ([9, 8, *[1, 2, 3, 4] * 3, 7], True),
        ([5] * 12, True),
        ([5] * 11, False),  # "---------"
        ([1, 2, 3, 4] * 2 + [1, 2, 3], False),  # two and a bit
        ([1, 2, 3] * 3, False),  # under 12 tokens
        ([1, 2, 3] * 4, True),
        (list(range(60)), False),
        ([], False),
        ([1], False),
    ],
)
def test_a_phrase_said_three_times_in_succession_is_a_repetition(ids: list[int], is_repeated: bool) -> None:
    assert repeats(ids) is is_repeated


def shares(name: str, lost: int, won: int, rest: int = 80) -> dict[str, Any]:
    """A comparison of right-or-wrong scores."""
    pairs = [(1.0, 0.0)] * lost + [(0.0, 1.0)] * won + [(1.0, 1.0)] * (rest // 2) + [(0.0, 0.0)] * (rest - rest // 2)
    return {name: compare("test", name, [a for a, _ in pairs], [b for _, b in pairs])}


@pytest.mark.parametrize(
    ("name", "lost", "won", "is_worse"),
    [
        ("greedy_right", 20, 0, True),
        ("greedy_right", 20, 19, False),
        ("greedy_right", 0, 20, False),
        ("greedy_right", 5, 0, False),  # the interval is below zero, but McNemar's p is 0.06
        ("greedy_right", 6, 0, True),
        ("greedy_ended", 12, 2, True),
        ("greedy_ended", 2, 12, False),
        ("greedy_repeats", 2, 12, True),
        ("greedy_repeats", 12, 2, False),
        ("greedy_right", 0, 0, False),
    ],
)
def test_shares_that_get_worse_by_more_than_chance_are_warned_about(
    name: str, lost: int, won: int, is_worse: bool
) -> None:
    assert bool(losses_of(shares(name, lost, won))) is is_worse


def test_a_few_rows_prove_nothing() -> None:
    assert losses_of(shares("greedy_right", 1, 0, rest=0)) == []
    assert losses_of(shares("greedy_right", 5, 0, rest=0)) == []


@pytest.mark.parametrize(
    ("falls", "is_worse"),
    [
        ([LARGEST_FALL + 0.05] * 9 + [LARGEST_FALL + 0.06], True),
        ([LARGEST_FALL - 0.05] * 10, False),
        ([-1.0] * 10, False),
        ([0.0] * 9 + [9.0], False),  # one row alone: the interval reaches zero
        ([3.0], True),
    ],
)
def test_a_fall_of_the_right_answers_log_probability_is_warned_about(falls: list[float], is_worse: bool) -> None:
    found = compare("test", "chosen_logprob", [-1.0] * len(falls), [-1.0 - fall for fall in falls])
    said = losses_of({"chosen_logprob": found})
    assert bool(said) is is_worse
    if is_worse:
        mean = sum(falls) / len(falls)
        assert f"fell by {mean:.2f} nats a token" in said[0] and f"from -1.00 to {-1 - mean:.2f}" in said[0]


def probe_pairs(checkpoint: Path, numbers: Any) -> list[Labelled]:
    rows = [pair(n) for n in numbers]
    return encode_answers(rows, ChatTemplate.from_checkpoint(checkpoint), 256, "rows")[0]


def check_of(checkpoint: Path, probes: list[drift.Probe], **changes: Any) -> DriftCheck:
    settings: dict[str, Any] = {"max_new_tokens": 16, "max_seq_length": 256, "row_tokens": 256, "cure": "Do less."}
    return DriftCheck(probes, ChatTemplate.from_checkpoint(checkpoint), {}, **{**settings, **changes})


def test_measures_before_and_after_are_paired_and_a_ruined_model_is_named(tiny_llama: Path) -> None:
    template = ChatTemplate.from_checkpoint(tiny_llama)
    probes = probes_of_answers(probe_pairs(tiny_llama, range(20)))
    check = check_of(tiny_llama, probes)

    def said(text: str, ended: bool = True) -> Rollout:
        return Rollout(template.encode(text) + [template.stop_ids[0]] * ended, [], ended)

    rights = [said(pair(n)["chosen"][0]["content"]) for n in range(20)]
    check.before = Measured([-1.0] * 20, rights)
    ruined = [
        *rights[:5],
        *(said("the term is the term is the term is the term is the term", False) for _ in range(15)),
    ]
    found = check.compared(Measured([-1.5 - 0.01 * n for n in range(20)], ruined))
    rows = {row["name"]: row for row in found.metrics}
    assert list(rows) == ["chosen_logprob_before", "chosen_logprob", "greedy_right_before", "greedy_right"]
    assert rows["chosen_logprob_before"]["value"] == -1 and rows["chosen_logprob"]["value"] == pytest.approx(-1.595)
    assert rows["chosen_logprob"]["stderr"] > 0
    assert rows["greedy_right_before"]["value"] == 1 and rows["greedy_right"]["value"] == 0.25
    assert (rows["greedy_right"]["low"], rows["greedy_right"]["high"]) == wilson_interval(0.25, 20)
    assert {row["n"] for row in rows.values()} == {20} and {row["split"] for row in rows.values()} == {"test"}
    differences = {row["metric"]: row["difference"] for row in found.gain}
    assert differences == {
        "chosen_logprob": pytest.approx(-0.595), "greedy_right": -0.75, "greedy_ended": -0.75, "greedy_repeats": 0.75,
    }  # fmt: skip
    assert len(found.warnings) == 5 and found.warnings[-1] == "Do less."
    assert "fell from 100% to 25%: -75 points" in found.warnings[1]
    assert [shown["before"] for shown in found.shown] == [pair(n)["chosen"][0]["content"] for n in range(3)]

    same = check.compared(check.before)
    assert same.warnings == [] and all(row["difference"] == 0 for row in same.gain)


def test_log_probabilities_are_means_over_an_answers_tokens_of_the_plain_forward(tiny_llama: Path) -> None:
    model = load_model(tiny_llama)
    trees = [Tree([5, 6, 7], [[8, 9]]), Tree([5, 6], [[10, 11, 12]], [[True, False, True]]), Tree([3], [[4]])]
    found = mean_logprobs(model, trees, 64)
    for tree, mean in zip(trees, found, strict=True):
        ids = torch.tensor([tree.prompt + tree.completions[0]])
        logprobs = torch.log_softmax(model(ids)[0].float(), dim=-1)
        mask = tree.loss_masks[0] if tree.loss_masks else [True] * len(tree.completions[0])
        places = [len(tree.prompt) + i for i, learned in enumerate(mask) if learned]
        expected = torch.stack([logprobs[place - 1, ids[0, place]] for place in places]).mean()
        assert mean == pytest.approx(float(expected.detach()), abs=1e-4)
    assert mean_logprobs(model, [], 64) == [] and model(pack_row(trees[:1])).shape == (2,)


def test_probes_differ_in_their_prompts_and_are_spread_over_the_rows(tiny_llama: Path) -> None:
    answers = probe_pairs(tiny_llama, range(3 * WATCHED))
    probes = probes_of_answers([*answers, *answers])
    assert len(probes) == WATCHED
    assert [probe.row for probe in probes] == [pair(3 * n) for n in range(WATCHED)]
    assert [probe.row for probe in check_of(tiny_llama, probes).asked] == [pair(6 * n) for n in range(ASKED)]
    first = probes[0].right
    assert first is not None and first.completions == answers[0].tree.completions[:1]
    bad = [Labelled(Tree(answer.tree.prompt, [[5]]), [False], answer.row) for answer in answers[:4]]
    good = [Labelled(Tree(answer.tree.prompt, [[6]]), [True], answer.row) for answer in answers[2:5]]
    assert [probe.right and probe.right.completions for probe in probes_of_answers([*bad, *good])] == [[[6]]] * 3
    assert [probe.right for probe in probes_of_answers(bad)] == [None] * 4


def test_a_question_brings_its_right_answer_in_the_templates_form(tiny_llama: Path) -> None:
    template = ChatTemplate.from_checkpoint(tiny_llama)
    rows = [
        question(1),
        {"prompt": question(2)["prompt"]},
        {**question(3), "chosen": "a text, which nothing checked"},
        {**question(4), "answers": ["long " * 300]},
        {**question(5), "chosen": ["no turn"]},
    ]
    questions = [Question(row, template.prompt_ids(row["prompt"])) for row in rows]
    probes = probes_of_questions(questions, template, 128)
    chat = template.encode_chat([*rows[0]["prompt"], {"role": "assistant", "content": "finding 1"}], 1)
    assert probes[0].right == Tree(chat.prompt, [chat.completion], [chat.loss_mask])
    assert probes[1].right is None and right_turns(rows[2])[0]["content"] == "finding 3"
    assert right_turns(rows[4])[0]["content"] == "finding 5"
    assert probes[3].right is not None and len(probes[3].prompt) + len(probes[3].right.completions[0]) == 128


def test_a_prompt_that_leaves_no_room_is_scored_but_not_asked(tiny_llama: Path) -> None:
    check = check_of(tiny_llama, probes_of_answers(probe_pairs(tiny_llama, range(4))), max_new_tokens=256)
    assert len(check.probes) == 4 and check.asked == []
    check.before = Measured([-1.0] * 4)
    found = check.compared(Measured([-3.0] * 4))
    assert [row["name"] for row in found.metrics] == ["chosen_logprob_before", "chosen_logprob"] and found.warnings


MEASURES = ("chosen_logprob", "greedy_right")
RUIN, GENTLE = replace(TRAIN, learning_rate=0.3), replace(TRAIN, learning_rate=1e-5)


@pytest.fixture(scope="module")
def taught(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model that gives the chosen answers, so that it has something to lose."""
    folder = tmp_path_factory.mktemp("taught")
    chats = [{"messages": [*pair(n)["prompt"], *pair(n)["chosen"]]} for n in range(48)]
    data = write(folder / "chats", train=chats, validation=chats[:4])
    train = replace(
        TRAIN, max_steps=60, learning_rate=5e-3, lr_schedule="linear", global_batch_size=8, row_tokens=512,
        eval_interval=60, save_interval=60,
    )  # fmt: skip
    lora.setup(
        checkpoint_dir=tiny_llama, data=data, out_dir=folder / "lora", lora_r=0, precision="32-true", train=train
    )
    return folder / "lora" / "final"


def prefer(checkpoint: Path, data: Path, out_dir: Path, **changes: Any) -> dict[str, Any]:
    """Run DPO; returns its metrics.json."""
    settings = {"precision": "32-true", "lora_r": 4, "max_new_tokens": 16, "max_val_rows": 2, **changes}
    dpo.setup(checkpoint_dir=checkpoint, data=data, out_dir=out_dir, **settings)
    metrics: dict[str, Any] = json.loads((out_dir / "final" / "metrics.json").read_text())
    return metrics


@pytest.mark.long
@pytest.mark.parametrize("loss", ["sigmoid", "robust", "ipo", "hinge", "simpo", "orpo", "kto"])
def test_a_ruined_preference_run_is_warned_about_and_a_gentle_one_is_not(
    taught: Path, pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], loss: str
) -> None:
    gentle = prefer(taught, pairs, tmp_path / "gentle", loss=loss, train=GENTLE)
    assert gentle["warnings"] == [] and "WARNING" not in capsys.readouterr().out
    ruined = prefer(taught, pairs, tmp_path / "ruined", loss=loss, train=RUIN)
    fall, wrong, *_, cure = ruined["warnings"]
    assert "log-probability of right answers fell by" in fall and "--train.learning_rate (it was 0.3)" in cure
    assert "Greedy answers that are right fell from 100% to " in wrong
    *_, said = capsys.readouterr().out.partition("\nWARNING: this step has made the model worse:\n")
    assert said.rstrip().endswith(cure)  # it is the last that is printed
    for run in ("gentle", "ruined"):
        test = on_test_split(tmp_path / run)
        assert {test[f"{name}{when}"]["n"] for name in MEASURES for when in ("_before", "")} == {8}
    assert test["chosen_logprob"]["value"] < test["chosen_logprob_before"]["value"] - LARGEST_FALL
    assert test["greedy_right_before"]["value"] == 1


@pytest.mark.long
@pytest.mark.parametrize("rank", [0, 4])
def test_the_model_before_training_is_measured_once_and_kept_over_a_resume(
    tiny_llama: Path, pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rank: int
) -> None:
    train = replace(TRAIN, learning_rate=1e-2 if rank else 1e-3)
    whole = prefer(tiny_llama, pairs, tmp_path / "whole", lora_r=rank, train=train)
    original, measured = DPO.batches, DriftCheck._measure
    calls: list[int] = []

    def stopping(self: Any, step: int, rank: int, world_size: int) -> Any:
        if step == 3:
            raise KeyboardInterrupt
        return original(self, step, rank, world_size)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(DPO, "batches", stopping)
        prefer(tiny_llama, pairs, tmp_path / "stopped", lora_r=rank, train=train)
    file = tmp_path / "stopped" / "before.json"
    written = file.read_bytes()
    monkeypatch.setattr(DriftCheck, "_measure", lambda self, model: calls.append(1) or measured(self, model))
    resumed = prefer(tiny_llama, pairs, tmp_path / "stopped", lora_r=rank, train=train)
    assert len(calls) == 1 and file.read_bytes() == written  # the trained model alone
    assert resumed["metrics"] == whole["metrics"] and resumed["shown"] == whole["shown"]
    assert all(shown["before"] for shown in whole["shown"])  # with all weights trained, too

    file.write_text(file.read_text()[:100])  # cut short: measured again
    again = prefer(tiny_llama, pairs, tmp_path / "stopped", lora_r=rank, train=train, resume=False)
    assert len(calls) == 3 and file.read_bytes() == written and again["metrics"] == whole["metrics"]


@pytest.mark.long
def test_without_test_rows_it_is_printed_that_nothing_is_measured(
    tiny_llama: Path, pairs: Path, questions: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    none = "no test rows (test.jsonl, --max_test_rows): what this step breaks is not measured"
    metrics = prefer(tiny_llama, pairs, tmp_path / "dpo", max_test_rows=0, train=RUIN)
    assert none in capsys.readouterr().out and metrics["warnings"] == metrics["gain"] == []
    rewards = [WeightedReward(f"{early_letters.__module__}.early_letters")]
    options: Any = {"precision": "32-true", "lora_r": 4, "max_new_tokens": 8, "rewards": rewards}
    grpo.setup(tiny_llama, questions, tmp_path / "grpo", train=replace(TRAIN, max_steps=1), max_test_rows=0, **options)
    assert none in capsys.readouterr().out and not (tmp_path / "grpo" / "before.json").exists()


@pytest.mark.long
@pytest.mark.parametrize("step", [grpo, ppo])
def test_a_ruined_reward_run_is_warned_about_and_a_gentle_one_is_not(
    taught: Path, pairs: Path, tmp_path: Path, step: Any
) -> None:
    rewards = [WeightedReward(f"{early_letters.__module__}.early_letters")]
    options: Any = {"precision": "32-true", "lora_r": 4, "max_new_tokens": 16, "rewards": rewards, "max_val_rows": 2}
    found = {}
    for name, train in (("gentle", GENTLE), ("ruined", RUIN)):
        out_dir = tmp_path / name
        step.setup(checkpoint_dir=taught, data=pairs, out_dir=out_dir, train=train, **options)
        found[name] = json.loads((out_dir / "final" / "metrics.json").read_text())
    assert found["gentle"]["warnings"] == []
    fall, wrong, *_, cure = found["ruined"]["warnings"]
    assert "log-probability of right answers fell by" in fall and "right fell from 100% to" in wrong
    assert "a larger --beta" in cure
