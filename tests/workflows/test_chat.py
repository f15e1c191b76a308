"""The terminal chat, against a stand-in server that streams, thinks, dies and forgets."""

import io
import json
import signal
import threading
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.workflows.fake_ollama import Handler, fake_ollama, show, speak
from workflows.__main__ import main
from workflows.chat import Chat, setup
from workflows.errors import UserError
from workflows.ollama.server import OllamaServer, probe
from workflows.ollama.thoughts import ThoughtParser


@pytest.fixture
def replies() -> dict:
    return {"/api/show": show(), "/api/chat": speak("Too little ", "hemoglobin", ".")}


@pytest.fixture
def requests(replies: dict, monkeypatch) -> Iterator[list]:
    with fake_ollama(replies) as (url, requests):
        monkeypatch.setenv("OLLAMA_HOST", url)
        yield requests


def connected(url: str, **more: object) -> Chat:
    endpoint = probe(url)
    assert endpoint is not None
    return Chat(OllamaServer(endpoint), "m", {}, out=io.StringIO(), **more)  # type: ignore[arg-type]


def test_one_answer_is_streamed(requests: list, capsys) -> None:
    setup(model="m", prompt="What is anemia?", temperature=0.0, num_predict=9, system="Be short.")
    assert capsys.readouterr().out == "Too little hemoglobin.\n"
    (sent,) = [body for path, body in requests if path == "/api/chat"]
    assert sent["messages"] == [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": "What is anemia?"},
    ]
    assert sent["options"] == {"temperature": 0.0, "num_predict": 9}


def test_json_output_is_one_object_per_answer(requests: list, capsys) -> None:
    setup(model="m", prompt="What is anemia?", json=True)
    record = json.loads(capsys.readouterr().out)
    assert (record["answer"], record["finished"], record["eval_count"]) == ("Too little hemoglobin.", True, 7)


def test_a_conversation_with_its_commands(requests: list, monkeypatch, capsys, tmp_path: Path) -> None:
    saved = tmp_path / "talk.json"
    lines = [
        "first",
        "",
        "/system Be exact.",
        "second",
        f"/save {saved}",
        "/reset",
        "third",
        "/nonsense",
        "/exit",
        "no",
    ]
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines) + "\n"))
    setup(model="m")
    sent = [body["messages"] for path, body in requests if path == "/api/chat"]
    answer = {"role": "assistant", "content": "Too little hemoglobin."}
    system = {"role": "system", "content": "Be exact."}
    assert sent == [
        [{"role": "user", "content": "first"}],
        [system, {"role": "user", "content": "first"}, answer, {"role": "user", "content": "second"}],
        [system, {"role": "user", "content": "third"}],
    ]
    messages = json.loads(saved.read_text())["messages"]
    assert messages == [*sent[1], answer]
    assert "There is no command /nonsense" in capsys.readouterr().err


def test_a_conversation_that_cannot_be_saved_goes_on(requests: list, monkeypatch, capsys, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    lines = f"/save {tmp_path}/file/under\n/save\nhello\n"
    monkeypatch.setattr("sys.stdin", io.StringIO(lines))
    setup(model="m")
    captured = capsys.readouterr()
    assert "not saved" in captured.err and "needs a file name" in captured.err
    assert "Too little hemoglobin." in captured.out


def test_ctrl_c_stops_the_answer_and_not_the_chat(monkeypatch, capsys) -> None:
    stuck = threading.Event()

    def talk(handler: Handler, body: dict) -> None:
        if body["messages"][-1]["content"] != "long":
            return speak("short")(handler, body)
        handler.begin_stream()
        handler.send_part({"message": {"role": "assistant", "content": "It begins"}, "done": False})
        threading.Timer(0.3, lambda: signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)).start()
        stuck.wait(10)

    with fake_ollama({"/api/show": show(), "/api/chat": talk}) as (url, requests):
        monkeypatch.setenv("OLLAMA_HOST", url)
        monkeypatch.setattr("sys.stdin", io.StringIO("long\nagain\n"))
        try:
            setup(model="m")
        finally:
            stuck.set()
    out = capsys.readouterr().out
    assert "It begins\n[stopped]" in out and out.endswith("short\n")
    assert requests[-1][1]["messages"][1] == {"role": "assistant", "content": "It begins"}
    # Only the answer that was left gave its slot back; Ollama would keep it and the next question would wait for ever.
    asked = [path for path, _ in requests if path != "/api/show"]
    assert asked == ["/api/chat", "/api/generate", "/api/chat"]
    assert next(body for path, body in requests if path == "/api/generate")["keep_alive"] == 0


