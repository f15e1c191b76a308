"""For every chat template in TRL's wheel our ids and masks are transformers', or the difference has a named reason.

`docs/templates.md` is the table of that. To write it again:

    .venv/bin/python -m tests.workflows.test_trl_templates
"""

import functools
from collections import Counter
from pathlib import Path

import pytest

from tests.workflows.trl_templates import CONVERSATIONS, NAMES, ours, tokenizer_of, transformers_rendering
from workflows.chat_spans import APART, RETOKENIZED, EncodedChat
from workflows.errors import UserError

PAGE = Path(__file__).parents[2] / "docs" / "templates.md"
KINDS = ("byte-level", "SentencePiece")
ARGUMENT = "whiskey"
"""The word that only the tool call holds."""
INTRODUCTION = """# Chat templates

How a conversation becomes token ids: the checkpoint's chat template renders it once, as a whole, and the text is
encoded once. The prompt's ids are those that the model is shown at inference; every assistant turn is learned, from the
end of its prompt to the token that ends the turn. What cannot be learned is counted when a step encodes its data, with
the words below. `train: false` on an assistant message makes it context.

Each of the {count} templates in the wheel of TRL {version} was tried with three conversations (a system message and one
turn; three turns; a tool call with its result) and two tokenizers (byte-level BPE and one of SentencePiece's kind).
*equal*: ids and masks are those of transformers' `apply_chat_template`; *refused*: an error names the reason before
training; *encoded after the prompt*: the ids of the whole do not begin with those that the model is shown at inference,
so the answer is encoded after the latter. Numbers refer to the notes below the table. The test that checks all of this
writes the page: `python -m tests.workflows.test_trl_templates`.

| template | system + one turn | several turns | tools |
|---|---|---|---|
"""
CURES = """
Where earlier answers are not learned, make a row of each answer, or train with a template that keeps the reasoning of
all turns (`--chat_template`).

Reasoning is the `reasoning_content` of an assistant message, or the text up to `</think>` that its content begins with.
A template that reads it gets it in the field that it reads; for others it becomes `<think>…</think>` before the
content.
`--reasoning drop` removes it from the data. `--reasoning none` removes it and switches thinking off: the line
`{%- set enable_thinking = false -%}` becomes the first of the result's chat template, so that transformers, LitGPT,
evaluation and Ollama all ask in the same way. With it the prompts of Qwen3's and Nemotron's templates end with an empty
reasoning block, and answers without reasoning continue them as they are.
"""


def expected_mask(name: str, kind: str, conversation: str) -> tuple[list[int], list[bool], list[bool]]:
    """transformers' ids, and for each whether it is certain to be the assistant's, or certain to be another's.

    Found in transformers' text by words that occur once, without the code under test.
    """
    text, ids, _ = rendered(name, kind, conversation)
    encoding = tokenizer_of(kind).encode(text, add_special_tokens=False)
    assert encoding.ids == ids
    assistant, other = [False] * len(ids), [False] * len(ids)
    for message in CONVERSATIONS[conversation][0]:
        mask = assistant if message["role"] == "assistant" else other
        words = message["content"] or ARGUMENT
        start = text.index(words)
        for n, (begin, end) in enumerate(encoding.offsets):
            mask[n] = mask[n] or (begin < start + len(words) and end > start)
    return ids, assistant, other


@functools.cache
def rendered(name: str, kind: str, conversation: str) -> tuple[str, list[int], list[int]]:
    return transformers_rendering(name, kind, conversation)


