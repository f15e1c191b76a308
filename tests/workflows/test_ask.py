"""Files of questions, against a stand-in server that dies, comes back, and answers several at a time."""

import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.workflows.fake_ollama import Handler, Reply, fake_ollama, show, speak
from workflows.__main__ import main
from workflows.ask import setup
from workflows.chat_template import ChatTemplate
from workflows.errors import UserError
from workflows.ollama import batch
from workflows.ollama.client import connect, create_model
from workflows.ollama.gguf_writer import write_gguf
from workflows.ollama.install import install, is_supported
from workflows.ollama.modelfile import make_modelfile
from workflows.ollama.server import OllamaServer, probe
from workflows.status import status_of, step_folders

R1_TEMPLATE = "{{ if $last }}<|Assistant|><think>\n{{ else }}<|Assistant|>{{ end }}"


def echo(handler: Handler, body: dict) -> None:
    """Answers with the question, after a thought."""
    question = body["messages"][-1]["content"]
    speak(f"<think>\nhm\n</think>\n\n{question}!", eval_duration=7 * 10**8, prompt_eval_count=5)(handler, body)


@pytest.fixture
def replies(monkeypatch) -> dict[str, Reply]:
    monkeypatch.setattr(Handler, "do_GET", tags)
    return {"/api/show": show(), "/api/chat": echo}


def tags(handler: Handler) -> None:
    listed = {"models": [{"model": "m:latest", "digest": "d"}, {"model": "n:latest", "digest": "e"}]}
    handler.send_json({"version": "0.0.1-fake"} if handler.path == "/api/version" else listed)


@pytest.fixture
def requests(replies: dict, monkeypatch) -> Iterator[list]:
    with fake_ollama(replies) as (url, requests):
        monkeypatch.setenv("OLLAMA_HOST", url)
        yield requests


@pytest.fixture(autouse=True)
def status_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("workflows.ask.STATUS", tmp_path / "out" / "ask")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return lines(tmp_path / "q.jsonl", *({"question": f"q{i}", "id": f"id{i}"} for i in range(6)))


def lines(path: Path, *rows: object) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def answers(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.with_suffix(".answers.jsonl").read_text().splitlines()]


def chats(requests: list) -> list[str]:
    return [body["messages"][-1]["content"] for path, body in requests if path == "/api/chat"]


def test_a_line_for_each_question_with_thought_answer_and_timing(requests: list, file: Path) -> None:
    setup(file, model="m", temperature=0.0)
    found = answers(file)
    assert [(row["line"], row["id"], row["question"]) for row in found] == [
        (i + 1, f"id{i}", f"q{i}") for i in range(6)
    ]
    assert [(row["thought"], row["answer"]) for row in found] == [("hm\n", f"q{i}!") for i in range(6)]
    assert all(row["tokens_per_second"] == 10.0 and row["seconds"] >= row["thought_seconds"] >= 0 for row in found)
    assert all(body["options"] == {"temperature": 0.0} for path, body in requests if path == "/api/chat")


def test_every_shape_of_question(requests: list, tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "<think>x</think>\n\nB"}]
    file = lines(
        tmp_path / "q.jsonl",
        {"prompt": "one"},
        {"prompt": [{"role": "system", "content": "own"}, {"role": "user", "content": "two"}], "answers": ["x"]},
        "",
        {"messages": [*turns, {"role": "user", "content": "three"}, {"role": "assistant", "content": "wanted"}]},
    )
    setup(file, model="m", system="S", parallel=1)
    sent = [[(m["role"], m["content"]) for m in body["messages"]] for path, body in requests if path == "/api/chat"]
    assert sent == [
        [("system", "S"), ("user", "one")],
        [("system", "own"), ("user", "two")],
        [("system", "S"), ("user", "a"), ("assistant", "\n\nB"), ("user", "three")],
    ]
    assert [row["line"] for row in answers(file)] == [1, 2, 4]


def test_several_questions_are_in_the_air_at_a_time(replies: dict, file: Path, monkeypatch) -> None:
    together = threading.Barrier(3, timeout=20)

    def talk(handler: Handler, body: dict) -> None:
        together.wait()  # breaks unless three ask at once
        echo(handler, body)

    with fake_ollama({**replies, "/api/chat": talk}) as (url, _):
        monkeypatch.setenv("OLLAMA_HOST", url)
        setup(file, model="m", parallel=3)
    assert [row["answer"] for row in answers(file)] == [f"q{i}!" for i in range(6)]


