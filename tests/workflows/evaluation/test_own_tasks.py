"""Task files of the user's, and how every task's prompts are made: lm-eval's own `hf` model is shown the same ones."""

import dataclasses
import json
from pathlib import Path

import pytest
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from tests.conftest import CHATML
from workflows.__main__ import main
from workflows.chat_template import ChatTemplate
from workflows.checkpoint import WEIGHTS, copy_companions
from workflows.errors import UserError
from workflows.evaluate import setup
from workflows.evaluation import tasks
from workflows.evaluation.lm import LitGPTLM, load_for_evaluation
from workflows.evaluation.tasks import leaf_tasks, load_tasks, settle_prompts

pytestmark = pytest.mark.long

CHOICE = """
task: findings
dataset_path: json
dataset_kwargs: {data_files: {train: train.jsonl, test: test.jsonl}}
training_split: train
test_split: test
output_type: multiple_choice
description: Name the finding.
doc_to_text: "{{question}}"
doc_to_choice: "{{options}}"
doc_to_target: "{{right}}"
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""
WRITTEN = """
include: findings.yaml
task: findings_written
output_type: generate_until
doc_to_choice: null
doc_to_target: "{{options[right]}}"
process_results: !function scorer.brief
generation_kwargs: {until: ["\\n"], max_gen_toks: 6}
metric_list: [{metric: brief, aggregation: mean, higher_is_better: true}]
"""
SCORER = """
def brief(doc, results):
    return {"brief": float(len(results[0]) < 20)}
"""
TEXTS = """
task: findings_texts
dataset_path: json
dataset_kwargs: {data_files: {test: test.jsonl}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{question}}"
"""
OPTIONS = ["Tachypnea", "Anemia", "Leiomyoma"]
QUESTIONS = ["Fast breathing?", "Few red cells?", "A leiomyoma of the uterus?", "A reduction of hemoglobin?"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Task files and their data, which the files name without a folder."""
    where = tmp_path / "my tasks"
    where.mkdir()
    files = {"findings.yaml": CHOICE, "written.yaml": WRITTEN, "texts.yaml": TEXTS, "scorer.py": SCORER}
    for name, text in files.items():
        (where / name).write_text(text)
    rows = [{"question": text, "options": OPTIONS, "right": i % 3} for i, text in enumerate(QUESTIONS)]
    (where / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    solved = [{**row, "question": f"Example {i}: {row['question']}"} for i, row in enumerate(rows)]
    (where / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in solved))
    return where


def evaluate(checkpoint: Path, folder: Path, names: list[str], **settings) -> tuple[dict, dict]:
    out = folder.parent / "out"
    setup(checkpoint, names, include_path=folder, out_dir=out, precision="32-true", **settings)
    return tuple(json.loads((out / name).read_text()) for name in ("metrics.json", "results.json"))


@pytest.mark.parametrize("asked", [None, False])
@pytest.mark.parametrize("examples", [{}, {"num_fewshot": 2}, {"num_fewshot": 2, "fewshot_as_multiturn": False}])
def test_prompts_and_scores_are_those_of_lm_evals_hf_model(
    tiny_llama, tiny_llama_hf, folder, monkeypatch, capsys, asked, examples
):
    chat = asked is None  # the checkpoint has a template
    if not chat and "fewshot_as_multiturn" in examples:
        with pytest.raises(UserError, match="has no effect without --num_fewshot and the chat template"):
            evaluate(tiny_llama, folder, ["findings"], apply_chat_template=False, **examples)
        return
    names = ["findings", "findings_written"]
    metrics, results = evaluate(tiny_llama, folder, names, apply_chat_template=asked, **examples)
    monkeypatch.chdir(folder)  # lm-eval itself looks for data in the current folder
    expected = simple_evaluate(
        model=HFLM(pretrained=str(tiny_llama_hf), device="cpu", dtype="float32", batch_size=4),
        tasks=names,
        task_manager=TaskManager(include_defaults=False, include_path=str(folder)),
        apply_chat_template=chat,
        **examples,
    )
    for name, metric in (("findings", "acc"), ("findings_written", "brief")):
        (row,) = [row for row in metrics["metrics"] if row["task"] == name]
        assert (row["name"], row["n"]) == (metric, 4) and row["value"] == expected["results"][name][f"{metric},none"]
        lines = (folder.parent / "out" / f"samples_{name}.jsonl").read_text().splitlines()
        for line, other in zip(lines, expected["samples"][name], strict=True):
            sample = json.loads(line)
            prompts = [args["arg_0"] for args in sample["arguments"].values()]
            assert prompts == [args[0] for args in other["arguments"]]
        how = metrics["prompts"][name]
        assert (how["chat_template"], how["num_fewshot"]) == (chat, examples.get("num_fewshot", 0))
        shown = results["prompts"][name]["prompt"]
        assert ("<|im_start|>user\n" in shown) == chat and shown.count("Example ") == how["num_fewshot"]
        assert expected["samples"][name][0]["arguments"][0][0].startswith(shown)
    printed = capsys.readouterr().out
    assert ("prompts by the chat template" if chat else "prompts without the chat template") in printed
    assert "findings, first prompt (" in printed and "  | " + ("<|im_start|>system" if chat else "Name the") in printed
    assert "scored after it: '" + ("\\nTachypnea" if chat else " Tachypnea") in printed


