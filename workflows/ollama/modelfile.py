"""The Modelfile of a checkpoint: FROM, TEMPLATE, SYSTEM, and every PARAMETER that a default of Ollama's would decide.

Ollama renders prompts with Go's text/template, not with the Jinja that came with the model. The Go template is derived
from what the Jinja template does: it is rendered with marked contents, and the texts between the marks are read off.
The pieces are then put together again and compared with the Jinja rendering of other conversations, so that a template
which does more than surround its messages is refused rather than approximated.

BOS: where the Jinja template writes it as text, so does the Go template, and the GGUF says `add_bos_token: false`; the
tokenizer turns the text into the one id. Go's templates cannot trim: where the Jinja template trims a message, equal
prompts need messages without spaces at their ends.
"""

import json
from dataclasses import dataclass
from typing import Any

from workflows.chat_template import ChatTemplate, Message
from workflows.errors import UserError

_S, _U1, _A1, _U2, _A2, _U3 = (f"\ue010{i}\ue011" for i in range(6))  # private use: in no real text, never split


@dataclass(frozen=True)
class GoTemplate:
    """A chat template as the texts around its messages.

    Attributes:
        system_before: Text before the system message; None if the template takes none.
        system_after: Text between the system message and the first user message.
        bare: Text before the first user message when there is no system message.
        user_to_assistant: Text between a user message and the answer to it, in the history.
        assistant_to_user: Text between an answer and the next user message.
        generation: Text after the last user message, where the model begins to speak.
    """

    system_before: str | None
    system_after: str
    bare: str
    user_to_assistant: str
    assistant_to_user: str
    generation: str

    def render(self, messages: list[Message]) -> str:
        """What `source` renders to in Ollama, for an optional system message and then user and assistant in turn."""
        text = "" if messages[0]["role"] == "system" else self.bare
        for i, message in enumerate(messages):
            content, is_last = message["content"], i == len(messages) - 1
            if message["role"] == "system":
                text += f"{self.system_before or ''}{content}{self.system_after}"
            elif message["role"] == "user":
                text += content + (self.generation if is_last else self.user_to_assistant)
            else:
                text += content + ("" if is_last else self.assistant_to_user)
        return text

    @property
    def source(self) -> str:
        """The Go template. `{{` in a literal text, which Go would read as an action, is written as a quoted string."""
        system = ""
        if self.system_before is not None:
            before, after = _literal(self.system_before), _literal(self.system_after)
            system = f'{{{{ if eq $message.Role "system" }}}}{before}{{{{ $message.Content }}}}{after}{{{{ else }}}}'
        bare = f"{{{{ if eq $i 0 }}}}{_literal(self.bare)}{{{{ end }}}}" if self.bare else ""
        answer_next = _literal(self.user_to_assistant)
        if self.generation != self.user_to_assistant:
            answer_next = f"{{{{ if $last }}}}{_literal(self.generation)}{{{{ else }}}}{answer_next}{{{{ end }}}}"
        return (
            "{{ range $i, $message := .Messages }}{{ $last := eq (len (slice $.Messages $i)) 1 }}"
            + system
            + bare
            + f'{{{{ if eq $message.Role "user" }}}}{{{{ $message.Content }}}}{answer_next}'
            + '{{ else if eq $message.Role "assistant" }}{{ $message.Content }}'
            + f"{{{{ if not $last }}}}{_literal(self.assistant_to_user)}{{{{ end }}}}{{{{ end }}}}"
            + ("{{ end }}" if system else "")
            + "{{ end }}"
        )


def _literal(text: str) -> str:
    # A quoted string where Go or the Modelfile (which ends a value at """) would read the text as something else.
    return "{{ " + json.dumps(text, ensure_ascii=False) + " }}" if "{{" in text or '"' in text else text


def derive(template: ChatTemplate) -> GoTemplate:
    """Derive the Go template that gives the same prompts as a checkpoint's Jinja template.

    Raises:
        UserError: If the template does not write the user's message, or does what a Go template cannot follow.
    """
    turns: list[Message] = [
        {"role": "user", "content": _U1},
        {"role": "assistant", "content": _A1},
        {"role": "user", "content": _U2},
        {"role": "assistant", "content": _A2},
        {"role": "user", "content": _U3},
    ]
    try:
        rendered = template.render(turns, add_generation_prompt=True)
        bare, user_to_assistant, assistant_to_user, _, _, generation = _between(rendered, [_U1, _A1, _U2, _A2, _U3])
    except ValueError as e:
        raise UserError(f"The chat template cannot be written as an Ollama TEMPLATE: {e}") from None
    try:
        system: Message = {"role": "system", "content": _S}
        rendered = template.render([system, *turns], add_generation_prompt=True)
        system_before, system_after, *_ = _between(rendered, [_S, _U1])
    except (UserError, ValueError):  # it refuses or drops system messages
        system_before, system_after = None, ""
    derived = GoTemplate(system_before, system_after, bare, user_to_assistant, assistant_to_user, generation)
    _check(derived, template)
    return derived