def test_run_again_only_what_is_missing_is_asked(requests: list, file: Path) -> None:
    setup(file, model="m")
    target, whole = file.with_suffix(".answers.jsonl"), answers(file)
    kept = target.read_text().splitlines(keepends=True)
    target.write_text("".join(kept[:3]) + kept[3][:20])  # as a kill leaves it
    lines(file, *file.read_text().splitlines(), {"question": "q0"})  # a new line, the same question as the first
    requests.clear()
    setup(file, model="m")
    assert sorted(chats(requests)) == ["q0", "q3", "q4", "q5"]
    timed = ("seconds", "thought_seconds")
    strip = [{k: v for k, v in row.items() if k not in timed} for row in answers(file)]
    assert strip[:6] == [{k: v for k, v in row.items() if k not in timed} for row in whole]
    assert strip[6]["line"] == 7 and answers(file)[:3] == whole[:3]
    requests.clear()
    setup(file, model="m")
    assert chats(requests) == []


@pytest.mark.parametrize("change", [{"temperature": 0.5}, {"model": "n"}, {"system": "S"}])
def test_answers_of_other_settings_are_not_taken_for_these(change: dict, requests: list, file: Path) -> None:
    setup(file, model="m")
    before = file.with_suffix(".answers.jsonl").read_text()
    with pytest.raises(UserError, match=r"holds no answer to one of these questions.*--resume false"):
        setup(file, **{"model": "m", **change})
    assert file.with_suffix(".answers.jsonl").read_text() == before
    setup(file, **{"model": "m", **change}, resume=False)


def test_a_question_that_was_mended_is_asked_alone_and_its_old_answer_is_laid_aside(requests: list, file: Path) -> None:
    setup(file, model="m")
    whole, questions = answers(file), file.read_text()
    requests.clear()
    file.write_text(questions.replace("q1", "q1, mended"))
    setup(file, model="m")
    assert chats(requests) == ["q1, mended"]
    assert [row["question"] for row in answers(file)] == ["q0", "q1, mended", "q2", "q3", "q4", "q5"]
    aside = file.with_name("q.answers.others.jsonl")
    assert [json.loads(line) for line in aside.read_text().splitlines()] == [whole[1]]
    requests.clear()
    file.write_text(questions)
    setup(file, model="m")  # as it was at first
    assert chats(requests) == [] and answers(file) == whole
    assert json.loads(aside.read_text())["question"] == "q1, mended"


def test_fewer_questions_than_are_answered_lose_nothing(requests: list, file: Path) -> None:
    setup(file, model="m", limit=3)
    whole = answers(file)
    requests.clear()
    setup(file, model="m", limit=2)
    assert chats(requests) == [] and answers(file) == whole[:2]
    setup(file, model="m", limit=3, num_thread=1)
    assert chats(requests) == [] and answers(file) == whole
    assert not file.with_name("q.answers.others.jsonl").exists()  # it is empty again
    setup(file, model="m", limit=3, resume=False)
    assert sorted(chats(requests)) == ["q0", "q1", "q2"]


def test_more_room_asks_again_only_what_was_cut(replies: dict, file: Path, monkeypatch) -> None:
    """q1 is cut in its thoughts, q2 in what it says; the others end by themselves."""

    def talk(handler: Handler, body: dict) -> None:
        question, most = body["messages"][-1]["content"], body["options"]["num_predict"]
        cut = {"done_reason": "length", "eval_count": most} if question in ("q1", "q2") and most < 50 else {}
        said = "<think>hm" if question == "q1" and cut else question
        speak(said, **{"prompt_eval_count": 5, "eval_count": 7, **cut})(handler, body)

    with fake_ollama({**replies, "/api/chat": talk}) as (url, requests):
        monkeypatch.setenv("OLLAMA_HOST", url)
        with pytest.raises(UserError, match="raise --num_predict"):
            setup(file, model="m", num_predict=10)
        assert answers(file)[2]["done_reason"] == "length" and len(chats(requests)) == 6
        for settings, asked in (
            ({"num_predict": 60}, ["q1", "q2"]),
            ({"num_predict": 60}, []),
            ({"num_predict": 60, "num_ctx": 100}, []),
            ({"num_predict": 6, "num_ctx": 100}, [f"q{i}" for i in range(6)]),  # less room than was taken
        ):
            requests.clear()
            with ExitStack() as stack:
                if settings["num_predict"] < 50:
                    stack.enter_context(pytest.raises(UserError, match="1 of 6 questions have no answer"))
                setup(file, model="m", **settings)
            assert sorted(chats(requests)) == asked


