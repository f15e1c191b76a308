"""The verification: what it lets pass, what it catches, and what a real Ollama does with real and tiny models."""

import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM

from tests.conftest import TEXT, convert, make_llama, make_qwen2
from tests.rounding import near_tie_of_8_bits
from tests.workflows.conftest import speak_ascii
from tests.workflows.fake_ollama import Handler, fake_ollama
from workflows import export
from workflows.chat_template import ChatTemplate
from workflows.errors import UserError
from workflows.ollama import verify
from workflows.ollama.client import connect, create_model
from workflows.ollama.gguf_writer import write_gguf
from workflows.ollama.install import install, is_supported
from workflows.ollama.modelfile import derive, make_modelfile
from workflows.ollama.server import OllamaServer, probe
from workflows.ollama.verify import (
    Reference,
    Verification,
    last_logged_prompt,
    reference_answers,
    verify_model,
)

LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
SHA = "0" * 64
QUESTIONS = [[{"role": "user", "content": f"What is finding {i}?"}] for i in range(3)]


@pytest.fixture(scope="module")
def template(tiny_llama: Path) -> ChatTemplate:
    return ChatTemplate.from_checkpoint(tiny_llama)


@pytest.fixture(scope="module")
def reference(tiny_llama: Path, template: ChatTemplate) -> Reference:
    return reference_answers(tiny_llama, template, QUESTIONS)


class Honest:
    """A stand-in server that does exactly what LitGPT does, but for what a test changes."""

    def __init__(self, template: ChatTemplate, reference: Reference) -> None:
        self.template, self.reference = template, reference

    def generate(self, handler: Handler, body: dict) -> None:
        prompt = self.template.prompt_ids([{"role": "user", "content": body["prompt"]}])
        answer: list[int] = []
        if prompt in self.reference.prompts:
            answer = self.reference.answers[self.reference.prompts.index(prompt)]
        spoken = [i for i in answer if i not in self.template.stop_ids]
        handler.send_json(
            self.change(
                {
                    "response": self.template.decode(spoken, skip_special_tokens=False),
                    "context": prompt + spoken,
                    "prompt_eval_count": len(prompt),
                    "done": True,
                    "done_reason": "stop" if len(spoken) < len(answer) else "length",
                }
            )
        )

    def change(self, reply: dict) -> dict:
        return reply

    def chat(self, handler: Handler, body: dict) -> None:
        messages = body["messages"]
        number = len(self.template.prompt_ids(messages))
        reply = {"message": {"role": "assistant", "content": "x"}, "done": True, "prompt_eval_count": number}
        handler.send_json(reply)


def judge(server_class: type[Honest], template: ChatTemplate, reference: Reference) -> Verification:
    honest = server_class(template, reference)
    with fake_ollama({"/api/generate": honest.generate, "/api/chat": honest.chat}) as (url, _):
        endpoint = probe(url)
        assert endpoint is not None
        return verify_model(OllamaServer(endpoint), "m", template, QUESTIONS, reference)


def test_an_honest_server_passes_and_its_unseen_conversations_are_not_called_verified(template, reference) -> None:
    result = judge(Honest, template, reference)
    assert (result.prompts, result.prompt_ids_equal, result.greedy_agreement) == (3, True, 1.0)
    assert result.chat_prompts_equal is None  # it shows no prompt
    assert result.differences == [] and all(example["equal"] for example in result.examples)


def test_a_server_that_shows_no_ids_is_not_verified(template, reference) -> None:
    class Silent(Honest):
        def change(self, reply: dict) -> dict:
            return {key: value for key, value in reply.items() if key != "context"}

    assert judge(Silent, template, reference).prompt_ids_equal is None


def test_one_wrong_id_is_shown_where_it_is(template, reference) -> None:
    class Wrong(Honest):
        def change(self, reply: dict) -> dict:
            reply["context"][4] += 1
            return reply

    with pytest.raises(UserError, match=r"differ from the model's at position 4 of (.|\n)*ours: (.|\n)*Ollama: "):
        judge(Wrong, template, reference)


def test_a_bos_that_the_server_adds_by_itself_is_caught(template, reference) -> None:
    class Adds(Honest):
        def change(self, reply: dict) -> dict:
            return {**reply, "prompt_eval_count": reply["prompt_eval_count"] + 1}

    with pytest.raises(UserError, match="a BOS too many or too few"):
        judge(Adds, template, reference)


