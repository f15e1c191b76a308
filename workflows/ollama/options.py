"""What the steps that speak with Ollama take alike: options, a port and names; what is wrong with them, as messages."""

import re
from typing import Any

_RANGES = {
    "temperature": (0, 10),
    "top_p": (0, 1),
    "top_k": (0, 10**6),
    "repeat_penalty": (0, 10),
    "num_predict": (1, 10**6),
    "num_ctx": (64, 10**7),
    "num_thread": (1, 4096),
}
MODEL_NAME = re.compile(r"[A-Za-z0-9_][\w.-]*(/[A-Za-z0-9_][\w.-]*)*(:[\w.-]+)?")
"""What Ollama can call a model: perhaps a host and an owner, the name, perhaps a tag."""


def chosen(**options: Any) -> dict[str, Any]:
    """Ollama's options among arguments: those that are not left to the model."""
    return {name: value for name, value in options.items() if value is not None}


def option_problems(
    options: dict[str, Any], port: int | None, model: str | None = None, name: str | None = None
) -> list[str]:
    """What is wrong with a step's arguments.

    Args:
        options: From `chosen`.
        port: For a server of ours.
        model: Which model is asked, or taken.
        name: What a model is to be called.
    """
    found = [
        f"--{option} must be from {low} to {high}, not {options[option]}."
        for option, (low, high) in _RANGES.items()
        if option in options and not low <= options[option] <= high
    ]
    if port is not None and not 0 < port < 65536:
        found.append(f"--port must be between 1 and 65535, not {port}.")
    if model is not None and not (model.strip() and model.isprintable()):
        found.append(f"--model {model!r} is no name of a model.")
    if name is not None and not MODEL_NAME.fullmatch(name):
        found.append(f"--name {name!r}: a model's name has letters, digits, '.', '_', '-', and perhaps a :tag.")
    return found
