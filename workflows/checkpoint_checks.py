"""Checks of a checkpoint's small files for everything that a later step would refuse: training, evaluation, export.

They run when a checkpoint is downloaded, before the first training step, and before an export writes its first file,
with the same functions that the export uses. No weights are read.
"""

import contextlib
import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from workflows.chat_template import ChatTemplate, Message
from workflows.checkpoint import copy_companions, load_config
from workflows.errors import UserError, report_all
from workflows.files import read_json
from workflows.hf_export import check_architecture
from workflows.ollama.modelfile import make_modelfile
from workflows.ollama.tokenizer_fields import read_tokenizer
from workflows.prompt_style import replace_chat_template

_MARK = "\ue020"  # private use: in no template and in no vocabulary
_PROBE: list[Message] = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is it?"},
    {"role": "assistant", "content": "It is this."},
    {"role": "user", "content": "Why?"},
]


HF_ONLY = '`export --create false --quantize "[]"` still writes its Hugging Face folder.'
"""What remains possible where no GGUF file and no Ollama model can be made."""


@dataclass(frozen=True)
class CheckpointProblems:
    """What is wrong with a checkpoint, as messages.

    Attributes:
        training: Reasons why it cannot be trained or evaluated.
        export: Reasons why it can be trained, but not exported to GGUF and Ollama.
        notes: What else a user should know; nothing is refused for it.
        unlearned: What is not learned of a conversation with several answers, or is encoded in another form.
    """

    training: list[str] = field(default_factory=list)
    export: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    unlearned: list[str] = field(default_factory=list)

    def notes_on(self, place: str) -> str:
        """Return one block of text with everything that forbids no training; "" if there is nothing."""
        lines = [f"{place}: {note}" for note in self.notes]
        lines += [f"{place}: in training on conversations with several answers, {note}" for note in self.unlearned]
        if self.export:
            lines += [
                f"{place}: training and evaluation work, but `make export` cannot make an Ollama model of it:",
                *(f"  - {problem}" for problem in self.export),
                f"  {HF_ONLY}",
            ]
        return "\n".join(lines)


def checkpoint_problems(
    checkpoint_dir: Path, template_file: Path | None = None, *, place: str | None = None, needs_template: bool = True
) -> CheckpointProblems:
    """Return what later steps would refuse in a checkpoint directory.

    Args:
        checkpoint_dir: The folder; its weights need not be there yet.
        template_file: A Jinja file that is to take the place of the checkpoint's chat template.
        place: The folder's name in messages, where its own would mean nothing to a reader.
        needs_template: Whether a checkpoint without a chat template, a base model, is a problem.

    Raises:
        UserError: If a file is missing or malformed.
    """
    place = place or str(checkpoint_dir)
    if template_file is not None:
        with tempfile.TemporaryDirectory() as folder:
            copy_companions(checkpoint_dir, Path(folder))
            try:
                report_all(unembedded_tokens(ChatTemplate.from_checkpoint(Path(folder), template_file)))
                replace_chat_template(Path(folder), template_file)
            except UserError as e:
                return CheckpointProblems([str(e).replace(folder, place)])
            return checkpoint_problems(Path(folder), place=place)
    vocab_size = read_json(checkpoint_dir / "config.json").get("vocab_size") or load_config(checkpoint_dir).vocab_size
    file = checkpoint_dir / "generation_config.json"
    generation = read_json(file) if file.is_file() else {}
    export = _refusal(lambda: check_architecture(checkpoint_dir))
    export += _refusal(lambda: read_tokenizer(checkpoint_dir / "tokenizer.json", vocab_size))
    template = None
    try:
        template = ChatTemplate.from_checkpoint(checkpoint_dir)
    except UserError as e:
        if needs_template:
            return CheckpointProblems([str(e).replace(str(checkpoint_dir), place)], export)
    tokenizer = template.tokenizer if template else _read(checkpoint_dir / "tokenizer.json")
    training, notes = _beyond_embedding(tokenizer, _written(template) if template else set(), vocab_size)
    unlearned: list[str] = []
    if template is not None and not training:
        training = [
            f"{message} `download` takes --stop TOKEN and --chat_template FILE."
            for message in _refusal(lambda: template.turn_end)
        ] or template.problems()
    if template is not None and not training:
        export += _stripping_tokens(template)
        export += _refusal(lambda: make_modelfile(template, generation, num_ctx=1, num_thread=1))
        notes += _unknown_stops(template, generation)
        unlearned = template.remarks()
    found = (training, export, notes, unlearned)
    return CheckpointProblems(*([text.replace(str(checkpoint_dir), place) for text in texts] for texts in found))


def _read(file: Path) -> Tokenizer:
    """Read a tokenizer."""
    try:
        return Tokenizer.from_file(str(file))
    except Exception as e:  # tokenizers raises bare Exception for every malformed file
        raise UserError(f"{file} is not a readable tokenizer ({e}). Download the model again.") from None


