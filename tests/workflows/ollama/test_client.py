"""What our side of a conversation says when a real server cuts it, dies, or loses the model."""

import io
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from workflows.chat import Chat
from workflows.chat_template import ChatTemplate
from workflows.errors import UserError
from workflows.ollama.client import ContextFull, UnknownModel, _logged_cut, connect, create_model, stream_chat
from workflows.ollama.gguf_writer import write_gguf
from workflows.ollama.install import install, is_supported
from workflows.ollama.modelfile import make_modelfile
from workflows.ollama.server import OllamaServer, probe
from workflows.ollama.thoughts import facts

pytestmark = pytest.mark.ollama
GREEDY = {"temperature": 0.0, "num_predict": 8}
Create = Callable[..., OllamaServer]


@pytest.fixture
def create(speaking_llama: Path, tmp_path: Path) -> Create:
    """Creates the tiny model under the name `talk` in a server."""

    def into(server: OllamaServer, num_ctx: int = 128) -> OllamaServer:
        modelfile = make_modelfile(ChatTemplate.from_checkpoint(speaking_llama), {}, num_ctx=num_ctx, num_thread=1)
        write_gguf(speaking_llama, tmp_path / "talk.gguf", "f32", "talk", "0" * 64)
        create_model(server, "talk", tmp_path / "talk.gguf", modelfile)
        return server

    return into


@pytest.fixture
def own_server(tmp_path: Path) -> Iterator[OllamaServer]:
    """A server that a test may kill."""
    if not is_supported():
        pytest.skip("the private Ollama is for Linux on x86-64")
    with OllamaServer.start(install(), tmp_path / "state") as server:
        yield server


def as_anothers(server: OllamaServer) -> OllamaServer:
    """The same server as one that we did not start, whose log we do not see."""
    endpoint = probe(server.url)
    assert endpoint is not None
    return OllamaServer(endpoint)


def talk(server: OllamaServer, options: dict | None = None, out: io.StringIO | None = None) -> Chat:
    context = facts(server, "talk", (options or {}).get("num_ctx")).context
    return Chat(server, "talk", GREEDY | (options or {}), out=out or io.StringIO(), context=context)


def question(words: int) -> str:
    return "breathing " * words


def test_a_prompt_longer_than_the_context_is_refused_and_more_room_cures_it(ollama_server, create: Create) -> None:
    create(ollama_server)
    for server in (ollama_server, as_anothers(ollama_server)):
        chat = talk(server)
        with pytest.raises(ContextFull, match=r"context of 128 tokens.*/reset.*--num_ctx"):
            chat.ask(question(100))
        assert chat.history == [] and chat.ask(question(20)).finished
        assert talk(server, {"num_ctx": 512}).ask(question(100)).finished
        # more than the model was trained for is not to be had
        with pytest.raises(ContextFull, match="context of 512 tokens"):
            talk(server, {"num_ctx": 4096}).ask(question(500))


def test_nothing_is_answered_to_a_conversation_that_a_server_of_ours_cuts(ollama_server, create: Create) -> None:
    create(ollama_server)
    chat = talk(ollama_server)
    chat.history = [{"role": ("user", "assistant")[i % 2], "content": question(20)} for i in range(4)]
    with pytest.raises(ContextFull):  # the messages left out, the rest fits
        chat.ask("And now?")
    assert chat.out.getvalue() == "\n" and len(chat.history) == 4


def test_no_message_is_left_out_before_the_chat_says_so(ollama_server, create: Create) -> None:
    """Another's server does not say what it leaves out: our count has to be quicker than its scissors."""
    create(ollama_server, num_ctx=400)
    assert ollama_server.log is not None
    mark = ollama_server.log.stat().st_size
    for words in (3, 10, 25):
        chat = talk(as_anothers(ollama_server))
        with pytest.raises(ContextFull):
            for _ in range(100):
                chat.ask(question(words))
        assert len(chat.history) >= 4
        assert not _logged_cut(ollama_server.log, mark)


def test_answers_left_in_the_middle_do_not_block_the_next_question(ollama_server, create: Create) -> None:
    """Ollama loses its slot to about one in twenty clients that hang up in the middle (its issue 17131)."""
    create(ollama_server, num_ctx=512)
    for _ in range(20):
        stream = stream_chat(
            ollama_server, "talk", [{"role": "user", "content": "Go on"}], GREEDY | {"num_predict": 99}
        )
        next(stream)
        stream.close()
    assert talk(ollama_server).ask("One?").finished


class Killer(io.StringIO):
    """Kills a server when the first piece of an answer is shown."""

    def __init__(self, pid: int) -> None:
        super().__init__()
        self.pid = pid

    def write(self, text: str) -> int:
        if not self.getvalue():
            os.kill(self.pid, signal.SIGKILL)
        return super().write(text)


def test_a_server_killed_in_the_middle_of_an_answer(own_server: OllamaServer, create: Create) -> None:
    create(own_server, num_ctx=512)
    assert own_server.pid is not None and own_server.log is not None
    chat = talk(own_server, {"num_predict": 5000}, out=Killer(own_server.pid))
    with pytest.raises(UserError, match=r"ended or broke off in the middle") as error:
        chat.ask("One?")  # its greedy answer does not end by itself
    assert str(own_server.log) in str(error.value) and chat.history == []
    left = [p for p in psutil.process_iter() if os.getsid(p.pid) == own_server.pid and p.pid != own_server.pid]
    assert left  # the runner outlives the server that was killed
    own_server.stop()
    assert not any(process.is_running() for process in left)
    assert own_server.log.is_file()  # the message points to it


def test_a_model_deleted_between_two_questions(own_server: OllamaServer, create: Create) -> None:
    chat = talk(create(own_server))
    assert chat.ask("One?").finished
    connect(own_server).delete("talk")
    with pytest.raises(UnknownModel, match=r"does not know the model 'talk'. It has no models yet. Make it with"):
        chat.ask("Two?")
    assert len(chat.history) == 2  # the first question and its answer


def test_a_server_killed_and_started_again_between_two_questions(tmp_path: Path, create: Create) -> None:
    if not is_supported():
        pytest.skip("the private Ollama is for Linux on x86-64")
    with OllamaServer.start(install(), tmp_path / "state") as first:
        port = int(first.url.rpartition(":")[2])
        chat = talk(as_anothers(create(first)))
        before = chat.ask("One?")
        assert first.pid is not None
        os.kill(first.pid, signal.SIGKILL)
        with pytest.raises(UserError, match="ended or broke off"):
            chat.ask("Two?")
    with OllamaServer.start(install(), tmp_path / "state", port):
        assert chat.ask("Two?").finished and len(chat.history) == 4
        chat.history.clear()
        assert chat.ask("One?").text == before.text


def test_a_stream_is_whole_or_an_error(ollama_server, create: Create) -> None:
    create(ollama_server)
    *_, last = stream_chat(ollama_server, "talk", [{"role": "user", "content": "Go on"}], GREEDY)
    assert last.done and last.eval_count
