"""`make deepseek`: DeepSeek-R1 on this machine, in Ollama, by whichever of three ways is open.

1. A name in Ollama's registry (`deepseek-r1:1.5b`, any tag, `hf.co/ORG/NAME-GGUF`): pulled by Ollama.
2. A distilled model on the Hugging Face Hub (a name in checkpoints/registry.yaml, ORG/NAME), a Hugging Face folder, or
   a checkpoint that our steps made from one: downloaded, converted, exported and verified like any other model.
3. A GGUF file: created in Ollama as it is, its TEMPLATE derived from the template inside it, and the prompts compared.

Each ends as a model NAME with the sampling and the context of the recipe.
"""

import dataclasses
import inspect
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import ollama
from tqdm import tqdm

from workflows import download, export
from workflows.chat_template import ChatTemplate
from workflows.checkpoint import WEIGHTS
from workflows.errors import UserError, did_you_mean, report_all
from workflows.files import sha256, write_json, write_text
from workflows.gguf_reader import read_gguf
from workflows.ollama.client import UnknownModel, connect, create_model, explained, installed, require_ours
from workflows.ollama.modelfile import make_modelfile
from workflows.ollama.options import MODEL_NAME, chosen, option_problems
from workflows.ollama.server import OllamaServer, open_server
from workflows.ollama.verify import check_conversations
from workflows.plan import require_room
from workflows.training.model import Precision

TAGS = ("1.5b", "7b", "8b", "14b", "32b", "70b", "671b")
"""Sizes of deepseek-r1 in Ollama's registry (its library page), to suggest names with."""