def _refusal(check: Callable[[], object]) -> list[str]:
    """Return the message with which a check refuses, if it does."""
    try:
        check()
    except UserError as e:
        return [str(e)]
    return []


def unembedded_tokens(template: ChatTemplate) -> list[str]:
    """Return a refusal of the tokens that a template or the tokenizer needs and the embedding has no row for, if any.

    It comes before whatever encodes a text, whose own message could not say where the token is from.
    """
    if template.vocab_size is None:
        return []
    return _beyond_embedding(template.tokenizer, _written(template), template.vocab_size)[0]


def _written(template: ChatTemplate) -> set[int]:
    """Return the ids that the template writes around messages, and those that end an answer."""
    ids = set(template.stop_ids)
    for probe in (_PROBE, _PROBE[1:]):
        with contextlib.suppress(UserError):  # a template may refuse system messages
            text = template.render(probe, add_generation_prompt=True)
            ids |= set(template.tokenizer.encode(text, add_special_tokens=False).ids)
    return ids


def _beyond_embedding(tokenizer: Tokenizer, written: set[int], vocab_size: int) -> tuple[list[str], list[str]]:
    """Return refusals of and notes on tokens whose ids have no row in the embedding.

    Many published tokenizers have a few added tokens too many, which no text of theirs uses. What the template writes,
    what ends an answer, and what plain text is made of must have a row.
    """
    added = set(tokenizer.get_added_tokens_decoder())
    beyond = {token_id: text for text, token_id in tokenizer.get_vocab().items() if token_id >= vocab_size}
    refused = [token_id for token_id in sorted(beyond) if token_id in written or token_id not in added]
    rest = [token_id for token_id in sorted(beyond) if token_id not in refused]

    def named(ids: list[int]) -> str:
        shown = ", ".join(f"{beyond[token_id]!r} ({token_id})" for token_id in ids[:5])
        return shown + (f" and {len(ids) - 5} more" if len(ids) > 5 else "")

    problems, notes = [], []
    if refused:
        problems.append(
            f"The tokenizer has tokens that are needed but have no row in the embedding of {vocab_size} rows: "
            f"{named(refused)}. Tokenizer and weights do not belong together, or the embedding was not resized when "
            "tokens were added: resize it with transformers (resize_token_embeddings) and save the model again."
        )
    if rest:
        notes.append(
            f"the tokenizer has tokens without a row in the embedding of {vocab_size} rows: {named(rest)}. Neither the "
            "template nor the stop tokens need them; a text with one is refused, and a GGUF file leaves them out."
        )
    return problems, notes


def _stripping_tokens(template: ChatTemplate) -> list[str]:
    """Return a refusal of tokens that take the white space beside them, if the template writes some: GGUF has none."""
    data = json.loads(template.tokenizer.to_str())
    flags = {"lstrip": False, "rstrip": False, "single_word": False}
    flagged = [token for token in data["added_tokens"] if any(token[flag] for flag in flags)]
    if not flagged:
        return []
    for token in flagged:
        token |= flags
    text = template.render(_PROBE[1:], add_generation_prompt=True)
    plain = Tokenizer.from_str(json.dumps(data)).encode(text, add_special_tokens=False)
    if plain.ids == template.encode(text):
        return []
    names = ", ".join(token["content"] for token in flagged if token["content"] in text)
    return [
        f"tokenizer.json says that the tokens {names} take the white space beside them (lstrip, rstrip), which those "
        "of a GGUF file do not, so Ollama's prompts would differ from the chat template's."
    ]


def _unknown_stops(template: ChatTemplate, generation: dict[str, Any]) -> list[str]:
    """Return a note on ids in generation_config.json that ought to end an answer, but that no token has."""
    ids = generation.get("eos_token_id")
    unknown = [i for i in (ids if isinstance(ids, list) else [ids]) if i is not None and i not in template.stop_ids]
    if not unknown:
        return []
    return [f"generation_config.json names stop tokens that the tokenizer does not have: {unknown}. They are ignored."]


def unnamed_turn_end(template: ChatTemplate) -> str | None:
    """Return the token that ends the assistant's turn, where it is exactly one special token and no stop token yet."""
    try:
        after = template.render([{"role": "user", "content": "?"}, {"role": "assistant", "content": _MARK}])
    except UserError:  # whoever needs the template says why
        return None
    ids = template.tokenizer.encode(after.rpartition(_MARK)[2], add_special_tokens=False).ids
    if set(ids) & set(template.stop_ids):
        return None
    specials = {token_id for token_id, token in template.tokenizer.get_added_tokens_decoder().items() if token.special}
    found = [token_id for token_id in ids if token_id in specials]
    return template.tokenizer.id_to_token(found[0]) if len(found) == 1 else None
