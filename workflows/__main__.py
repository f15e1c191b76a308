"""`python -m workflows STEP --checkpoint_dir … --config recipe.yaml`: the command line of every step.

A step is a function: its signature and docstring are the interface, read by jsonargparse as in LitGPT. Only the step
that is named gets imported, so `--help` is quick.
"""

import importlib
import logging
import os
import sys
import warnings
from collections.abc import Callable
from typing import Any

from workflows.errors import UserError

STEPS = {
    "download": ("workflows.download", "get a checkpoint and bring it into LitGPT's form"),
    "data": ("data_prep.prepare", "prepare a data set as JSONL with a manifest"),
    "lora": ("workflows.lora", "fine-tune with LoRA, QLoRA or full weights"),
    "merge": ("workflows.merge", "fold LoRA weights into a plain checkpoint"),
    "evaluate": ("workflows.evaluate", "score a checkpoint with lm-eval, and compare with another"),
    "export": ("workflows.export", "write Hugging Face, GGUF and Ollama forms, and verify them"),
    "chat": ("workflows.chat", "talk to a model in Ollama"),
    "demo": ("workflows.demo", "the whole road's summary: from a real checkpoint to answers from Ollama"),
}


def usage() -> str:
    """The list of steps, one line each."""
    width = max(map(len, STEPS))
    lines = [f"  {name:<{width}}  {about}" for name, (_, about) in STEPS.items()]
    return "\n".join(["usage: python -m workflows STEP [--help] [--config FILE] [--key value …]", "", *lines])


def parse_all(function: Callable[..., Any], args: list[str], prog: str) -> Any:
    """Parse a step's arguments; if several are wrong, say all of that at once.

    jsonargparse stops at the first problem. The offending argument is then left out and the rest parsed again, until
    nothing is left to complain about.

    Args:
        function: The step's `setup` function.
        args: The command line after the step's name.
        prog: The command's name in messages.

    Returns:
        The function's keyword arguments, instantiated.

    Raises:
        SystemExit: With code 2 and the list of problems, or 0 after `--help` and `--print_config`.
    """
    from jsonargparse import ArgumentParser, set_parsing_settings

    set_parsing_settings(docstring_parse_attribute_docstrings=True, config_read_mode_urls_enabled=False)
    parser = ArgumentParser(prog=f"python -m workflows {prog}", exit_on_error=False)
    parser.add_argument("--config", action="config", help="YAML file of these same keys; later arguments override it.")
    parser.add_function_arguments(function, fail_untyped=True, sub_configs=True)
    problems: list[str] = []
    remaining = list(args)
    while True:
        try:
            namespace = parser.parse_args(remaining)
            break
        except Exception as e:  # jsonargparse: ArgumentError; argparse: its own; YAML: another
            message = str(e).removeprefix("error: ").strip()
            problems.append(message)
            shorter = _without_offender(remaining, message)
            if shorter == remaining:
                break
            remaining = shorter
    if problems:
        problems = list(dict.fromkeys(problems))
        listed = problems[0] if len(problems) == 1 else "\n".join(["wrong arguments:", *(f"  - {p}" for p in problems)])
        print(f"{parser.prog}: {listed}", file=sys.stderr)
        print(f"Try `{parser.prog} --help`.", file=sys.stderr)
        raise SystemExit(2)
    namespace.pop("config", None)
    return parser.instantiate_classes(namespace)


def _without_offender(args: list[str], message: str) -> list[str]:
    """Leave out the arguments that a parser's message is about (`--key value` or `--key=value`)."""
    kept: list[str] = []
    skip_value = False
    for position, arg in enumerate(args):
        if skip_value:
            skip_value = False
            continue
        key = arg.split("=")[0]
        named = key.startswith("--") and (
            f'"{key.removeprefix("--")}"' in message
            or f'{key.removeprefix("--")}"' in message
            or key in message.split()
        )
        stray = not arg.startswith("-") and arg in message.split() and "nrecognized" in message
        if named or stray:
            skip_value = "=" not in arg and position + 1 < len(args) and not args[position + 1].startswith("--")
            continue
        kept.append(arg)
    return kept


def main(argv: list[str] | None = None) -> int:
    """Run one step.

    Returns:
        The exit code: 0 if all went well, 1 for a condition the user can mend, 2 for wrong arguments, 130 for Ctrl-C.
    """
    args = sys.argv[1:] if argv is None else argv
    if not args or args[0] in ("-h", "--help"):
        print(usage())
        return 0 if args else 2
    step, rest = args[0], args[1:]
    if step not in STEPS:
        print(f"There is no step {step!r}.\n{usage()}", file=sys.stderr)
        return 2

    # Idle OpenMP threads spin briefly and then sleep: where something else runs too, spinning threads keep each other
    # from the cores. Measured on two cores with one busy: 4.8 s a training step by default, 1.6 s with this; with both
    # free 1.5 and 1.6. libgomp reads it when torch loads.
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.filterwarnings("ignore", module="litgpt|jsonargparse|torch|lightning")
    logging.getLogger("lightning").setLevel(logging.WARNING)
    try:
        function = importlib.import_module(STEPS[step][0]).setup
        function(**parse_all(function, rest, step))
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nstopped; run the same command again to go on", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
