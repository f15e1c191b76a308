"""Questions judged by rules and the likelihood of answers, as `evaluate` scores them."""

import json
from pathlib import Path
from typing import Any

import pytest

from workflows.chat_template import ChatTemplate
from workflows.errors import UserError
from workflows.evaluate import setup
from workflows.evaluation.compare import wilson_interval
from workflows.training.answers import Tree
from workflows.training.batch import pack_row
from workflows.training.model import load_model
from workflows.training.rollouts import generate

pytestmark = pytest.mark.long

NEW_TOKENS = 8


def ask(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def write(data_dir: Path, name: str, rows: list[dict[str, Any]], split: str = "test") -> None:
    (data_dir / name).mkdir(parents=True, exist_ok=True)
    (data_dir / name / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def evaluate(checkpoint: Path, data_dir: Path, tasks: list[str], **settings: Any) -> dict[str, Any]:
    out_dir = settings.pop("out_dir", data_dir / "out")
    setup(checkpoint, tasks, data_dir=data_dir, out_dir=out_dir, precision="32-true", **settings)
    metrics: dict[str, Any] = json.loads((out_dir / "metrics.json").read_text())
    return {**metrics, "by_name": {(row["task"], row["name"]): row for row in metrics["metrics"]}}


@pytest.fixture(scope="module")
def greedy(tiny_llama: Path) -> dict[str, str]:
    """What the model answers, by question."""
    template, model = ChatTemplate.from_checkpoint(tiny_llama), load_model(tiny_llama, precision="32-true")
    questions = [f"What is finding {i}?" for i in range(6)]
    prompts = [template.prompt_ids(ask(question)) for question in questions]
    answers = generate(model, prompts, max_new_tokens=NEW_TOKENS, stop_ids=template.stop_ids)
    return {q: template.decode(a.ids).strip() for q, a in zip(questions, answers, strict=True)}


@pytest.fixture
def data_dir(tmp_path: Path, greedy: dict[str, str]) -> Path:
    """Questions of two kinds: the first has the model's own answers as the right ones in two of three rows."""
    texts = list(greedy.items())
    names = [
        {"prompt": ask(q), "answers": [a if i < 2 else "Fever"], "kind": "name", "rules": ["exact", "contains"]}
        for i, (q, a) in enumerate(texts[:3])
    ]
    advice = [{"prompt": ask(q), "answers": ["-"], "kind": "advice", "rules": ["disclaimer"]} for q, _ in texts[3:]]
    write(tmp_path, "my_questions", [*names, *advice])
    return tmp_path


def test_a_kinds_metrics_are_the_shares_that_its_rules_accept(tiny_llama, data_dir, greedy, capsys):
    found = evaluate(tiny_llama, data_dir, ["my_questions"], max_new_tokens=NEW_TOKENS)
    values = {key: row["value"] for key, row in found["by_name"].items()}
    assert values == {
        ("my_questions/name", "exact"): pytest.approx(2 / 3),
        ("my_questions/name", "contains"): pytest.approx(2 / 3),
        ("my_questions/advice", "disclaimer"): 0,
    }
    row = found["by_name"]["my_questions/name", "exact"]
    assert (row["n"], row["split"]) == (3, "test")
    assert (row["low"], row["high"]) == pytest.approx(wilson_interval(2 / 3, 3))
    assert "my_questions/name" in capsys.readouterr().out
    samples = [json.loads(line) for line in (data_dir / "out" / "samples_my_questions_name.jsonl").open()]
    kept = {sample["doc"]["prompt"][0]["content"]: sample["resps"][0][0].strip() for sample in samples}
    assert kept == {question: greedy[question] for question in list(greedy)[:3]}


def test_two_models_are_compared_question_by_question(tiny_llama, data_dir):
    evaluate(tiny_llama, data_dir, ["my_questions"], max_new_tokens=NEW_TOKENS)
    base = (data_dir / "out").rename(data_dir / "base")
    found = evaluate(tiny_llama, data_dir, ["my_questions"], max_new_tokens=NEW_TOKENS, baseline=base)
    compared = {(row["task"], row["metric"]): row for row in found["comparison"]}
    assert len(compared) == 3
    row = compared["my_questions/name", "exact"]
    assert (row["difference"], row["n"], row["test"]) == (0, 3, "mcnemar")


def test_the_validation_split_leaves_the_test_unread(tiny_llama, data_dir):
    (data_dir / "my_questions" / "test.jsonl").rename(data_dir / "my_questions" / "validation.jsonl")
    found = evaluate(tiny_llama, data_dir, ["my_questions"], max_new_tokens=2, split="validation")
    assert {row["split"] for row in found["metrics"]} == {"validation"}
    with pytest.raises(UserError, match=r"my_questions reads .*test.jsonl, which does not exist. Make it with"):
        evaluate(tiny_llama, data_dir, ["my_questions"])


def test_the_log_probability_is_that_of_the_answers_tokens(tiny_llama, tmp_path):
    template, model = ChatTemplate.from_checkpoint(tiny_llama), load_model(tiny_llama, precision="32-true").eval()
    chats = [[*ask(f"Name {i}."), {"role": "assistant", "content": "It is a finding " * (i + 1)}] for i in range(3)]
    write(tmp_path, "general_taught", [{"messages": chat} for chat in chats])
    means = []
    for chat in chats:
        encoded = template.encode_chat(chat)
        logprobs, _ = model.score(pack_row([Tree(encoded.prompt, [encoded.completion])]))
        means.append(float(logprobs.mean()))
    found = evaluate(tiny_llama, tmp_path, ["general_taught"])
    row = found["by_name"]["general_taught", "logprob"]
    # White space that ends the prompt is scored with the answer.
    assert row["n"] == 3 and row["stderr"] > 0
    samples = [json.loads(line) for line in (tmp_path / "out" / "samples_general_taught.jsonl").open()]
    for sample, chat, mean in zip(samples, chats, means, strict=True):
        encoded = template.encode_chat(chat)
        assert sample["doc"]["tokens"] == len(encoded.completion)
        assert sample["doc"]["target"] == template.answer_text(chat[-1]["content"])
        header, _ = model.score(pack_row([Tree(encoded.prompt[:-1], [encoded.prompt[-1:]])]))
        ends_with_space = template.decode(encoded.prompt[-1:], False).isspace()
        extra = float(header[0]) / len(encoded.completion) if ends_with_space else 0.0
        assert sample["logprob"] == pytest.approx(mean + extra, abs=1e-4)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"rules": ["exakt"]}, r"test.jsonl, kind name: there is no rule 'exakt'. Did you mean exact\?"),
        ({"rules": "exact"}, r'"rules" must be a list of names'),
        ({"rules": ["contains"]}, r"rows of kind name name different rules, \['exact'\] and \['contains'\]"),
        ({"answers": []}, r'line 2: "answers" must be a list of texts'),
    ],
)
def test_rows_that_cannot_be_judged_are_refused(tiny_llama, tmp_path, row, message):
    good = {"prompt": ask("Which?"), "answers": ["This."], "kind": "name", "rules": ["exact"]}
    write(tmp_path, "my_questions", [good, {**good, **row}])
    with pytest.raises(UserError, match=message):
        evaluate(tiny_llama, tmp_path, ["my_questions"])


def test_what_does_not_go_with_such_tasks_is_refused(tiny_llama, data_dir):
    with pytest.raises(UserError, match="without examples"):
        evaluate(tiny_llama, data_dir, ["my_questions"], num_fewshot=2)
    write(data_dir, "my_taught", [{"messages": [*ask("Hi"), {"role": "assistant", "content": "Hello"}]}])
    with pytest.raises(UserError, match="leave out --apply_chat_template false"):
        evaluate(tiny_llama, data_dir, ["my_taught"], apply_chat_template=False)
    with pytest.raises(UserError, match=r"none_taught reads .*workflows teach --checkpoint_dir BASE"):
        evaluate(tiny_llama, data_dir, ["none_taught"])
