"""Talking to an Ollama server through its Python client, with failures told in one sentence each."""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import ollama

from workflows.errors import UserError, did_you_mean, first_line
from workflows.ollama.modelfile import Modelfile
from workflows.ollama.server import OllamaServer

_CUT = (b'msg="truncating input messages', b'msg="truncating input prompt')
"""What a server logs when a conversation does not fit: whole messages left out, tokens left out."""
OURS = "own_language_model.checkpoint_sha256"
"""A key in the header of every GGUF that we write, shown by `/api/show`: a model without it is somebody else's, and is
never overwritten or deleted by us."""
FROM_LINE = re.compile(r"^FROM (.+)$", flags=re.MULTILINE)
"""Where a Modelfile that `/api/show` gives says what the weights are: the first such line; others may be of a text."""
NOT_TEXT = "What is to be asked is not UTF-8 text. Save the input as UTF-8, or set the terminal to it."
_ANSWER_SECONDS = 1800.0
_UNLOAD_SECONDS = 30.0


def connect(server: OllamaServer, seconds: float | None = None) -> ollama.Client:
    """The client of a server, which waits that long for an answer; no environment variable or proxy redirects it."""
    return ollama.Client(host=server.url, timeout=seconds or _ANSWER_SECONDS, trust_env=False)


class UnknownModel(UserError):
    """Ollama has no model of that name."""


class ServerGone(UserError):
    """The server ended, or broke off in the middle of an answer."""


class ContextFull(UserError):
    """A conversation is longer than the context: Ollama would silently answer a part of it."""

    def __init__(self, context: int | None) -> None:
        size = "model's context" if context is None else f"context of {context:,} tokens"
        super().__init__(
            f"The conversation does not fit into the {size}: Ollama would answer without its beginning. Forget it with "
            "/reset, ask something shorter, or give the model more room with --num_ctx."
        )


@contextmanager
def explained(server: OllamaServer, model: str) -> Iterator[None]:
    """Turn what goes wrong between us and a server into one `UserError`.

    Raises:
        UnknownModel: If the server does not know the model.
        ServerGone: If it is gone.
        UserError: If it reports an error, or what it is to be sent is no text.
    """
    try:
        yield
    except ollama.ResponseError as e:
        reason = e.error.strip() or f"HTTP {e.status_code}"
        if e.status_code == 404 or "not found" in reason:
            raise UnknownModel(
                f"Ollama at {server.url} does not know the model {model!r}.{_known_models(server, model)} "
                "Make it with `make export`."
            ) from None
        if e.status_code in (-1, 500) and ("runner" in reason or "EOF" in reason):
            raise ServerGone(_died(server, reason)) from None
        raise UserError(f"Ollama at {server.url} reports: {reason}{_log_hint(server)}") from None
    except UnicodeEncodeError:  # Python reads such bytes of a command line or a terminal as halves of characters
        raise UserError(NOT_TEXT) from None
    except json.JSONDecodeError as e:
        raise ServerGone(_died(server, f"a cut line: {e.msg}")) from None
    except httpx.TimeoutException:
        raise UserError(f"Ollama at {server.url} gave no answer within {_ANSWER_SECONDS:.0f} seconds.") from None
    except (ConnectionError, httpx.HTTPError) as e:
        raise ServerGone(_died(server, first_line(e))) from None


def stream_chat(
    server: OllamaServer,
    model: str,
    messages: list[dict[str, str]],
    options: dict[str, Any],
    context: int | None = None,
    schema: dict[str, Any] | None = None,
) -> Iterator[ollama.ChatResponse]:
    """Parts of an answer as they come; the last has `done` set.

    Args:
        server: The server.
        model: The model's name.
        messages: The conversation.
        options: Ollama's parameters for this answer.
        context: The model's context in tokens, if known.
        schema: A JSON schema that the answer must follow; Ollama makes a grammar of it.

    Raises:
        ContextFull: If Ollama left out a part of the conversation: a server of ours says so in its log, before the
            answer begins; on another, a prompt that fills the whole context is what it makes of a longer one.
        UserError: As `explained`; also if the stream ends before the answer does.
    """
    mark = server.log.stat().st_size if server.log else 0
    begun = done = False
    with explained(server, model):
        try:
            for part in connect(server).chat(model, messages, stream=True, options=options, format=schema):
                done = bool(part.done)
                is_cut = done and context is not None and (part.prompt_eval_count or 0) >= context
                if server.log and (done or not begun):  # at the end again: the runner's lines may come a moment late
                    is_cut = is_cut or _logged_cut(server.log, mark)
                if is_cut:
                    raise ContextFull(context)
                begun = True
                yield part
        except (GeneratorExit, KeyboardInterrupt, ContextFull):
            if not done:
                free_slot(server, model)
            raise
    if not done:
        raise ServerGone(_died(server, "the answer stops in the middle"))


