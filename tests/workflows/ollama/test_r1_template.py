"""The template of R1's distilled models, from the checkpoint's Jinja through GGUF to the prompt of a real Ollama."""

from pathlib import Path

import pytest

from tests.conftest import convert
from tests.workflows.r1_models import ASSISTANT, BOS, EOS, USER, make_r1
from workflows.chat_template import ChatTemplate
from workflows.ollama.client import connect, create_model
from workflows.ollama.gguf_writer import write_gguf
from workflows.ollama.modelfile import make_modelfile
from workflows.ollama.server import OllamaServer
from workflows.ollama.thoughts import answer_at_once, facts, without_thoughts
from workflows.ollama.verify import last_logged_prompt, reference_answers, verify_model

ASKED = [
    {"role": "user", "content": "A"},
    {"role": "assistant", "content": "<think>x</think>\n\nB"},
    {"role": "user", "content": "C"},
]
WANTED = (
    "<｜begin▁of▁sentence｜><｜User｜>A<｜Assistant｜>\n\nB<｜end▁of▁sentence｜><｜User｜>C<｜Assistant｜><think>\n"
)
QUESTIONS = [[{"role": "user", "content": f"What is finding {i}?"}] for i in range(3)]


@pytest.fixture(scope="module", params=["qwen2", "llama"])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("r1")
    return convert(make_r1(folder / request.param, request.param), folder / "checkpoints")


@pytest.fixture(scope="module")
def template(checkpoint: Path) -> ChatTemplate:
    return ChatTemplate.from_checkpoint(checkpoint)


def test_what_the_template_writes(template: ChatTemplate) -> None:
    assert template.render(ASKED, add_generation_prompt=True) == WANTED
    system = [{"role": "system", "content": "S"}]
    assert template.render(system + ASKED, True) == WANTED.replace(BOS, f"{BOS}S")
    assert template.render(without_thoughts(ASKED), True) == WANTED
    assert template.default_system == "" and template.opens_thoughts and template.drops_thoughts
    ids = template.prompt_ids(ASKED)
    special = [template.tokenizer.token_to_id(token) for token in (BOS, USER, ASSISTANT, EOS, "<think>")]
    assert None not in special and [ids.count(token_id) for token_id in special] == [1, 2, 2, 1, 1]
    assert ids[0] == special[0] and template.stop_ids == (special[3],)


def test_training_learns_the_thoughts_that_the_prompt_has_opened(template: ChatTemplate) -> None:
    chat = template.encode_chat(ASKED[:2])
    assert template.decode(chat.prompt, False) == f"{BOS}{USER}A{ASSISTANT}<think>\n"
    assert template.decode(chat.completion, False) == f"x</think>\n\nB{EOS}"


@pytest.fixture(scope="module")
def served(checkpoint: Path, template: ChatTemplate, ollama_server: OllamaServer, tmp_path_factory) -> str:
    file, name = tmp_path_factory.mktemp("gguf") / "m.gguf", f"tiny-r1-{checkpoint.name}"
    write_gguf(checkpoint, file, "f32", name, "0" * 64)
    create_model(ollama_server, name, file, make_modelfile(template, {}, num_ctx=512, num_thread=1))
    return name


@pytest.mark.ollama
def test_ollama_asks_as_the_template_does(checkpoint, template, ollama_server: OllamaServer, served: str) -> None:
    reference = reference_answers(checkpoint, template, QUESTIONS)
    result = verify_model(ollama_server, served, template, QUESTIONS, reference)
    assert result.prompt_ids_equal is True and result.chat_prompts_equal is True
    assert all(difference["near_tie"] for difference in result.differences), result
    assert facts(ollama_server, served).begins_in_thoughts


@pytest.mark.ollama
def test_ollamas_prompt_after_an_answer_with_thoughts(template, ollama_server: OllamaServer, served: str) -> None:
    prompt, number = asked(ollama_server, served, without_thoughts(ASKED))
    assert prompt == WANTED and number == len(template.prompt_ids(ASKED))
    told, _ = asked(ollama_server, served, ASKED)  # a template of Go's cannot cut a text: who talks to Ollama has to
    assert told == WANTED.replace("\n\nB", "<think>x</think>\n\nB")


@pytest.mark.ollama
def test_an_answer_at_once_has_its_thoughts_closed(template, ollama_server: OllamaServer, served: str) -> None:
    prompt, number = asked(ollama_server, served, answer_at_once(without_thoughts(ASKED)))
    assert prompt == WANTED + template.empty_thoughts
    assert number == len(template.encode(prompt))


def asked(server: OllamaServer, model: str, messages: list[dict[str, str]]) -> tuple[str | None, int | None]:
    """The prompt that the server logs for a conversation, and how many tokens it counts."""
    assert server.log is not None
    mark = server.log.stat().st_size
    response = connect(server).chat(model, messages, options={"num_predict": 1, "temperature": 0.0})
    return last_logged_prompt(server.log, mark), response.prompt_eval_count