def setup(
    model: str = "deepseek-r1:1.5b",
    name: str = "deepseek",
    temperature: float = 0.6,
    top_p: float = 0.95,
    num_ctx: int = 32768,
    system: str | None = None,
    num_thread: int | None = None,
    quantize: export.Quantization | list[export.Quantization] = "q8_0",
    data: Path = Path("data/hpo"),
    verify_prompts: int = 20,
    verify_precision: Precision = "32-true",
    revision: str | None = None,
    checkpoints_dir: Path = Path("checkpoints"),
    out_dir: Path | None = None,
    port: int | None = None,
    ignore_plan: bool = False,
) -> None:
    """Get a DeepSeek-R1 into Ollama, with its own sampling.

    Args:
        model: A name in Ollama's registry, a name in checkpoints/registry.yaml, a Hub id, a Hugging Face folder, a
            checkpoint of ours, or a .gguf file.
        name: The model's name in Ollama afterwards.
        temperature: Sampling temperature.
        top_p: Sample from the fewest tokens whose probabilities reach this.
        num_ctx: Context length in tokens, prompt, thoughts and answer together; at most the model's.
        system: A system message; R1 is to have none.
        num_thread: CPU threads in Ollama; half the logical cores by default.
        quantize: Types of GGUF, for a model that is exported.
        data: Data directory whose test.jsonl holds the questions that an exported model is verified with.
        verify_prompts: How many of them; 0 for no verification.
        verify_precision: Precision of the answers that it is verified with; bf16-true halves the memory.
        revision: For the Hub: a branch, tag or commit.
        checkpoints_dir: The folder of downloaded checkpoints.
        out_dir: Where an export's files go; out/NAME/ollama by default.
        port: Port for an Ollama server of ours; by default a free one, and only if no other Ollama is found.
        ignore_plan: Export although the plan says that memory or disk are too little.

    Raises:
        UserError: If an argument is not usable, or the model cannot be had, read or verified; with what to do instead.
    """
    sampling: dict[str, Any] = {"temperature": temperature, "top_p": top_p}
    problems = option_problems(chosen(num_ctx=num_ctx, num_thread=num_thread, **sampling), port, model, name)
    if name == model:
        problems.append(f"--name {name} is the model's own name; choose another for the one with this recipe.")
    report_all(problems)
    path = Path(model).expanduser()
    threads = num_thread or max(1, (os.cpu_count() or 1) // 2)
    if path.suffix.lower() == ".gguf":
        with open_server(port) as server:
            create_from_gguf(server, name, path, system, num_ctx=num_ctx, num_thread=threads, **sampling)
    elif (checkpoint := _checkpoint(model, revision, checkpoints_dir)) is not None:
        if system is not None:
            raise UserError("--system goes with a pulled model or a GGUF file: an export takes what its template says.")
        exported = inspect.signature(export.setup).bind(
            checkpoint,
            name=name,
            quantize=quantize,
            out_dir=out_dir or Path("out") / name / "ollama",
            data=data,
            verify_prompts=verify_prompts,
            verify_precision=verify_precision,
            num_ctx=num_ctx,
            num_thread=num_thread,
            port=port,
            **sampling,
        )
        exported.apply_defaults()
        if not ignore_plan:
            require_room("export", exported.arguments)
        export.setup(**exported.arguments)
    else:
        with open_server(port) as server:
            pull(server, model)
            created = {"num_ctx": num_ctx, "num_predict": num_ctx, "num_thread": threads, **sampling}
            require_ours(server, name, made_from=model)
            with explained(server, name):
                connect(server).create(name, from_=model, system=system, parameters=created)
            print(
                "its prompts are those of the registry's template: not verified, there is no checkpoint to compare with"
            )
    print(f"talk to it: make chat NAME={name}   a file of questions: make ask NAME={name} FILE=questions.jsonl")


def _checkpoint(model: str, revision: str | None, checkpoints_dir: Path) -> Path | None:
    """The checkpoint directory that a name stands for, downloaded and converted; None for a name of Ollama's.

    Raises:
        UserError: If it cannot be had.
    """
    path = Path(model).expanduser()
    if (path / WEIGHTS).is_file():
        return path
    host, *rest = model.split("/")
    if not path.is_dir() and (model[0] in "/.~" or (len(rest) > 1 and "." not in host)):
        raise UserError(
            f"There is no folder {path}. Elsewhere models have names: ORG/NAME on the Hugging Face Hub, NAME:TAG or "
            "hf.co/ORG/NAME for Ollama."
        )
    of_the_hub = model.count("/") == 1 and ":" not in model
    if not path.is_dir() and not of_the_hub and model.lower() not in download.registry():
        return None
    origin = download.find_model(model, revision)
    download.setup(model, revision=revision, checkpoints_dir=checkpoints_dir)
    return checkpoints_dir / origin.org / origin.name.lower()


def pull(server: OllamaServer, model: str) -> None:
    """Let Ollama fetch a model from its registry, unless it is there.

    What has arrived is kept by Ollama, so that a pull that broke off goes on where it was.

    Raises:
        UserError: If there is no such model, or the registry cannot be reached.
    """
    if not MODEL_NAME.fullmatch(model):
        raise UserError(f"{model!r} is no name of a model.{_known_models(server, model)}")
    try:
        print(f"{installed(server, model).model} is there already")
        return
    except UnknownModel:
        pass
    try:
        _show_progress(connect(server).pull(model, stream=True))
    except ollama.ResponseError as e:
        reason = e.error.strip()
        if any(words in reason for words in ("file does not exist", "not found", "manifest unknown", "invalid model")):
            raise UserError(
                f"Ollama's registry has no model {model!r} ({reason}).{_known_models(server, model)}"
            ) from None
        if "no space" in reason:
            raise UserError(f"The disk has no room for {model} ({reason}). What has arrived is kept.") from None
        raise UserError(_unreachable(server, model, reason)) from None
    except (ConnectionError, httpx.HTTPError) as e:
        raise UserError(_unreachable(server, model, f"{type(e).__name__}: {e}")) from None


def _show_progress(parts: Iterator[ollama.ProgressResponse]) -> None:
    """A bar for each file that comes."""
    bars: dict[str, Any] = {}
    for part in parts:
        if part.digest and part.total:
            if part.digest not in bars:
                bars[part.digest] = tqdm(total=part.total, unit="B", unit_scale=True, desc=part.digest[7:19])
            bars[part.digest].update((part.completed or 0) - bars[part.digest].n)
    for bar in bars.values():
        bar.close()


def _known_models(server: OllamaServer, model: str) -> str:
    """The names nearest to one that is unknown, or all where none is near."""
    names = [f"deepseek-r1:{tag}" for tag in TAGS] + [n for n in download.registry() if "deepseek" in n]
    with explained(server, model):
        names += [str(entry.model) for entry in connect(server).list().models]
    meant = did_you_mean(model.lower(), names, cutoff=0.4) or f" There are, among others: {', '.join(names)}."
    return f"{meant} All tags: https://ollama.com/library/deepseek-r1/tags"


def _unreachable(server: OllamaServer, model: str, reason: str) -> str:
    meant = "" if model in {f"deepseek-r1:{tag}" for tag in TAGS} else f"{_known_models(server, model).strip()}\n"
    return (
        f"Ollama could not pull {model!r} from its registry: {reason}\n{meant}"
        "Check the network and proxy variables (the server's own), and run the same command again: what has arrived is "
        "kept. Without the registry there are two other ways:\n"
        "  - a model of the Hugging Face Hub: make deepseek MODEL=deepseek-r1-distill-qwen-1.5b\n"
        "  - a GGUF file on your disk: make deepseek MODEL=path/to/file.gguf"
    )


def create_from_gguf(
    server: OllamaServer, name: str, file: Path, system: str | None = None, **parameters: Any
) -> bool | None:
    """Create a model from a GGUF file of somebody else's, asked as the template inside it says.

    Args:
        server: The server.
        name: The model's name in Ollama.
        file: The GGUF file, of a Llama or Qwen2.
        system: A system message.
        **parameters: Of `make_modelfile`.

    Returns:
        True if the server's prompts are those of the template; None if it does not show them.

    Raises:
        UserError: If the file is missing, damaged, of another kind, has no chat template, or the prompts differ.
    """
    if not file.is_file():
        raise UserError(f"There is no file {file}.")
    source = read_gguf(file)
    context = int(source.config["max_position_embeddings"])
    if parameters["num_ctx"] > context:
        print(f"{file} was made for {context:,} tokens of context; it gets these instead of {parameters['num_ctx']:,}")
        parameters["num_ctx"] = context
    with tempfile.TemporaryDirectory() as folder:
        for part, content in (
            ("tokenizer.json", source.tokenizer_json),
            ("chat_template.jinja", source.chat_template),
        ):
            if content is None:
                raise UserError(f"{file} holds no chat template: it is of a base model. Use an instruction-tuned one.")
            write_text(Path(folder) / part, content)
        write_json(Path(folder) / "tokenizer_config.json", source.tokenizer_config)
        write_json(Path(folder) / "generation_config.json", source.generation_config)
        template = ChatTemplate.from_checkpoint(folder)
    # Where the file has its tokenizer begin with BOS, the text must not, or there would be two.
    adds_bos = len(template.tokenizer.encode("x").ids) > len(template.encode("x"))
    as_text = dataclasses.replace(template, bos_token="") if adds_bos else template
    modelfile = make_modelfile(as_text, source.generation_config, **parameters)
    digest = sha256(file)
    create_model(server, name, file, modelfile, made_from=digest)
    equal = check_conversations(server, name, template, as_text)
    if system is not None:  # with it, conversations without a system message are not the template's own any more
        create_model(server, name, file, dataclasses.replace(modelfile, system=system), made_from=digest)
    told = {True: "equal to those of the template in the file", None: "not verified: this server does not show them"}
    print(f"{name}: prompts of conversations {told[equal]}")
    return equal