# ---- thoughts ----

THINKING = "<think>\nFast breathing\nmeans … < 3 </thin\n</think>\n\nTachypnea <b>"
PARTED = ("Fast breathing\nmeans … < 3 </thin\n", "Tachypnea <b>")


def parse(pieces: list[str], inside: bool = False) -> tuple[str, str]:
    parser = ThoughtParser(inside)
    parts = [part for piece in pieces for part in parser.feed(piece)] + list(parser.close())
    return "".join(t for is_thought, t in parts if is_thought), "".join(t for is_thought, t in parts if not is_thought)


@given(st.lists(st.integers(0, len(THINKING)), max_size=12))
def test_thoughts_are_parted_wherever_the_stream_is_cut(cuts: list[int]) -> None:
    edges = [0, *sorted(cuts), len(THINKING)]
    pieces = [THINKING[a:b] for a, b in pairwise(edges)]
    assert parse(pieces) == PARTED
    opened = THINKING.removeprefix("<think>")
    edges = [0, *sorted(min(c, len(opened)) for c in cuts), len(opened)]
    assert parse([opened[a:b] for a, b in pairwise(edges)], inside=True) == PARTED


@pytest.mark.parametrize("text", ["plain", "<thin air>", "<", " \n<th", "a <think>b</think> c", "", "1 </think> 2"])
def test_text_without_leading_thoughts_is_unchanged(text: str) -> None:
    for pieces in ([text], list(text)):
        assert parse(pieces) == ("", text)


def test_thoughts_that_never_end_are_thoughts() -> None:
    assert parse(["<think>on", " and on </thi"]) == ("on and on </thi", "")


@pytest.mark.parametrize(("think", "shown"), [("show", "hm, breath\n\nTachypnea\n"), ("hide", "Tachypnea\n")])
def test_thoughts_are_shown_or_hidden_and_what_follows_them_is_sent_again_to_the_letter(think: str, shown: str) -> None:
    with fake_ollama({"/api/chat": speak("<thi", "nk>hm, ", "breath</think>", "\n\nTachy", "pnea")}) as (url, requests):
        chat = connected(url, think=think)
        answer = chat.ask("fast?")
        chat.ask("sure?")
    assert (answer.thoughts, answer.text) == ("hm, breath", "Tachypnea")
    assert chat.out.getvalue() == shown * 2
    assert {"role": "assistant", "content": "\n\nTachypnea"} in requests[-1][1]["messages"]


THOUGHT = "<think>\nhm, fast breath\n</think>\n\nTachypnea"


class Screen(io.StringIO):
    """What a terminal is sent."""

    def isatty(self) -> bool:
        return True


def test_thoughts_are_folded_into_a_line_and_unfolded(capsys) -> None:
    with fake_ollama({"/api/chat": speak(*THOUGHT)}) as (url, _):
        chat = connected(url, think="fold")
        chat.ask("fast?")
        said = chat.out.getvalue()
        chat.command("/think")
        assert "hm, fast breath" in capsys.readouterr().err
        chat.out = Screen()
        chat.ask("fast?")
    first, second, _ = said.split("\n")
    assert first.startswith("[thought for ") and first.endswith(" s: 3 words]") and second == "Tachypnea"
    drawn = chat.out.getvalue()
    assert "\r\033[K\033[2mthinking … 0 s\033[0m" in drawn and "hm" not in drawn
    assert drawn.endswith("words]\033[0m\nTachypnea\n")


def test_thoughts_are_dim_on_a_terminal() -> None:
    with fake_ollama({"/api/chat": speak(THOUGHT)}) as (url, _):
        chat = connected(url)
        chat.out = Screen()
        chat.ask("fast?")
    assert chat.out.getvalue() == "\033[2mhm, fast breath\n\033[0m\n\nTachypnea\n"


