"""Finding, starting and stopping Ollama servers; impostors and dead ends."""

import http.server
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from workflows.errors import UserError
from workflows.ollama import install as install_module
from workflows.ollama.client import connect
from workflows.ollama.gguf_writer import write_gguf
from workflows.ollama.install import environment, install
from workflows.ollama.server import OllamaServer, find_server, open_server, parse_host, probe
from workflows.ollama.store import StoreLock

needs_private_copy = pytest.mark.skipif(
    not install_module.is_supported(), reason="the private Ollama is for Linux x86-64"
)


@pytest.mark.parametrize(
    ("host", "url"),
    [
        ("127.0.0.1:1234", "http://127.0.0.1:1234"),
        ("localhost", "http://localhost:11434"),
        (":9000", "http://127.0.0.1:9000"),
        ("0.0.0.0:80", "http://127.0.0.1:80"),
        ("http://example.org", "http://example.org:80"),
        ("https://example.org/", "https://example.org:443"),
        ("[::1]:7", "http://[::1]:7"),
        (' "127.0.0.1:5" ', "http://127.0.0.1:5"),
    ],
)
def test_ollama_host_is_read_as_ollama_reads_it(host: str, url: str) -> None:
    assert parse_host(host) == url


def test_a_host_that_is_no_address_is_explained() -> None:
    with pytest.raises(UserError, match=r"OLLAMA_HOST='127.0.0.1:port' is not an address"):
        parse_host("127.0.0.1:port")


@pytest.fixture
def web_server(request) -> Iterator[str]:
    """An HTTP server that is not Ollama: what it answers is the test's parameter (status, body)."""
    status, body = request.param

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


@pytest.mark.parametrize(
    "web_server", [(200, b"<html>hello"), (404, b""), (200, b"[]"), (200, b'{"v": 1}'), (500, b"{}")], indirect=True
)
def test_what_speaks_http_but_is_not_ollama_is_named(web_server: str, monkeypatch) -> None:
    with pytest.raises(UserError, match=r"is not an Ollama server.*OLLAMA_HOST"):
        probe(web_server)
    monkeypatch.setenv("OLLAMA_HOST", web_server)
    with pytest.raises(UserError, match="is not an Ollama server"):
        find_server()


def test_what_speaks_no_http_is_named_and_silence_is_nothing() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"

        def greet() -> None:
            connection, _ = listener.accept()
            connection.sendall(b"220 mail.example.org ESMTP\r\n")
            time.sleep(0.2)
            connection.close()

        threading.Thread(target=greet, daemon=True).start()
        with pytest.raises(UserError, match="is not an Ollama server"):
            probe(url)
    assert probe(url) is None  # the listener is closed


@pytest.mark.parametrize("web_server", [(200, b'{"version": "0.0.1"}')], indirect=True)
def test_ollama_host_that_answers_is_used_and_not_stopped(web_server: str, monkeypatch) -> None:
    monkeypatch.setenv("OLLAMA_HOST", web_server.removeprefix("http://"))
    with open_server() as server:
        assert (server.url, server.version, server.is_ours, server.log) == (web_server, "0.0.1", False, None)
    assert probe(web_server) is not None


