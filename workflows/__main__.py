"""`python -m workflows STEP --checkpoint_dir … --config recipe.yaml`: the command line of every step.

A step is a function: its signature and docstring are the interface, read by jsonargparse as in LitGPT. Only the step
that is named gets imported, so `--help` is quick.
"""

import dataclasses
import functools
import importlib
import inspect
import logging
import os
import re
import sys
import warnings
from collections.abc import Callable
from typing import Any, Literal, get_args, get_origin, get_type_hints

from workflows import environment
from workflows.errors import UserError, did_you_mean
from workflows.lifetime import exit_code, interruptible
from workflows.planning import PLANNED

STEPS = {
    "download": ("workflows.download", "setup", "get a checkpoint and bring it into LitGPT's form"),
    "data": ("data_prep.prepare", "setup", "prepare a data set as JSONL with a manifest"),
    "lora": ("workflows.lora", "setup", "fine-tune with LoRA, QLoRA or full weights"),
    "shrink": ("workflows.shrink", "setup", "make a smaller model of some of a model's layers: a student"),
    "teach": ("workflows.teach", "setup", "let a teacher answer a data set's questions: data to train a student on"),
    "distill-lm": ("workflows.distill_lm", "setup", "train a student to say what its teacher would"),
    "dpo": ("workflows.dpo", "setup", "align with preferences: DPO and its variants"),
    "reward": ("workflows.reward", "setup", "train a reward model on preferences"),
    "ppo": ("workflows.ppo", "setup", "align with a reward model, by PPO with a value head"),
    "grpo": ("workflows.grpo", "setup", "align with rewards: sample groups of answers, and learn from the better ones"),
    "merge": ("workflows.merge", "setup", "fold LoRA weights into a plain checkpoint"),
    "evaluate": ("workflows.evaluate", "setup", "score a checkpoint with lm-eval, and compare with another"),
    "export": ("workflows.export", "setup", "write Hugging Face, GGUF and Ollama forms, and verify them"),
    "plan": ("workflows.plan", "run", "say what a step would take, and what fits: memory, time, disk"),
    "chat": ("workflows.chat", "setup", "talk to a model in Ollama"),
    "report": ("workflows.report", "setup", "a page about a run, or about several: curves, scores, answers, checks"),
    "status": ("workflows.status", "setup", "what runs, what was stopped, what is finished, and how to go on"),
    "ask": ("workflows.ask", "setup", "have a file of questions answered by a model in Ollama"),
    "deepseek": ("workflows.deepseek", "setup", "get DeepSeek-R1 into Ollama: from its registry, the Hub, or a file"),
    "evaluate-ollama": ("workflows.evaluate_ollama", "setup", "score a model in Ollama on questions with options"),
    "panel": ("workflows.panel", "setup", "ask stages of a run the same few prompts in Ollama, side by side"),
    "stage": ("workflows.stages", "setup", "print the number of a stage of `make demo`, and the time that is left"),
    "demo": ("workflows.demo", "setup", "the summary of `make demo`: answers, scores and times of every stage"),
}


Steps = dict[str, tuple[str, str, str]]
"""For each step its module, the function in it, and what it does in one line."""


def usage(steps: Steps = STEPS, program: str = "workflows") -> str:
    """The list of steps, one line each."""
    width = max(map(len, steps))
    lines = [f"  {name:<{width}}  {about}" for name, (_, _, about) in steps.items()]
    return "\n".join([f"usage: python -m {program} STEP [--help] [--config FILE] [--key value …]", "", *lines])


def parse_all(function: Callable[..., Any], args: list[str], prog: str, program: str = "workflows") -> Any:
    """Parse a step's arguments; if several are wrong, say all of that at once.

    jsonargparse stops at the first problem. The offending argument is then left out and the rest parsed again, until
    nothing is left to complain about.

    Args:
        function: The step's `setup` function.
        args: The command line after the step's name.
        prog: The step's name in messages.
        program: The package's.

    Returns:
        The function's keyword arguments, instantiated.

    Raises:
        SystemExit: With code 2 and the list of problems, or 0 after `--help` and `--print_config`.
    """
    from jsonargparse import ArgumentParser, set_parsing_settings

    _bound_yaml()
    set_parsing_settings(docstring_parse_attribute_docstrings=True, config_read_mode_urls_enabled=False)
    parser = ArgumentParser(prog=f"python -m {program} {prog}", exit_on_error=False)
    parser.add_argument("--config", action="config", help="YAML file of these same keys; later arguments override it.")
    parser.add_function_arguments(function, fail_untyped=True, sub_configs=True)
    if _is_planned(prog, program):
        about = "Run although the plan says that memory or disk are too little."
        parser.add_argument("--ignore_plan", type=bool, default=False, help=about)
    problems: list[str] = []
    remaining = list(args)
    while True:
        try:
            namespace = parser.parse_args(remaining)
            break
        except Exception as e:  # jsonargparse: ArgumentError; argparse: its own; YAML: another
            message = _with_choices(str(e).removeprefix("error: ").strip(), function)
            problems.append(message)
            shorter = _without_offender(remaining, message)
            if shorter == remaining:
                break
            remaining = shorter
    if not problems:
        problems = _emptied_groups(function, namespace)
    if problems:
        problems = list(dict.fromkeys(problems))
        listed = problems[0] if len(problems) == 1 else "\n".join(["wrong arguments:", *(f"  - {p}" for p in problems)])
        print(f"{parser.prog}: {listed}", file=sys.stderr)
        print(f"Try `{parser.prog} --help`.", file=sys.stderr)
        raise SystemExit(2)
    namespace.pop("config", None)
    return parser.instantiate_classes(namespace)