def _between(text: str, marks: list[str]) -> list[str]:
    """The texts before, between and after marks that must occur once each, in order."""
    pieces = []
    for mark in marks:
        before, found, text = text.partition(mark)
        if not found or mark in text:
            raise ValueError("it leaves out a message, repeats it, or changes the order.")
        pieces.append(before)
    return [*pieces, text]


def conversations(with_system: bool) -> list[list[Message]]:
    """Conversations of one to three turns, without and (where asked for) with a system message, to compare prompts."""
    turns: list[Message] = [
        {"role": "user", "content": "What is anemia?"},
        {"role": "assistant", "content": "Too little hemoglobin:\n\n1. in the blood;  2. {{ .Content }}"},
        {"role": "user", "content": 'And "tachypnea" – 漢字, <b>&amp;</b>?'},
        {"role": "assistant", "content": "Fast breathing."},
        {"role": "user", "content": "Thanks\nWhich is worse?"},
    ]
    system: list[Message] = [{"role": "system", "content": "Answer in one line.\nBe exact."}]
    shapes = [turns[:1], turns[:3], turns[:5]]
    return shapes + [system + shape for shape in shapes] if with_system else shapes


def _check(derived: GoTemplate, template: ChatTemplate) -> None:
    for messages in conversations(with_system=derived.system_before is not None):
        expected = template.render(messages, add_generation_prompt=True)
        if (got := derived.render(messages)) != expected:
            at = next((i for i, (a, b) in enumerate(zip(got, expected, strict=False)) if a != b), len(expected))
            raise UserError(
                "The chat template does more than surround its messages, and Ollama's TEMPLATE cannot follow it: for a "
                f"conversation of {len(messages)} messages it writes {expected[max(0, at - 20) : at + 60]!r}, where "
                f"the derived one gives {got[max(0, at - 20) : at + 60]!r}."
            )


@dataclass(frozen=True)
class Modelfile:
    """Everything but the weights that makes a model in Ollama.

    Attributes:
        template: The Go template.
        system: The system message used when a conversation has none; "" for none.
        parameters: Ollama's parameters; `stop` is a list.
    """

    template: str
    system: str
    parameters: dict[str, Any]

    def text(self, source: str) -> str:
        """The file's text.

        Args:
            source: What FROM names: a GGUF file beside the Modelfile.
        """
        lines = [f"FROM {source}", f'TEMPLATE """{self.template}"""']
        if self.system:
            lines.append(f'SYSTEM """{self.system}"""')
        for name, value in self.parameters.items():
            for item in value if isinstance(value, list) else [value]:
                lines.append(f"PARAMETER {name} {json.dumps(item, ensure_ascii=False)}")
        return "\n".join(lines) + "\n"


def make_modelfile(
    template: ChatTemplate,
    generation: dict[str, Any],
    *,
    num_ctx: int,
    num_thread: int,
    temperature: float | None = None,
    top_p: float | None = None,
    repeat_penalty: float = 1.0,
) -> Modelfile:
    """Derive a checkpoint's Modelfile.

    Args:
        template: The checkpoint's chat template.
        generation: The contents of `generation_config.json`; its temperature, top_p and top_k are taken over (null, as
            in some, means none).
        num_ctx: Context length in tokens, prompt and answer together.
        num_thread: CPU threads.
        temperature: Overrides the checkpoint's; 0 is greedy.
        top_p: Overrides the checkpoint's.
        repeat_penalty: 1.0 is none.

    Raises:
        UserError: If the chat template cannot be derived, or a setting is not a number.
    """
    own = {"temperature": 0.2, "top_p": 0.9, "top_k": 0}
    own |= {name: generation[name] for name in own if generation.get(name) is not None}
    if odd := {name: value for name, value in own.items() if not isinstance(value, int | float)}:
        raise UserError(
            f"generation_config.json: {', '.join(f'{n} is {v!r:.40}, not a number' for n, v in odd.items())}."
        )
    stops = [template.tokenizer.id_to_token(stop_id) for stop_id in template.stop_ids]
    derived = derive(template)
    # A template that takes no system message writes any default itself, before the first question.
    system = "" if derived.system_before is None else template.default_system
    return Modelfile(
        derived.source,
        system if '"""' not in system else "",
        {
            "stop": stops,
            "num_ctx": num_ctx,
            "num_predict": num_ctx,
            "num_thread": num_thread,
            "temperature": float(own["temperature"] if temperature is None else temperature),
            "top_p": float(own["top_p"] if top_p is None else top_p),
            "top_k": int(own["top_k"]),
            "min_p": 0.0,
            "repeat_penalty": float(repeat_penalty),
        },
    )