def test_a_server_that_restarts_in_the_middle_loses_nothing(replies: dict, file: Path, monkeypatch, capsys) -> None:
    count = itertools.count()

    def talk(handler: Handler, body: dict) -> None:
        if next(count) == 2:
            handler.die()  # the connection breaks; the next look finds it there again
        else:
            echo(handler, body)

    with fake_ollama({**replies, "/api/chat": talk}) as (url, requests):
        monkeypatch.setenv("OLLAMA_HOST", url)
        setup(file, model="m", parallel=1)
    assert [row["answer"] for row in answers(file)] == [f"q{i}!" for i in range(6)]
    assert chats(requests) == ["q0", "q1", "q2", *(f"q{i}" for i in range(2, 6))]
    assert "Waiting up to" in capsys.readouterr().err


def test_a_server_that_stays_away_ends_it_and_the_same_command_goes_on(
    replies: dict, file: Path, monkeypatch, capsys
) -> None:
    monkeypatch.setattr(batch, "PATIENCE", 0.0)

    def talk(handler: Handler, body: dict) -> None:
        if body["messages"][-1]["content"] == "q3":
            handler.die()
        else:
            echo(handler, body)

    command = ["ask", "--file", str(file), "--model", "m", "--parallel", "1"]
    with fake_ollama({**replies, "/api/chat": talk}) as (url, _):
        monkeypatch.setenv("OLLAMA_HOST", url)
        assert main(command) == 1
    error = capsys.readouterr().err
    assert "3 of 6 answers are in" in error and "the same command goes on" in error and "Traceback" not in error
    with fake_ollama(replies) as (url, requests):
        monkeypatch.setenv("OLLAMA_HOST", url)
        assert main(command) == 0
    assert chats(requests) == ["q3", "q4", "q5"] and len(answers(file)) == 6


def test_a_question_that_ends_the_server_each_time_is_left_with_its_error(
    replies: dict, file: Path, monkeypatch
) -> None:
    def talk(handler: Handler, body: dict) -> None:
        if body["messages"][-1]["content"] == "q1":
            handler.send_json({"error": "llama runner process has terminated: signal: killed"}, 500)
        else:
            echo(handler, body)

    with fake_ollama({**replies, "/api/chat": talk}) as (url, _):
        monkeypatch.setenv("OLLAMA_HOST", url)
        with pytest.raises(UserError, match=r"1 of 6 questions have no answer.*line 2 of"):
            setup(file, model="m", parallel=1)
    found = answers(file)
    assert [("error" in row) for row in found] == [False, True, False, False, False, False]
    assert "runner process has terminated" in found[1]["error"]


def test_ctrl_c_keeps_what_is_answered(replies: dict, file: Path, monkeypatch, capsys) -> None:
    def talk(handler: Handler, body: dict) -> None:
        if body["messages"][-1]["content"] == "q2":
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
        echo(handler, body)

    out = file.parent / "out"
    command = ["ask", "--file", str(file), "--model", "m", "--parallel", "1"]
    with fake_ollama({**replies, "/api/chat": talk}) as (url, _):
        monkeypatch.setenv("OLLAMA_HOST", url)
        assert main(command) == 130
    assert "run the same command again" in capsys.readouterr().err
    (folder,) = step_folders(out)
    status = status_of(folder, out)
    assert status.name.startswith("ask/") and status.name.endswith("-q.answers")
    assert status.total == 6 and status.done < 6
    assert "keeps what is answered" in (folder / "progress.json").read_text()
    assert [row["answer"] for row in answers(file)][:2] == ["q0!", "q1!"] and len(answers(file)) < 6
    with fake_ollama(replies) as (url, requests):
        monkeypatch.setenv("OLLAMA_HOST", url)
        assert main(command) == 0
    assert len(answers(file)) == 6 and "q0" not in chats(requests)
    assert not (out / "ask").exists()


