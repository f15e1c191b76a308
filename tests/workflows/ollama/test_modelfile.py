"""Go templates derived from the Jinja templates of known families; the real server is asked in test_verify.py."""

import dataclasses
from pathlib import Path

import pytest

from tests.workflows.r1_models import R1
from workflows.chat_template import ChatTemplate
from workflows.errors import UserError
from workflows.ollama.modelfile import conversations, derive, make_modelfile

LLAMA3 = (
    "{{- bos_token }}{%- if messages[0]['role'] == 'system' %}{%- set system_message = messages[0]['content']|trim %}"
    "{%- set messages = messages[1:] %}{%- else %}{%- set system_message = '' %}{%- endif %}"
    "{{- '<|start_header_id|>system<|end_header_id|>\\n\\nToday Date: ' + strftime_now('%d %b %Y') + '\\n\\n' }}"
    "{{- system_message }}{{- '<|eot_id|>' }}"
    "{%- for message in messages %}{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' "
    "+ message['content'] | trim + '<|eot_id|>' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}"
)
LLAMA2 = (
    "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}"
    "{% set system_message = '<<SYS>>\\n' + messages[0]['content'] + '\\n<</SYS>>\\n\\n' %}{% else %}"
    "{% set loop_messages = messages %}{% set system_message = '' %}{% endif %}"
    "{% for message in loop_messages %}{% if loop.index0 == 0 %}{% set content = system_message + message['content'] %}"
    "{% else %}{% set content = message['content'] %}{% endif %}{% if message['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + content + ' [/INST]' }}{% else %}{{ ' ' + content + ' ' + eos_token }}{% endif %}"
    "{% endfor %}"
)
NO_SYSTEM = (
    "{% for message in messages %}{% if message['role'] == 'system' %}{{ raise_exception('no system role') }}"
    "{% endif %}{{ '<' + message['role'] + '>' + message['content'] + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)
NUMBERED = "{% for m in messages %}{{ loop.index|string + m['content'] + eos_token }}{% endfor %}>"
UPPER = "{% for m in messages %}{{ m['role'] + m['content']|upper + eos_token }}{% endfor %}>"
BACKWARDS = "{% for m in messages|reverse %}{{ m['role'] + m['content'] + eos_token }}{% endfor %}>"
QUOTES = '{% for m in messages %}{{ "{{ \\"" + m.role + "\\"\\"\\" }}" + m.content + eos_token }}{% endfor %}>'


@pytest.fixture(scope="module")
def chatml(tiny_llama: Path) -> ChatTemplate:
    return ChatTemplate.from_checkpoint(tiny_llama)


def of(chatml: ChatTemplate, source: str) -> ChatTemplate:
    return dataclasses.replace(chatml, source=source, bos_token="<|endoftext|>")


@pytest.mark.parametrize(
    "source", [None, LLAMA3, R1, LLAMA2, QUOTES], ids=["chatml", "llama3", "r1", "llama2", "quotes"]
)
def test_derived_template_renders_conversations_as_jinja_does(source: str | None, chatml: ChatTemplate) -> None:
    template = of(chatml, source) if source else chatml
    derived = derive(template)
    for messages in conversations(with_system=True):
        assert derived.render(messages) == template.render(messages, add_generation_prompt=True)


def test_default_system_message_becomes_system(chatml: ChatTemplate) -> None:
    modelfile = make_modelfile(chatml, {}, num_ctx=512, num_thread=1)
    assert modelfile.system == "You are a tiny model"
    assert derive(chatml).bare == "<|im_start|>system\nYou are a tiny model<|im_end|>\n<|im_start|>user\n"
    assert make_modelfile(of(chatml, LLAMA2), {}, num_ctx=512, num_thread=1).system == ""


def test_bos_stands_once_at_the_beginning(chatml: ChatTemplate) -> None:
    derived = derive(of(chatml, LLAMA3))
    assert derived.bare.count("<|endoftext|>") == 1 and derived.bare.startswith("<|endoftext|>")
    assert derived.system_before is not None and derived.system_before.count("<|endoftext|>") == 1
    assert "<|endoftext|>" not in derived.assistant_to_user + derived.generation
    assert "<|endoftext|>" not in derive(chatml).source


def test_a_generation_prompt_that_opens_thoughts_differs_from_the_history() -> None:
    template = ChatTemplate(R1, None, "<bos>", "<eos>", (1,))  # type: ignore[arg-type]
    derived = derive(template)
    assert derived.generation == "<｜Assistant｜><think>\n" and derived.user_to_assistant == "<｜Assistant｜>"
    assert "{{ if $last }}<｜Assistant｜><think>" in derived.source


def test_a_template_without_system_role(chatml: ChatTemplate) -> None:
    derived = derive(of(chatml, NO_SYSTEM))
    assert derived.system_before is None and '"system"' not in derived.source


@pytest.mark.parametrize("source", [NUMBERED, UPPER, BACKWARDS], ids=["numbers", "changes", "reorders"])
def test_a_template_that_does_more_than_surround_is_refused(source: str, chatml: ChatTemplate) -> None:
    with pytest.raises(UserError, match=r"Ollama's TEMPLATE cannot follow|cannot be written as an Ollama TEMPLATE"):
        derive(of(chatml, source))


def test_modelfile_leaves_nothing_to_defaults(chatml: ChatTemplate) -> None:
    generation = {"temperature": 0.6, "top_p": 0.95, "top_k": 50}
    text = make_modelfile(chatml, generation, num_ctx=2048, num_thread=3).text("./m.gguf")
    lines = text.splitlines()
    assert lines[0] == "FROM ./m.gguf"
    for expected in (
        'SYSTEM """You are a tiny model"""',
        'PARAMETER stop "<|im_end|>"',
        "PARAMETER num_ctx 2048",
        "PARAMETER num_thread 3",
        "PARAMETER temperature 0.6",
        "PARAMETER top_p 0.95",
        "PARAMETER top_k 50",
        "PARAMETER repeat_penalty 1.0",
    ):
        assert expected in lines
    override = make_modelfile(chatml, generation, num_ctx=64, num_thread=1, temperature=0.0, top_p=1.0).parameters
    assert (override["temperature"], override["top_p"]) == (0.0, 1.0)


def test_null_in_generation_config_is_as_if_it_were_not_there(chatml: ChatTemplate) -> None:
    names = ("temperature", "top_p", "top_k")
    parameters = [
        make_modelfile(chatml, generation, num_ctx=64, num_thread=1).parameters
        for generation in ({}, dict.fromkeys(names), dict.fromkeys(names, 0))
    ]
    given = [tuple(each[name] for name in names) for each in parameters]
    assert given == [(0.2, 0.9, 0), (0.2, 0.9, 0), (0.0, 0.0, 0)]


def test_literal_braces_and_quotes_stay_text(chatml: ChatTemplate) -> None:
    source = derive(of(chatml, QUOTES)).source
    assert '"""' not in source  # it would end the Modelfile's value
    assert '{{ "{{ \\"user\\"\\"\\" }}" }}' in source or '\\"user\\"' in source


def test_a_template_that_refuses_system_messages_has_a_modelfile(chatml: ChatTemplate) -> None:
    modelfile = make_modelfile(of(chatml, NO_SYSTEM), {}, num_ctx=8, num_thread=1)
    assert (modelfile.system, modelfile.parameters["stop"]) == ("", ["<|im_end|>"])


@pytest.mark.parametrize("settings", [{"temperature": "hot"}, {"top_k": [1]}, {"top_p": {}}])
def test_settings_that_are_no_numbers_are_refused(settings: dict, chatml: ChatTemplate) -> None:
    with pytest.raises(UserError, match=r"generation_config.json: \w+ is .*, not a number"):
        make_modelfile(chatml, settings, num_ctx=8, num_thread=1)