def test_each_answer_says_how_long_it_took(replies: dict, monkeypatch, capsys) -> None:
    replies["/api/chat"] = speak("Tachypnea", eval_duration=7 * 10**8)
    with fake_ollama(replies) as (url, _):
        monkeypatch.setenv("OLLAMA_HOST", url)
        setup(model="m", prompt="fast?")
        captured = capsys.readouterr()
        assert captured.out == "Tachypnea\n" and captured.err.rstrip().endswith(" s, 7 tokens, 10.0 tokens/s]")
        setup(model="m", prompt="fast?", json=True)
        record = json.loads(capsys.readouterr().out)
    assert record["tokens_per_second"] == 10.0 and record["seconds"] >= 0


def test_an_answer_in_the_form_of_a_schema(replies: dict, monkeypatch, tmp_path: Path, capsys) -> None:
    schema = {"type": "object", "properties": {"finding": {"type": "string"}}, "required": ["finding"]}
    (tmp_path / "schema.json").write_text(json.dumps(schema))
    command = ["chat", "--model", "m", "--prompt", "fast?", "--schema", str(tmp_path / "schema.json")]
    replies |= {"/api/show": show(R1_TEMPLATE), "/api/chat": speak('{"finding": "Tachypnea"}')}
    with fake_ollama(replies) as (url, requests):
        monkeypatch.setenv("OLLAMA_HOST", url)
        assert main(command) == 0
        assert json.loads(capsys.readouterr().out) == {"finding": "Tachypnea"}
        body = next(body for path, body in requests if path == "/api/chat")
        assert body["format"] == schema and body["messages"][-1]["content"] == "<think>\n\n</think>\n\n"
        replies["/api/chat"] = speak('{"finding": "Tach')
        assert main(command) == 1
    assert "not whole JSON" in capsys.readouterr().err


def test_an_answer_may_begin_inside_the_thoughts(replies: dict, monkeypatch, capsys) -> None:
    replies |= {
        "/api/show": show(R1_TEMPLATE),
        "/api/chat": speak("hm</think>\n\nTachypnea"),
    }
    with fake_ollama(replies) as (url, _):
        monkeypatch.setenv("OLLAMA_HOST", url)
        setup(model="m", prompt="fast?", think="hide")
        assert capsys.readouterr().out == "Tachypnea\n"
        setup(model="m", prompt="fast?", json=True)
        assert json.loads(capsys.readouterr().out)["thoughts"] == "hm"


R1_TEMPLATE = "{{ if $last }}<|Assistant|><think>\n{{ else }}<|Assistant|>{{ end }}"


@pytest.mark.parametrize("think", ["show", "hide"])
def test_an_answer_that_never_leaves_the_thoughts_is_the_answer(think: str, replies: dict, monkeypatch, capsys) -> None:
    replies |= {"/api/show": show(R1_TEMPLATE), "/api/chat": speak("Tachy", "pnea.")}
    with fake_ollama(replies) as (url, requests):
        monkeypatch.setenv("OLLAMA_HOST", url)
        monkeypatch.setattr("sys.stdin", io.StringIO("fast?\nsure?\n"))
        setup(model="m", think=think)
        assert capsys.readouterr().out == "Tachypnea.\n" * 2
        assert {"role": "assistant", "content": "Tachypnea."} in requests[-1][1]["messages"]
        setup(model="m", prompt="fast?", think=think, json=True)
        record = json.loads(capsys.readouterr().out)
    assert record["answer"] == "Tachypnea." and "thoughts" not in record


def test_an_answer_that_is_cut_in_its_thoughts_says_so(replies: dict, monkeypatch, capsys) -> None:
    replies |= {"/api/show": show(R1_TEMPLATE), "/api/chat": speak("hm, it may", done_reason="length")}
    with fake_ollama(replies) as (url, _):
        monkeypatch.setenv("OLLAMA_HOST", url)
        setup(model="m", prompt="fast?", think="hide")
    captured = capsys.readouterr()
    assert captured.out == "\n" and "cut while it was thinking: raise --num_predict" in captured.err


