"""Every chat template of TRL's wheel with two tokenizers, what transformers makes of it, and what we make of it.

The oracle does not use the code under test: ids are those of transformers' `apply_chat_template`; the assistant's part
is known because each message is made of words that occur nowhere else, and by transformers' own mask where the template
has `{% generation %}` tags.
"""

import datetime
import functools
import re
from pathlib import Path
from typing import Any

import transformers.utils.chat_template_utils as transformers_templates
import trl
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from tests.conftest import TEXT
from workflows.chat_template import ChatTemplate
from workflows.gguf_tokenizer import LLAMA3_SPLIT

FOLDER = Path(trl.__file__).parent / "chat_templates"
NAMES = sorted(file.stem for file in FOLDER.glob("*.jinja"))
BOS = "<bos>"
STOPS = ("<|call|>", "<|eom_id|>", "<|user|>", "<|observation|>", "<|tool_response>")
"""Stop tokens of real checkpoints besides the one that ends a plain answer."""
_MARKS = re.compile(
    r"<\|[^<>|\s]{1,30}\|>|<｜[^<>｜]{1,30}｜>|<\|[a-z_]{3,20}>|<[a-z_]{3,20}\|>"
    r"|<(?:start|end)_of_[a-z_]+>|<fake_[a-z_]+>|</s>|</?think>|<eos>"
)

TOOLS: list[dict[str, Any]] = [
    {
        "type": "function",
        "function": {
            "name": "dose_of",
            "description": "Quebec tango.",
            "parameters": {
                "type": "object",
                "properties": {"drug": {"type": "string", "description": "uniform"}},
                "required": ["drug"],
            },
        },
    }
]
_CALL = {"id": "call_0001", "type": "function", "function": {"name": "dose_of", "arguments": {"drug": "whiskey"}}}
CONVERSATIONS: dict[str, tuple[list[dict[str, Any]], list[dict[str, Any]] | None]] = {
    "system": (
        [
            {"role": "system", "content": "alpha bravo"},
            {"role": "user", "content": "charlie delta"},
            {"role": "assistant", "content": "echo foxtrot"},
        ],
        None,
    ),
    "turns": (
        [
            {"role": "user", "content": "golf hotel"},
            {"role": "assistant", "content": "india juliett"},
            {"role": "user", "content": "kilo lima"},
            {"role": "assistant", "content": "mike november"},
            {"role": "user", "content": "oscar papa"},
            {"role": "assistant", "content": "romeo sierra"},
        ],
        None,
    ),
    "tools": (
        [
            {"role": "user", "content": "victor xray"},
            {"role": "assistant", "content": "", "tool_calls": [_CALL]},
            {"role": "tool", "name": "dose_of", "tool_call_id": "call_0001", "content": "yankee zulu"},
            {"role": "assistant", "content": "ten milligrams"},
        ],
        TOOLS,
    ),
}


@functools.cache
def source_of(name: str) -> str:
    return (FOLDER / f"{name}.jinja").read_text(encoding="utf-8")


@functools.cache
def marks() -> list[str]:
    """The markers of all templates, which real checkpoints have as tokens of their own."""
    found = {mark for name in NAMES for mark in _MARKS.findall(source_of(name))}
    return sorted(found | {BOS, *STOPS})


@functools.cache
def tokenizer_of(kind: str) -> Tokenizer:
    """A small tokenizer: byte-level BPE, or BPE over words with a space before the first, as SentencePiece makes it."""
    words = [message["content"] for messages, _ in CONVERSATIONS.values() for message in messages]
    if kind == "byte-level":
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(LLAMA3_SPLIT), behavior="isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    else:
        tokenizer = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")  # no merges across words
        tokenizer.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
        alphabet = [chr(i) for i in range(33, 127)]
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        special_tokens=["<unk>", *(f"<0x{i:02X}>" for i in range(256))] if kind != "byte-level" else [],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT, *words, "\n\n\n\n \n\n"] * 4, trainer)
    if kind != "byte-level":
        tokenizer.pre_tokenizer = None
    tokenizer.add_special_tokens([AddedToken(mark, special=True, normalized=False) for mark in marks()])
    return tokenizer


class _FixedDay(datetime.datetime):
    """The day that our rendering always has."""

    @classmethod
    def now(cls, tz: Any = None) -> datetime.datetime:
        return datetime.datetime(2024, 7, 26)


def transformers_rendering(
    name: str, kind: str, conversation: str | list[dict[str, Any]], asked: bool = False, **variables: Any
) -> tuple[str, list[int], list[int]]:
    """transformers' text, ids and assistant mask of a conversation, or of the prompt that asks for its next answer.

    Raises:
        Exception: Whatever the template raises.
    """
    messages, tools = CONVERSATIONS[conversation] if isinstance(conversation, str) else (conversation, None)
    options: dict[str, Any] = {"tools": tools, "add_generation_prompt": asked, **variables}
    reference = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer_of(kind), bos_token=BOS, eos_token=eos_of(name), chat_template=source_of(name)
    )
    day, transformers_templates.datetime = transformers_templates.datetime, _FixedDay  # type: ignore[attr-defined]
    try:
        text = reference.apply_chat_template(messages, tokenize=False, **options)
        encoded = reference.apply_chat_template(
            messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True, **options
        )
    finally:
        transformers_templates.datetime = day  # type: ignore[attr-defined]
    return text, encoded["input_ids"], encoded["assistant_masks"]


@functools.cache
def eos_of(name: str) -> str:
    """The first marker that a template writes after an answer, which the real model stops at."""
    if name.startswith("cohere2"):
        return "<|END_OF_TURN_TOKEN|>"  # of two
    messages, _ = CONVERSATIONS["system"]
    template = ChatTemplate(source_of(name), tokenizer_of("byte-level"), BOS, "</s>", (0,))
    for conversation in (messages, messages[1:]):
        try:
            after = template.render(conversation).rpartition("echo foxtrot")[2]
        except Exception:
            continue
        if found := re.findall("|".join(map(re.escape, sorted(marks(), key=len, reverse=True))), after):
            return str(found[0])
    return "</s>"


def ours(name: str, kind: str) -> ChatTemplate:
    """The template as a checkpoint of ours would have it."""
    tokenizer = tokenizer_of(kind)
    stops = {tokenizer.token_to_id(token) for token in (eos_of(name), *STOPS)}
    return ChatTemplate(source_of(name), tokenizer, BOS, eos_of(name), tuple(sorted(stops)))