@functools.cache
def outcome(name: str, kind: str, conversation: str) -> tuple[str, EncodedChat | None]:
    """What we make of a conversation: "equal", "encoded after the prompt", or "refused: …"."""
    messages, tools = CONVERSATIONS[conversation]
    try:
        chat = ours(name, kind).encode_chat(messages, tools=tools)
    except UserError as e:
        return f"refused: {str(e).partition('): ')[2] or e}", None
    try:
        _, ids, _ = rendered(name, kind, conversation)
    except Exception as e:
        return f"rendered, where transformers raises {e}", chat
    got = chat.prompt + chat.completion
    rest = tokenizer_of(kind).decode(ids[len(got) :], skip_special_tokens=True)
    return ("equal" if got == ids[: len(got)] and not rest.strip() else "encoded after the prompt"), chat


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", NAMES)
def test_ids_and_masks_are_transformers_or_the_reason_is_named(name, kind):
    for conversation, (messages, tools) in CONVERSATIONS.items():
        told, chat = outcome(name, kind, conversation)
        if chat is None:
            assert told.startswith("refused: ") and len(told) > 30
            continue
        template, tokenizer = ours(name, kind), tokenizer_of(kind)
        learned = [False] * len(chat.prompt) + chat.loss_mask
        assert any(learned) and not told.startswith("rendered")
        if told != "equal":  # the prompt is that of inference all the same, and why is said
            assert APART in chat.notes or RETOKENIZED in chat.notes
            first = next(i for i, message in enumerate(messages) if message["role"] == "assistant")
            prompts = [
                template.prompt_ids(messages[:i], tools)
                for i in range(first, len(messages))
                if messages[i]["role"] == "assistant"
            ]
            assert chat.prompt in prompts
            text = tokenizer.decode([i for i, own in zip(chat.prompt + chat.completion, learned, strict=True) if own])
            assert messages[-1]["content"] in text and "victor" not in text and "charlie" not in text
            continue
        ids, assistant, other = expected_mask(name, kind, conversation)
        learned += [False] * (len(ids) - len(learned))
        missing = [n for n, own in enumerate(assistant) if own and not learned[n]]
        assert not missing or any("not learned" in note for note in chat.notes)
        assert not any(own and theirs for own, theirs in zip(learned, other, strict=True))
        if not chat.notes:
            for n in range(1, len(ids)):  # each turn is learned up to its stop token
                if learned[n - 1] and not learned[n]:
                    assert ids[n - 1] in template.stop_ids
        _, _, theirs = rendered(name, kind, conversation)
        if any(theirs) and not chat.notes:  # `{% generation %}` tags: the same contents, and the end of the last turn
            assert all(theirs[n] for n, own in enumerate(assistant) if own)
            end = max(n for n, own in enumerate(learned) if own)
            assert theirs[end] and ids[end] in template.stop_ids


SWITCHED = [n for n in NAMES if n.startswith(("qwen3", "nemotron")) and "vl" not in n and "instruct" not in n]


@pytest.mark.parametrize("name", SWITCHED)
def test_thinking_switched_off_is_transformers_rendering_without_it(name):
    """The line in the template does what `enable_thinking=False` does, and the whole continues the prompt."""
    messages, _ = CONVERSATIONS["system"]
    template = ours(name, "byte-level").with_reasoning("none")
    thinks = messages[:-1] + [{**messages[-1], "reasoning_content": "hush"}]
    asked, _, _ = transformers_rendering(name, "byte-level", messages[:-1], True, enable_thinking=False)
    whole, ids, _ = transformers_rendering(name, "byte-level", messages, enable_thinking=False)
    assert template.render(messages[:-1], True) == asked and whole.startswith(asked)
    for version in (messages, thinks):
        chat = template.encode_chat(version)
        got = chat.prompt + chat.completion
        assert got == ids[: len(got)]
        assert tokenizer_of("byte-level").decode(chat.completion, False) == "echo foxtrot<|im_end|>"
    assert any("--reasoning" in note for note in template.encode_chat(thinks).notes)


def page() -> str:
    """The table as Markdown."""
    import trl

    legend: dict[str, int] = {}

    def number(text: str) -> str:
        return str(legend.setdefault(text, len(legend) + 1))

    def cell(name: str, conversation: str) -> str:
        shown = []
        for kind in KINDS:
            told, chat = outcome(name, kind, conversation)
            notes = Counter(chat.notes) if chat else Counter()
            reasons = [number(told.removeprefix("refused: "))] if told.startswith("refused") else []
            reasons += [number(note) for note in notes]
            told = "refused" if told.startswith("refused") else told
            shown.append(told + (f" ({', '.join(reasons)})" if reasons else ""))
        return shown[0] if len(set(shown)) == 1 else "; ".join(map(": ".join, zip(KINDS, shown, strict=True)))

    rows = [f"| `{name}` | " + " | ".join(cell(name, each) for each in CONVERSATIONS) + " |" for name in NAMES]
    notes = [f"{n}. {text}" for text, n in legend.items()]
    introduction = INTRODUCTION.format(count=len(NAMES), version=trl.__version__)
    return introduction + "\n".join(rows) + "\n\nNotes:\n\n" + "\n".join(notes) + "\n" + CURES


def test_the_page_is_what_the_templates_give():
    assert PAGE.read_text(encoding="utf-8") == page()


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
