"""Read a local Hugging Face directory (safetensors or `.bin` weights, whole or sharded) without loading its weights."""

from functools import partial
from pathlib import Path
from typing import Any

import torch

from workflows.checkpoint import is_state_dict
from workflows.conversion import LazyTensor, Source
from workflows.errors import UserError, first_line
from workflows.files import read_json, read_text
from workflows.hf_export import hf_tensors

_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}
_LONGEST_NAME = 255
# Saved with the weights of BERT and its kin (0, 1, 2, …) and of GPT-2 (the causal mask), but no weights.
_NO_WEIGHTS = ("position_ids", ".attn.bias", ".attn.masked_bias")
_SAFETENSORS, _BIN = "model.safetensors", "pytorch_model.bin"


def read_hf_dir(directory: Path) -> Source:
    """Read configuration, tokenizer and the headers of the weight files.

    Raises:
        UserError: If a file is missing, malformed, cut short, or a pickle with anything but tensors in it.
    """
    tokenizer_json = directory / "tokenizer.json"
    if not tokenizer_json.is_file():
        raise UserError(
            f"{directory} has no tokenizer.json. Make one with transformers: "
            f"`AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR)`."
        )
    config = read_json(directory / "config.json")
    tokenizer_config = read_tokenizer_config(directory)
    return Source(
        place=str(directory),
        config=config,
        tensors=lazy_tensors(directory),
        tokenizer_json=read_text(tokenizer_json),
        tokenizer_config=tokenizer_config,
        generation_config=_generation_config(directory, config),
        chat_template=read_chat_template(directory, tokenizer_config),
    )


def read_checkpoint(checkpoint_dir: Path) -> Source:
    """Describe a LitGPT checkpoint directory in Hugging Face's terms, as the base of an adapter."""
    weights, tied = hf_tensors(checkpoint_dir)
    config = read_json(checkpoint_dir / "config.json")
    tokenizer_config = read_tokenizer_config(checkpoint_dir)
    return Source(
        place=str(checkpoint_dir),
        config={**config, "tie_word_embeddings": tied},
        tensors={n: LazyTensor(tuple(t.shape), t.dtype, partial(_copy, t)) for n, t in weights.items()},
        tokenizer_json=read_text(checkpoint_dir / "tokenizer.json"),
        tokenizer_config=tokenizer_config,
        generation_config=_generation_config(checkpoint_dir, config),
        chat_template=read_chat_template(checkpoint_dir, tokenizer_config),
    )


def read_tokenizer_config(directory: Path) -> dict[str, Any]:
    """Return `tokenizer_config.json` with the special tokens that older checkpoints name elsewhere."""
    file, older = directory / "tokenizer_config.json", directory / "special_tokens_map.json"
    config = read_json(file) if file.is_file() else {}
    specials = read_json(older) if older.is_file() else {}  # older checkpoints name BOS and EOS only there
    config = {**{key: specials[key] for key in ("bos_token", "eos_token") if key in specials}, **config}
    kinds: dict[str, type | tuple[type, ...]] = {"tokenizer_class": str, "add_bos_token": bool}
    for key, kind in {**kinds, "bos_token": (str, dict), "eos_token": (str, dict)}.items():
        if config.get(key) is not None and not isinstance(config[key], kind):
            raise UserError(f"{file}: {key} is {config[key]!r:.40}, which it cannot be. Download it again.")
    return config


def _generation_config(directory: Path, config: dict[str, Any]) -> dict[str, Any]:
    file = directory / "generation_config.json"
    generation: dict[str, Any] = {key: config[key] for key in ("bos_token_id", "eos_token_id") if key in config}
    if file.is_file():
        try:
            generation = read_json(file)
        except UserError as e:  # some were published with a trailing comma; config.json knows the essential part
            print(f"{e} Using config.json's token ids instead.")
    for key in ("bos_token_id", "eos_token_id"):
        ids = generation.get(key)
        every = ids if isinstance(ids, list) else [ids]
        if not all(token_id is None or isinstance(token_id, int) for token_id in every):
            raise UserError(f"{directory}: {key} is {ids!r:.40}, no token's number. Download it again.")
    return generation


