"""The one source of every prompt: the chat template that came with the checkpoint, and its tokenizer.

Training, evaluation, rollouts, LitGPT's CLI and Ollama all get their prompts from here, so that a model is always
asked in the form it was trained on. The template is Jinja as Hugging Face ships it (`chat_template.jinja`), rendered in
Jinja's sandbox; the text is tokenized by `tokenizer.json` without further special tokens, because the template writes
them itself (a BOS token too, where the model wants one).

Prompt and completion are encoded apart and concatenated: at inference the model continues the prompt's tokens, so no
token may straddle the border. The token that ends the assistant's turn belongs to the completion.
"""

import functools
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2
from tokenizers import Tokenizer

from workflows.errors import UserError
from workflows.files import read_json, read_text
from workflows.template_sandbox import render

Message = dict[str, str]
"""`{"role": "system" | "user" | "assistant", "content": TEXT}`."""

# Private-use characters: no tokenizer or template treats them specially, and no real text holds them by accident.
_CONTENT = "\ue000content\ue001"


@dataclass(frozen=True)
class EncodedChat:
    """One conversation as token ids, split where the model begins to speak.

    Attributes:
        prompt: Ids up to and including the generation prompt of the first assistant turn that is learned from.
        completion: The ids that follow.
        loss_mask: For each completion id, whether the assistant wrote it (turn-ending tokens included).
    """

    prompt: list[int]
    completion: list[int]
    loss_mask: list[bool]


