"""The projects of custom_models: each with its recipe, its data and a folder of its own."""

import pytest

from tests.make.project import Project, option

pytestmark = pytest.mark.long


def test_projects_read_reviews_and_write_folders_of_their_own(project):
    data, scratch = project.calls("sentiment", "TEXT=it's")
    assert data == ["data", "--data", "movie_snippets"]
    assert option(scratch, "--config").endswith("sentiment-scratch.yaml")
    assert option(scratch, "--data") == "data/movie_snippets"
    assert option(scratch, "--out_dir") == "out/sentiment/movie_snippets/scratch"
    (bert,) = project.calls("sentiment", "ENCODER=google-bert/bert-base-uncased", "ARGS=--seeds [1,2]")
    assert option(bert, "--config").endswith("sentiment-pretrained.yaml") and bert[-2:] == ["--seeds", "[1,2]"]
    assert option(bert, "--out_dir") == "out/sentiment/movie_snippets/google-bert--bert-base-uncased"
    assert project.steps("predict", "ENCODER=minilm", "TEXT=good") == ["sentiment", "predict"]  # trained, then asked
    (asked,) = project.calls("predict", "TEXT=it's bad")
    assert option(asked, "--text") == "it's bad"
    assert option(asked, "--checkpoint_dir") == "out/sentiment/movie_snippets/scratch/final"


def test_a_gpt_is_trained_by_its_recipe_and_asked_once_it_is_there(project):
    (call,) = project.calls("gpt", "DEVICES=2", "RECIPE=gpt-shakespeare", "ARGS=--fit.max_steps 9")
    assert option(call, "--config") == "custom_models/recipes/gpt-shakespeare.yaml" and option(call, "--devices") == "2"
    assert option(call, "--out_dir") == "out/gpt-shakespeare" and call[-2:] == ["--fit.max_steps", "9"]
    trained, asked = project.calls("gpt-sample", "PROMPT=it's", "ARGS=--temperature 0")
    assert trained[0] == "gpt" and option(trained, "--out_dir") == "out/gpt" and "--temperature" not in trained
    assert option(asked, "--prompt") == "it's" and option(asked, "--checkpoint_dir") == "out/gpt/final"
    assert project.steps("gpt-sample", "PROMPT=more") == ["gpt-sample"]
    assert project.steps("gpt-sample", "RECIPE=gpt-dpo") == ["data", "gpt-dpo", "gpt-sample"]


def test_a_translator_is_trained_by_the_recipe_of_its_texts(project):
    data, french = project.calls("translate", "ARGS=--seeds [1,2]")
    assert data == ["data", "--data", "catalogues_fr"] and french[-2:] == ["--seeds", "[1,2]"]
    assert option(french, "--data") == "data/catalogues_fr" and option(french, "--config").endswith("/translate.yaml")
    for parallel, recipe in {
        "catalogues_de": "translate",
        "python_javascript": "translate-python_javascript",
        "opus_books_fr": "translate-opus_books",
    }.items():
        _, call = project.calls("translate", f"PARALLEL={parallel}")
        assert option(call, "--config") == f"custom_models/recipes/{recipe}.yaml"
        assert option(call, "--out_dir") == f"out/translate/{parallel}"
    assert project.steps("translate-text", "TEXT=x") == ["translate-text"]  # of the French one, trained above
    assert project.steps("translate-text", "TEXT=x", "PARALLEL=opus_books_de") == [
        "data",
        "translate",
        "translate-text",
    ]
    (project.root / "it's.py").touch()
    program = project.calls("translate-text", "PARALLEL=python_javascript", "FILE=it's.py")[-1]
    assert option(program, "--file") == "it's.py" and "--text" not in program
    (asked,) = project.calls("translate-text", "PARALLEL=catalogues_de", "TEXT=it's %(name)s")
    assert option(asked, "--text") == "it's %(name)s"
    assert option(asked, "--checkpoint_dir") == "out/translate/catalogues_de/final"