def read_chat_template(directory: Path, tokenizer_config: dict[str, Any]) -> str | None:
    """Return the chat template of a folder, wherever it keeps it; None if it has none."""
    if (file := directory / "chat_template.jinja").is_file():
        return read_text(file)
    template = tokenizer_config.get("chat_template")
    if template is None and (file := directory / "chat_template.json").is_file():
        template = read_json(file).get("chat_template")
    if isinstance(template, list):  # several by name, as [{"name": …, "template": …}]
        named = [entry for entry in template if isinstance(entry, dict) and entry.get("name") == "default"]
        if not named:
            names = ", ".join(str(entry.get("name")) for entry in template if isinstance(entry, dict))
            print(f"{directory}: none of its chat templates is called default, so none is used ({names}).")
        template = named[0].get("template") if named else None
    if template is not None and not isinstance(template, str):
        raise UserError(f"{directory}: its chat template is {template!r:.40}, not a text. Download it again.")
    return template


def lazy_tensors(directory: Path) -> dict[str, LazyTensor]:
    """The weights of a directory under their names, none read yet; a `UserError` for what is missing or damaged."""
    tensors: dict[str, LazyTensor] = {}
    for file in _weight_files(directory):
        tensors |= read_tensors(file)
    return tensors


def read_tensors(file: Path) -> dict[str, LazyTensor]:
    """Return the tensors of one safetensors or `.bin` file under their names, none read yet."""
    return _safetensors(file) if file.suffix == ".safetensors" else _pickled(file)


def _weight_files(directory: Path) -> list[Path]:
    for name in (_SAFETENSORS, _BIN):
        index = directory / f"{name}.index.json"
        if index.is_file():
            weight_map = read_json(index).get("weight_map")
            shards: list[Any] = list(weight_map.values()) if isinstance(weight_map, dict) else [None]
            if not all(isinstance(shard, str) and len(shard) < _LONGEST_NAME for shard in shards):
                raise UserError(f"{index} does not say which file a tensor is in; it is damaged. Download it again.")
            # A shard's name comes from a downloaded file; it must not lead out of the folder.
            files = [directory / Path(shard).name for shard in sorted(set(shards))]
            if missing := [file.name for file in files if not file.is_file()]:
                raise UserError(f"{directory} lacks {', '.join(missing)}, named in {index.name}. Download it again.")
            if not files:
                raise UserError(f"{index} names no files; it is damaged. Download it again.")
            return files
        if (directory / name).is_file():
            return [directory / name]
    others = [file.name for file in directory.glob("*.gguf")]
    hint = f" It holds GGUF files: give one of them as --model ({', '.join(others)})." if others else ""
    raise UserError(f"{directory} has no weights ({_SAFETENSORS} or {_BIN}, whole or sharded with an index).{hint}")


def _safetensors(file: Path) -> dict[str, LazyTensor]:
    from safetensors import SafetensorError, safe_open

    try:
        opened = safe_open(file, framework="pt")
    except (SafetensorError, OSError) as e:  # an empty file cannot be mapped: OSError
        raise UserError(f"{file} is cut short or not a safetensors file ({e}). Download it again.") from None
    tensors = {}
    for name in opened.keys():  # noqa: SIM118 - not a dict
        if name.endswith(_NO_WEIGHTS):
            continue
        header = opened.get_slice(name)
        if (dtype := _DTYPES.get(header.get_dtype())) is None:
            raise UserError(f"{file}: {name} is stored as {header.get_dtype()}; use the model's 16-bit checkpoint.")
        tensors[name] = LazyTensor(tuple(header.get_shape()), dtype, partial(_copy_mapped, opened, name))
    return tensors


def _pickled(file: Path) -> dict[str, LazyTensor]:
    try:
        state_dict = torch.load(file, mmap=True, weights_only=True, map_location="cpu")
    except Exception as e:  # RuntimeError, UnpicklingError, EOFError, ...: torch has no class for "not a checkpoint"
        raise UserError(
            f"{file} cannot be read as a file of tensors: it is cut short, written by torch older than 1.6, or a "
            f"pickle that would run code, which is refused. Use the model's safetensors. ({first_line(e)})"
        ) from None
    if not is_state_dict(state_dict):
        raise UserError(f"{file} is not a dictionary of tensors. Use the model's safetensors.")
    return {
        name: LazyTensor(tuple(tensor.shape), tensor.dtype, partial(_copy, tensor))
        for name, tensor in state_dict.items()
    }


def _copy_mapped(opened: Any, name: str, out: torch.Tensor) -> None:
    out.copy_(opened.get_tensor(name))


def _copy(tensor: torch.Tensor, out: torch.Tensor) -> None:
    out.copy_(tensor)
