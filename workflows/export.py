"""`make export`: a checkpoint in the forms that others read, a model in Ollama, and proof that it is the same model.

OUT_DIR holds the GGUF files, the Modelfile, the model card, `hf/` (Hugging Face) and on request `adapter/` (PEFT).
They take the places of an earlier export's when all of them are written. `metrics.json` and `provenance.json` come
last: without them an export is not finished. `verification.json` follows where models were created in Ollama. Finished
GGUF files of the same weights are kept when the step is run again.
"""

import contextlib
import dataclasses
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any, Literal

from data_prep.rows import iterate_jsonl
from workflows.chat_template import THINKING_OFF, ChatTemplate, Message, Reasoning
from workflows.checkpoint import (
    LORA_WEIGHTS,
    PROVENANCE,
    check_checkpoint_dir,
    describe_source,
    load_config,
    metric,
    write_metrics,
    write_provenance,
)
from workflows.checkpoint_checks import HF_ONLY, checkpoint_problems
from workflows.errors import UserError, report_all
from workflows.files import atomic_file, atomic_update, read_json, write_json, write_text
from workflows.hf_export import write_hf
from workflows.measure import PeakMemory, seconds_of_step, step_began
from workflows.model_card import licence_of, lineage, model_card
from workflows.ollama.client import FROM_LINE, connect, create_model, explained, require_ours
from workflows.ollama.gguf_writer import GGUFType, fingerprint, is_gguf_of, write_gguf
from workflows.ollama.modelfile import Modelfile, make_modelfile
from workflows.ollama.options import chosen, option_problems
from workflows.ollama.server import OllamaServer, open_server
from workflows.ollama.verify import ANSWER_TOKENS, NEAR_TIE, Reference, Verification, reference_answers, verify_model
from workflows.peft_export import adapter_contents, find_base, write_adapter
from workflows.progress import watched
from workflows.training.model import Precision
from workflows.training.processes import choose_accelerator

Quantization = Literal["f32", "f16", "bf16", "q8_0", "q4_K_M", "q4_K_S"]
_BY_OLLAMA = ("q4_K_M", "q4_K_S")
"""Types that Ollama itself makes."""
_LOST_GAP = 5.0
"""A token whose logit is so much lower than the best is no rounding of a working model's weights."""
_HF_USAGE = """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model, tokenizer = AutoModelForCausalLM.from_pretrained("."), AutoTokenizer.from_pretrained(".")
```"""
_RESULTS = (PROVENANCE, "metrics.json", "verification.json")


