"""The evaluate step as a user runs it: files, comparison, a stop in the middle, wrong arguments."""

import json
import re
from pathlib import Path

import pytest
import torch
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from data_prep.rows import read_rows
from workflows import evaluate as step
from workflows.__main__ import main
from workflows.chat_template import ChatTemplate
from workflows.checkpoint import WEIGHTS, copy_companions, load_weights
from workflows.errors import UserError
from workflows.evaluate import UNFINISHED, default_out_dir, setup
from workflows.evaluation.compare import wilson_interval
from workflows.evaluation.lm import LitGPTLM
from workflows.evaluation.tasks import LocalTask
from workflows.progress import PROGRESS
from workflows.training.model import load_model
from workflows.training.rollouts import generate

pytestmark = pytest.mark.long

WORDS = ("breathing", "rate", "uterus", "density", "blood", "reduction", "clinical", "finding", "presence", "anemia")
QUESTIONS = 40


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    """Questions about nothing, whose answers a random model has opinions on."""
    generator = torch.Generator().manual_seed(0)

    def words(n):
        return " ".join(WORDS[i] for i in torch.randint(0, len(WORDS), (n,), generator=generator))

    directory = tmp_path_factory.mktemp("data")
    (directory / "hpo_mcq").mkdir()
    rows = []
    for number in range(QUESTIONS):
        prompt = [{"role": "user", "content": f"{number}: {words(4 + number % 7)}?"}]
        choices = [f"{words(1 + i)} {i}" for i in range(4)]
        rows.append({"prompt": prompt, "choices": choices, "answer": number % 4, "id": number})
    (directory / "hpo_mcq" / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return directory


@pytest.fixture(scope="module")
def other_llama(tiny_llama, tmp_path_factory):
    """The tiny Llama with its weights shaken."""
    directory = tmp_path_factory.mktemp("shaken") / "lora" / "final"
    directory.mkdir(parents=True)
    copy_companions(tiny_llama, directory)
    torch.manual_seed(0)
    shaken = {name: tensor + 0.05 * torch.randn_like(tensor) for name, tensor in load_weights(tiny_llama).items()}
    shaken["lm_head.weight"] = shaken["transformer.wte.weight"]
    torch.save(shaken, directory / WEIGHTS)
    return directory


def evaluate(checkpoint, data_dir, out_dir, **settings):
    setup(checkpoint, data_dir=data_dir, out_dir=out_dir, precision="32-true", row_tokens=128, **settings)
    return json.loads((out_dir / "metrics.json").read_text())


def samples_of(out_dir):
    return (out_dir / "samples_hpo_mcq.jsonl").read_bytes()


def test_accuracies_are_those_of_lm_evals_hf_model(tiny_llama, tiny_llama_hf, data_dir, tmp_path, capsys):
    metrics = evaluate(tiny_llama, data_dir, tmp_path)
    task = LocalTask("hpo_mcq", data_dir / "hpo_mcq" / "test.jsonl", ChatTemplate.from_checkpoint(tiny_llama))
    hf = HFLM(pretrained=str(tiny_llama_hf), device="cpu", dtype="float32", batch_size=8)
    expected = simple_evaluate(model=hf, tasks=[task], task_manager=TaskManager(include_defaults=False))
    scores = expected["results"]["hpo_mcq"]
    rows = {row["name"]: row for row in metrics["metrics"]}
    assert set(rows) == {"acc", "acc_norm"}
    for name, row in rows.items():
        assert row["value"] == scores[f"{name},none"]
        assert row["stderr"] == scores[f"{name}_stderr,none"]
        assert (row["n"], row["split"], row["task"]) == (QUESTIONS, "test", "hpo_mcq")
    lines = [json.loads(line) for line in samples_of(tmp_path).splitlines()]
    for mine, other in zip(lines, expected["samples"]["hpo_mcq"], strict=True):
        assert mine["doc_hash"] == other["doc_hash"]
        assert [r[0][0] for r in mine["resps"]] == pytest.approx([r[0][0] for r in other["resps"]], abs=1e-3)
    assert json.loads((tmp_path / "results.json").read_text())["results"]["hpo_mcq"]["acc,none"] == rows["acc"]["value"]
    assert metrics["tokens_per_second"] > 0 and metrics["seconds"] > 0 and metrics["peak_bytes"] > 0
    assert not (tmp_path / UNFINISHED).exists()
    acc = rows["acc"]
    assert (acc["low"], acc["high"]) == wilson_interval(acc["value"], QUESTIONS)
    assert f"{acc['value']:.3f} ({acc['low']:.3f} to {acc['high']:.3f})" in capsys.readouterr().out


def test_the_first_questions_are_answered_in_words(tiny_llama, data_dir, tmp_path):
    evaluate(tiny_llama, data_dir, tmp_path, limit=6, written=3, max_new_tokens=8)
    found = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    rows = read_rows(data_dir / "hpo_mcq" / "test.jsonl", "scoring")[:3]
    template, model = ChatTemplate.from_checkpoint(tiny_llama), load_model(tiny_llama)
    prompts = [template.prompt_ids(row["prompt"]) for row in rows]
    answers = generate(model, prompts, max_new_tokens=8, stop_ids=template.stop_ids)
    for row, said, answer in zip(rows, found, answers, strict=True):
        assert (said["task"], said["question"]) == ("hpo_mcq", row["prompt"][-1]["content"])
        assert said["wanted"] == row["choices"][row["answer"]]
        assert said["answer"] == template.decode(answer.ids).strip()
    evaluate(tiny_llama, data_dir, tmp_path, limit=6, written=0)
    assert (tmp_path / "answers.jsonl").read_text() == ""


def test_examples_are_read_before_each_question(tiny_llama, data_dir, tmp_path, capsys):
    folder = tmp_path / "data" / "hpo_mcq"
    folder.mkdir(parents=True)
    rows = (data_dir / "hpo_mcq" / "test.jsonl").read_text().splitlines(keepends=True)
    (folder / "validation.jsonl").write_text("".join(rows[:20]))
    (folder / "test.jsonl").write_text("".join(rows[20:]))
    tokens = {}
    for number in (0, 2):
        found = evaluate(tiny_llama, folder.parent, tmp_path / str(number), num_fewshot=number, written=2)
        assert found["prompts"]["hpo_mcq"]["num_fewshot"] == number
        tokens[number] = int(re.search(r"([\d,]+) tokens, ", capsys.readouterr().out).group(1).replace(",", ""))
        shown = json.loads((tmp_path / str(number) / "results.json").read_text())["prompts"]["hpo_mcq"]["prompt"]
        assert shown.count("<|im_start|>assistant\n") + shown.endswith("<|im_start|>assistant") == number + 1
    assert tokens[2] > 2 * tokens[0]
    assert len((tmp_path / "2" / "answers.jsonl").read_text().splitlines()) == 2


def test_comparison_with_a_baseline(tiny_llama, other_llama, data_dir, tmp_path, capsys):
    base = evaluate(tiny_llama, data_dir, tmp_path / "base", limit=30)
    tuned = evaluate(other_llama, data_dir, tmp_path / "tuned", baseline=tmp_path / "base")
    by_name = {row["metric"]: row for row in tuned["comparison"]}
    for row in base["metrics"]:
        compared = by_name[row["name"]]
        assert (compared["n"], compared["base"]) == (30, row["value"])
        assert compared["base_stderr"] == pytest.approx(row["stderr"])
        assert compared["difference"] == pytest.approx(compared["tuned"] - compared["base"])
        assert 0 < compared["p_value"] <= 1
    assert tuned["remarks"] == ["hpo_mcq: 30 questions compared, of 30 (baseline) and 40"]
    out = capsys.readouterr().out
    assert "95% interval" in out and f"{by_name['acc']['difference']:+.3f}  " in out and "±" not in out


def test_a_stopped_run_goes_on_and_ends_the_same(tiny_llama, data_dir, tmp_path, monkeypatch):
    whole = evaluate(tiny_llama, data_dir, tmp_path / "whole")
    score, done = LitGPTLM._score, []

    def stopped_after_three(self, trees):
        if len(done) == 3:
            raise KeyboardInterrupt
        done.append(trees)
        score(self, trees)

    monkeypatch.setattr(LitGPTLM, "_score", stopped_after_three)
    with pytest.raises(KeyboardInterrupt):
        evaluate(tiny_llama, data_dir, tmp_path / "stopped")
    monkeypatch.undo()
    unfinished = tmp_path / "stopped" / UNFINISHED
    lines = unfinished.read_bytes().splitlines(keepends=True)
    assert len(lines) == 4  # which model it is of, and three rows
    unfinished.write_bytes(b"".join(lines[:-1]) + lines[-1][:25])  # as if killed while writing
    computed = []
    monkeypatch.setattr(LitGPTLM, "_score", lambda self, trees: (computed.append(len(self.cache)), score(self, trees)))
    resumed = evaluate(tiny_llama, data_dir, tmp_path / "stopped")
    assert computed[0] == computed[2] > 0 and computed[3] > computed[2]  # the first two rows were there
    assert samples_of(tmp_path / "stopped") == samples_of(tmp_path / "whole")
    assert resumed["metrics"] == whole["metrics"]
    assert not unfinished.exists()


def test_results_of_another_model_are_not_kept(tiny_llama, other_llama, data_dir, tmp_path, monkeypatch, capsys):
    score = LitGPTLM._score
    monkeypatch.setattr(
        LitGPTLM,
        "_score",
        lambda self, trees: score(self, trees) if not self.cache.tokens else (_ for _ in ()).throw(OSError),
    )
    with pytest.raises(OSError):
        evaluate(tiny_llama, data_dir, tmp_path)
    monkeypatch.undo()
    assert (tmp_path / UNFINISHED).is_file()
    evaluate(other_llama, data_dir, tmp_path)
    assert "resuming with" not in capsys.readouterr().out


def test_a_folder_between_an_old_and_a_new_result_is_taken_for_neither(
    tiny_llama, other_llama, data_dir, tmp_path, monkeypatch
):
    whole = evaluate(other_llama, data_dir, tmp_path / "whole")
    changed = tmp_path / "changed"
    evaluate(tiny_llama, data_dir, changed)
    before = {path.name: path.read_bytes() for path in changed.iterdir()}

    def stops(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(step, "write_json", stops)  # after the samples
        with pytest.raises(KeyboardInterrupt):
            evaluate(other_llama, data_dir, changed)
    assert {
        path.name: path.read_bytes() for path in changed.iterdir() if path.name not in (UNFINISHED, PROGRESS)
    } == before
    replace, samples = Path.replace, changed / "samples_hpo_mcq.jsonl"
    with monkeypatch.context() as patch:  # when the samples are to take their place
        patch.setattr(Path, "replace", lambda file, to: stops() if to == samples else replace(file, to))
        with pytest.raises(KeyboardInterrupt):
            evaluate(other_llama, data_dir, changed)
    assert not (changed / "metrics.json").exists()
    with pytest.raises(UserError, match="has finished"):
        evaluate(tiny_llama, data_dir, tmp_path / "tuned", baseline=changed)
    assert evaluate(other_llama, data_dir, changed)["metrics"] == whole["metrics"]
    assert samples_of(changed) == samples_of(tmp_path / "whole")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--checkpoint_dir", "absent"], "There is no checkpoint at absent"),
        (["--checkpoint_dir", "{tiny}", "--data_dir", "absent"], "make data DATA=hpo"),
        (["--checkpoint_dir", "{tiny}", "--baseline", "absent"], "--baseline absent has no metrics.json"),
        (["--checkpoint_dir", "{tiny}", "--tasks", "[]", "--limit", "0"], "2 problems"),
        (["--checkpoint_dir", "{tiny}", "--device", "cuda:7"], "--device cuda:7 cannot be used here: "),
        (["--checkpoint_dir", "{tiny}", "--device", "abacus"], "--device abacus cannot be used here: "),
        (
            ["--checkpoint_dir", "{tiny}", "--data_dir", "{data}", "--num_fewshot", "1"],
            "hpo_mcq has no questions to take",
        ),
    ],
)
def test_mistakes_are_explained(tiny_llama, data_dir, tmp_path, capsys, arguments, expected):
    filled = [argument.format(tiny=tiny_llama, data=data_dir) for argument in arguments]
    assert main(["evaluate", *filled, "--out_dir", str(tmp_path / "out")]) == 1
    assert expected in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_where_results_go():
    assert default_out_dir(Path("out/demo/lora/final")) == Path("out/demo/evaluate/lora")
    assert default_out_dir(Path("checkpoints/embedded/x")) == Path("out/evaluate/x")


