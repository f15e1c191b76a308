"""Which Ollama to use, and servers that we start and stop ourselves.

`$OLLAMA_HOST` if it answers, else `ollama` on PATH (its server if one runs, else one that we start), else the private
copy of `workflows.ollama.install`. A server of ours listens on 127.0.0.1, keeps its models and its log under the
project, and is stopped by its process id, with the runners it started. A server that we did not start is never stopped.
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from urllib.parse import urlsplit

import psutil

from workflows.errors import UserError
from workflows.lifetime import end_with_parent
from workflows.ollama.install import environment, install
from workflows.ollama.store import STATE, StoreLock

DEFAULT_PORT = 11434
_START_SECONDS = 60.0
_STOP_SECONDS = 10.0


@dataclass(frozen=True)
class Endpoint:
    """A server that answers.

    Attributes:
        url: `http://HOST:PORT`.
        version: What `/api/version` says.
    """

    url: str
    version: str


def parse_host(host: str) -> str:
    """`$OLLAMA_HOST` as Ollama itself reads it: scheme, port and address may each be missing.

    Raises:
        UserError: If it is no address.
    """
    text = host.strip().strip("\"'")
    scheme, separator, rest = text.partition("://")
    if not separator:
        scheme, rest = "http", text
    default_port = {"http": DEFAULT_PORT if not separator else 80, "https": 443}.get(scheme, DEFAULT_PORT)
    try:
        parts = urlsplit(f"{scheme}://{rest}")
        address, port = parts.hostname or "127.0.0.1", parts.port or default_port
    except ValueError as e:
        raise UserError(
            f"OLLAMA_HOST={host!r} is not an address ({e}); write it as 127.0.0.1:{DEFAULT_PORT}."
        ) from None
    if address in ("0.0.0.0", "::"):  # "listen everywhere": a client reaches it on this machine
        address = "127.0.0.1"
    return f"{scheme}://[{address}]:{port}" if ":" in address else f"{scheme}://{address}:{port}"


def probe(url: str, timeout: float = 5.0) -> Endpoint | None:
    """Ask an address whether it is an Ollama server.

    Args:
        url: `http://HOST:PORT`.
        timeout: Seconds to wait.

    Returns:
        The server, or None if nothing answers there.

    Raises:
        UserError: If something answers that is not Ollama.
    """
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # a proxy cannot reach this machine
    try:
        with opener.open(f"{url}/api/version", timeout=timeout) as response:
            body = response.read(10_000)
    except urllib.error.HTTPError as e:
        raise UserError(_not_ollama(url, f"HTTP {e.code} for /api/version")) from None
    except (urllib.error.URLError, TimeoutError, ConnectionError) as e:
        if isinstance(getattr(e, "reason", None), ValueError):
            raise UserError(f"{url} is not an address that can be asked ({e}).") from None
        return None
    except (OSError, ValueError) as e:  # http.client's errors: what answers does not speak HTTP
        raise UserError(_not_ollama(url, str(e) or type(e).__name__)) from None
    except Exception as e:  # http.client.HTTPException has no common base with the above
        raise UserError(_not_ollama(url, str(e) or type(e).__name__)) from None
    try:
        version = json.loads(body)["version"]
    except (ValueError, KeyError, TypeError):
        raise UserError(_not_ollama(url, f"its answer to /api/version begins {body[:60]!r}")) from None
    return Endpoint(url, str(version))


def _not_ollama(url: str, sign: str) -> str:
    return (
        f"What answers at {url} is not an Ollama server ({sign}). Point OLLAMA_HOST to Ollama, or unset it to let a "
        "server of this project be started on a free port."
    )


class OllamaServer:
    """A connection to an Ollama server; one that was started here is stopped at the end of the `with` block.

    Attributes:
        url: `http://HOST:PORT`.
        version: The server's version.
        log: The server's log (with every prompt, OLLAMA_DEBUG) if we started it, else None.
        binary: The executable if we started it, else None.
        keep_log: Whether the log stays after the server is stopped; set where a message has pointed to it.
    """

    def __init__(self, endpoint: Endpoint) -> None:
        self.url, self.version = endpoint.url, endpoint.version
        self.log: Path | None = None
        self.binary: Path | None = None
        self.keep_log = False
        self._process: subprocess.Popen[bytes] | None = None
        self._lock: StoreLock | None = None

    @property
    def is_ours(self) -> bool:
        """Whether we started it."""
        return self._process is not None

    @property
    def is_running(self) -> bool:
        """Whether we started it and its process has not ended."""
        return self._process is not None and self._process.poll() is None

    @property
    def pid(self) -> int | None:
        """Process id of a server of ours."""
        return self._process.pid if self._process else None

    @classmethod
    def start(cls, binary: Path, state: Path = STATE, port: int | None = None, parallel: int = 1) -> "OllamaServer":
        """Start `ollama serve` on 127.0.0.1.

        Args:
            binary: The executable.
            state: Folder of its models, key and log.
            port: The port to listen on; a free one if None.
            parallel: Requests that it works on at a time, each with a context of its own.

        Raises:
            UserError: If the port is in use, or the server ends or does not answer.
        """
        if port is not None and not _is_free(port):
            raise UserError(
                f"Port {port} on 127.0.0.1 is in use. Choose another with --port, or leave it out for a free one."
            )
        for attempt in range(3):
            chosen = port if port is not None else _free_port()
            try:
                return cls._start_on(binary, state, chosen, parallel)
            except _PortTaken:  # another program was quicker between the look and the start
                if port is not None or attempt == 2:
                    raise UserError(f"Port {chosen} on 127.0.0.1 is in use; choose another with --port.") from None
        raise AssertionError("unreachable")

    @classmethod
    def _start_on(cls, binary: Path, state: Path, port: int, parallel: int) -> "OllamaServer":
        (state / "models").mkdir(parents=True, exist_ok=True)
        (state / "logs").mkdir(exist_ok=True)
        lock = StoreLock(state)
        url, log = f"http://127.0.0.1:{port}", state / "logs" / f"{os.getpid()}-{port}.log"
        variables = {
            **os.environ,
            **environment(binary),
            "OLLAMA_HOST": f"127.0.0.1:{port}",
            "OLLAMA_MODELS": str((state / "models").resolve()),
            "OLLAMA_DEBUG": "2",  # at this level the log holds every prompt, which the verification reads
            "OLLAMA_NUM_PARALLEL": str(parallel),
            "OLLAMA_MAX_LOADED_MODELS": "1",
            "OLLAMA_NOPRUNE": "0" if lock.is_alone else "1",
            "HOME": str(state.resolve()),  # its key pair; the user's own ~/.ollama is left alone
        }
        try:
            process = _spawn([str(binary.resolve()), "serve"], variables, log)
        except OSError as e:
            lock.release()
            raise UserError(f"{binary} cannot be started ({e.strerror}); is it Ollama for this machine?") from None
        deadline = time.monotonic() + _START_SECONDS
        try:
            while True:
                if process.poll() is not None:
                    tail = log.read_text(errors="replace").strip()[-600:]
                    if "address already in use" in tail:
                        raise _PortTaken
                    raise UserError(f"{binary} serve ended with code {process.returncode}. Its log {log} ends:\n{tail}")
                if (endpoint := probe(url, timeout=2.0)) is not None:
                    break
                if time.monotonic() > deadline:
                    raise UserError(f"{binary} serve gave no answer within {_START_SECONDS:.0f} s; see {log}.")
                time.sleep(0.05)
        except BaseException:
            _stop(process)
            lock.release()
            raise
        lock.started()
        server = cls(endpoint)
        server.log, server.binary, server._process, server._lock = log, binary, process, lock
        return server

    def stop(self) -> None:
        """Stop a server of ours and the runners it started; do nothing to another's."""
        if self._process is not None:
            _stop(self._process)
            self._process = None
            if self._lock is not None:
                self._lock.release()
            if self.log is not None and not self.keep_log:
                self.log.unlink(missing_ok=True)

    def __enter__(self) -> "OllamaServer":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()