def free_slot(server: OllamaServer, model: str, seconds: float = _UNLOAD_SECONDS) -> None:
    """Unload a model whose answer was left in the middle; the next question loads it again.

    A client that hangs up while the server has a piece in hand makes it wait for ever for somebody to take that piece,
    and with it the model's slot (Ollama issue 17131): every later question would wait too. A new runner has a new slot.

    Args:
        server: The server.
        model: The model's name.
        seconds: How long to wait for its answer; it unloads the model all the same.
    """
    with suppress(ollama.ResponseError, ConnectionError, httpx.HTTPError):  # a server that is gone has no slots
        connect(server, seconds).generate(model, keep_alive=0)


def _logged_cut(log: Path, mark: int) -> bool:
    with open(log, "rb") as f:
        f.seek(mark)
        return any(words in line for line in f for words in _CUT)


def rough_tokens(text: str) -> int:
    """About how many tokens a message has, its role's marks included; rather too many than too few."""
    return len(text.encode()) // 3 + 8


def _died(server: OllamaServer, reason: str) -> str:
    return (
        f"Ollama at {server.url} ended or broke off in the middle ({reason}).{_log_hint(server)} "
        "Start it again and repeat the command; if it repeats, the machine may be short of memory: "
        "try a smaller model or --num_ctx."
    )


def _log_hint(server: OllamaServer) -> str:
    if server.log is None or not server.log.is_file():
        return ""
    server.keep_log = True
    return f" Its log: {server.log}."


def _known_models(server: OllamaServer, model: str) -> str:
    try:
        names = sorted(str(entry.model) for entry in connect(server).list().models)
    except (ollama.ResponseError, ConnectionError, httpx.HTTPError, ValueError):
        return ""  # only a hint is lost
    return f"{did_you_mean(model, names)} It knows: {', '.join(names)}." if names else " It has no models yet."


def installed(server: OllamaServer, model: str) -> ollama.ListResponse.Model:
    """What the server's list of models says of one: name, digest, size in bytes, quantization.

    Raises:
        UnknownModel: If it is not in the list.
        UserError: If the server fails.
    """
    with explained(server, model):
        for entry in connect(server).list().models:
            if entry.model in (model, f"{model}:latest"):
                return entry
        raise ollama.ResponseError("not found", 404)


def owner_sha256(server: OllamaServer, name: str) -> str | None:
    """The fingerprint of the checkpoint that a model was made from; None if it is absent or not marked as ours."""
    return _mark(_shown(server, name))


def require_ours(server: OllamaServer, name: str, made_from: str | None = None) -> None:
    """Do not touch what is somebody else's.

    Args:
        server: The server.
        name: The name that a model of ours is to have.
        made_from: What a model without our mark must be made from to be taken for ours: the SHA-256 of its GGUF file,
            or the name of the model that it is a copy of.

    Raises:
        UserError: If there is a model of that name that this project did not make.
    """
    shown = _shown(server, name)
    if shown is None or _mark(shown) is not None:
        return
    parent = shown.details.parent_model if shown.details else None
    weights = FROM_LINE.search(shown.modelfile or "")
    if made_from and (
        parent in (made_from, f"{made_from}:latest") or (weights and weights[1].endswith(f"/sha256-{made_from}"))
    ):
        return
    raise UserError(
        f"Ollama already has a model {name!r} that this project did not make, and it is left alone. "
        "Choose another name with --name."
    )


def _shown(server: OllamaServer, name: str) -> ollama.ShowResponse | None:
    try:
        with explained(server, name):
            return connect(server).show(name)
    except UnknownModel:
        return None


def _mark(shown: ollama.ShowResponse | None) -> str | None:
    mark = ((shown and shown.modelinfo) or {}).get(OURS)
    return mark if isinstance(mark, str) else None


def create_model(
    server: OllamaServer,
    name: str,
    gguf: Path,
    modelfile: Modelfile,
    quantize: str | None = None,
    made_from: str | None = None,
) -> None:
    """Create (or replace, if it is ours) a model in Ollama.

    Args:
        server: The server.
        name: The model's name.
        gguf: The weights, with our mark in the header or `made_from`.
        modelfile: All else.
        quantize: A type that Ollama converts the weights to.
        made_from: As in `require_ours`.

    Raises:
        UserError: If a model of that name is not ours, or the server fails.
    """
    require_ours(server, name, made_from)
    client = connect(server)
    with explained(server, name):
        digest = client.create_blob(gguf)
        client.create(
            name,
            files={gguf.name: digest},
            template=modelfile.template,
            system=modelfile.system or None,
            parameters=modelfile.parameters,
            quantize=quantize,
        )
