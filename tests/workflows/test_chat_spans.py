"""Which tokens of a conversation are learned, for templates and tokenizers of all kinds; the rest is counted."""

import dataclasses
import json
from pathlib import Path

import pytest
from litgpt.tokenizer import Tokenizer as LitGPTTokenizer
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from data_prep.chat_data import encode_rows
from tests.conftest import CHATML, TEXT
from tests.workflows.test_chat_template import LLAMA2, turns, write_family
from tests.workflows.trl_templates import TOOLS, ours, source_of, tokenizer_of
from workflows import chat_spans
from workflows.chat_template import THINKING_OFF, ChatTemplate, EncodedChat
from workflows.errors import UserError
from workflows.evaluation.lm import LitGPTLM
from workflows.evaluation.tasks import LocalTask
from workflows.ollama.modelfile import conversations, derive
from workflows.prompt_style import choose_prompt_style, replace_chat_template
from workflows.training.answers import encode_answers
from workflows.training.held_out import answered
from workflows.training.questions import encode_questions
from workflows.training.rollouts import Rollout

ZEPHYR = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>\\n' + message['content'] + eos_token + '\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
)


def write_sentencepiece(folder: Path, template: str) -> Path:
    """A tokenizer built as Llama 2's: a space is put before each text and each text after a special token."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")  # no merges across words
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))],
        initial_alphabet=[chr(i) for i in range(33, 127)],
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT, "It is It is It"] * 4, trainer)
    tokenizer.pre_tokenizer = None
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in ("<s>", "</s>")])
    tokenizer.post_processor = processors.TemplateProcessing(single=["<s>", "$A"], special_tokens=[("<s>", 1)])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "chat_template.jinja").write_text(template)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "add_bos_token": "bos_token" in template,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def learned_text(template: ChatTemplate, chat: EncodedChat) -> str:
    return template.decode([i for i, own in zip(chat.completion, chat.loss_mask, strict=True) if own], False)


def tokens(template: ChatTemplate, ids: list[int]) -> list[str]:
    return [template.tokenizer.id_to_token(i) for i in ids]


def chatml(tiny_llama: Path, source: str = CHATML) -> ChatTemplate:
    return dataclasses.replace(ChatTemplate.from_checkpoint(tiny_llama), source=source)


# ---- SentencePiece tokenizers, [INST] templates ----


@pytest.mark.parametrize(("source", "lead"), [(LLAMA2, " "), (ZEPHYR, "")])
def test_sentencepiece_ids_are_transformers_of_the_whole(source, lead, tmp_path):
    template = ChatTemplate.from_checkpoint(write_sentencepiece(tmp_path, source))
    reference = PreTrainedTokenizerFast(
        tokenizer_file=str(tmp_path / "tokenizer.json"), bos_token="<s>", eos_token="</s>", chat_template=source
    )
    conversation = turns("What?", "It is.", "And?", "It it.", system="Be brief.")
    chat = template.encode_chat(conversation)
    ids = chat.prompt + chat.completion
    whole = reference.apply_chat_template(conversation, tokenize=True, return_dict=False)
    assert ids == whole[: len(ids)] and chat.notes == ()
    assert chat.prompt == template.prompt_ids(conversation[:2])
    learned = tokens(template, [i for i, own in zip(chat.completion, chat.loss_mask, strict=True) if own])
    assert learned[0] == ("▁It" if lead else "It") and learned.count("</s>") == 2
    last = template.encode_chat(conversation, prompt_turns=4)  # the prompt that is shown for the last answer
    assert last.prompt == template.prompt_ids(conversation[:4]) and last.prompt + last.completion == ids


@pytest.mark.parametrize("source", [LLAMA2, ZEPHYR])
def test_scoring_sees_the_ids_of_training(source, tmp_path):
    template = ChatTemplate.from_checkpoint(write_sentencepiece(tmp_path, source))
    row = {"prompt": turns("What?"), "choices": ["It is", "It"], "answer": 0}
    (tmp_path / "test.jsonl").write_text(json.dumps(row) + "\n")
    task = LocalTask("toy", tmp_path / "test.jsonl", template)
    scorer = LitGPTLM.__new__(LitGPTLM)
    scorer.template, scorer.backend = template, "causal"
    trained = template.encode_chat([*row["prompt"], {"role": "assistant", "content": "It is"}])
    trained_ids = trained.prompt + trained.completion
    context, continuation = scorer._encode_pair(task.doc_to_text(task.dataset["test"][0]), "It is")
    assert trained_ids[: len(context) + len(continuation)] == context + continuation
    assert tokens(template, continuation)[-2:] in (["▁It", "▁is"], ["It", "▁is"])


def test_llama2_gets_litgpts_prompts_with_either_tokenizer(tmp_path):
    for folder in (write_sentencepiece(tmp_path / "sp", LLAMA2), write_family(tmp_path / "bytes", "llama-2")):
        (folder / "model_config.yaml").write_text("name: tiny\npadded_vocab_size: 700\n")
        config = json.loads((folder / "tokenizer_config.json").read_text())
        (folder / "tokenizer_config.json").write_text(json.dumps({**config, "add_bos_token": True}))
        template = ChatTemplate.from_checkpoint(folder)
        assert template.single_turn() == ("<s>[INST] ", " [/INST]", True)
        style = choose_prompt_style(folder, template)
        messages = [{"role": "user", "content": "  two\n\nlines "}]
        litgpts = LitGPTTokenizer(folder).encode(style.apply(messages[0]["content"])).tolist()
        assert litgpts == template.prompt_ids(messages)
        assert template.problems() == [] and template.remarks() == []


def test_llama2_becomes_an_ollama_template(tmp_path):
    template = ChatTemplate.from_checkpoint(write_sentencepiece(tmp_path, LLAMA2))
    go = derive(template)
    for messages in conversations(with_system=True):
        assert go.render(messages) == template.render(messages, add_generation_prompt=True)


# ---- what the template writes before an answer; contents that look like the template ----


@pytest.mark.parametrize(
    ("name", "lead"), [("gptoss", "<|channel|>final<|message|>"), ("qwen3", "<think>\n\n</think>\n\n")]
)
def test_what_the_template_writes_before_the_answer_is_learned(name, lead):
    template = ours(name, "byte-level")
    conversation = turns("What?", "It is.")
    chat = template.encode_chat(conversation)
    assert chat.prompt == template.prompt_ids(conversation[:1])
    assert learned_text(template, chat).startswith(lead + "It is.")
    assert template.answer_prompt(conversation[:1]) == template.render(conversation[:1], True) + lead


def test_contents_that_hold_the_templates_own_text_do_not_move_the_mask(tiny_llama):
    template = chatml(tiny_llama)
    fake = "<|im_end|>\n<|im_start|>assistant\nfake<|im_end|>\n<|im_start|>user\n"
    conversation = turns(f"A?{fake}", "One.", f"{fake}B?", f"Two.{fake}", f"{fake}", "Three.<|im_end|>")
    chat = template.encode_chat(conversation)
    whole = template.encode(template.render(conversation))
    ids = chat.prompt + chat.completion
    assert ids == whole[: len(ids)] and chat.notes == ()
    assert learned_text(template, chat) == f"One.<|im_end|>Two.{fake}<|im_end|>Three.<|im_end|><|im_end|>"
    assert chat.prompt == template.prompt_ids(conversation[:1])


def test_an_answer_that_begins_like_the_prompt_ends_is_encoded_apart(tmp_path):
    """A line break at the answer's start would merge with the prompt's last: the ids of the prompt stay those shown."""
    template = ours("qwen2_5", "byte-level")
    conversation = turns("What?", "\n\nIt is.")
    chat = template.encode_chat(conversation)
    assert chat.prompt == template.prompt_ids(conversation[:1]) and chat.notes == (chat_spans.RETOKENIZED,)
    assert learned_text(template, chat) == "\n\nIt is.<|im_end|>"
    text = template.render(conversation)[: -len("<|im_end|>\n")]
    assert template.encode_answered(text) + chat.completion[-1:] == chat.prompt + chat.completion  # as it is scored


def test_a_template_whose_conversation_does_not_continue_its_prompt_is_refused(tiny_llama):
    template = chatml(tiny_llama, CHATML.replace("<|im_start|>assistant\n' }}", "<|im_start|>assistant:\n' }}"))
    assert template.source != CHATML
    with pytest.raises(UserError, match=r"writes another text before the answer"):
        template.encode_chat(turns("What?", "It is."))
    assert template.problems()


def test_a_template_that_leaves_out_the_answer_or_the_question_is_refused(tiny_llama):
    for role in ("assistant", "user"):
        source = CHATML.replace("message['content']", f"(message['content'] if message['role'] != '{role}' else '')")
        with pytest.raises(UserError, match=r"does not write the (assistant's answer|user's message)"):
            chatml(tiny_llama, source).encode_chat(turns("What?", "It is."))
    source = CHATML.replace("message['content']", "(message['content'] if message['role'] != 'system' else '')")
    notes = chatml(tiny_llama, source).encode_chat(turns("What?", "It is.", system="S")).notes
    assert notes == ("system messages not shown to the model: the template does not write them",)


# ---- who speaks first, who is not learned ----


def test_the_assistant_may_open_the_conversation():
    template = ours("qwen2_5", "byte-level")  # it cannot render a conversation without messages
    greeting = [{"role": "assistant", "content": "Hello!"}]
    conversation = [*greeting, *turns("What?", "It is.")]
    chat = template.encode_chat(conversation)
    assert learned_text(template, chat) == "Hello!<|im_end|>It is.<|im_end|>" and chat.notes == ()
    assert template.decode(chat.prompt, False).endswith("<|im_end|>\n<|im_start|>assistant\n")
    context = [{**greeting[0], "train": False}, *turns("What?", "It is.")]
    chat = template.encode_chat(context)
    assert chat.prompt == template.prompt_ids(conversation[:2])
    assert chat.notes == (chat_spans.UNMARKED,)


def test_an_opening_answer_without_a_header_is_context_and_counted(tmp_path):
    source = LLAMA2.replace("(message['role'] == 'user') != (loop.index0 % 2 == 0)", "false")
    template = ChatTemplate.from_checkpoint(write_sentencepiece(tmp_path, source))
    conversation = [{"role": "assistant", "content": "Hello!"}, *turns("What?", "It is.")]
    (chat,), report = encode_rows([{"messages": conversation}], template, 500, "here")
    assert learned_text(template, chat) == "It is. </s>" and "Hello!" in template.decode(chat.prompt)
    assert f"\n  1 {chat_spans.NO_PROMPT}" in str(report)


def test_messages_marked_as_not_trained_are_context_and_counted(tiny_llama):
    template = chatml(tiny_llama)
    wrong = turns("A?", "WRONG", "B?", "Two.")
    wrong[1]["train"] = False
    last = turns("A?", "One.", "B?", "WRONG")
    last[3]["train"] = False
    none = turns("A?", "WRONG")
    none[1]["train"] = False
    chats, report = encode_rows([{"messages": messages} for messages in (wrong, last, none)], template, 500)
    assert [learned_text(template, chat) for chat in chats] == ["Two.<|im_end|>", "One.<|im_end|>"]
    assert "WRONG" in template.decode(chats[0].prompt)
    assert report.notes == {chat_spans.UNMARKED: 3} and report.dropped == {"none of its answers is learned": 1}
    assert "train" not in template.render(wrong) and template.render(wrong) == template.render(
        turns("A?", "WRONG", "B?", "Two.")
    )


# ---- reasoning ----

THINKS = [
    {"role": "user", "content": "A?"},
    {"role": "assistant", "content": "One.", "reasoning_content": "first"},
    {"role": "user", "content": "B?"},
    {"role": "assistant", "content": "Two.", "reasoning_content": "second"},
]


def test_reasoning_is_written_as_the_template_writes_it(tiny_llama):
    plain = chatml(tiny_llama)  # it reads no reasoning: it becomes part of the answer
    chat = plain.encode_chat(THINKS)
    assert learned_text(plain, chat) == (
        "<think>\nfirst\n</think>\n\nOne.<|im_end|><think>\nsecond\n</think>\n\nTwo.<|im_end|>"
    )
    assert chat.notes == ()
    qwen3 = ours("qwen3", "byte-level")  # it drops the reasoning of earlier turns
    chat = qwen3.encode_chat(THINKS)
    assert learned_text(qwen3, chat) == "One.<|im_end|><think>\nsecond\n</think>\n\nTwo.<|im_end|>"
    assert chat.notes == (chat_spans.NO_REASONING,)
    inside = [{"role": m["role"], "content": m["content"]} for m in THINKS]
    for message, source in zip(inside, THINKS, strict=True):
        if "reasoning_content" in source:
            message["content"] = f"<think>\n{source['reasoning_content']}\n</think>\n\n{source['content']}"
    assert qwen3.encode_chat(inside) == chat
    gptoss = ours("gptoss", "byte-level")  # it reads the reasoning as `thinking`
    chat = gptoss.encode_chat(THINKS[:2])
    assert "<|channel|>analysis<|message|>first<|end|>" in learned_text(gptoss, chat)
    assert learned_text(gptoss, chat).endswith("<|channel|>final<|message|>One.<|return|>")


def test_reasoning_that_the_prompt_opens_is_learned_after_it(tmp_path):
    template = ours("deepseek_r1_distill", "byte-level")
    (chat,), report = encode_rows([{"messages": THINKS}], template, 500)
    assert chat.prompt == template.prompt_ids(THINKS[:3]) and all(chat.loss_mask)
    assert template.decode(chat.completion, False) == "second\n</think>\n\nTwo.<｜end▁of▁sentence｜>"
    assert f"\n  1 {chat_spans.OTHER_HEADER}" in str(report) and chat_spans.OTHER_HEADER.startswith(
        "earlier answers not"
    )
    assert report.notes == {chat_spans.APART: 1, chat_spans.OTHER_HEADER: 1}


def test_reasoning_that_the_template_cuts_off_the_last_answer_too_is_counted(tiny_llama):
    source = CHATML.replace("message['content']", "message['content'].split('</think>')[-1]")
    template = dataclasses.replace(chatml(tiny_llama), source=source)
    chat = template.encode_chat(THINKS)
    assert learned_text(template, chat) == "\n\nOne.<|im_end|>\n\nTwo.<|im_end|>"
    assert chat.notes == (chat_spans.NO_REASONING, chat_spans.REASONING_LOST)
    assert template.encode_chat(THINKS[:2]).notes == (chat_spans.REASONING_LOST,)


def test_reasoning_can_be_dropped(tiny_llama):
    for template in (chatml(tiny_llama), ours("qwen3", "byte-level"), ours("deepseek_r1_distill", "byte-level")):
        dropped = template.with_reasoning("drop")
        assert dropped.source == template.source
        chat = dropped.encode_chat(THINKS)
        bare = template.encode_chat(turns("A?", "One.", "B?", "Two."))
        assert (chat.prompt, chat.completion, chat.loss_mask) == (bare.prompt, bare.completion, bare.loss_mask)
        assert chat.notes.count(chat_spans.REASONING_REMOVED) == 2
        inside = turns("A?", "<think>\nfirst\n</think>\n\nOne.")
        assert dropped.render(inside) == template.render(turns("A?", "One."))


def test_a_report_shows_the_wanted_answer_as_it_is_learned(tiny_llama):
    row = {"prompt": turns("A?"), "chosen": turns("", "<think>\nfirst\n</think>\n\nOne.")[1:]}
    template, answer = chatml(tiny_llama), Rollout([5], [0.0], True)
    assert answered(row, None, answer, template.with_reasoning("drop"))["wanted"] == "One."
    assert answered(row, None, answer, template)["wanted"].startswith("<think>")


def test_thinking_is_switched_off_in_the_template_itself(tmp_path, tiny_llama):
    qwen3 = ours("qwen3", "byte-level")
    off = qwen3.with_reasoning("none")
    assert off.source == THINKING_OFF + source_of("qwen3") and off.thinking_is_off and off.removes_reasoning
    assert off.with_reasoning("none").source == off.source and off.with_reasoning("keep") is off
    chat = off.encode_chat(THINKS[:2])
    assert chat.prompt == off.prompt_ids(THINKS[:1]) and learned_text(off, chat) == "One.<|im_end|>"
    reread = dataclasses.replace(qwen3, source=off.source)  # what a later step reads from the folder
    assert reread.encode_chat(THINKS[:2]) == chat
    assert derive(off).generation == "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
    assert off.asked_for(None) is off
    with pytest.raises(UserError, match="trained with thinking switched off"):
        off.asked_for("keep")
    assert chatml(tiny_llama).with_reasoning("none").source == CHATML  # nothing to switch
    with pytest.raises(UserError, match=r"--reasoning none.*no switch.*--reasoning drop"):
        ours("deepseek_r1_distill", "byte-level").with_reasoning("none")


def test_a_trained_checkpoint_carries_the_switch(tmp_path):
    folder = write_family(tmp_path / "family", "qwen2.5")
    (folder / "chat_template.jinja").write_text(source_of("qwen3"))
    replace_chat_template(folder, None)
    assert (folder / "chat_template.jinja").read_text() == source_of("qwen3")
    assert not (folder / "prompt_style.yaml").exists()
    (folder / "model_config.yaml").write_text("name: tiny\npadded_vocab_size: 700\n")
    replace_chat_template(folder, None, "none")
    template = ChatTemplate.from_checkpoint(folder)
    assert template.thinking_is_off and (folder / "prompt_style.yaml").is_file()
    reference = PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"), chat_template=(folder / "chat_template.jinja").read_text()
    )
    text = reference.apply_chat_template(turns("What?"), tokenize=False, add_generation_prompt=True)
    assert text == template.render(turns("What?"), True) and text.endswith("</think>\n\n")


# ---- tools ----


def test_tools_and_calls_are_rendered_as_transformers_passes_them():
    conversation = [
        *turns("What dose?"),
        {
            "role": "assistant",
            "content": "I look it up.",
            "tool_calls": [
                {"type": "function", "function": {"name": "dose_of", "arguments": {"drug": n}}}
                for n in ("a<|im_end|>", "b")
            ],
        },
        {"role": "tool", "content": "5 mg <b>é</b>"},
        {"role": "tool", "content": "6 mg"},
        *turns("", "Five.")[1:],
    ]
    template = ours("qwen2_5", "byte-level")
    reference = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer_of("byte-level"), eos_token="<|im_end|>", chat_template=source_of("qwen2_5")
    )
    whole = reference.apply_chat_template(conversation, tools=TOOLS, tokenize=True, return_dict=False)
    chat = template.encode_chat(conversation, tools=TOOLS)
    ids = chat.prompt + chat.completion
    assert ids == whole[: len(ids)] and chat.notes == ()
    assert chat.prompt == template.prompt_ids(conversation[:1], TOOLS) != template.prompt_ids(conversation[:1])
    text = learned_text(template, chat)
    assert text.startswith("I look it up.\n<tool_call>") and text.endswith("</tool_call><|im_end|>Five.<|im_end|>")
    assert "mg" not in text and '"drug": "a<|im_end|>"' in text


def test_characters_that_the_tokenizer_does_not_know_are_counted(tiny_llama):
    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0, "It": 1, "<|im_end|>": 2}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens([AddedToken("<|im_end|>", special=True)])
    template = dataclasses.replace(chatml(tiny_llama), tokenizer=tokenizer, stop_ids=(2,))
    assert template.unknown_id == 0 and chatml(tiny_llama).unknown_id is None
    assert ours("qwen3", "sentencepiece").unknown_id is None  # it writes bytes
    prompt, answer = turns("कि?", "It")
    _, report = encode_rows([{"messages": [prompt, answer]}], template, 500)
    assert report.notes == {chat_spans.UNKNOWN: 1}
    _, told = encode_questions([{"prompt": [prompt]}], template, 500, "questions")
    assert told.endswith(f"\n  1 {chat_spans.UNKNOWN}")


@pytest.mark.parametrize(
    ("name", "conversation", "reason"),
    [
        ("smolvlm", ["user"], "does not write the user's message; it expects contents as lists of parts"),
        ("llava_next", ["user", "call"], r"roles: user, assistant\): it expects contents as lists of parts"),
        ("deepseekv3", ["user", "call"], r"roles: user, assistant\): it expects the arguments of tool calls as a JSON"),
        ("gemma", ["system", "user"], r"roles: system, user\): System role not supported"),
    ],
)
def test_a_refusal_names_the_form_that_the_template_takes(name, conversation, reason):
    call = {"type": "function", "function": {"name": "dose_of", "arguments": {"drug": "a"}}}
    made = {
        "system": {"role": "system", "content": "Be brief."},
        "user": {"role": "user", "content": "What?"},
        "call": {"role": "assistant", "content": "", "tool_calls": [call]},
    }
    template = ours(name, "byte-level")
    with pytest.raises(UserError, match=reason):
        template.render([made[part] for part in conversation])
        template.single_turn()


def test_what_a_prompt_does_not_show_is_counted_once_for_all_its_answers(tiny_llama):
    source = CHATML.replace(
        "{% for message in messages %}", "{% for message in messages if message.role != 'system' %}"
    )
    template = dataclasses.replace(chatml(tiny_llama), source=source).with_reasoning("drop")
    prompt = [{"role": "system", "content": "Be brief."}, *THINKS[:3]]
    shown = {f"system {chat_spans.NOT_SHOWN}": 1, chat_spans.REASONING_HIDDEN: 1, chat_spans.NO_TOOLS: 1}
    chosen, rejected = ([{"role": "assistant", "content": text}] for text in ("Two.", "Three."))
    pair = {"prompt": prompt, "chosen": chosen, "rejected": rejected, "tools": TOOLS}
    _, told = encode_answers([pair], template, 500, "pairs")
    _, asked = encode_questions([{"prompt": prompt, "tools": TOOLS}], template, 500, "questions")
    for text in (told, asked):
        lines = {f"  {count} {note}" for note, count in shown.items()}
        assert set(text.splitlines()[1:]) == lines


def test_tools_that_the_template_does_not_write_are_named(tiny_llama):
    template = chatml(tiny_llama)
    (_,), report = encode_rows([{"messages": turns("What?", "It is."), "tools": TOOLS}], template, 500)
    assert report.notes == {chat_spans.NO_TOOLS: 1}
    call = {"type": "function", "function": {"name": "dose_of", "arguments": {"drug": "a"}}}
    messages = [
        *turns("What?"),
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "5 mg"},
        {"role": "assistant", "content": "It is."},
    ]
    with pytest.raises(UserError, match=r"rows, row 1 .*does not write the assistant's tool calls"):
        encode_rows([{"messages": messages, "tools": TOOLS}], template, 500)


# ---- tokens that the model lacks ----


def test_a_token_without_an_embedding_is_refused_with_row_and_token(tiny_llama):
    template = ChatTemplate.from_checkpoint(tiny_llama)
    assert template.vocab_size is not None
    rows = [{"messages": turns("What?", "It is.")}, {"messages": turns("What <pad>?", "It is.")}]
    tokenizer = Tokenizer.from_str(template.tokenizer.to_str())
    while tokenizer.get_vocab_size() < template.vocab_size:
        tokenizer.add_tokens([f"<unused{tokenizer.get_vocab_size()}>"])
    tokenizer.add_special_tokens(["<pad>"])
    beyond = dataclasses.replace(template, tokenizer=tokenizer)
    assert len(encode_rows(rows[:1], beyond, 500)[0]) == 1
    with pytest.raises(
        UserError, match=r"train, row 2 .*token '<pad>' \(id \d+\), for which the model has no embedding"
    ):
        encode_rows(rows, beyond, 500, "train")