def test_thoughts_that_ollama_parts_itself(replies: dict, monkeypatch, capsys) -> None:
    def talk(handler: Handler, _: dict) -> None:
        handler.begin_stream()
        handler.send_part({"message": {"role": "assistant", "content": "", "thinking": "hm"}, "done": False})
        handler.send_part({"message": {"role": "assistant", "content": "Tachypnea"}, "done": True})
        handler.end_stream()

    with fake_ollama({**replies, "/api/chat": talk}) as (url, _):
        monkeypatch.setenv("OLLAMA_HOST", url)
        setup(model="m", prompt="fast?", json=True)
    record = json.loads(capsys.readouterr().out)
    assert (record["thoughts"], record["answer"]) == ("hm", "Tachypnea")


# ---- what goes wrong ----


def cut(*sent: dict | bytes, ending: bool = False):
    def reply(handler: Handler, _: dict) -> None:
        handler.begin_stream()
        for part in sent:
            handler.send_part(part)
        if ending:
            handler.end_stream()
        handler.die()

    return reply


BEGUN = {"message": {"role": "assistant", "content": "Too lit"}, "done": False}


@pytest.mark.parametrize(
    "reply",
    [
        cut(BEGUN),
        cut(BEGUN, ending=True),
        cut(BEGUN, b'{"message": {"role": "assis', ending=True),
        cut(BEGUN, {"error": "llama runner process no longer running: 2"}, ending=True),
        lambda handler, _: handler.send_json({"error": "llama runner process has terminated: signal: killed"}, 500),
        lambda handler, _: handler.die(),
    ],
    ids=["connection broken", "stream ends", "line cut", "runner died", "runner died before", "no answer"],
)
def test_a_server_that_dies_is_one_clear_message(reply, replies: dict, monkeypatch, capsys) -> None:
    with fake_ollama({**replies, "/api/chat": reply}) as (url, _):
        monkeypatch.setenv("OLLAMA_HOST", url)
        assert main(["chat", "--model", "m", "--prompt", "What is anemia?"]) == 1
    error = capsys.readouterr().err
    assert "ended or broke off in the middle" in error and url in error and "Traceback" not in error


def test_an_unknown_model_is_one_clear_message(replies: dict, monkeypatch, capsys) -> None:
    replies["/api/show"] = lambda handler, _: handler.send_json({"error": "model 'nope' not found"}, 404)
    with fake_ollama(replies) as (url, _):
        monkeypatch.setenv("OLLAMA_HOST", url)
        assert main(["chat", "--model", "nope", "--prompt", "x"]) == 1
    error = capsys.readouterr().err
    assert "does not know the model 'nope'" in error and "It knows: known" in error and "make export" in error


def test_a_model_deleted_during_the_chat_is_one_clear_message(replies: dict, monkeypatch, capsys) -> None:
    replies["/api/chat"] = lambda handler, _: handler.send_json({"error": 'model "m" not found'}, 404)
    with fake_ollama(replies) as (url, _):
        monkeypatch.setenv("OLLAMA_HOST", url)
        assert main(["chat", "--model", "m", "--prompt", "x"]) == 1
    assert "does not know the model 'm'" in capsys.readouterr().err


def test_a_failed_question_is_not_kept(replies: dict) -> None:
    with fake_ollama({"/api/chat": cut(BEGUN)}) as (url, _):
        chat = connected(url)
        with pytest.raises(UserError):
            chat.ask("x")
    assert chat.history == []


def test_ctrl_c_at_a_single_question_ends_quietly(monkeypatch, capsys) -> None:
    stuck = threading.Event()

    def talk(handler: Handler, _: dict) -> None:
        handler.begin_stream()
        handler.send_part(BEGUN)
        threading.Timer(0.3, lambda: signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)).start()
        stuck.wait(10)

    with fake_ollama({"/api/show": show(), "/api/chat": talk}) as (url, _):
        monkeypatch.setenv("OLLAMA_HOST", url)
        with pytest.raises(SystemExit) as stop:
            main(["chat", "--model", "m", "--prompt", "x"])
        stuck.set()
    captured = capsys.readouterr()
    assert stop.value.code == 130 and captured.out == "Too lit\n[stopped]\n"
    assert "again" not in captured.err and "Traceback" not in captured.err


