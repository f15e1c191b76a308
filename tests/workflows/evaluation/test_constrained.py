"""The option that is written when nothing else may be: against every text the model could write instead."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from workflows.chat_template import ChatTemplate
from workflows.errors import UserError
from workflows.evaluation.constrained import choose_options, enum_of, speakable, token_bytes, written
from workflows.training.model import GPT, load_model


@pytest.fixture(scope="module")
def template(tiny_llama: Path) -> ChatTemplate:
    return ChatTemplate.from_checkpoint(tiny_llama)


@pytest.fixture(scope="module")
def model(tiny_llama: Path) -> GPT:
    return load_model(tiny_llama, precision="32-true", max_seq_length=256)


def by_hand(model: GPT, template: ChatTemplate, prompt: str, options: list[str]) -> int:
    """The same by trying every token of the vocabulary at each step."""
    texts = {token_id: text for text, token_id in token_bytes(template.tokenizer).items()}
    ids, done = template.encode(prompt), b""
    forms = [written(option).encode() for option in options]
    while True:
        logits = model(torch.tensor([ids]))[0, -1]
        for token_id in torch.argsort(logits, descending=True).tolist():
            if token_id not in texts:
                continue
            grown = done + texts[token_id]
            ahead = [i for i, form in enumerate(forms) if form.startswith(grown) or grown.rstrip() == form]
            if ahead:
                break
        if len(ahead) == 1:
            return ahead[0]
        ids, done = [*ids, token_id], grown


@settings(deadline=None, max_examples=25)
@given(options=st.lists(st.text(min_size=1, max_size=8), min_size=2, max_size=5, unique_by=speakable))
def test_the_likeliest_token_that_leads_to_an_option_at_each_step(options: list[str], model, template) -> None:
    prompt = "Which finding?"
    assert choose_options(model, template, [prompt], [options], progress=False) == [
        by_hand(model, template, prompt, options)
    ]


def test_an_option_that_begins_another_can_be_chosen(model: GPT, template: ChatTemplate) -> None:
    options = ["Tachypnea", "Tachypnea of the uterus", "Anemia"]
    prompts = [f"question {i}" for i in range(20)]
    chosen = choose_options(model, template, prompts, [options] * 20, progress=False)
    assert chosen == [by_hand(model, template, prompt, options) for prompt in prompts]
    assert len(set(chosen)) > 1


def test_tokens_are_the_bytes_that_they_decode_to(template: ChatTemplate) -> None:
    found = token_bytes(template.tokenizer)
    assert len(found) == template.tokenizer.get_vocab_size() - 3  # the special ones
    for text, token_id in found.items():
        if text.isascii():
            assert template.decode([token_id]) == text.decode()
    ids = template.encode("Ünïcödé 漢字")
    by_id = {token_id: text for text, token_id in found.items()}
    assert b"".join(by_id[i] for i in ids).decode() == "Ünïcödé 漢字"


def test_a_question_that_does_not_fit_is_told(model: GPT, template: ChatTemplate) -> None:
    with pytest.raises(UserError, match="longer than the model's context of 256"):
        choose_options(model, template, ["x " * 300], [["a", "b"]], progress=False)


def test_options_that_differ_in_what_a_grammar_cannot_hold_are_told() -> None:
    assert enum_of(['a "b"', "a\\b"])["enum"] == ["a 'b'", "a/b"]
    with pytest.raises(UserError, match="differ in quotation marks"):
        enum_of(['a "b"', "a 'b'"])
