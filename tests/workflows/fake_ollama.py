"""A stand-in for an Ollama server on 127.0.0.1, whose answers (and deaths) a test decides."""

import http.server
import json
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

Reply = Callable[["Handler", dict[str, Any]], None]


class Handler(http.server.BaseHTTPRequestHandler):
    """Answers /api/version by itself, all else by the test's functions."""

    protocol_version = "HTTP/1.1"
    replies: dict[str, Reply]
    requests: list[tuple[str, dict[str, Any]]]

    def do_GET(self) -> None:
        self.send_json({"version": "0.0.1-fake"} if self.path == "/api/version" else {"models": [{"model": "known"}]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.requests.append((self.path, body))
        reply = self.replies.get(self.path)
        if reply is None:
            self.send_json({"error": f"no route {self.path}"}, 404)
        else:
            reply(self, body)

    def send_json(self, value: dict[str, Any], status: int = 200) -> None:
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def begin_stream(self) -> None:
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()

    def send_part(self, value: dict[str, Any] | bytes) -> None:
        data = value if isinstance(value, bytes) else json.dumps(value).encode() + b"\n"
        self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
        self.wfile.flush()

    def end_stream(self) -> None:
        self.wfile.write(b"0\r\n\r\n")

    def die(self) -> None:
        """Break the connection off."""
        self.close_connection = True

    def log_message(self, *_: object) -> None:
        pass


class _Server(http.server.ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exc_info()[1], ConnectionError):  # a client may hang up
            super().handle_error(request, client_address)


@contextmanager
def fake_ollama(replies: dict[str, Reply]) -> Iterator[tuple[str, list[tuple[str, dict[str, Any]]]]]:
    """Run the server; yields its URL and the list of requests it gets."""
    requests: list[tuple[str, dict[str, Any]]] = []
    handler = type("Bound", (Handler,), {"replies": replies, "requests": requests})
    with _Server(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}", requests
        finally:
            server.shutdown()


def show(template: str = "{{ .Prompt }}", parameters: str = "", context: int = 8192) -> Reply:
    """/api/show of a model with this template, parameters (a line each) and context."""
    info = {"general.architecture": "llama", "llama.context_length": context}
    return lambda handler, _: handler.send_json({"template": template, "parameters": parameters, "model_info": info})


def speak(*pieces: str, **end_fields: Any) -> Reply:
    """/api/chat that answers in these pieces; `end_fields` are said at the end."""

    def reply(handler: Handler, _: dict[str, Any]) -> None:
        handler.begin_stream()
        for piece in pieces:
            handler.send_part({"message": {"role": "assistant", "content": piece}, "done": False})
        end = {"message": {"role": "assistant", "content": ""}, "done": True, "done_reason": "stop", "eval_count": 7}
        handler.send_part(end | end_fields)
        handler.end_stream()

    return reply