def setup(
    checkpoint_dir: Path,
    name: str = "medical",
    quantize: Quantization | list[Quantization] = "q8_0",
    out_dir: Path | None = None,
    data: Path = Path("data/hpo"),
    hf: bool = True,
    adapter: bool = False,
    create: bool = True,
    verify_prompts: int = 50,
    verify_precision: Precision = "32-true",
    device: str | None = None,
    num_ctx: int = 4096,
    num_thread: int | None = None,
    temperature: float | None = None,
    top_p: float | None = None,
    repeat_penalty: float = 1.0,
    reasoning: Reasoning | None = None,
    shard_size: int = 1000,
    port: int | None = None,
) -> None:
    """Write a checkpoint as Hugging Face directory and GGUF, create it in Ollama, and verify what Ollama does with it.

    Args:
        checkpoint_dir: The LitGPT checkpoint directory, e.g. out/demo/lora/final.
        name: The model's name in Ollama. One that this project did not make is never overwritten.
        quantize: One type or a list (`[f16,q8_0,q4_K_M]`); the first becomes NAME, the others NAME:TYPE. With
            --create false, `[]` writes no GGUF file: for models that llama.cpp and Ollama cannot run.
        out_dir: Where the files go; out/RUN/ollama for a checkpoint of out/RUN, else out/NAME/ollama.
        data: Data directory whose test.jsonl holds the questions for the verification.
        hf: Write the Hugging Face directory OUT_DIR/hf.
        adapter: Write the LoRA adapter in PEFT's format to OUT_DIR/adapter.
        create: Create the model in Ollama and verify it; false only writes the files.
        verify_prompts: Held-out questions to verify with; 0 for no verification.
        verify_precision: Precision of LitGPT's own answers; bf16-true halves the memory.
        device: Where LitGPT's own answers are computed: "cpu", "cuda", …; null takes a GPU if there is one.
        num_ctx: Context length in Ollama, in tokens; at most the model's.
        num_thread: CPU threads in Ollama; half the logical cores by default (with every core taken it crawls).
        temperature: Sampling temperature; the checkpoint's own by default, else 0.2.
        top_p: Nucleus sampling; the checkpoint's own by default, else 0.9.
        repeat_penalty: Penalty on repeated tokens; 1.0 is none.
        reasoning: Reasoning before answers; null is as the checkpoint was trained, which its chat template says, and a
            value that contradicts it is refused.
        shard_size: Largest safetensors file, in megabytes.
        port: Port for an Ollama server of ours; by default a free one, and only if no other Ollama is found.

    Raises:
        UserError: If an argument, the checkpoint or the data is not usable, Ollama fails, or the verification does.
    """
    settings = dict(locals())
    directory = check_checkpoint_dir(checkpoint_dir)
    kinds = list(dict.fromkeys(quantize if isinstance(quantize, list) else [quantize]))
    context = load_config(directory).block_size
    sampling: dict[str, Any] = {"temperature": temperature, "top_p": top_p, "repeat_penalty": repeat_penalty}
    problems = option_problems(chosen(num_ctx=num_ctx, num_thread=num_thread, **sampling), port, name=name)
    if not kinds and (create or not (hf or adapter)):
        problems.append("--quantize is empty, which needs --create false, and --hf or --adapter.")
    if len(kinds) > 1 and ":" in name:
        problems.append(f"--name {name!r} has a tag, and several types need several; leave the tag out.")
    if verify_prompts < 0:
        problems.append(f"--verify_prompts must be 0 (no verification) or more, not {verify_prompts}.")
    if shard_size < 1:
        problems.append(f"--shard_size must be at least 1 megabyte, not {shard_size}.")
    if adapter and not (directory / LORA_WEIGHTS).is_file():
        problems.append(f"--adapter needs {LORA_WEIGHTS}, which {directory} does not have: it is no result of LoRA.")
    if create and verify_prompts and not (data / "test.jsonl").is_file():
        problems.append(f"{data}/test.jsonl does not exist: run `make data`, or name another folder with --data.")
    report_all(problems)
    if adapter:
        adapter_contents(directory)  # refused before anything is written

    began = step_began()
    template = ChatTemplate.from_checkpoint(directory)
    if template.asked_for(reasoning).source != template.source:
        raise UserError(
            f"--reasoning {reasoning}: {directory} was not trained with thinking switched off. Train with --reasoning "
            "none, or write this line at the top of its chat_template.jinja: " + THINKING_OFF
        )
    modelfile, prompts = None, []
    if kinds:
        found = checkpoint_problems(directory)
        if found.export:
            found.export[-1] += f" {HF_ONLY}"
        report_all(found.training + found.export)
        for note in found.notes:
            print(f"{directory}: {note}")
        modelfile = make_modelfile(
            template,
            read_json(file) if (file := directory / "generation_config.json").is_file() else {},
            num_ctx=min(num_ctx, context),
            num_thread=num_thread or max(1, (os.cpu_count() or 1) // 2),
            **sampling,
        )
        if create and verify_prompts:
            prompts = held_out_prompts(data, verify_prompts, template, min(num_ctx, context))
    target = out_dir or default_out_dir(directory, name)
    with watched(target), PeakMemory() as peak:
        with atomic_update(target, last=_RESULTS, kept="*.gguf") as fresh:
            write_files(directory, target, fresh, name, kinds, hf=hf, adapter=adapter, shard_bytes=shard_size * 10**6)
            if modelfile is not None:
                write_instructions(directory, fresh, name, kinds, modelfile)
            if not create:
                finish(fresh, directory, settings, None, {}, seconds_of_step(began), peak.bytes)
        for kind in kinds:
            if kind in _BY_OLLAMA:  # one that is there is of an earlier export
                gguf_file(target, name, kind).unlink(missing_ok=True)
        results: dict[str, Verification] = {}
        version = None
        if create and modelfile is not None:
            with open_server(port) as server:
                version = server.version
                create_models(server, target, name, kinds, modelfile)
                write_instructions(directory, target, name, kinds, modelfile)  # its files may be others now
                if prompts:
                    reference = reference_answers(
                        directory, template, prompts, verify_precision, device or choose_accelerator()
                    )
                    results = verify(server, template, name, kinds, prompts, reference)
    if create:
        finish(target, directory, settings, version, results, seconds_of_step(began), peak.bytes)
        print(f"{name} is in Ollama; talk to it with: make chat NAME={name}")


def default_out_dir(checkpoint_dir: Path, name: str) -> Path:
    """out/RUN/ollama for a checkpoint out/RUN/STEP/final, else out/NAME/ollama."""
    if checkpoint_dir.name == "final" and checkpoint_dir.parent.parent.parent.name == "out":
        return checkpoint_dir.parent.parent / "ollama"
    return Path("out") / name.replace("/", "-").replace(":", "-") / "ollama"


def held_out_prompts(data: Path, number: int, template: ChatTemplate, num_ctx: int) -> list[list[Message]]:
    """The first different questions of the test split: an optional system message and one user message each.

    A small data set may have fewer than are asked for; then all of them are taken, and the terminal says so.

    Args:
        data: A data directory; its rows may be conversations or prompts.
        number: How many.
        template: The checkpoint's template.
        num_ctx: Longer prompts (with room for an answer) are left out.

    Raises:
        UserError: If none fits, or a line is malformed.
    """
    prompts: dict[str, list[Message]] = {}
    file = data / "test.jsonl"
    for line, row in iterate_jsonl(file):
        try:
            messages = list(row["prompt"] if "prompt" in row else row["messages"])
            end = 1 + next(i for i, message in enumerate(messages) if message["role"] == "user")
            asked = [m for m in messages[:end] if m["role"] in ("system", "user")]  # without an opening greeting
            question = [{"role": m["role"], "content": m["content"].strip()} for m in asked]
        except (KeyError, TypeError, AttributeError, StopIteration):
            raise UserError(f"{file}, line {line}: no conversation with a user's message.") from None
        key = json.dumps(question)
        if key not in prompts and len(template.prompt_ids(question)) + ANSWER_TOKENS <= num_ctx:
            prompts[key] = question
        if len(prompts) == number:
            return list(prompts.values())
    if not prompts:
        raise UserError(
            f"{file} has no question that fits into --num_ctx {num_ctx} with {ANSWER_TOKENS} tokens left to answer. "
            "Raise --num_ctx (at most to the model's context), or switch the verification off: --verify_prompts 0."
        )
    print(f"{file} has {len(prompts)} different questions that fit: verifying with these instead of {number}")
    return list(prompts.values())


def gguf_file(out_dir: Path, name: str, kind: str) -> Path:
    """The name of a GGUF file in an export's folder."""
    return out_dir / f"{re.sub(r'[/:]', '-', name)}-{kind}.gguf"


def model_name(name: str, kinds: list[Any], kind: str) -> str:
    """The name in Ollama: NAME for the first type, NAME:TYPE for the others."""
    return name if kind == kinds[0] else f"{name}:{kind.lower()}"


def write_files(
    directory: Path,
    out_dir: Path,
    fresh: Path,
    name: str,
    kinds: list[Quantization],
    *,
    hf: bool,
    adapter: bool,
    shard_bytes: int,
) -> None:
    """Write the weights in all forms that need no Ollama.

    Args:
        directory: The checkpoint.
        out_dir: The export's folder; finished files of the same weights are taken over from there.
        fresh: Where to write; finished files that a stopped run left there are kept.
        name: The model's name.
        kinds: The types of GGUF.
        hf: Write the Hugging Face directory.
        adapter: Write the adapter.
        shard_bytes: The largest safetensors file.
    """
    steps = lineage(directory)
    checkpoint_sha256 = fingerprint(directory)
    if hf:
        write_hf(directory, fresh / "hf", model_card(directory, name, _HF_USAGE), shard_bytes)
        print(f"written: {out_dir / 'hf'}")
    if adapter:
        base = find_base(directory, out_dir / "base")
        write_adapter(directory, fresh / "adapter", base, model_card(directory, name, base.usage))
        print(f"written: {out_dir / 'adapter'}")
    ours: dict[str, GGUFType] = {kind: kind for kind in kinds if kind not in _BY_OLLAMA}  # type: ignore[misc]
    if set(kinds) - set(ours):
        ours["source"] = "source"
    files = {gguf_file(fresh, name, kind): kind for kind in ours.values()}
    for leftover in set(fresh.glob("*.gguf")) - set(files):
        leftover.unlink()
    for file, kind in files.items():
        there = out_dir / file.name
        if not is_gguf_of(file, checkpoint_sha256, kind) and is_gguf_of(there, checkpoint_sha256, kind):
            file.unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # a file system without links: it is written anew
                file.hardlink_to(there)
        if is_gguf_of(file, checkpoint_sha256, kind):
            print(f"already there: {there}")
            continue
        write_gguf(directory, file, kind, name, checkpoint_sha256, licence_of(steps))
        print(f"written: {there} ({file.stat().st_size / 1e6:.0f} MB)")


def write_instructions(
    directory: Path, out_dir: Path, name: str, kinds: list[Quantization], modelfile: Modelfile
) -> None:
    """Write the Modelfile and the model card, over the file of the first type or what Ollama makes that type from."""
    file, option = gguf_file(out_dir, name, kinds[0]), ""
    if not file.is_file():
        file, option = gguf_file(out_dir, name, "source"), f"-q {kinds[0]} "
    write_text(out_dir / "Modelfile", modelfile.text(f"./{file.name}"))
    commands = f"ollama create {option}{name} -f Modelfile\nollama run {name}"
    usage = f"```\n{commands}\n```\n\nor `make chat NAME={name}` in the project."
    write_text(out_dir / "README.md", model_card(directory, name, usage))


def create_models(
    server: OllamaServer, out_dir: Path, name: str, kinds: list[Quantization], modelfile: Modelfile
) -> None:
    """Create one model for each type; files of types that Ollama makes are copied out of a server of ours.

    What Ollama makes such a type from is kept where its file could not be had.
    """
    for kind in kinds:  # all of them before the first is touched
        require_ours(server, model_name(name, kinds, kind))
    for kind in kinds:
        model = model_name(name, kinds, kind)
        file = gguf_file(out_dir, name, kind)
        if kind not in _BY_OLLAMA:
            create_model(server, model, file, modelfile)
            continue
        create_model(server, model, gguf_file(out_dir, name, "source"), modelfile, quantize=kind)
        if server.is_ours:
            copy_blob(server, model, file)
    if all(gguf_file(out_dir, name, kind).is_file() for kind in kinds):
        gguf_file(out_dir, name, "source").unlink(missing_ok=True)


def copy_blob(server: OllamaServer, model: str, file: Path) -> None:
    """Copy the weights that a server of ours keeps for a model.

    Raises:
        UserError: If there is no room.
    """
    with explained(server, model):
        shown = connect(server).show(model).modelfile or ""
    found = FROM_LINE.search(shown)
    if found is None or not Path(found[1]).is_file():
        print(f"Ollama does not show where it keeps the weights of {model}; {file} is not written")
        return
    with atomic_file(file) as temporary:
        shutil.copyfile(found[1], temporary)


def verify(
    server: OllamaServer,
    template: ChatTemplate,
    name: str,
    kinds: list[Quantization],
    prompts: list[list[Message]],
    reference: Reference,
) -> dict[str, Verification]:
    """Verify each model against LitGPT's answers.

    Raises:
        UserError: If prompt ids differ, a model is broken, or f16 parts from LitGPT elsewhere than at near ties. How
            many near ties there are is a matter of the processor.
    """
    results: dict[str, Verification] = {}
    for kind in kinds:
        result = results[kind] = verify_model(server, model_name(name, kinds, kind), template, prompts, reference)
        ids = {True: "equal", None: "not verified: this server does not show them", False: "different"}
        print(
            f"{kind}: prompt ids of {result.prompts} questions {ids[result.prompt_ids_equal]}; conversations "
            f"{ids[result.chat_prompts_equal]}; greedy agreement {result.greedy_agreement:.2f}",
            flush=True,
        )
        lost = [d for d in result.differences if d["logit_gap"] > _LOST_GAP]
        if len(lost) > result.prompts / 2:
            raise UserError(
                f"{kind} in Ollama is broken: {len(lost)} of {result.prompts} answers go where LitGPT's logits are "
                f"more than {_LOST_GAP} lower. The first: {json.dumps(lost[0], ensure_ascii=False)}. Use another type."
            )
        wide = [d for d in result.differences if not d["near_tie"]]
        if kind == "f16" and wide:
            raise UserError(
                f"f16 in Ollama gives other answers than LitGPT: {len(wide)} of {result.prompts} differ where "
                f"the logits are more than {NEAR_TIE} apart. The first: {json.dumps(wide[0], ensure_ascii=False)}"
            )
    return results


def finish(
    out_dir: Path,
    directory: Path,
    settings: dict[str, Any],
    version: str | None,
    results: dict[str, Verification],
    seconds: float,
    peak_bytes: int,
) -> None:
    """Write `provenance.json`, `metrics.json` and, last, `verification.json`: make takes that for "is in Ollama"."""
    agreement = {kind: result.greedy_agreement for kind, result in results.items()}
    checks = [result.prompt_ids_equal for result in results.values()]
    chats = [result.chat_prompts_equal for result in results.values()]
    prompts = max((result.prompts for result in results.values()), default=0)
    write_provenance(out_dir, "export", {"base": describe_source(directory)}, settings, files="*.gguf")
    rows = [metric(f"greedy_agreement_{kind}", share, n=prompts, split="test") for kind, share in agreement.items()]
    sizes = {file.name: file.stat().st_size for file in sorted(out_dir.glob("*.gguf"))}
    write_metrics(out_dir / "metrics.json", rows, seconds=seconds, peak_bytes=peak_bytes, file_bytes=sizes)
    if version is None:
        return
    write_json(
        out_dir / "verification.json",
        {
            "version": version,
            "name": settings["name"],
            "prompt_ids_equal": True if checks and all(checks) else None,
            "chat_prompts_equal": True if chats and all(chats) else None,
            "prompts": prompts,
            "greedy_agreement": agreement,
            "file_bytes": sizes,
            "models": {kind: dataclasses.asdict(result) for kind, result in results.items()},
        },
    )