def test_whole_texts_are_scored_without_template_and_say_so(tiny_llama, folder):
    metrics, _ = evaluate(tiny_llama, folder, ["findings_texts"])
    assert metrics["prompts"]["findings_texts"] == {"chat_template": False, "num_fewshot": 0}
    with pytest.raises(UserError) as error:
        evaluate(tiny_llama, folder, ["findings_texts"], apply_chat_template=True, num_fewshot=1)
    assert "2 problems" in str(error.value)
    for option in ("--apply_chat_template true", "--num_fewshot 1"):
        assert f"findings_texts scores whole texts: {option} would have no effect" in str(error.value)


def load(folder: Path, names: list[str], num_fewshot: int | None = None):
    loaded = leaf_tasks(load_tasks(names, folder, None, num_fewshot, folder))
    return loaded, settle_prompts(loaded, True, None, num_fewshot, True)


def test_a_question_is_never_its_own_example(folder):
    for name, splits in (("tested", "test_split: test"), ("validated", "validation_split: test")):
        text = CHOICE.replace("findings", name).replace("training_split: train\ntest_split: test", splits)
        (folder / f"{name}.yaml").write_text(text)
        (task,), (made, remarks) = load(folder, [name], 3)  # the three others
        assert made[name]["num_fewshot"] == 3
        assert remarks == [f"{name}: its examples are other questions of the split that is scored (test)"]
        task.set_config("num_fewshot", 3)
        for seed in range(4):
            task.set_fewshot_seed(seed)
            task.build_all_requests()
            prompts = [instance.args[0] for instance in task.instances if instance.idx == 0]
            assert all(sum(text in prompt for text in QUESTIONS) == 4 for prompt in prompts)
            assert all(prompt.count(question) == 1 for prompt, question in zip(prompts, QUESTIONS, strict=True))
        with pytest.raises(UserError, match=f"--num_fewshot 4: task {name} has 3 examples"):
            load(folder, [name], 4)


def test_examples_that_a_task_does_not_take_are_refused(folder):
    (folder / "zero.yaml").write_text(CHOICE.replace("findings", "zero") + "num_fewshot: 0\n")
    (folder / "two.yaml").write_text(CHOICE.replace("findings", "two") + "num_fewshot: 2\n")
    assert load(folder, ["zero", "two"])[1][0]["two"]["num_fewshot"] == 2  # the task's own number
    with pytest.raises(UserError, match=r"zero is defined without examples \(num_fewshot: 0\)"):
        load(folder, ["zero", "two"], 1)


def test_names_that_are_unknown_and_files_that_cannot_be_read(folder, tiny_llama, monkeypatch, capsys):
    monkeypatch.setattr(tasks, "all_tasks", lambda: TaskManager(include_defaults=False))  # to read lm-eval's takes long
    (folder / "old.yml").write_text(CHOICE.replace("findings", "old"))
    (folder / "broken.yaml").write_text("task: [broken")
    (folder / "twice.yaml").write_text(CHOICE)
    command = ["evaluate", "--checkpoint_dir", str(tiny_llama), "--include_path", str(folder)]
    command += ["--out_dir", str(folder.parent / "out"), "--tasks", "[findngs_written,findings]"]
    assert main(command) == 1
    error = capsys.readouterr().err
    assert "2 problems" in error and "no task 'findngs_written'. Did you mean findings_written" in error
    assert "old.yml: lm-eval reads files that end in .yaml" in error and "broken.yaml: while parsing" in error
    assert "Task 'findings' is defined by" in error and "twice.yaml. Give each a name of its own" in error
    (folder / "twice.yaml").unlink()
    assert main([*command, "--tasks", "[hpo_mcq]", "--data_dir", str(folder.parent)]) == 1
    assert "hpo_mcq/test.jsonl, which does not exist" in capsys.readouterr().err
    with pytest.raises(
        UserError, match=r"names none of its tasks; it defines findings, findings_texts, findings_written"
    ):
        load(folder, ["pubmedqa"])
    assert main([*command, "--include_path", str(folder / "absent")]) == 1
    assert "absent is not a folder" in capsys.readouterr().err
    assert not (folder.parent / "out").exists()


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"data_files: {train: train.jsonl, test: test.jsonl}": "data_files: {test: no.jsonl}"}, "no.jsonl"),
        ({"output_type: multiple_choice": "output_type: guess"}, "Got invalid output_type 'guess'"),
        ({"test_split: test": "test_split: exam"}, "KeyError: 'exam'"),
        ({'"{{question}}"': "!function scorer.absent"}, "has no function 'absent'"),
        ({"description:": "descripton:"}, "unexpected keyword argument 'descripton'"),
        ({'doc_to_text: "{{question}}"': "doc_to_text: null"}, "in doc_to_text"),
    ],
)
def test_a_faulty_task_file_is_explained(folder, change, expected):
    for old, new in change.items():
        (folder / "findings.yaml").write_text(CHOICE.replace(old, new))
    with pytest.raises(UserError) as error:
        load(folder, ["findings"])
    assert "A task could not be loaded. " in str(error.value) and expected in str(error.value)