def test_entities_are_named_by_the_t5_that_is_asked_for(project, tmp_path):
    data, ner = project.calls("ner", "ARGS=--head tokens")
    assert data == ["data", "--data", "hpo_entities"] and ner[-2:] == ["--head", "tokens"]
    assert option(ner, "--config") == "custom_models/recipes/ner-scratch.yaml"
    assert option(ner, "--data") == "data/hpo_entities" and option(ner, "--out_dir") == "out/ner/hpo_entities/scratch"
    (tmp_path / "bc5cdr").mkdir()
    data, ner = project.calls("ner", f"WORKFLOW_DATA={tmp_path}", "T5=google-t5/t5-small")
    assert option(data, "--raw_dir") == str(tmp_path / "bc5cdr") and option(ner, "--model") == "google-t5/t5-small"
    assert option(ner, "--config") == "custom_models/recipes/ner-pretrained.yaml"
    assert option(ner, "--out_dir") == "out/ner/bc5cdr/google-t5--t5-small"
    assert project.steps("ner-predict", "T5=some/t5", "TEXT=x") == ["ner", "ner-predict"]
    (asked,) = project.calls("ner-predict", "TEXT=it's lithium")
    assert option(asked, "--text") == "it's lithium"
    assert option(asked, "--checkpoint_dir") == "out/ner/hpo_entities/scratch/final"
    (auto,) = project.calls("ner-autotrain", "ARGS=--seeds [1,2]", "PIP_ARGS=--extra-index-url it's")
    assert option(auto, "--config") == "custom_models/recipes/ner-autotrain-scratch.yaml"
    assert option(auto, "--out_dir") == "out/ner-autotrain/hpo_entities/scratch" and auto[-2:] == ["--seeds", "[1,2]"]
    assert "--pip_args=--extra-index-url it's" in auto
    (auto,) = project.calls("ner-autotrain", f"WORKFLOW_DATA={tmp_path}", "T5=google-t5/t5-small")
    assert option(auto, "--model") == "google-t5/t5-small" and option(auto, "--data") == "data/bc5cdr"
    assert option(auto, "--config") == "custom_models/recipes/ner-autotrain-pretrained.yaml"
    assert project.calls("data", "DATA=ncbi_disease") == [["data", "--data", "ncbi_disease"]]
    (pretrained,) = project.calls("pretrain-t5", "ARGS=--file mine.txt")
    assert option(pretrained, "--config") == "custom_models/recipes/pretrain-t5.yaml"
    assert pretrained[-2:] == ["--file", "mine.txt"]


def test_our_own_lora_learns_what_the_roads_does(project):
    data, download, scratch = project.calls("lora-scratch", "ARGS=--method lora")
    assert (data[0], download[0], scratch[-2:]) == ("data", "download", ["--method", "lora"])
    assert option(scratch, "--config") == "custom_models/recipes/lora-scratch.yaml"
    assert option(scratch, "--data") == "data/hpo" and option(scratch, "--kinds") == "[name]"
    assert option(scratch, "--checkpoint_dir") == "checkpoints/made/up"
    (mine,) = project.calls("lora-scratch", "KINDS=")
    assert "--kinds" not in mine and "--method" not in mine
    assert "exactly one of" in project.refusal("lora", "lora-scratch", "ARGS=--method lora")


def test_a_student_of_reviews_needs_its_teacher_once(project, tmp_path):
    (tmp_path / "sentence_polarity").mkdir()
    raw = f"WORKFLOW_DATA={tmp_path}"
    calls = project.calls("distill", raw, "ARGS=--seeds [1,2]")
    assert [call[0] for call in calls] == ["data", "sentiment", "distill"]
    assert option(calls[0], "--raw_dir") == str(tmp_path / "sentence_polarity")
    assert "--seeds" not in calls[1] and option(calls[1], "--encoder") == "minilm"
    assert option(calls[2], "--seeds") == "[1,2]"
    assert project.steps("distill", raw) == ["distill"]
    # other reviews need their data; what WORKFLOW_DATA lacks comes from elsewhere
    assert project.calls("distill", raw, "REVIEWS=sst2")[0] == ["data", "--data", "sst2"]
    assert "exactly one of" in project.refusal("sentiment", "distill", "ARGS=--seeds [1,2]")


def test_a_text_is_summarised_by_a_model_that_is_trained_once(project, tmp_path):
    for name in ("it's mine.txt", "other.txt"):
        (project.root / name).touch()
    calls = project.calls("summarize", "TEXT=it's mine.txt", "ARGS=--n_sentences 2")
    assert [call[0] for call in calls] == ["data", "summarize", "summary"]
    assert calls[0] == ["data", "--data", "docstrings"] and option(calls[1], "--encoder") == "minilm"
    assert option(calls[1], "--config").endswith("summarize-minilm.yaml") and "--n_sentences" not in calls[1]
    assert option(calls[2], "--file") == "it's mine.txt" and calls[2][-2:] == ["--n_sentences", "2"]
    assert option(calls[1], "--out_dir") == "out/summarize/docstrings/minilm"
    assert option(calls[2], "--checkpoint_dir") == "out/summarize/docstrings/minilm/final"
    assert project.steps("summarize", "TEXT=other.txt") == ["summary"]
    assert project.steps("summarize") == ["summarize"]  # asked for by name it trains again
    (own,) = project.calls("summarize", "METHOD=abstractive", "ARGS=--max_rows 9")
    assert option(own, "--config").endswith("summarize-abstractive.yaml") and own[-2:] == ["--max_rows", "9"]
    assert option(own, "--out_dir") == "out/summarize/docstrings/minilm-abstractive"
    (bert,) = project.calls("summarize", "ENCODER=google-bert/bert-base-uncased")
    assert option(bert, "--config").endswith("summarize-pretrained.yaml")
    for name in ("scitldr", "pubmedqa"):
        (tmp_path / "raw" / name).mkdir(parents=True)
    raw = f"WORKFLOW_DATA={tmp_path / 'raw'}"
    assert project.calls("summarize", raw)[0][2:] == ["scitldr", "--raw_dir", f"{tmp_path}/raw/scitldr"]
    data, _ = project.calls("summarize", raw, "DOCUMENTS=pubmedqa_conclusions")
    assert option(data, "--raw_dir") == f"{tmp_path}/raw/pubmedqa"


