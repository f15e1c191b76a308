"""The one source of every prompt: the chat template that came with the checkpoint, and its tokenizer.

Training, evaluation, rollouts, LitGPT's CLI and Ollama all get their prompts from here, so that a model is always
asked in the form it was trained on. The template is Jinja as Hugging Face ships it (`chat_template.jinja`), rendered in
Jinja's sandbox; the text is tokenized by `tokenizer.json` without further special tokens, because the template writes
them itself (a BOS token too, where the model wants one).

`chat_spans.py` encodes conversations for training: the text of the whole is encoded once, the prompt's ids are those of
inference, and the token that ends the assistant's turn belongs to the completion.
"""

import contextlib
import copy
import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import jinja2
from tokenizers import Tokenizer

from workflows import chat_spans
from workflows.chat_spans import MARKER, REASONING_FIELDS, EncodedChat, split_reasoning
from workflows.checkpoint import load_config
from workflows.errors import UserError
from workflows.files import read_json, read_text
from workflows.template_sandbox import render

__all__ = ["THINKING_OFF", "ChatTemplate", "EncodedChat", "Message", "Reasoning"]

Message = dict[str, Any]
"""`{"role": "system" | "user" | "assistant" | "tool", "content": TEXT}`, and for some roles `reasoning_content`,
`tool_calls`, `tool_call_id`, `name`, `train`."""
Reasoning = Literal["keep", "drop", "none"]
"""Treatment of the reasoning before answers: "keep" = as the data has it, "drop" = removed from the data, "none" =
removed, and thinking is switched off in the chat template, here and in all that is made from the result."""
THINKING_OFF = "{%- set enable_thinking = false -%}\n"
"""The first line of a chat template in which thinking is switched off."""
# At both ends of a message it shows whether the template trims: no template writes this by itself.
_BORDER = 24
"""Characters after a prompt that may change how its end is tokenized."""
_SPACED = f"  \t{MARKER}\t  "