def test_another_answer_is_counted_with_its_logits(template, reference) -> None:
    class Other(Honest):
        def change(self, reply: dict) -> dict:
            if "finding 1" in self.template.decode(reply["context"]):
                reply["context"] = [*self.reference.prompts[1], 300, 301]
                reply["response"] = self.template.decode([300, 301])
            return reply

    result = judge(Other, template, reference)
    assert result.greedy_agreement == pytest.approx(2 / 3)
    (difference,) = result.differences
    assert difference["position"] == 0 and difference["ollama"] == template.tokenizer.id_to_token(300)
    assert difference["litgpt"] == template.tokenizer.id_to_token(reference.answers[1][0])
    assert difference["logit_gap"] > 0  # ours is the greedy one
    assert difference["near_tie"] == (difference["logit_gap"] < verify.NEAR_TIE)


def test_prompts_are_read_from_the_servers_log(tmp_path: Path) -> None:
    log = tmp_path / "log"
    head = 'time=2026-01-01T00:00:00.000Z level=TRACE source=server.go:757 msg="completion request" prompt='
    log.write_text(f'{head}"first \\"one\\"\\n\\ttab \\\\ \\u00a0\\x7f 漢 \\U000e0001"\nother line\n')
    assert last_logged_prompt(log) == 'first "one"\n\ttab \\ \u00a0\x7f 漢 \U000e0001'
    offset = log.stat().st_size
    assert last_logged_prompt(log, offset) is None
    with open(log, "a") as f:
        f.write(f"{head}bare\n")
    assert last_logged_prompt(log, offset) == "bare"


# ---- a real Ollama ----

LLAMA3_TEMPLATE = (
    "{{- bos_token }}{%- for message in messages %}{{- '<|im_start|>' + message['role'] + '\n\n' + "
    "message['content'] | trim + '<|im_end|>' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n\n' }}{%- endif %}"
)


def retrain(folder: Path, split: str, ignore_merges: bool, nfc: bool, template: str | None) -> Path:
    """Give a tiny model a tokenizer of another family, with BOS where its template writes one."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    if nfc:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(split), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=384,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT + " 1234 567\n\n\n"] * 4, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)
        config = json.loads((folder / "tokenizer_config.json").read_text())
        (folder / "tokenizer_config.json").write_text(json.dumps({**config, "bos_token": "<|endoftext|>"}))
    return folder


def begin_with_line_breaks(folder: Path) -> Path:
    """Let a tiny model with an untied head begin its answers to QUESTIONS with a line break."""
    model, template = AutoModelForCausalLM.from_pretrained(folder), ChatTemplate.from_checkpoint(folder)
    with torch.no_grad():
        ids = [torch.tensor([template.prompt_ids(question)]) for question in QUESTIONS]
        state = torch.stack([model.model(each).last_hidden_state[0, -1] for each in ids]).mean(0)  # (hidden_size,)
        model.lm_head.weight[template.encode("\n")[0]] = 50 * state / state.norm() ** 2
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def families(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Tiny checkpoints: ChatML without BOS, Llama 3's form with BOS, one that thinks, Qwen2 with an untied head."""
    folder = tmp_path_factory.mktemp("families")
    sizes = {"hidden_size": 64, "intermediate_size": 128, "vocab_size": 384}
    plain = make_llama(folder / "plain", **sizes)
    with_bos = retrain(make_llama(folder / "with-bos", **sizes), LLAMA3_SPLIT, True, False, LLAMA3_TEMPLATE)
    qwen2 = retrain(make_qwen2(folder / "qwen2", **sizes), LLAMA3_SPLIT.replace("{1,3}", ""), False, True, None)
    thoughts = LLAMA3_TEMPLATE.replace("assistant\n\n' }}", "assistant\n\n<think>\n' }}")
    thinking = retrain(make_llama(folder / "thinking", tied=False, **sizes), LLAMA3_SPLIT, True, False, thoughts)
    models = [speak_ascii(model) for model in (plain, with_bos, qwen2, thinking)]
    begin_with_line_breaks(thinking)
    return {path.name: convert(path, folder / "checkpoints") for path in models}