def _is_planned(step: str, program: str) -> bool:
    """Whether a step of a program is planned before it runs."""
    return program == "workflows" and step in PLANNED


def _emptied_groups(function: Callable[..., Any], namespace: Any) -> list[str]:
    """Groups of settings that are null or empty lists in a config file, which jsonargparse lets pass."""
    defaults = {name: parameter.default for name, parameter in inspect.signature(function).parameters.items()}
    return [
        f'Parser key "{name}": not a group of settings; leave it out for the defaults.'
        for name, default in defaults.items()
        if dataclasses.is_dataclass(default) and not isinstance(namespace.get(name), type(namespace))
    ]


def _with_choices(message: str, function: Callable[..., Any]) -> str:
    """Name the choices where jsonargparse only says "Cannot take a Union of no types": a value that is none of them."""
    found = re.search(r'Parser key "([\w.]+)"', message)
    if found is None or "Union of no types" not in message:
        return message
    owner: Any = function
    for name in (path := found[1].split("."))[:-1]:
        owner = _hint(owner, name)
    choices = [str(value) for value in _literals(_hint(owner, path[-1]))]
    return f'Parser key "{found[1]}": must be one of {", ".join(choices)}.'


def _hint(owner: Any, name: str) -> Any:
    """The type hint of a function's argument (one of a training step's `**run` among them) or of a class's field."""
    hints = get_type_hints(owner)
    if name not in hints:
        from workflows.training.step import RunArgs

        hints = get_type_hints(RunArgs)
    return hints[name]


def _literals(hint: Any) -> list[Any]:
    """The values that a type hint allows by name, with `null` for None."""
    if get_origin(hint) is Literal:
        return list(get_args(hint))
    if hint is type(None):
        return ["null"]
    return [value for part in get_args(hint) for value in _literals(part)]


@functools.cache
def _bound_yaml() -> None:
    """Let jsonargparse refuse YAML that would fill the memory."""
    import jsonargparse
    import yaml

    from workflows.untrusted import parse_yaml

    load = jsonargparse.get_loader("yaml")
    jsonargparse.set_loader("yaml", lambda text: parse_yaml(text, load), exceptions=(yaml.YAMLError,))


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


def explain(error: Exception) -> str | None:
    """One message for what the machine or the user can be the cause of; None for what is a fault of the program."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, OSError) and error.filename is not None:  # no permission, not a folder, too many open files
        return f"{error.strerror}: {error.filename}"
    words = str(error).lower()
    if isinstance(error, MemoryError) or "out of memory" in words or "can't allocate memory" in words:
        return (
            "Out of memory. Lower --train.row_tokens (training, which resumes from its last checkpoint; the "
            "last bits of sums may differ) or --row_tokens (evaluation); choose a smaller model, --precision bf16-true "
            "or --quantize bnb.nf4 (training); in export, choose --verify_precision bf16-true or --device cpu."
        )
    return None


def main(argv: list[str] | None = None, steps: Steps = STEPS, program: str = "workflows") -> int:
    """Run one step.

    Args:
        argv: The arguments; those of the command line if None.
        steps: What there is to run.
        program: The package whose steps they are.

    Returns:
        The exit code: 0 if all went well, 1 for a condition the user can fix, 2 for wrong arguments; after a signal 128
        and its number, which is 130 for Ctrl-C, 143 for SIGTERM and 129 for SIGHUP.
    """
    args = sys.argv[1:] if argv is None else argv
    if not args or args[0] in ("-h", "--help"):
        print(usage(steps, program))
        return 0 if args else 2
    # surrogates stand for bytes
    if other := [ascii(arg) for arg in args if arg != arg.encode(errors="ignore").decode()]:
        print(
            f"error: not UTF-8 text: {', '.join(other)}. Set the terminal to UTF-8, or rename the file.",
            file=sys.stderr,
        )
        return 2
    step, rest = args[0], args[1:]
    if step not in steps:
        print(f"There is no step {step!r}.{did_you_mean(step, steps)}\n{usage(steps, program)}", file=sys.stderr)
        return 2

    with interruptible():
        return _run(step, rest, steps, program)


def _run(step: str, rest: list[str], steps: Steps, program: str) -> int:
    """Run a step that there is; its exit code."""
    first = os.environ.get("LOCAL_RANK", "0") == "0"  # of a run's processes
    try:
        environment.prepare()
        warnings.filterwarnings("ignore", module="litgpt|jsonargparse|torch|lightning")
        for name in ("lightning", "lightning.pytorch"):
            logging.getLogger(name).setLevel(logging.WARNING)
        module, name, _ = steps[step]
        function = getattr(importlib.import_module(module), name)
        if step == "plan" and steps is STEPS:  # its arguments are another step's
            function(rest)
            return 0
        arguments = parse_all(function, rest, step, program)
        if _is_planned(step, program) and not arguments.pop("ignore_plan"):
            from workflows.plan import require_room

            require_room(step, vars(arguments))
        function(**arguments)
    except (UserError, OSError, MemoryError, RuntimeError) as e:
        if (message := explain(e)) is None:
            raise
        where = "" if first else f" in process {os.environ['LOCAL_RANK']}"
        print(f"error{where}: {message}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        if first:
            from workflows.progress import command

            print(f"\nstopped; run the same command again to resume:\n  {command()}", file=sys.stderr)
        return exit_code()
    return 0


if __name__ == "__main__":
    sys.exit(main())