@dataclass(frozen=True)
class ChatTemplate:
    """A checkpoint's template and tokenizer.

    Attributes:
        source: The Jinja text.
        tokenizer: The fast tokenizer read from `tokenizer.json`.
        bos_token: The text of the beginning-of-sequence token, "" if the model has none.
        eos_token: The text of the end-of-sequence token.
        stop_ids: Every id that ends an answer (from `generation_config.json` and the EOS token), lowest first.
    """

    source: str
    tokenizer: Tokenizer = field(repr=False)
    bos_token: str
    eos_token: str
    stop_ids: tuple[int, ...]

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
        return cls(source, tokenizer, _token_text(config.get("bos_token")), eos_token, tuple(sorted(stop_ids)))

    def render(self, messages: list[Message], add_generation_prompt: bool = False) -> str:
        """Render a conversation to text, as `transformers`' `apply_chat_template` does.

        Raises:
            UserError: If the template is malformed or refuses the messages (an unknown role, two user turns in a row).
        """
        variables = {
            "messages": [{**message} for message in messages],  # Jinja's `indent` adds to the list that it is given
            "add_generation_prompt": add_generation_prompt,
            "bos_token": self.bos_token,
            "eos_token": self.eos_token,
            "tools": None,
            "documents": None,
        }
        try:
            return render(self.source, variables)
        except jinja2.TemplateSyntaxError as e:
            raise UserError(f"The chat template is not valid Jinja (line {e.lineno}: {e.message}).") from None
        except (RecursionError, SyntaxError):  # of Python's compiler, which has limits on nesting
            raise UserError("The chat template is nested too deeply, or calls itself without end.") from None
        except (jinja2.TemplateError, TypeError, ValueError, ArithmeticError, LookupError, AttributeError) as e:
            roles = ", ".join(str(message.get("role")) for message in messages[:20])
            raise UserError(f"The chat template refuses this conversation (roles: {roles}): {str(e)[:500]}") from None

    def encode(self, text: str) -> list[int]:
        """Token ids of a text; special tokens written in it become their ids, none are added."""
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str:
        """Text of token ids."""
        return self.tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)

    def prompt_ids(self, messages: list[Message]) -> list[int]:
        """Ids of a conversation that ends with the user's turn, plus the header of the assistant's answer."""
        return self.encode(self.render(messages, add_generation_prompt=True))

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
        after = self.render([*_PROBE, {"role": "assistant", "content": _CONTENT}]).partition(_CONTENT)[2]
        encoding = self.tokenizer.encode(after, add_special_tokens=False)
        for token_id, (_, end) in zip(encoding.ids, encoding.offsets, strict=True):
            if token_id in self.stop_ids:
                return after[:end]
        raise UserError(
            f"The chat template writes {after!r} after an answer, which holds none of the model's stop tokens "
            f"{[self.tokenizer.id_to_token(i) for i in self.stop_ids]}. Mend chat_template.jinja or "
            "generation_config.json (eos_token_id)."
        )

    @functools.cached_property
    def opens_thoughts(self) -> bool:
        """Whether the generation prompt itself writes `<think>`, so that answers begin inside the thoughts."""
        return self.render(_PROBE, add_generation_prompt=True).rstrip().endswith("<think>")

    @functools.cached_property
    def drops_thoughts(self) -> bool:
        """Whether of an earlier answer only what follows `</think>` is in the prompt, to the letter (DeepSeek-R1)."""
        texts = [
            self.render([*_PROBE, {"role": "assistant", "content": f"{thoughts}\n\n{_CONTENT}"}, *_PROBE])
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
        explicit = self.render([{"role": "system", "content": _CONTENT}, *_PROBE], add_generation_prompt=True)
        before, found, after = explicit.partition(_CONTENT)
        if found and len(bare) >= len(before) + len(after) and bare.startswith(before) and bare.endswith(after):
            return bare[len(before) : len(bare) - len(after)]
        return ""

    @functools.cached_property
    def _trims_answers(self) -> bool:
        spaced = self.render([*_PROBE, {"role": "assistant", "content": f" {_CONTENT} "}])
        return f" {_CONTENT} " not in spaced

    def encode_chat(self, messages: list[Message], prompt_turns: int = 0) -> EncodedChat:
        """Encode a conversation for training: the assistant's tokens carry the loss, all others are context.

        Each assistant turn is encoded on its own, after the text the template puts before it. Where a template rewrites
        earlier turns (DeepSeek-R1 drops their thoughts), only the last answer is learned from.

        Args:
            messages: Turns of which the last is the assistant's.
            prompt_turns: How many of them are the prompt, whatever their roles: nothing in these is learned from.

        Raises:
            UserError: If no turn, or not the last one, is the assistant's.
        """
        if not messages or messages[-1].get("role") != "assistant":
            raise UserError("A training conversation must end with an assistant message.")
        spoken = [i for i in range(prompt_turns, len(messages)) if messages[i]["role"] == "assistant"]
        contexts = [self.render(messages[:i], add_generation_prompt=True) for i in spoken]
        answers = [self.answer_text(messages[i]["content"]) for i in spoken]
        for earlier in range(len(spoken) - 1):
            if not contexts[earlier + 1].startswith(contexts[earlier] + answers[earlier]):
                contexts, answers = contexts[-1:], answers[-1:]
                break

        completion, loss_mask = [], []
        text = contexts[0]
        for turn, (context, answer) in enumerate(zip(contexts, answers, strict=True)):
            if turn > 0:
                between = self.encode(context[len(text) :])
                completion += between
                loss_mask += [False] * len(between)
            ids = self.encode(answer)
            completion += ids
            loss_mask += [True] * len(ids)
            text = context + answer
        return EncodedChat(self.encode(contexts[0]), completion, loss_mask)

    def single_turn(self) -> tuple[str, str, bool]:
        """How a prompt of one user message, without a system message, is made.

        Returns:
            The text before the message, the text after it, and whether the template trims the message.

        Raises:
            UserError: If the template does not write the user's message.
        """
        spaced = f" {_CONTENT} "
        text = self.render([{"role": "user", "content": spaced}], add_generation_prompt=True)
        if _CONTENT not in text:
            raise UserError("The chat template does not write the user's message; check chat_template.jinja.")
        trims = spaced not in text
        before, _, after = text.partition(_CONTENT if trims else spaced)
        return before, after, trims


_PROBE: list[Message] = [{"role": "user", "content": "\ue002"}]


def _token_text(token: Any) -> str:
    """`tokenizer_config.json` writes a special token as a string, as an AddedToken object, or as null."""
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else ""