@pytest.mark.checkpoint
def test_the_real_checkpoint_reads_the_question(embedded_checkpoint, hpo_data, tmp_path):
    """The right answer is far more probable after its own question than after another one."""
    rows = read_rows(hpo_data / "hpo_mcq" / "test.jsonl", "scoring")[:8]
    others = [{**row, "prompt": rows[i - 1]["prompt"]} for i, row in enumerate(rows)]
    means = []
    for name, questions in (("own", rows), ("other", others)):
        folder = tmp_path / name / "hpo_mcq"
        folder.mkdir(parents=True)
        (folder / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in questions))
        metrics = evaluate(embedded_checkpoint, folder.parent, tmp_path / f"{name}-scores", written=0)
        samples = [json.loads(line) for line in samples_of(tmp_path / f"{name}-scores").splitlines()]
        scores = [[resp[0][0] for resp in sample["resps"]] for sample in samples]
        right = [row["answer"] for row in questions]
        best = [max(range(4), key=each.__getitem__) for each in scores]
        acc = sum(choice == answer for choice, answer in zip(best, right, strict=True)) / len(rows)
        assert {row["name"]: row["value"] for row in metrics["metrics"]}["acc"] == pytest.approx(acc)
        means.append(sum(each[answer] for each, answer in zip(scores, right, strict=True)) / len(rows))
    assert means[0] - means[1] > 5  # nats; it is 16, and rounding moves it in the third digit