def test_an_answer_that_shares_a_token_with_the_prompt(families) -> None:
    """Ollama tokenizes prompt and answer again, as one text: only then the prompt's ids need not stand alone."""
    template = ChatTemplate.from_checkpoint(families["thinking"])
    reference = reference_answers(families["thinking"], template, QUESTIONS)

    class Joins(Honest):
        def change(self, reply: dict) -> dict:
            text = template.decode(reply["context"], skip_special_tokens=False)
            return {**reply, "context": template.encode(text)}

    class Miscounts(Joins):
        def change(self, reply: dict) -> dict:
            return {**super().change(reply), "prompt_eval_count": reply["prompt_eval_count"] + bool(reply["response"])}

    class Mistakes(Joins):
        def change(self, reply: dict) -> dict:
            reply = super().change(reply)
            reply["context"][-1] += bool(reply["response"])
            return reply

    result = judge(Joins, template, reference)
    assert (result.prompt_ids_equal, result.greedy_agreement) == (True, 1.0)
    for wrong in (Miscounts, Mistakes):
        with pytest.raises(UserError, match="Ollama's prompt ids differ"):
            judge(wrong, template, reference)


@pytest.mark.ollama
def test_a_server_killed_amid_the_prompts_and_one_started_again(families, tmp_path: Path, monkeypatch) -> None:
    """One that is dead at the next question ends it with one message; one that is back by then is as good as before."""
    if not is_supported():
        pytest.skip("the private Ollama is for Linux on x86-64")
    checkpoint, state, binary = families["plain"], tmp_path / "state", install()
    template = ChatTemplate.from_checkpoint(checkpoint)
    write_gguf(checkpoint, tmp_path / "m.gguf", "f32", "m", SHA)
    reference = reference_answers(checkpoint, template, QUESTIONS)
    real_ask = verify._ask

    def verify_with_a_crash(server: OllamaServer, then: Callable[[], object]) -> Verification:
        def ask(*args: Any, **more: Any) -> Any:
            if args[3] is QUESTIONS[1]:
                assert server.pid is not None
                os.kill(server.pid, signal.SIGKILL)
                then()
            return real_ask(*args, **more)

        monkeypatch.setattr(verify, "_ask", ask)
        endpoint = probe(server.url)  # a server that is not ours, and so not ours to start again
        assert endpoint is not None
        return verify_model(OllamaServer(endpoint), "m", template, QUESTIONS, reference)

    with ExitStack() as stack:
        first = stack.enter_context(OllamaServer.start(binary, state))
        create_model(first, "m", tmp_path / "m.gguf", make_modelfile(template, {}, num_ctx=512, num_thread=1))
        with pytest.raises(UserError, match="ended or broke off in the middle"):
            verify_with_a_crash(first, first.stop)

        port = int(first.url.rpartition(":")[2])
        second = stack.enter_context(OllamaServer.start(binary, state, port))

        def start_again() -> None:
            second.stop()
            stack.enter_context(OllamaServer.start(binary, state, port))

        result = verify_with_a_crash(second, start_again)
    assert result.prompt_ids_equal is True and all(difference["near_tie"] for difference in result.differences)


@pytest.mark.ollama
@pytest.mark.parametrize("family", ["plain", "with-bos", "qwen2", "thinking"])
def test_ollamas_prompts_and_answers_are_ours(family, families, ollama_server, tmp_path: Path) -> None:
    checkpoint = families[family]
    template = ChatTemplate.from_checkpoint(checkpoint)
    write_gguf(checkpoint, tmp_path / "m.gguf", "f32", family, SHA)
    modelfile = make_modelfile(template, {}, num_ctx=512, num_thread=1)
    create_model(ollama_server, f"tiny-{family}", tmp_path / "m.gguf", modelfile)
    reference = reference_answers(checkpoint, template, QUESTIONS)
    result = verify_model(ollama_server, f"tiny-{family}", template, QUESTIONS, reference)
    assert result.prompt_ids_equal is True and result.chat_prompts_equal is True
    assert all(difference["near_tie"] for difference in result.differences), result
    bos = template.tokenizer.token_to_id("<|endoftext|>")
    assert [ids.count(bos) for ids in reference.prompts] == [int(family in ("with-bos", "thinking"))] * 3
    if family == "thinking":  # what this family is for: prompt and answer share a token where both are one text
        texts = [template.decode(ids, False) for ids in reference.answers]
        assert all(text.startswith("\n") for text in texts)
        prompt = template.render(QUESTIONS[0], add_generation_prompt=True)
        assert template.encode(prompt + texts[0])[: len(reference.prompts[0])] != reference.prompts[0]


