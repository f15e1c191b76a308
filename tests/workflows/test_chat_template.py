"""Prompts equal transformers' for every family of templates; only the assistant's own tokens carry the loss."""

import dataclasses
import json
from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from tests.conftest import TEXT
from tests.workflows.r1_models import R1
from workflows.chat_template import ChatTemplate
from workflows.errors import UserError

# Each is built as the family's own template is: its variables, filters, whitespace control and special tokens.
SMOLLM2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a tiny model<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3 = """{{- bos_token }}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}
        {%- set date_string = strftime_now("%d %b %Y") %}
    {%- else %}
        {%- set date_string = "26 Jul 2024" %}
    {%- endif %}
{%- endif %}

{#- The system message comes first, whether there is one or not. #}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{{- "Cutting Knowledge Date: December 2023\\n" }}
{{- "Today Date: " + date_string + "\\n\\n" }}
{{- system_message }}
{{- "<|eot_id|>" }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'+ message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""
QWEN25 = """{%- if tools %}
    {{- raise_exception('no tools here') }}
{%- elif messages[0]['role'] == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}
{%- else %}
    {{- '<|im_start|>system\\nYou are helpful.<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) or message.role == "assistant" %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
LLAMA2 = (  # the official one
    "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}"
    "{% set system_message = messages[0]['content'] %}{% else %}{% set loop_messages = messages %}"
    "{% set system_message = false %}{% endif %}{% for message in loop_messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if loop.index0 == 0 and system_message != false %}"
    "{% set content = '<<SYS>>\\n' + system_message + '\\n<</SYS>>\\n\\n' + message['content'] %}"
    "{% else %}{% set content = message['content'] %}{% endif %}{% if message['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}{% elif message['role'] == 'assistant' %}"
    "{{ ' '  + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
FAMILIES = {
    "llama-2": (LLAMA2, ["<s>", "</s>"], "<s>", "</s>", True),
    "smollm2": (SMOLLM2, ["<|endoftext|>", "<|im_start|>", "<|im_end|>"], "<|im_start|>", "<|im_end|>", False),
    "llama-3.2": (
        LLAMA3,
        ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|end_of_text|>"],
        "<|begin_of_text|>",
        "<|eot_id|>",
        True,
    ),
    "qwen2.5": (QWEN25, ["<|endoftext|>", "<|im_start|>", "<|im_end|>"], None, "<|im_end|>", False),
    "deepseek-r1": (
        R1,
        ["<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>"],
        "<｜begin▁of▁sentence｜>",
        "<｜end▁of▁sentence｜>",
        True,
    ),
}
"""Template, special tokens, BOS, EOS, and whether tokenizer.json itself puts a BOS before plain text."""


def write_family(directory: Path, family: str) -> Path:
    """The tokenizer and template files of a family, with a small vocabulary."""
    template, specials, bos, eos, adds_bos = FAMILIES[family]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=[AddedToken(token, special=True) for token in specials],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT] * 4, trainer)
    if adds_bos:
        bos_id = tokenizer.token_to_id(bos)
        tokenizer.post_processor = processors.TemplateProcessing(single=[bos, "$A"], special_tokens=[(bos, bos_id)])
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "chat_template.jinja").write_text(template)
    as_object = {"__type": "AddedToken", "content": bos, "special": True} if family == "deepseek-r1" else bos
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": as_object, "eos_token": eos}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": tokenizer.token_to_id(eos)}))
    return directory


@pytest.fixture(params=list(FAMILIES))
def family(request, tmp_path) -> tuple[str, ChatTemplate, PreTrainedTokenizerFast]:
    directory = write_family(tmp_path / "family", request.param)
    template, _, bos, eos, _ = FAMILIES[request.param]
    reference = PreTrainedTokenizerFast(
        tokenizer_file=str(directory / "tokenizer.json"), bos_token=bos, eos_token=eos, chat_template=template
    )
    return request.param, ChatTemplate.from_checkpoint(directory), reference


def turns(*contents: str, system: str | None = None) -> list[dict[str, str]]:
    start = [] if system is None else [{"role": "system", "content": system}]
    return start + [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(contents)]


CONVERSATIONS = [
    turns("Name the finding."),
    turns("  spaces, \t tabs\n\nand lines ", system=" Be brief.\n"),
    turns("One?", "One.", "Two?"),
    turns(
        "Ünïcödé 漢字 🙂 <b>&amp;</b> {{ not_jinja }}", 'A & B < C\'s "d"', "1234?", "  padded  \n", "5?", system="S"
    ),
    turns("a <|im_end|> inside", "<|eot_id|>", "｜User｜"),
]