def test_the_users_definition_comes_first(folder, capsys):
    """Names that this project defines, or takes for a folder of local questions, mean the user's file."""
    for name in ("hpo_mcq", "pubmedqa", "mine_mcq"):
        (folder / f"{name}.yaml").write_text(CHOICE.replace("findings", name))
        (task,), _ = load(folder, [name])
        assert task.config.description == "Name the finding."
        assert f"{name}: as {folder}/{name}.yaml defines it" in capsys.readouterr().out


def test_a_description_opens_the_question_where_the_template_takes_no_system_message(tiny_llama):
    template = ChatTemplate.from_checkpoint(tiny_llama)
    model = load_for_evaluation(tiny_llama, "32-true")
    chat = [{"role": "system", "content": "Name it."}, {"role": "user", "content": "Fast breathing?"}]
    refuses = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no') }}{% endif %}" + CHATML
    drops = "{% set messages = messages | rejectattr('role', 'equalto', 'system') | list %}" + CHATML
    assert LitGPTLM(model, template).takes_system
    for source in (refuses, drops):
        lm = LitGPTLM(model, dataclasses.replace(template, source=source))
        assert not lm.takes_system and not lm.folded
        asked = [{"role": "user", "content": "Name it.\n\nFast breathing?"}]
        assert lm.apply_chat_template(chat) == template.render(asked, add_generation_prompt=True)
        assert lm.folded


def test_reasoning_that_the_template_opens_is_closed_before_what_is_scored(tiny_llama):
    template = ChatTemplate.from_checkpoint(tiny_llama)
    opens = dataclasses.replace(template, source=template.source.replace("assistant\n'", "assistant\n<think>\n'"))
    lm = LitGPTLM(load_for_evaluation(tiny_llama, "32-true"), opens)
    asked = [{"role": "user", "content": "Hi"}]
    prompt = opens.render(asked, add_generation_prompt=True) + "\n</think>\n\n"
    assert lm.apply_chat_template(asked) == prompt
    begun = [*asked, {"role": "assistant", "content": "The answer is "}]
    assert lm.apply_chat_template(begun, False) == prompt + "The answer is "


def test_a_base_model_is_scored_on_plain_text(tiny_llama, folder, tmp_path):
    base = tmp_path / "base"
    base.mkdir()
    copy_companions(tiny_llama, base)
    (base / "chat_template.jinja").unlink()
    (base / WEIGHTS).symlink_to(tiny_llama / WEIGHTS)
    metrics, results = evaluate(base, folder, ["findings"])
    assert not metrics["prompts"]["findings"]["chat_template"]
    assert results["prompts"]["findings"]["prompt"] == "Name the finding.Fast breathing?"  # as lm-eval joins them
    plain, _ = evaluate(tiny_llama, folder, ["findings"], apply_chat_template=False)
    assert plain["metrics"] == metrics["metrics"]
    with pytest.raises(UserError, match="has no chat template, it looks like a base model"):
        evaluate(base, folder, ["findings"], apply_chat_template=True)


def test_a_baseline_with_other_prompts_is_named(tiny_llama, folder):
    evaluate(tiny_llama, folder, ["findings"])
    base = (folder.parent / "out").rename(folder.parent / "base")
    metrics, _ = evaluate(tiny_llama, folder, ["findings"], baseline=base, num_fewshot=1)
    (remark,) = metrics["remarks"]
    assert (
        remark.startswith("findings: the baseline's prompts were made in another way") and "'num_fewshot': 1" in remark
    )
    same, _ = evaluate(tiny_llama, folder, ["findings"], baseline=base)
    assert same["remarks"] == []


@pytest.mark.parametrize("option", ["written=2", "max_new_tokens=9"])
def test_options_of_local_tasks_are_refused_where_there_is_none(tiny_llama, folder, option):
    name, value = option.split("=")
    with pytest.raises(UserError, match="is for local tasks, and --tasks names none"):
        evaluate(tiny_llama, folder, ["findings"], **{name: int(value)})