@dataclass(frozen=True)
class ChatTemplate:
    """A checkpoint's template and tokenizer.

    Attributes:
        source: The Jinja text.
        tokenizer: The fast tokenizer read from `tokenizer.json`.
        bos_token: The text of the beginning-of-sequence token, "" if the model has none.
        eos_token: The text of the end-of-sequence token.
        stop_ids: Every id that ends an answer (from `generation_config.json` and the EOS token), lowest first.
        vocab_size: Rows of the model's embedding, as far as the folder holds a model; a larger id is an error.
        drops_data_reasoning: Remove the reasoning of the data before it is rendered.
        other_specials: Texts of further special tokens (`pad_token`, `unk_token`, …) that templates may name.
    """

    source: str
    tokenizer: Tokenizer = field(repr=False)
    bos_token: str
    eos_token: str
    stop_ids: tuple[int, ...]
    vocab_size: int | None = None
    drops_data_reasoning: bool = False
    other_specials: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def from_checkpoint(cls, checkpoint_dir: Path | str, template_file: Path | None = None) -> "ChatTemplate":
        """Read the template and tokenizer of a checkpoint directory.

        Args:
            checkpoint_dir: The folder.
            template_file: A Jinja file to use in place of the checkpoint's own template.

        Raises:
            UserError: If a file is missing or malformed, or the checkpoint has no chat template (a base model).
        """
        directory = Path(checkpoint_dir)
        config = read_json(directory / "tokenizer_config.json")
        if template_file is None and (own := directory / "chat_template.jinja").is_file():
            template_file = own
        source = read_text(template_file) if template_file is not None else config.get("chat_template")
        if not isinstance(source, str):
            raise UserError(
                f"{directory} has no chat template (chat_template.jinja): it looks like a base model. Use the "
                "instruction-tuned variant, or give `lora` a template, which its result keeps: --chat_template FILE."
            )
        tokenizer_file = directory / "tokenizer.json"
        if not tokenizer_file.is_file():
            raise UserError(f"{tokenizer_file} does not exist. Run `make download` for this model again.")
        try:
            tokenizer = Tokenizer.from_file(str(tokenizer_file))
        except Exception as e:  # tokenizers raises bare Exception for every malformed file
            raise UserError(f"{tokenizer_file} is not a readable tokenizer ({e}). Download the model again.") from None
        tokenizer.no_padding()
        tokenizer.no_truncation()

        eos_token = _token_text(config.get("eos_token"))
        generation = directory / "generation_config.json"
        stop = read_json(generation).get("eos_token_id") if generation.is_file() else None
        stops = [i for i in (stop if isinstance(stop, list) else [stop]) if isinstance(i, int) and 0 <= i < 1 << 32]
        stop_ids = {token_id for token_id in stops if tokenizer.id_to_token(token_id) is not None}
        if (eos_id := tokenizer.token_to_id(eos_token)) is not None:
            stop_ids.add(eos_id)
        if not stop_ids:
            raise UserError(
                f"{directory}: neither tokenizer_config.json nor generation_config.json names an EOS token."
            )
        vocab_size = None
        if (directory / "model_config.yaml").is_file():
            vocab_size = load_config(directory).padded_vocab_size
        bos_token = _token_text(config.get("bos_token"))
        others = {name: text for name in _OTHER_SPECIALS if (text := _token_text(config.get(name)))}
        stops_found = tuple(sorted(stop_ids))
        return cls(source, tokenizer, bos_token, eos_token, stops_found, vocab_size, other_specials=others)

    def with_reasoning(self, reasoning: Reasoning) -> "ChatTemplate":
        """The template with a `reasoning` setting; `keep` leaves it as it is, switched off or not.

        Raises:
            UserError: If thinking is to be switched off in a template that has no switch for it.
        """
        if reasoning == "keep":
            return self
        changed = replace(self, drops_data_reasoning=True)
        if reasoning == "drop" or self.thinking_is_off:
            return changed
        off = replace(changed, source=THINKING_OFF + self.source)
        if off.opens_thoughts:
            raise UserError(
                "--reasoning none: the chat template begins every answer with the reasoning and has no switch for it "
                "(`enable_thinking`). Use --reasoning drop: answers then close the reasoning at once."
            )
        same = all(off.render(_PROBE + end, not end) == self.render(_PROBE + end, not end) for end in ([], [_ANSWER]))
        return changed if same else off  # a template without reasoning needs no switch

    def asked_for(self, reasoning: Reasoning | None) -> "ChatTemplate":
        """The template for questions to a trained checkpoint; None asks as it was trained.

        Raises:
            UserError: If reasoning is to be kept by a checkpoint that was trained with thinking switched off.
        """
        if reasoning == "keep" and self.thinking_is_off:
            raise UserError(
                "--reasoning keep: the checkpoint was trained with thinking switched off. Leave the option out, or "
                f"remove the first line of its chat_template.jinja: {THINKING_OFF}"
            )
        return self if reasoning is None else self.with_reasoning(reasoning)

    @property
    def thinking_is_off(self) -> bool:
        """True if the template's first line switches thinking off."""
        return self.source.startswith(THINKING_OFF.strip())

    @property
    def removes_reasoning(self) -> bool:
        """True if the reasoning of the data is removed before it is rendered."""
        return self.drops_data_reasoning or self.thinking_is_off

    @staticmethod
    def has_reasoning(message: Message) -> bool:
        """Return True if an assistant message holds reasoning, in a field of its own or before `</think>`."""
        return any(message.get(name) for name in REASONING_FIELDS) or bool(split_reasoning(message["content"])[0])

    def prepared(self, messages: list[Message]) -> list[Message]:
        """Messages as they are handed to the template: reasoning in the form that it reads, or removed."""
        return [self._prepared(message) if message.get("role") == "assistant" else message for message in messages]

    def _prepared(self, message: Message) -> Message:
        message = {name: value for name, value in message.items() if name != "train"}
        if self.removes_reasoning:
            message = {name: value for name, value in message.items() if name not in REASONING_FIELDS}
            return {**message, "content": split_reasoning(message["content"])[1]}
        if "reasoning_content" not in message or self._reasoning_field == "reasoning_content":
            return message
        reasoning = message.pop("reasoning_content")
        if self._reasoning_field is not None:
            return {**message, self._reasoning_field: reasoning}
        return (
            {**message, "content": f"<think>\n{reasoning}\n</think>\n\n{message['content']}"} if reasoning else message
        )

    @functools.cached_property
    def _reasoning_field(self) -> str | None:
        """The field that the template reads an answer's reasoning from; None if it reads none."""
        for name in REASONING_FIELDS:
            try:
                if MARKER in self._render([*_PROBE, {"role": "assistant", "content": "?", name: MARKER}], False, None):
                    return name
            except UserError:
                continue
        return None

    def render(
        self, messages: list[Message], add_generation_prompt: bool = False, tools: list[Any] | None = None
    ) -> str:
        """Render a conversation to text, as `transformers`' `apply_chat_template` does.

        Args:
            messages: The conversation.
            add_generation_prompt: Add the header of the assistant's next answer.
            tools: JSON schemas of the tools that the assistant may call.

        Raises:
            UserError: If the template is malformed or refuses the messages (an unknown role, two user turns in a row).
        """
        return self._render(self.prepared(messages), add_generation_prompt, tools)

    def _render(self, messages: list[Message], add_generation_prompt: bool, tools: list[Any] | None) -> str:
        try:
            return self._render_raw(messages, add_generation_prompt, tools)
        except jinja2.TemplateSyntaxError as e:
            raise UserError(f"The chat template is not valid Jinja (line {e.lineno}: {e.message}).") from None
        except (RecursionError, SyntaxError):  # of Python's compiler, which has limits on nesting
            raise UserError("The chat template is nested too deeply, or calls itself without end.") from None
        except _RENDERING_ERRORS as e:
            roles = ", ".join(str(message.get("role")) for message in messages[:20])
            reason = self._other_form(messages, add_generation_prompt, tools) or str(e)[:500]
            raise UserError(f"The chat template refuses this conversation (roles: {roles}): {reason}") from None

    def _render_raw(self, messages: list[Message], add_generation_prompt: bool, tools: list[Any] | None) -> str:
        variables = {
            **self.other_specials,
            "messages": copy.deepcopy(messages),  # Jinja's `indent` adds to the list that it is given
            "add_generation_prompt": add_generation_prompt,
            "bos_token": self.bos_token,
            "eos_token": self.eos_token,
            "tools": copy.deepcopy(tools) if tools else None,
            "documents": None,
        }
        return render(self.source, variables)

    def _other_form(self, messages: list[Message], add_generation_prompt: bool, tools: list[Any] | None) -> str:
        """Return in which other form the template takes a conversation, found out by rendering it so; "" if in none."""
        turn = [*_PROBE, _ANSWER]
        in_parts = [{**message, "content": [{"type": "text", "text": message["content"]}]} for message in turn]
        if not self._takes(turn, False, None) and self._takes(in_parts, False, None):
            return _PARTS
        with_json = [_with_json_arguments(message) for message in messages]
        return _JSON_ARGUMENTS if with_json != messages and self._takes(with_json, add_generation_prompt, tools) else ""

    def _takes(self, messages: list[Message], add_generation_prompt: bool, tools: list[Any] | None) -> bool:
        """Return True if the template renders a conversation and writes the user's texts."""
        try:
            text = self._render_raw(messages, add_generation_prompt, tools)
        except (*_RENDERING_ERRORS, RecursionError, SyntaxError):
            return False
        asked = [message["content"] for message in messages if message["role"] == "user"]
        return all((content if isinstance(content, str) else content[0]["text"]).strip() in text for content in asked)

    def encode(self, text: str) -> list[int]:
        """Token ids of a text; special tokens written in it become their ids, none are added.

        Raises:
            UserError: If one is beyond the model's embedding.
        """
        return self.checked_ids(self.tokenizer.encode(text, add_special_tokens=False).ids)

    def checked_ids(self, ids: list[int]) -> list[int]:
        """Token ids, after the check that the model has an embedding for each.

        Raises:
            UserError: If one is beyond the embedding.
        """
        if self.vocab_size is not None and ids and (worst := max(ids)) >= self.vocab_size:
            raise UserError(
                f"The text holds the token {self.tokenizer.id_to_token(worst)!r} (id {worst}), for which the model has "
                f"no embedding: it has {self.vocab_size:,} rows. Remove the token from the text, or use a checkpoint "
                "whose tokenizer and embedding belong together."
            )
        return ids

    def encode_answered(self, text: str, add_special_tokens: bool = False) -> list[int]:
        """Token ids of a rendered prompt with an answer or the beginning of one: no token straddles their border.

        Args:
            text: The text.
            add_special_tokens: Add those that tokenizer.json adds.
        """
        header = self.generation_header
        before, found, after = text.rpartition(header or MARKER)
        if found and after:
            alone = self.encode(header)
            if self.encode(header + after[:_BORDER])[: len(alone)] != alone:
                prompt = self.tokenizer.encode(before + header, add_special_tokens=add_special_tokens).ids
                return self.checked_ids(prompt + self.encode_inside(after))
        return self.checked_ids(self.tokenizer.encode(text, add_special_tokens=add_special_tokens).ids)

    def encode_inside(self, text: str) -> list[int]:
        """Token ids of a text that continues another one: a SentencePiece tokenizer adds no space before it."""
        head, both = self.encode("\n"), self.encode("\n" + text)
        return both[len(head) :] if both[: len(head)] == head else self.encode(text)

    def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str:
        """Text of token ids."""
        return self.tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)

    def prompt_ids(self, messages: list[Message], tools: list[Any] | None = None) -> list[int]:
        """Ids of a conversation that ends with the user's turn, plus the header of the assistant's answer."""
        return self.encode(self.render(messages, add_generation_prompt=True, tools=tools))

    def answer_prompt(self, messages: list[Message], tools: list[Any] | None = None) -> str:
        """The text of a prompt and of what the template writes before an answer's content.

        It is what a given answer is scored after: a space, a channel, an empty reasoning block are not the answer's.

        Raises:
            UserError: If the template refuses the messages, or writes no answer after the prompt.
        """
        return chat_spans.answer_prompt(self, messages, tools)

    def answer_text(self, content: str) -> str:
        """An assistant's answer as the model is to write it: trimmed where the template trims, turn end included.

        Where the generation prompt has opened the thoughts (DeepSeek-R1), they are not opened twice; an answer without
        thoughts closes them first, or the model would learn never to leave them.
        """
        content = content.strip() if self._trims_answers else content
        if self.opens_thoughts and "</think>" in content:
            content = content.removeprefix("<think>").removeprefix("\n")
        else:
            content = self.empty_thoughts + content
        return content + self.turn_end

    @functools.cached_property
    def turn_end(self) -> str:
        """The text that ends an assistant's turn: what the template writes after the answer, up to its stop token.

        Raises:
            UserError: If the template writes no stop token there: a model trained on it would never learn to stop.
        """
        after = self.render([*_PROBE, _ANSWER]).partition(MARKER)[2]
        end = self.find_stop(after, 0, len(after))
        if end is None:
            raise self.no_stop_error(after)
        return after[:end]

    def find_stop(self, text: str, begin: int, limit: int) -> int | None:
        """The end of the first stop token of `text[begin:limit]`, as an index of the text; None if it has none."""
        encoding = self.tokenizer.encode(text[begin:limit], add_special_tokens=False)
        ends = (end for i, (_, end) in zip(encoding.ids, encoding.offsets, strict=True) if i in self.stop_ids)
        return next((begin + end for end in ends), None)

    def no_user_error(self) -> UserError:
        """The error for a template that does not write the user's message."""
        reason = self._other_form(_PROBE, False, None) or "check chat_template.jinja."
        return UserError(f"The chat template does not write the user's message; {reason}")

    def no_stop_error(self, after: str) -> UserError:
        """The error for a template that ends an answer with the text `after`."""
        return UserError(
            f"The chat template writes {after!r} after an answer, which holds none of the model's stop tokens "
            f"{[self.tokenizer.id_to_token(i) for i in self.stop_ids]}. Correct chat_template.jinja or "
            "generation_config.json (eos_token_id)."
        )

    @functools.cached_property
    def generation_header(self) -> str:
        """The text that the generation prompt adds to a conversation; "" if it adds none."""
        bare, asked = self.render(_PROBE), self.render(_PROBE, add_generation_prompt=True)
        return asked[len(bare) :] if asked.startswith(bare) else ""

    @functools.cached_property
    def openings(self) -> tuple[str, ...]:
        """The texts that a rendered conversation begins with: before a user's and before a system message."""
        found = {self.render(_PROBE).partition(_PROBE[0]["content"])[0]}
        with contextlib.suppress(UserError):  # a template may refuse system messages
            marked: Message = {"role": "system", "content": MARKER}
            found.add(self.render([marked, *_PROBE]).partition(MARKER)[0])
        return tuple(sorted(found - {""}))

    @functools.cached_property
    def added_tokens(self) -> dict[int, str]:
        """The tokens that are cut out of a text before it is tokenized, by id."""
        return {i: token.content for i, token in self.tokenizer.get_added_tokens_decoder().items()}

    @functools.cached_property
    def unknown_id(self) -> int | None:
        """The id that stands for every character the tokenizer does not know; None if it knows all, or their bytes."""
        one, other = (self.tokenizer.encode(text, add_special_tokens=False).ids for text in ("\ue0aa", "\uf1bb"))
        return one[-1] if one and one == other else None

    @functools.cached_property
    def frames(self) -> dict[bool, tuple[str, str, int] | None]:
        """Texts that the template writes around an answer, the last one or an earlier one; filled when needed."""
        return {}

    @functools.cached_property
    def unwritten(self) -> dict[tuple[str, ...], list[str]]:
        """For the roles of a conversation, those of the messages that the template leaves out; filled when needed."""
        return {}

    @functools.cached_property
    def opens_thoughts(self) -> bool:
        """Whether the generation prompt itself writes `<think>`, so that answers begin inside the thoughts."""
        return self.render(_PROBE, add_generation_prompt=True).rstrip().endswith("<think>")

    @functools.cached_property
    def drops_thoughts(self) -> bool:
        """Whether of an earlier answer only what follows `</think>` is in the prompt, to the letter (DeepSeek-R1)."""
        texts = [
            self.render([*_PROBE, {"role": "assistant", "content": f"{thoughts}\n\n{MARKER}"}, *_PROBE])
            for thoughts in ("", "<think>\n\ue003\n</think>")
        ]
        return texts[0] == texts[1]

    @property
    def empty_thoughts(self) -> str:
        """What leads from the generation prompt to an answer without thoughts; "" where it does not open them."""
        return "\n</think>\n\n" if self.opens_thoughts else ""

    @functools.cached_property
    def default_system(self) -> str:
        """The system message the template writes when the conversation has none; "" if it writes none."""
        bare = self.render(_PROBE, add_generation_prompt=True)
        explicit = self.render([{"role": "system", "content": MARKER}, *_PROBE], add_generation_prompt=True)
        before, found, after = explicit.partition(MARKER)
        if found and len(bare) >= len(before) + len(after) and bare.startswith(before) and bare.endswith(after):
            return bare[len(before) : len(bare) - len(after)]
        return ""

    @functools.cached_property
    def _trims_answers(self) -> bool:
        return _SPACED not in self.render([*_PROBE, {"role": "assistant", "content": _SPACED}])

    def encode_chat(
        self, messages: list[Message], prompt_turns: int = 0, tools: list[Any] | None = None
    ) -> EncodedChat:
        """Encode a conversation for training: the assistant's tokens carry the loss, all others are context.

        Args:
            messages: Turns of which the last is the assistant's.
            prompt_turns: How many of them are the prompt, whatever their roles: nothing in these is learned.
            tools: JSON schemas of the tools that the assistant may call.

        Returns:
            The ids; without completion if no turn can be learned, which the notes explain.

        Raises:
            UserError: If the last turn is not the assistant's, the template refuses the conversation, or its text does
                not continue the prompt that asks for the last answer.
        """
        return chat_spans.encode_chat(self, messages, prompt_turns, tools)

    def problems(self) -> list[str]:
        """Return the faults that make the template unfit for training, found on a conversation of two short turns."""
        try:
            _ = self._probe_notes, self.single_turn()
        except UserError as e:
            return [str(e)]
        return []

    def remarks(self) -> list[str]:
        """Return the notes on what is not learned of a longer conversation, or is encoded in another form."""
        return sorted(set(self._probe_notes))

    @functools.cached_property
    def _probe_notes(self) -> tuple[str, ...]:
        answer: Message = {"role": "assistant", "content": "It is."}
        return self.encode_chat([*_PROBE, answer, *_PROBE, answer]).notes

    def single_turn(self) -> tuple[str, str, bool]:
        """How a prompt of one user message, without a system message, is made.

        Returns:
            The text before the message, the text after it, and whether the template trims the message.

        Raises:
            UserError: If the template does not write the user's message.
        """
        text = self.render([{"role": "user", "content": _SPACED}], add_generation_prompt=True)
        if MARKER not in text:
            raise self.no_user_error()
        trims = _SPACED not in text
        before, _, after = text.partition(MARKER if trims else _SPACED)
        return before, after, trims


_OTHER_SPECIALS = ("unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_PROBE: list[Message] = [{"role": "user", "content": "\ue002"}]
_RENDERING_ERRORS = (jinja2.TemplateError, TypeError, ValueError, ArithmeticError, LookupError, AttributeError)
"""What a template raises that does not suit its messages."""
_PARTS = (
    "it expects contents as lists of parts (text and images), but gets plain text. Use a text-only model, or a "
    "template that reads plain text (--chat_template)."
)
_JSON_ARGUMENTS = (
    "it expects the arguments of tool calls as a JSON string, but gets objects. Use another template "
    "(--chat_template), or remove the tool calls from the data."
)
_ANSWER: Message = {"role": "assistant", "content": MARKER}


def _with_json_arguments(message: Message) -> Message:
    if "tool_calls" not in message:
        return message
    calls = [
        {**call, "function": {**call["function"], "arguments": json.dumps(call["function"].get("arguments"))}}
        for call in message["tool_calls"]
        if "function" in call
    ]
    return {**message, "tool_calls": calls}


def _token_text(token: Any) -> str:
    """`tokenizer_config.json` writes a special token as a string, as an AddedToken object, or as null."""
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else ""
