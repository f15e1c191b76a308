"""Local tasks over prepared data, and the definitions of the Hub's medical tasks (read over small local stand-ins)."""

import dataclasses
import json
from pathlib import Path

import datasets
import httpx
import lm_eval.tasks
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError
from lm_eval.tasks import TaskManager

from data_prep import pubmedqa
from workflows.chat_template import ChatTemplate
from workflows.errors import UserError
from workflows.evaluation import tasks
from workflows.evaluation.local_task import LocalTask
from workflows.evaluation.tasks import MMLU_MEDICAL, load_tasks, settle_prompts, split_of

pytestmark = pytest.mark.long

ROWS = [
    {"prompt": [{"role": "user", "content": "Fast breathing?"}], "choices": ["Tachypnea", "Anemia"], "answer": 0},
    {"prompt": [{"role": "user", "content": "Few red cells?"}], "choices": ["Fever", "Anemia", "Rash"], "answer": 1},
]


@pytest.fixture(scope="module")
def template(tiny_llama):
    return ChatTemplate.from_checkpoint(tiny_llama)


def write(data_dir, name, rows):
    (data_dir / name).mkdir(parents=True)
    (data_dir / name / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_a_local_task_asks_for_each_choice_after_the_chat_prompt(tmp_path, template):
    write(tmp_path, "hpo_mcq", [{**row, "id": i} for i, row in enumerate(ROWS)])
    (task,) = load_tasks(["hpo_mcq"], tmp_path, template)
    for apply_chat_template in (False, True):  # rendered once, whatever lm-eval is told
        task.build_all_requests(
            apply_chat_template=apply_chat_template,
            chat_template=lambda *args, **kwargs: "twice",
            fewshot_as_multiturn=True,
            system_instruction=None,
        )
        prompts = [template.render(row["prompt"], add_generation_prompt=True) for row in ROWS]
        expected = [(p, choice) for p, row in zip(prompts, ROWS, strict=True) for choice in row["choices"]]
        assert [instance.args for instance in task.instances] == expected
    # The likeliest is the longest; per character it is the right one.
    scores = task.process_results({**ROWS[1]}, [(-5.0, False), (-5.5, False), (-4.0, False)])
    assert scores == {"acc": 0.0, "acc_norm": 1.0}
    assert split_of(task.dump_config()) == "test"


def test_a_local_task_as_plain_text(tmp_path):
    asked = [{"role": "system", "content": "Be brief."}, *ROWS[0]["prompt"]]
    write(tmp_path, "hpo_mcq", [{**ROWS[0], "prompt": asked}, ROWS[1]])
    (task,) = load_tasks(["hpo_mcq"], tmp_path, None)
    task.build_all_requests()
    assert task.instances[0].args == ("Be brief.\n\nFast breathing?", " Tachypnea")
    assert task.instances[2].args == ("Few red cells?", " Fever")


SYSTEM = [{"role": "system", "content": "Be brief."}]
SOLVED = [
    {"prompt": [{"role": "user", "content": f"Solved {i}?"}], "choices": [f"No {i}", f"Yes {i}"], "answer": 1}
    for i in range(4)
]


def contexts(task, seed=1, **settings) -> list[str]:
    task.set_fewshot_seed(seed)
    task.build_all_requests(**settings)
    return [instance.args[0] for instance in task.instances if instance.idx == 0]


@pytest.mark.parametrize("file", ["train", "validation"])
def test_examples_of_a_local_task_are_solved_questions_that_are_not_scored(tmp_path, template, file):
    write(tmp_path, "hpo_mcq", ROWS)
    rows = [*SOLVED, {**ROWS[1], "answer": 2}]  # the last one is scored, so it must not be shown
    (tmp_path / "hpo_mcq" / f"{file}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (task,) = load_tasks(["hpo_mcq"], tmp_path, template, num_fewshot=4)
    made, remarks = settle_prompts([task], True, None, 4, True)
    assert made == {"hpo_mcq": {"chat_template": True, "num_fewshot": 4, "fewshot_as_multiturn": True}}
    assert remarks == ["hpo_mcq: 1 examples are questions of the test, too, and are not used"]
    found = contexts(task, fewshot_as_multiturn=True)
    assert found == contexts(task, fewshot_as_multiturn=True) != contexts(task, 2, fewshot_as_multiturn=True)
    for text, row in zip(found, ROWS, strict=True):
        order = sorted(range(4), key=lambda i: text.index(f"Solved {i}?"))
        turns = [turn for i in order for turn in (*SOLVED[i]["prompt"], {"role": "assistant", "content": f"Yes {i}"})]
        assert text == template.render([*turns, *row["prompt"]], add_generation_prompt=True)
    (single, _) = contexts(task, fewshot_as_multiturn=False)
    order = sorted(range(4), key=lambda i: single.index(f"Solved {i}?"))
    joined = "".join(f"Solved {i}? Yes {i}\n\n" for i in order) + "Fast breathing?"
    assert single == template.render([{"role": "user", "content": joined}], add_generation_prompt=True)
    (plain,) = load_tasks(["hpo_mcq"], tmp_path, None, num_fewshot=4)
    assert contexts(plain)[0] == joined


def test_examples_have_the_questions_system_message_once(tmp_path, template):
    prompt = [*SYSTEM, *ROWS[0]["prompt"]]
    write(tmp_path, "hpo_mcq", [{**ROWS[0], "prompt": prompt}])
    rows = [*SOLVED[:2], {**SOLVED[2], "prompt": [*SYSTEM, *SOLVED[2]["prompt"]]}]
    (tmp_path / "hpo_mcq" / "validation.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (task,) = load_tasks(["hpo_mcq"], tmp_path, template, num_fewshot=1)
    turns = [*SYSTEM, *SOLVED[2]["prompt"], {"role": "assistant", "content": "Yes 2"}, *ROWS[0]["prompt"]]
    assert contexts(task, fewshot_as_multiturn=True) == [template.render(turns, add_generation_prompt=True)]
    with pytest.raises(UserError, match=r"validation.jsonl has 1 examples .* system message 'Be brief.'"):
        load_tasks(["hpo_mcq"], tmp_path, template, num_fewshot=2)
    (tmp_path / "hpo_mcq" / "validation.jsonl").unlink()
    with pytest.raises(UserError, match=r"hpo_mcq has no questions to take examples from.*hpo_mcq/train.jsonl"):
        load_tasks(["hpo_mcq"], tmp_path, template, num_fewshot=1)


def test_choices_are_scored_after_thoughts_that_the_template_opens(tmp_path, template):
    """A model trained to answer as `answer_text` has it never writes a choice right after `<think>`."""
    write(tmp_path, "hpo_mcq", ROWS)
    thinking = dataclasses.replace(template, source=template.source.replace("assistant\n'", "assistant\n<think>\n'"))
    (task,) = load_tasks(["hpo_mcq"], tmp_path, thinking)
    task.build_all_requests()
    chat = thinking.encode_chat([*ROWS[0]["prompt"], {"role": "assistant", "content": "Tachypnea"}])
    context, choice = task.instances[0].args
    assert choice == "Tachypnea" and "<think>\n" in context  # per character means the choice's own
    learned = thinking.decode(chat.prompt + chat.completion, skip_special_tokens=False)
    assert learned == context + choice + thinking.turn_end


def test_names_of_local_tasks(tmp_path, template):
    for folder in ("hpo_mcq", "pubmedqa_mcq", "medmcqa_mcq", "medqa_mcq", "mine_mcq"):
        write(tmp_path, folder, ROWS)
    names = ["hpo_mcq", "pubmedqa_local", "medmcqa_local", "medqa_local", "mine_mcq"]
    loaded = load_tasks(names, tmp_path, template)
    assert [task.task_name for task in loaded] == names
    assert all(isinstance(task, LocalTask) for task in loaded)


def test_unknown_tasks_and_missing_data_are_reported_together(tmp_path, template, monkeypatch):
    some = Path(lm_eval.tasks.__file__).parent / "medqa"  # to read all of lm-eval's takes ten seconds
    monkeypatch.setattr(tasks, "all_tasks", lambda: TaskManager(include_defaults=False, include_path=some))
    with pytest.raises(UserError) as error:
        load_tasks(["hpo_mcq", "medqa_local", "medqa_4option"], tmp_path, template)
    text = str(error.value)
    assert "hpo_mcq/test.jsonl, which does not exist. Make it with `make data DATA=hpo`" in text
    assert "`make data DATA=medqa`" in text
    assert "no task 'medqa_4option'. Did you mean medqa_4options" in text and "pubmedqa_local" in text


def test_bad_rows_are_named(tmp_path, template):
    write(tmp_path, "hpo_mcq", [*ROWS, {**ROWS[0], "answer": 2}])
    with pytest.raises(UserError, match=r"test\.jsonl, line 3: .*answer"):
        load_tasks(["hpo_mcq"], tmp_path, template)


# What each data set of the `medical` group looks like on the Hub: path -> (splits, columns of a row).
HUB_ROWS = {
    "GBaker/MedQA-USMLE-4-options-hf": (
        ("train", "validation", "test"),
        {"id": "1", "sent1": "Q", "sent2": "", **{f"ending{i}": f"E{i}" for i in range(4)}, "label": 2},
    ),
    "openlifescienceai/medmcqa": (
        ("train", "validation", "test"),
        {"id": "1", "question": "Q", "opa": "a", "opb": "b", "opc": "c", "opd": "d", "cop": 3, "exp": ""},
    ),
    "cais/mmlu": (
        ("dev", "validation", "test"),
        {"question": "Q", "subject": "s", "choices": ["a", "b", "c", "d"], "answer": 1},
    ),
    "qiaojin/PubMedQA": (
        ("train",),
        {
            "pubid": 7,
            "question": "Is it?",
            "context": {"contexts": ["First.", "Second."], "labels": [], "meshes": []},
            "long_answer": "It is.",
            "final_decision": "yes",
        },
    ),
}


@pytest.fixture
def hub(monkeypatch):
    loaded = []

    def load_dataset(path, name=None, **kwargs):
        splits, row = HUB_ROWS[path]
        loaded.append((path, name))
        rows = [row, {**row, "pubid": 8}] if "pubid" in row else [row]
        return datasets.DatasetDict({split: datasets.Dataset.from_list(rows) for split in splits})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(tasks, "official_test_ids", lambda labels: {"8"} if labels == {"7": "yes", "8": "yes"} else {})
    return loaded


def test_the_medical_group_is_lm_evals_own_definitions(hub, tmp_path, template):
    (group,) = load_tasks(["medical"], tmp_path, template)
    loaded = {task.task_name: task for task in group.get_all_tasks()}
    names = {"medqa_4options", "medmcqa", "pubmedqa", *(f"mmlu_{subject}" for subject in MMLU_MEDICAL)}
    assert group.name == "medical" and set(loaded) == names
    assert {name for path, name in hub if path == "cais/mmlu"} == set(MMLU_MEDICAL)
    for task in loaded.values():
        task.set_fewshot_seed(1)
        task.set_config("num_fewshot", 0)
        task.build_all_requests()
        assert len(task.instances) in (3, 4)  # one question, its choices
        assert "acc" in task.process_results(
            task.eval_docs[0], [(-float(i), False) for i in range(len(task.instances))]
        )
    question = loaded["pubmedqa"].instances[0]
    assert question.args == ("Abstract: First.\nSecond.\nQuestion: Is it?\nAnswer:", " yes")
    assert question.doc["pubid"] == 8  # only the official test
    assert split_of(loaded["pubmedqa"].dump_config()) == "test"
    assert split_of(loaded["medmcqa"].dump_config()) == "validation"
    (example,) = loaded["pubmedqa"].sampler.df
    assert example["pubid"] == 7  # never of the official test
    made, _ = settle_prompts(list(loaded.values()), True, None, 0, True)
    assert all(how == {"chat_template": True, "num_fewshot": 0} for how in made.values()) and set(made) == names


def test_pubmedqa_alone_is_ours_too(hub, tmp_path, template):
    load_tasks(["pubmedqa"], tmp_path, template)
    assert hub == [(pubmedqa.HUB_ID, "pqa_labeled")]


def test_tasks_named_twice_and_data_that_cannot_be_had(hub, monkeypatch, tmp_path, template):
    with pytest.raises(UserError, match=r"twice.*medmcqa"):
        load_tasks(["medical", "medmcqa"], tmp_path, template)

    def closed(*args, **kwargs):
        client = httpx.Client()
        client.close()
        client.get("http://localhost")

    monkeypatch.setattr(datasets, "load_dataset", closed)
    with pytest.raises(UserError, match=r"(?s)client has been closed.*need the internet"):
        load_tasks(["pubmedqa"], tmp_path, template)
    for error in (ConnectionError, LocalEntryNotFoundError, httpx.ReadError):

        def unreachable(*args, error=error, **kwargs):
            raise error("Couldn't reach the Hub")

        monkeypatch.setattr(datasets, "load_dataset", unreachable)
        with pytest.raises(UserError, match=r"(?s)Couldn't reach the Hub.*need the internet"):
            load_tasks(["pubmedqa"], tmp_path, template)