def test_a_question_is_answered_by_a_model_that_is_trained_once(project):
    (project.root / "a b.txt").touch()
    calls = project.calls("answer", "TEXT=What's that?", "CONTEXT=a b.txt", "ENCODER=minilm")
    assert [call[0] for call in calls] == ["data", "qa", "answer"]
    assert option(calls[0], "--data") == "hpo_spans" and option(calls[1], "--config").endswith("qa-pretrained.yaml")
    assert option(calls[2], "--question") == "What's that?" and option(calls[2], "--context") == "a b.txt"
    assert project.steps("answer", "TEXT=x", "CONTEXT=a b.txt", "ENCODER=minilm") == ["answer"]
    (scratch,) = project.calls("qa", "ARGS=--seeds [1,2]")
    assert option(scratch, "--config").endswith("qa-scratch.yaml") and scratch[-2:] == ["--seeds", "[1,2]"]


@pytest.mark.parametrize(
    ("asking", "variable", "others"),
    [
        (("predict", "TEXT=x"), "REVIEWS", ("movie_snippets", "sst2")),
        (("ner-predict", "TEXT=x"), "ENTITIES", ("hpo_entities", "bc5cdr")),
        (("answer", "TEXT=x", "CONTEXT=Makefile"), "QUESTIONS", ("hpo_spans", "squad")),
        (("summarize", "TEXT=Makefile"), "DOCUMENTS", ("docstrings", "xsum")),
        (("translate-text", "TEXT=x"), "PARALLEL", ("catalogues_fr", "catalogues_de")),
        (("distill",), "REVIEWS", ("movie_snippets", "sst2")),
    ],
)
def test_a_model_of_other_data_is_never_asked(project: Project, asking, variable, others):
    folders = []
    for name in others:
        data, trained, asked = project.calls(*asking, f"{variable}={name}")
        assert option(data, "--data") == name and option(trained, "--data") == f"data/{name}"
        folder = option(asked, "--teacher_dir" if asking == ("distill",) else "--checkpoint_dir")
        assert folder == option(trained, "--out_dir") + "/final"
        folders.append(folder)
        assert len(project.steps(*asking, f"{variable}={name}")) == 1
    assert len(set(folders)) == 2


@pytest.mark.parametrize(
    ("asking", "cure"),
    [
        (("predict",), 'make predict TEXT="'),
        (("ner-predict", "TEXT= "), 'make ner-predict TEXT="'),
        (("answer", "TEXT=x"), "CONTEXT=file"),
        (("answer", "CONTEXT=Makefile"), 'TEXT="question"'),
        (("answer", "TEXT=x", "CONTEXT=typo.txt"), "a file that can be read"),
        (("translate-text",), 'make translate-text TEXT="'),
        (("translate-text", "FILE=typo.py", "TEXT=x"), "a file that can be read"),
        (("summarize", "TEXT=typo.txt"), "a file that can be read"),
        (("summarize", "TEXT=workflows"), "a file that can be read"),
    ],
)
def test_nothing_is_trained_for_a_question_that_is_missing(project: Project, asking, cure):
    assert f"`make {asking[0]}` needs" in (message := project.refusal(*asking)) and cure in message


@pytest.mark.parametrize(
    ("goal", "variable", "form"),
    [
        ("sentiment", "REVIEWS", "jsonl"),
        ("ner", "ENTITIES", "iob"),
        ("summarize", "DOCUMENTS", "jsonl"),
        ("qa", "QUESTIONS", "jsonl"),
        ("translate", "PARALLEL", "jsonl"),
    ],
)
def test_a_projects_data_that_is_not_there_is_asked_for(project: Project, goal, variable, form):
    message = project.refusal(goal, f"{variable}=mine")
    assert f'there is no data/mine. Prepare it from a file of yours: make data DATA={form} ARGS="--file' in message


def test_pictures_are_drawn_with_the_options_that_were_given(project):
    assert project.calls("attention-map", "TEXT=it's") == [["attention-map", "--text", "it's"]]
    assert project.calls("expert-load", "ARGS=--steps 5") == [["expert-load", "--steps", "5"]]


@pytest.mark.parametrize(
    ("goal", "variable", "others"),
    [
        ("sentiment", "ENCODER", "minilm"),
        ("distill", "REVIEWS", "pubmedqa_decisions"),
        ("qa", "QUESTIONS", "squad"),
        ("ner", "ENTITIES", "wnut_17"),
        ("ner-autotrain", "ENTITIES", "wnut_17"),
        ("summarize", "METHOD", "abstractive"),
        ("translate", "PARALLEL", "catalogues_de"),
    ],
)
def test_a_projects_folder_shows_the_figures_of_its_latest_model(project: Project, goal, variable, others):
    for variables in ([], [f"{variable}={others}"], []):
        *_, call = project.calls(goal, *variables)
        shown = project.root / "out" / goal / "metrics.json"
        assert shown.read_text() == (project.root / option(call, "--out_dir") / "metrics.json").read_text()
        assert shown.read_text() == " ".join(call[1:])