@pytest.mark.parametrize("status", [200, 404, 500])
def test_ollama_host_that_points_elsewhere_is_one_clear_message(status: int, monkeypatch, capsys) -> None:
    def version(handler: Handler) -> None:
        handler.send_json({"hello": "world"}, status)

    monkeypatch.setattr(Handler, "do_GET", version)
    with fake_ollama({}) as (url, _):
        monkeypatch.setenv("OLLAMA_HOST", url)
        assert main(["chat", "--model", "m", "--prompt", "x"]) == 1
    error = capsys.readouterr().err
    assert f"What answers at {url} is not an Ollama server" in error and "unset it" in error
    assert "Traceback" not in error and len(error.splitlines()) == 1


def test_wrong_arguments_are_all_reported(capsys) -> None:
    wrong = ["--prompt", " ", "--temperature", "-1", "--top_p", "2", "--port", "0", "--model", ""]
    assert main(["chat", *wrong]) == 1
    error = capsys.readouterr().err
    for part in ("5 problems", "--prompt is empty", "--temperature", "--top_p", "--port", "--model '' is no name"):
        assert part in error


@pytest.mark.parametrize("errors", ["strict", "surrogateescape"])  # of a terminal with UTF-8, and of one without
def test_input_that_is_no_text_is_one_clear_message(errors: str, requests: list, monkeypatch, capsys) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9\n"), encoding="utf-8", errors=errors))
    assert main(["chat", "--model", "m"]) == 1
    assert main(["chat", "--model", "m", "--prompt", "caf\udce9"]) == 2  # as Python reads a command line
    error = capsys.readouterr().err
    assert "error: What is to be asked is not UTF-8 text" in error and "Traceback" not in error
    assert "error: not UTF-8 text: 'caf\\udce9'" in error


# ---- a full context ----


class Terminal(io.StringIO):
    """Lines typed at a terminal."""

    def isatty(self) -> bool:
        return True


def counting(handler: Handler, body: dict) -> None:
    """A server with a context of 128 tokens: one for three letters, and as in Ollama, less of what is longer."""
    length = sum(len(message["content"]) for message in body["messages"]) // 3
    speak("Yes.", prompt_eval_count=min(length, 128))(handler, body)


FULL = "does not fit into the context of 128 tokens"


@pytest.mark.parametrize("where", ["parameter", "option", "model"])
def test_a_prompt_longer_than_the_context_is_one_clear_message(where: str, replies: dict, monkeypatch, capsys) -> None:
    parameters = 'stop  "x"\nnum_ctx                        128\ntop_p 1' if where == "parameter" else "num_ctx  4096"
    replies |= {"/api/show": show(parameters=parameters, context=128 if where == "model" else 8192)}
    with fake_ollama({**replies, "/api/chat": counting}) as (url, _):
        monkeypatch.setenv("OLLAMA_HOST", url)
        options = ["--num_ctx", "128"] if where == "option" else []
        assert main(["chat", "--model", "m", "--prompt", "a" * 381, *options]) == 0
        capsys.readouterr()
        assert main(["chat", "--model", "m", "--prompt", "a" * 900, *options]) == 1
    error = capsys.readouterr().err
    assert FULL in error and "/reset" in error and "--num_ctx" in error and "Traceback" not in error


def test_a_full_context_does_not_end_a_chat_at_a_terminal(replies: dict, monkeypatch, capsys) -> None:
    replies["/api/show"] = show(parameters="num_ctx 128")
    lines = ["short", "b" * 180, "c" * 210, "d" * 900, "/reset", "e" * 60, "/exit"]
    with fake_ollama({**replies, "/api/chat": counting}) as (url, requests):
        monkeypatch.setenv("OLLAMA_HOST", url)
        monkeypatch.setattr("sys.stdin", Terminal("\n".join(lines) + "\n"))
        setup(model="m")
        assert capsys.readouterr().err.count(FULL) == 2
        # What would make Ollama forget the first messages is not sent, and not kept.
        sent = [[m["content"] for m in body["messages"]] for path, body in requests if path == "/api/chat"]
        assert sent == [["short"], ["short", "Yes.", "b" * 180], ["e" * 60]]
        monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines) + "\n"))
        assert main(["chat", "--model", "m"]) == 1  # nobody is there to mend it