@pytest.mark.ollama
def test_a_wrong_template_or_a_second_bos_fails_the_verification(families, ollama_server, tmp_path: Path) -> None:
    checkpoint = families["with-bos"]
    template = ChatTemplate.from_checkpoint(checkpoint)
    write_gguf(checkpoint, tmp_path / "m.gguf", "f32", "x", SHA)
    modelfile = make_modelfile(template, {}, num_ctx=512, num_thread=1)
    source = derive(template).source
    reference = reference_answers(checkpoint, template, QUESTIONS)
    for wrong in (source.replace("<|endoftext|>", "<|endoftext|>" * 2), source.replace("assistant\n\n", "assistant\n")):
        broken = type(modelfile)(wrong, modelfile.system, modelfile.parameters)
        create_model(ollama_server, "tiny-wrong", tmp_path / "m.gguf", broken)
        with pytest.raises(UserError, match="Ollama's prompt ids differ"):
            verify_model(ollama_server, "tiny-wrong", template, QUESTIONS, reference)
    connect(ollama_server).delete("tiny-wrong")


HARD = (
    "tachypnea",
    "1234567890",
    "10 mg/kg",
    "Ünïcödé",
    "漢字かな",
    "🙂👩‍⚕️",
    "two  spaces",
    "it's I'LL",
    "x = {'a': 1}",
)


def varied_questions(number: int) -> list[list[dict[str, str]]]:
    """Questions with all that tokenizers stumble over, different from each other."""
    texts = (f"{i}. {HARD[i % 9]}\n{HARD[(i * i + 1) % 9]}? {TEXT[i : i + i % 30]}".strip() for i in range(number))
    return [[{"role": "user", "content": text}] for text in texts]


@pytest.fixture
def real_model(embedded_checkpoint: Path, ollama_server: OllamaServer, tmp_path: Path) -> Iterator[ChatTemplate]:
    template = ChatTemplate.from_checkpoint(embedded_checkpoint)
    write_gguf(embedded_checkpoint, tmp_path / "m.gguf", "q8_0", "smollm2", SHA)
    modelfile = make_modelfile(template, {}, num_ctx=1024, num_thread=1)
    create_model(ollama_server, "real", tmp_path / "m.gguf", modelfile)
    yield template
    connect(ollama_server).delete("real")


@pytest.mark.ollama
@pytest.mark.checkpoint
def test_real_models_prompt_ids_are_ours_on_questions_of_every_kind(
    real_model, embedded_checkpoint: Path, ollama_server: OllamaServer, monkeypatch
) -> None:
    monkeypatch.setattr(verify, "ANSWER_TOKENS", 2)  # the ids are what counts here; answers in the slow test
    questions = varied_questions(12)
    reference = reference_answers(embedded_checkpoint, real_model, questions)
    result = verify_model(ollama_server, "real", real_model, questions, reference)
    assert (result.prompts, result.prompt_ids_equal, result.chat_prompts_equal) == (12, True, True)
    sizes = [len(ids) for ids in reference.prompts]
    assert min(sizes) < max(sizes)
    # Answers part at near ties only: how many of those there are is a matter of the processor.
    near_tie, gaps = near_tie_of_8_bits(reference.model, reference.prompts)
    assert all(difference["logit_gap"] < near_tie for difference in result.differences), (near_tie, result.differences)
    assert any(gap > near_tie for gap in gaps)  # and answers that no rounding may change are among these


@pytest.mark.slow
@pytest.mark.ollama
@pytest.mark.checkpoint
def test_real_answers_agree(embedded_checkpoint: Path, export_to_it: OllamaServer, tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    rows = [json.dumps({"prompt": question}) for question in varied_questions(60)]
    (data / "test.jsonl").write_text("\n".join(rows) + "\n")
    export.setup(
        embedded_checkpoint,
        name="agree",
        quantize=["f16", "q8_0", "q4_K_M"],
        out_dir=tmp_path / "out",
        data=data,
        hf=False,
    )
    found = json.loads((tmp_path / "out" / "verification.json").read_text())
    assert set(found["greedy_agreement"]) == {"f16", "q8_0", "q4_K_M"}
    print(f"greedy agreement: {found['greedy_agreement']}")
    assert all(difference["near_tie"] for difference in found["models"]["f16"]["differences"])
    shutil.rmtree(tmp_path / "out")