def test_ctrl_c_does_not_wait_for_a_silent_server(replies: dict, file: Path, monkeypatch, capsys) -> None:
    silent = threading.Event()

    def talk(handler: Handler, body: dict) -> None:
        if body.get("keep_alive") != 0:
            threading.Timer(0.2, lambda: signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)).start()
        silent.wait(60)

    with fake_ollama({**replies, "/api/chat": talk, "/api/generate": talk}) as (url, requests):
        monkeypatch.setenv("OLLAMA_HOST", url)
        began = time.monotonic()
        try:
            assert main(["ask", "--file", str(file), "--model", "m", "--parallel", "1"]) == 130
        finally:
            silent.set()
    assert time.monotonic() - began < 30  # half as long as the server is silent
    assert requests[-1][0] == "/api/generate" and requests[-1][1]["keep_alive"] == 0  # its slot is given back


@pytest.mark.ollama
def test_a_real_server_is_asked_again_after_ctrl_c(
    speaking_llama: Path, tmp_path: Path, file: Path, ollama_server: OllamaServer, monkeypatch
) -> None:
    write_gguf(speaking_llama, tmp_path / "m.gguf", "f32", "stop", "0" * 64)
    modelfile = make_modelfile(ChatTemplate.from_checkpoint(speaking_llama), {}, num_ctx=512, num_thread=1)
    create_model(ollama_server, "stop", tmp_path / "m.gguf", modelfile)
    lines(file, *({"question": f"q{i}"} for i in range(60)))
    command = [sys.executable, "-m", "workflows", "ask", "--file", file, "--model", "stop", "--num_predict", "40"]
    environment = {**os.environ, "OLLAMA_HOST": ollama_server.url, "PYTHONPATH": str(ROOT)}
    target = file.with_suffix(".answers.jsonl")
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, cwd=tmp_path) as process:
        while process.poll() is None and (len(answers(file)) if target.is_file() else 0) < 5:
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130, process.stderr.read()
    assert 5 <= len(answers(file)) < 60
    monkeypatch.setenv("OLLAMA_HOST", ollama_server.url)
    setup(file, model="stop", num_predict=40)
    assert len(answers(file)) == 60
    connect(ollama_server).delete("stop")


@pytest.mark.ollama
def test_a_real_server_killed_amid_a_batch_and_started_again(
    speaking_llama: Path, tmp_path: Path, file, monkeypatch
) -> None:
    if not is_supported():
        pytest.skip("the private Ollama is for Linux on x86-64")
    state, binary = tmp_path / "state", install()
    with ExitStack() as stack:
        first = stack.enter_context(OllamaServer.start(binary, state, parallel=2))
        write_gguf(speaking_llama, tmp_path / "m.gguf", "f32", "m", "0" * 64)
        modelfile = make_modelfile(ChatTemplate.from_checkpoint(speaking_llama), {}, num_ctx=256, num_thread=1)
        create_model(first, "m", tmp_path / "m.gguf", modelfile)
        monkeypatch.setenv("OLLAMA_HOST", first.url)
        settings = {"model": "m", "parallel": 2, "temperature": 0.0, "num_predict": 16}
        setup(file, **settings, out_file=tmp_path / "undisturbed.answers.jsonl")
        port, count, record = int(first.url.rpartition(":")[2]), itertools.count(), batch.Batch._record

        def crash(self: batch.Batch, i: int, **result: object) -> dict:
            if next(count) == 2:
                assert first.pid is not None
                os.kill(first.pid, signal.SIGKILL)
            return record(self, i, **result)

        def start_again(url: str, timeout: float) -> object:
            if first.pid is not None:
                first.stop()
                stack.enter_context(OllamaServer.start(binary, state, port, parallel=2))
            return probe(url, timeout)

        monkeypatch.setattr(batch.Batch, "_record", crash)
        monkeypatch.setattr(batch, "probe", start_again)
        setup(file, **settings)
    wanted = [json.loads(line)["answer"] for line in (tmp_path / "undisturbed.answers.jsonl").read_text().splitlines()]
    assert [row["answer"] for row in answers(file)] == wanted and len(wanted) == 6 and all(wanted)


# ---- a schema ----

SCHEMA = {"type": "object", "properties": {"finding": {"type": "string"}}, "required": ["finding"]}