def test_without_any_ollama_the_message_says_how_to_install_one(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.delenv("OLLAMA_HOST", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(install_module.sys, "platform", "darwin")
    with pytest.raises(UserError, match=r"Install Ollama from https://ollama.com/download"):
        install(tmp_path / "ollama")


def test_a_port_in_use_is_explained(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        with pytest.raises(UserError, match=rf"Port {port} on 127.0.0.1 is in use.*--port"):
            OllamaServer.start(Path("ollama"), tmp_path, port)


def test_a_server_that_ends_at_once_is_explained_with_its_log(tmp_path: Path) -> None:
    binary = tmp_path / "ollama"
    binary.write_text("#!/bin/sh\necho cannot do this here\nexit 3\n")
    binary.chmod(0o755)
    with pytest.raises(UserError, match=r"ended with code 3(.|\n)*cannot do this here"):
        OllamaServer.start(binary, tmp_path / "state")


def test_ollama_on_path_comes_before_the_private_copy(tmp_path: Path, monkeypatch) -> None:
    binary = tmp_path / "bin" / "ollama"
    binary.parent.mkdir()
    binary.write_text("#!/bin/sh\necho it was me\nexit 7\n")
    binary.chmod(0o755)
    monkeypatch.setenv("PATH", f"{binary.parent}:{os.environ['PATH']}")
    monkeypatch.delenv("OLLAMA_HOST", raising=False)
    monkeypatch.setattr("workflows.ollama.server._user_server", lambda: None)
    with pytest.raises(UserError, match="it was me"):
        find_server(state=tmp_path / "state")
    assert environment(binary) == {}  # the private copy's libraries are not for another Ollama


@pytest.mark.ollama
@needs_private_copy
def test_a_server_of_ours_starts_listens_locally_and_leaves_nothing_behind(tmp_path: Path) -> None:
    server = OllamaServer.start(install(), tmp_path)
    pid = server.pid
    assert pid is not None and server.is_ours and server.version
    listening = {c.laddr.ip for c in psutil.Process(pid).net_connections() if c.status == psutil.CONN_LISTEN}
    assert listening == {"127.0.0.1"}
    family = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    server.stop()
    assert not any(process.is_running() for process in family)
    assert probe(server.url, timeout=1) is None
    assert (tmp_path / "models").is_dir() and not list((tmp_path / "logs").iterdir())
    server.stop()  # a second time does nothing


OWNER = """
import sys, time
from pathlib import Path
import psutil
from workflows.ollama.client import connect, create_model
from workflows.ollama.install import install
from workflows.ollama.modelfile import Modelfile
from workflows.ollama.server import OllamaServer

with OllamaServer.start(install(), Path(sys.argv[1])) as server:
    create_model(server, "m", Path(sys.argv[2]), Modelfile("{{ .Prompt }}", "", {"num_ctx": 64, "num_thread": 1}))
    connect(server).generate("m", "hello", options={"num_predict": 1})
    print(server.pid, *(child.pid for child in psutil.Process(server.pid).children(recursive=True)), flush=True)
    if sys.argv[3] == "error":
        raise ValueError("a fault of ours")
    if sys.argv[3] == "signal":
        time.sleep(60)
"""


@pytest.mark.ollama
@needs_private_copy
@pytest.mark.parametrize("end", ["normal", "error", signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_no_server_and_no_runner_outlives_its_owner(
    end: str | signal.Signals, speaking_llama: Path, tmp_path: Path
) -> None:
    write_gguf(speaking_llama, tmp_path / "m.gguf", "f32", "m", "0" * 64)
    how = "signal" if isinstance(end, signal.Signals) else end
    command = [sys.executable, "-c", OWNER, str(tmp_path / "state"), str(tmp_path / "m.gguf"), how]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as owner:
        assert owner.stdout is not None
        family = [psutil.Process(int(pid)) for pid in owner.stdout.readline().split()]
        if isinstance(end, signal.Signals):
            owner.send_signal(end)
        owner.wait(30)
    assert len(family) == 2  # the server and the runner of its model
    assert (owner.returncode == 0) == (end == "normal")
    _, alive = psutil.wait_procs(family, timeout=10)
    assert not alive


@pytest.mark.ollama
@needs_private_copy
def test_a_server_of_ours_leaves_the_users_models_alone(tmp_path: Path, monkeypatch) -> None:
    """A starting Ollama deletes what no model names in the folder that it uses."""
    home, models = tmp_path / "home", tmp_path / "home" / ".ollama" / "models"
    for folder in (models, tmp_path / "elsewhere"):
        (folder / "blobs").mkdir(parents=True)
        (folder / "blobs" / ("sha256-" + "b" * 64)).write_text("the user's download, half done")
        (folder / "manifests" / "empty").mkdir(parents=True)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("OLLAMA_MODELS", str(tmp_path / "elsewhere"))

    def everything() -> dict[Path, int]:
        roots = (home, tmp_path / "elsewhere")
        return {path: path.stat().st_mtime_ns for root in roots for path in [root, *root.rglob("*")]}

    before = everything()
    with OllamaServer.start(install(), tmp_path / "state") as server:
        assert not connect(server).list().models
    assert everything() == before


def test_only_a_server_that_is_alone_may_delete_unnamed_files(tmp_path: Path) -> None:
    first = StoreLock(tmp_path)
    first.started()
    second = StoreLock(tmp_path)
    assert first.is_alone and not second.is_alone
    first.release()
    third = StoreLock(tmp_path)
    assert not third.is_alone  # the second still runs
    second.release()
    third.release()
    assert StoreLock(tmp_path).is_alone


@pytest.mark.ollama
@needs_private_copy
def test_a_second_server_leaves_the_firsts_unnamed_uploads(tmp_path: Path) -> None:
    upload = tmp_path / "models" / "blobs" / ("sha256-" + "a" * 64)
    with OllamaServer.start(install(), tmp_path):
        upload.write_text("sent, not yet named")
        with OllamaServer.start(install(), tmp_path):
            pass
        assert upload.exists()
    with OllamaServer.start(install(), tmp_path):
        assert not upload.exists()  # alone: tidied up


@needs_private_copy
@pytest.mark.ollama
def test_an_interrupted_install_is_not_taken_for_a_whole_one(tmp_path: Path, monkeypatch) -> None:
    def fails_halfway(folder: Path, *_: object) -> None:
        (folder / "bin").mkdir()
        (folder / "bin" / "ollama").write_text("half")
        raise KeyboardInterrupt

    home = tmp_path / "ollama"
    with monkeypatch.context() as patch:
        patch.setattr(install_module, "lay_out", fails_halfway)
        with pytest.raises(KeyboardInterrupt):
            install(home)
    assert not home.exists()
    binary = install(home)
    version = subprocess.run(
        [binary, "--version"], env={**os.environ, **environment(binary)}, capture_output=True, text=True
    )
    assert "0.9.3" in version.stdout
    assert sorted(p.name for p in home.iterdir()) == ["bin", "lib", "nosycl"]
    shutil.rmtree(home)