@pytest.mark.parametrize("conversation", CONVERSATIONS)
def test_prompts_equal_transformers(family, conversation):
    _, ours, reference = family
    options = {"add_generation_prompt": True, "date_string": "26 Jul 2024"}
    text = reference.apply_chat_template(conversation, tokenize=False, **options)
    assert ours.render(conversation, add_generation_prompt=True) == text
    ids = reference.apply_chat_template(conversation, tokenize=True, return_dict=False, **options)
    assert ours.prompt_ids(conversation) == ids
    assert ours.render(conversation) == reference.apply_chat_template(
        conversation, tokenize=False, date_string="26 Jul 2024"
    )


@pytest.mark.parametrize("conversation", [turns("One?", "One."), turns("One?", "One.", "Two?", "Two!", system="S")])
def test_training_ids_are_the_prompt_and_the_answers_with_their_end(family, conversation):
    name, ours, reference = family
    chat = ours.encode_chat(conversation)
    spoken = [message["content"] + ours.eos_token for message in conversation if message["role"] == "assistant"]
    learned = [token for token, own in zip(chat.completion, chat.loss_mask, strict=True) if own]
    assert len(chat.completion) == len(chat.loss_mask)
    if name == "deepseek-r1":  # its prompt opens the thoughts, its history drops them: one answer a sample
        assert chat.prompt == ours.prompt_ids(conversation[:-1])
        assert ours.decode(learned, skip_special_tokens=False) == "\n</think>\n\n" + spoken[-1]
        assert all(chat.loss_mask)
        return
    if name == "llama-2":  # its template writes spaces around answers
        spoken = [f" {text.removesuffix(ours.eos_token)} {ours.eos_token}" for text in spoken]
    assert ours.decode(learned, skip_special_tokens=False) == "".join(spoken)
    whole = reference.apply_chat_template(conversation, tokenize=True, return_dict=False, date_string="26 Jul 2024")
    ids = chat.prompt + chat.completion
    assert ids == whole[: len(ids)]
    assert ours.decode(whole[len(ids) :], skip_special_tokens=False).strip() == ""  # but for a final newline