def test_answers_that_follow_a_schema_are_values(replies: dict, file: Path, tmp_path: Path, monkeypatch) -> None:
    schema = lines(tmp_path / "schema.json", SCHEMA)
    replies |= {"/api/show": show(R1_TEMPLATE), "/api/chat": speak('{"finding": ', '"Tachypnea"}')}
    with fake_ollama(replies) as (url, requests):
        monkeypatch.setenv("OLLAMA_HOST", url)
        setup(file, model="m", schema=schema)
    assert [row["answer"] for row in answers(file)] == [{"finding": "Tachypnea"}] * 6
    assert "thought" not in answers(file)[0]
    body = next(body for path, body in requests if path == "/api/chat")
    assert body["format"] == SCHEMA
    assert body["messages"][-1] == {"role": "assistant", "content": "<think>\n\n</think>\n\n"}


@pytest.mark.parametrize(
    ("said", "why"),
    [
        ('{"finding": "Tachy', "not whole JSON"),
        ('{"finding": 3}', "3 is not of type 'string'"),
        ("{}", "required"),
        ('{"finding": "", "share": 1e400}', "it has no 1e400"),
        ('{"finding": "", "share": NaN}', "no NaN"),
    ],
)
def test_an_answer_that_does_not_follow_it_is_none(
    said: str, why: str, replies: dict, file, tmp_path, monkeypatch
) -> None:
    with fake_ollama({**replies, "/api/chat": speak(said)}) as (url, _):
        monkeypatch.setenv("OLLAMA_HOST", url)
        with pytest.raises(UserError, match="6 of 6 questions have no answer"):
            setup(file, model="m", schema=lines(tmp_path / "schema.json", SCHEMA))
    assert all(why in row["error"] and row["answer"] == said for row in answers(file))


def test_a_schema_that_is_none_is_told_before_anything_is_asked(file: Path, tmp_path: Path, requests: list) -> None:
    with pytest.raises(UserError, match="is not a JSON schema: at type"):
        setup(file, model="m", schema=lines(tmp_path / "schema.json", {"type": "objekt"}))
    assert chats(requests) == []


# ---- files that are wrong ----


def test_all_broken_lines_are_told_before_anything_is_asked(requests: list, tmp_path: Path, capsys) -> None:
    file = lines(
        tmp_path / "q.jsonl",
        {"question": "fine"},
        '{"question": "cut',
        [1],
        {"question": "  "},
        {"prompt": [{"role": "user"}]},
        {"messages": [{"role": "assistant", "content": "x"}]},
        '{"question": "q", "id": NaN}',
        {"messages": [{"role": "tool", "content": "x"}, {"role": "user", "content": "y"}]},
    )
    assert main(["ask", "--file", str(file), "--model", "m"]) == 1
    error = capsys.readouterr().err
    for number, why in (
        (2, "not valid JSON"),
        (3, "a list"),
        (4, "no question"),
        (5, "no question"),
        (6, "not end"),
        (7, "no NaN"),
        (8, "no question"),
    ):
        assert any(f"line {number}:" in line and why in line for line in error.splitlines()), error
    assert "Nothing has been asked yet" in error and chats(requests) == []
    assert main(["ask", "--file", str(file), "--model", "m", "--skip_broken", "true"]) == 0
    assert chats(requests) == ["fine"] and "7 lines of" in capsys.readouterr().out


@pytest.mark.parametrize(("text", "why"), [(None, "does not exist"), ("\n\n", "holds no question")])
def test_a_file_without_questions(text: str | None, why: str, requests: list, tmp_path: Path) -> None:
    file = tmp_path / "q.jsonl"
    if text is not None:
        file.write_text(text)
    with pytest.raises(UserError, match=why):
        setup(file, model="m")


def test_a_misspelt_model_is_told_with_the_nearest(requests: list, replies: dict, file: Path) -> None:
    replies["/api/show"] = lambda handler, _: handler.send_json({"error": "model 'm:latst' not found"}, 404)
    with pytest.raises(UserError, match=r"does not know the model 'm:latst'. Did you mean m:latest"):
        setup(file, model="m:latst")


def test_wrong_arguments_are_all_reported(file: Path, capsys) -> None:
    wrong = ["--parallel", "0", "--limit", "0", "--temperature", "-1", "--out_file", str(file)]
    assert main(["ask", "--file", str(file), *wrong]) == 1
    error = capsys.readouterr().err
    for part in ("4 problems", "--parallel", "--limit", "--temperature", "--out_file"):
        assert part in error