class _PortTaken(Exception):
    pass


@contextmanager
def open_server(port: int | None = None, state: Path = STATE, parallel: int = 1) -> Iterator[OllamaServer]:
    """The Ollama to use: `$OLLAMA_HOST` if it answers, else the one on PATH, else the private copy.

    Args:
        port: Port for a server of ours; given, a server of ours is used in any case.
        state: Folder of the models and logs of a server of ours.
        parallel: Requests that a server of ours works on at a time.

    Yields:
        The server; one that we start is stopped at the end.

    Raises:
        UserError: If what answers is not Ollama, the port is in use, or no Ollama can be had on this machine.
    """
    with find_server(port, state, parallel) as server:
        kind = "started" if server.is_ours else "found"
        print(f"Ollama {server.version} {kind} at {server.url}", file=sys.stderr, flush=True)
        yield server


def find_server(port: int | None = None, state: Path = STATE, parallel: int = 1) -> OllamaServer:
    """Like `open_server`, without the message; the caller stops it."""
    on_path = shutil.which("ollama")
    if port is None:
        host = os.environ.get("OLLAMA_HOST", "").strip()
        if host:
            if (endpoint := probe(parse_host(host))) is not None:
                return OllamaServer(endpoint)
            print(f"no Ollama answers at OLLAMA_HOST={host}; looking further", file=sys.stderr)
        elif on_path and (endpoint := _user_server()) is not None:
            return OllamaServer(endpoint)
    return OllamaServer.start(Path(on_path) if on_path else install(), state, port, parallel)


def _user_server() -> Endpoint | None:
    """The server that an installed Ollama runs by default, if it runs and is one."""
    try:
        return probe(f"http://127.0.0.1:{DEFAULT_PORT}")
    except UserError:  # another program has that port; nobody pointed us there
        return None


def _is_free(port: int) -> bool:
    with socket.socket() as s:
        s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            s.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def _spawn(command: list[str], variables: dict[str, str], log: Path) -> subprocess.Popen[bytes]:
    with open(log, "wb") as sink:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=sink,
            stderr=subprocess.STDOUT,
            env=variables,
            start_new_session=True,  # Ctrl-C in the terminal is for us, not for the server
            preexec_fn=end_with_parent(signal.SIGTERM) if os.name == "posix" else None,
        )


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Terminate a server and wait; then end what it left behind."""
    family = _runners(process.pid)  # before `poll`: until then no other process can have the id of one that has died
    if was_alive := process.poll() is None:
        process.terminate()  # Ollama stops its runners itself on SIGTERM
        try:
            process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    _, alive = psutil.wait_procs(family, timeout=2.0 if was_alive else 0.0)
    for child in alive:  # psutil compares start times: a reused process id is not touched
        child.kill()
    psutil.wait_procs(alive, timeout=5.0)


def _runners(pid: int) -> list[psutil.Process]:
    """The processes that a server started. Where it was killed, they go on without a parent, but in its session."""
    if os.name != "posix":
        return psutil.Process(pid).children(recursive=True) if psutil.pid_exists(pid) else []
    found = []
    for process in psutil.process_iter():
        with suppress(ProcessLookupError, PermissionError):  # it ended meanwhile, or is another user's
            if process.pid != pid and os.getsid(process.pid) == pid:
                found.append(process)
    return found