def test_loss_mask_equals_transformers_assistant_mask(tmp_path):
    """transformers finds the assistant's tokens by `{% generation %}` marks, which we render as nothing."""
    marked = (
        "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
        "{% if message['role'] == 'assistant' %}"
        "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{% else %}"
        "{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    directory = write_family(tmp_path / "family", "smollm2")
    (directory / "chat_template.jinja").write_text(marked)
    ours = ChatTemplate.from_checkpoint(directory)
    reference = PreTrainedTokenizerFast(tokenizer_file=str(directory / "tokenizer.json"), chat_template=marked)
    conversation = turns("One?", "The first.", "Two?", "Tachypnea. And 12 more", system="S")
    expected = reference.apply_chat_template(
        conversation, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    chat = ours.encode_chat(conversation)
    ids = chat.prompt + chat.completion
    assert ids == expected["input_ids"][: len(ids)]
    mask = [0] * len(chat.prompt) + [int(own) for own in chat.loss_mask]
    assert mask == expected["assistant_masks"][: len(ids)]
    assert not any(expected["assistant_masks"][len(ids) :])


def test_answers_follow_the_template(tmp_path):
    of = {name: ChatTemplate.from_checkpoint(write_family(tmp_path / name, name)) for name in FAMILIES}
    assert of["smollm2"].answer_text(" padded ") == " padded <|im_end|>"
    assert of["llama-3.2"].answer_text(" padded ") == "padded<|eot_id|>"  # this family trims
    thoughts = "<think>\nIt is fast.\n</think>\n\nTachypnea"
    assert of["deepseek-r1"].answer_text(thoughts) == thoughts.removeprefix("<think>\n") + "<｜end▁of▁sentence｜>"
    assert of["smollm2"].answer_text(thoughts) == thoughts + "<|im_end|>"
    assert {name: of[name].default_system for name in FAMILIES if of[name].default_system} == {
        "smollm2": "You are a tiny model",
        "qwen2.5": "You are helpful.",
    }
    assert [name for name in FAMILIES if of[name].opens_thoughts] == ["deepseek-r1"]
    for name, template in of.items():
        assert template.encode(template.answer_text("x"))[-1] in template.stop_ids, name


def test_an_answer_without_thoughts_closes_those_that_the_prompt_opens(tmp_path):
    """Else a model trained on it would answer inside its thoughts: the text it learns has one opening, one end."""
    template = ChatTemplate.from_checkpoint(write_family(tmp_path / "r1", "deepseek-r1"))
    trims = dataclasses.replace(
        template, source=R1.replace("content = message['content']", "content = message['content']|trim")
    )
    assert trims.answer_text(" x ").partition("</think>")[2] == "\n\nx<｜end▁of▁sentence｜>"
    for answer in ("Tachypnea.", "It is fast.</think>\n\nTachypnea.", "<think>\nIt is fast.\n</think>\n\nTachypnea."):
        for each in (template, trims):
            chat = each.encode_chat(turns("Fast breathing?", answer))
            text = each.decode(chat.prompt + chat.completion, skip_special_tokens=False)
            _, opened, thoughts = text.partition("<think>\n")
            assert opened and thoughts.count("<think>") == 0 and thoughts.count("</think>") == 1
            assert thoughts.endswith("</think>\n\nTachypnea.<｜end▁of▁sentence｜>")
            assert ("It is fast." in thoughts.partition("</think>")[0]) == ("It is fast." in answer)


@pytest.mark.parametrize("name", FAMILIES)
def test_single_turn_rebuilds_the_prompt(name, tmp_path):
    template = ChatTemplate.from_checkpoint(write_family(tmp_path / name, name))
    before, after, trims = template.single_turn()
    for text in (" two\n lines ", "plain"):
        rebuilt = before + (text.strip() if trims else text) + after
        assert rebuilt == template.render([{"role": "user", "content": text}], add_generation_prompt=True)


def test_every_special_token_has_its_name_in_a_template(tmp_path):
    source = "{% for message in messages %}{{ pad_token ~ unk_token ~ message['content'] ~ eos_token }}{% endfor %}"
    directory = write_family(tmp_path / "family", "smollm2")
    (directory / "chat_template.jinja").write_text(source)
    file = directory / "tokenizer_config.json"
    specials = {"pad_token": "<|endoftext|>", "unk_token": {"content": "<unk>", "special": True}}
    file.write_text(json.dumps({**json.loads(file.read_text()), **specials}))
    assert ChatTemplate.from_checkpoint(directory).render(turns("a")) == "<|endoftext|><unk>a<|im_end|>"


def test_filters_and_tags_that_transformers_knows(tmp_path):
    source = (
        "{% for message in messages %}{% if message['role'] == 'system' %}{% continue %}{% endif %}"
        "{{ message | tojson(indent=2, sort_keys=true, separators=(',', ': ')) }}<|im_end|>{% endfor %}"
    )
    directory = write_family(tmp_path / "family", "smollm2")
    (directory / "chat_template.jinja").write_text(source)
    reference = PreTrainedTokenizerFast(tokenizer_file=str(directory / "tokenizer.json"), chat_template=source)
    conversation = turns("é < & >", system="skipped")
    expected = reference.apply_chat_template(conversation, tokenize=False)
    assert ChatTemplate.from_checkpoint(directory).render(conversation) == expected


def test_a_template_cannot_reach_python(tmp_path):
    directory = write_family(tmp_path / "family", "smollm2")
    (directory / "chat_template.jinja").write_text("{{ messages.__class__.__mro__[1].__subclasses__() }}")
    with pytest.raises(UserError, match="refuses this conversation"):
        ChatTemplate.from_checkpoint(directory).render(turns("hello"))


@pytest.mark.parametrize(
    ("file", "contents", "message"),
    [
        ("chat_template.jinja", None, "has no chat template"),
        ("tokenizer.json", None, "does not exist"),
        ("tokenizer.json", '{"version": "1.0"', "not a readable tokenizer"),
        ("tokenizer_config.json", None, "does not exist"),
        ("tokenizer_config.json", '{\n"eos_token": ', "line 2: not valid JSON"),
        ("generation_config.json", "[", "not valid JSON"),
    ],
)
def test_bad_files_are_named(file, contents, message, tmp_path):
    directory = write_family(tmp_path / "family", "smollm2")
    (directory / file).unlink()
    if contents is not None:
        (directory / file).write_text(contents)
    with pytest.raises(UserError, match=message):
        ChatTemplate.from_checkpoint(directory)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{% for m in messages %}", "not valid Jinja"),
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages[5]['content'] }}", "refuses this conversation"),
    ],
)
def test_bad_templates_are_explained(source, message, tmp_path):
    directory = write_family(tmp_path / "family", "smollm2")
    (directory / "chat_template.jinja").write_text(source)
    with pytest.raises(UserError, match=message):
        ChatTemplate.from_checkpoint(directory).prompt_ids(turns("hello"))


def test_training_needs_an_end_to_learn(tmp_path):
    template = ChatTemplate.from_checkpoint(write_family(tmp_path / "family", "smollm2"))
    for conversation in ([], turns("only a question")):
        with pytest.raises(UserError, match="must end with an assistant message"):
            template.encode_chat(conversation)
    directory = write_family(tmp_path / "endless", "smollm2")
    (directory / "chat_template.jinja").write_text("{% for m in messages %}{{ m['content'] + '\n' }}{% endfor %}")
    with pytest.raises(UserError, match="none of the model's stop tokens"):
        ChatTemplate.from_checkpoint(directory).answer_text("x")
