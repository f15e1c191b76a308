"""Does Ollama really ask and answer as we do? Checked on what the server did, not on what it should have done.

* Prompt ids: `/api/generate` returns in `context` the ids of prompt and answer, which it makes after answering, by its
  own tokenizer, from both texts together. The prompt's must equal ours, id by id, and their number must be what was
  evaluated (a BOS that the server adds by itself shows there only). An answer that begins with a line break may share
  its first token with the end of the prompt; then all ids must be what our tokenizer makes of prompt and answer.
* Conversations: `/api/chat` returns no ids. A server that we started logs the prompt's text; text and
  `prompt_eval_count` must equal ours.
* Greedy agreement: the share of prompts whose first 32 tokens, or all up to the stop, are LitGPT's greedy ones. Where
  they are not, the two tokens' float32 logits say whether it was a near tie or an error.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from workflows.chat_template import ChatTemplate, Message
from workflows.errors import UserError
from workflows.ollama.client import connect, explained
from workflows.ollama.modelfile import conversations, derive
from workflows.ollama.server import OllamaServer
from workflows.ollama.thoughts import without_thoughts
from workflows.progress import brief
from workflows.training.model import GPT, Precision, load_model
from workflows.training.rollouts import generate

ANSWER_TOKENS = 32
NEAR_TIE = 0.25
"""Logits closer than this are a near tie: float16 weights and cache move them by about so much."""
_GREEDY = {"temperature": 0.0, "repeat_penalty": 1.0, "top_k": 1, "seed": 0}
_PROBES = (
    "Digits 1234567890 and 3.14, 10 mg/kg; µg, ½, ², Ⅳ",
    "Ünïcödé, 漢字かな, русский, עברית, العربية, 🙂👩‍⚕️ é",
    "def f(x):\n    return {\n\t'a': x ** 2,  # comment\n    }\n\n\nprint(f(1))",
    "Spaces   inside,\ttabs\t\tand\n\n\nlines; it's, I'LL, we're, DON'T",
    'Braces {{ .Content }} {% if %} "quotes" \\ backslash <b>&amp;</b> </s> <unk>',
)


@dataclass
class Reference:
    """What LitGPT makes of the prompts.

    Attributes:
        prompts: Ids of each prompt.
        answers: Greedy ids of each answer, at most `ANSWER_TOKENS`, with the stop id if it was reached.
        model: The model, for logits at a difference.
    """

    prompts: list[list[int]]
    answers: list[list[int]]
    model: GPT = field(repr=False)


@dataclass
class Verification:
    """What was found for one model in Ollama.

    Attributes:
        prompts: Prompts asked.
        prompt_ids_equal: Whether all ids were equal; None if the server shows no ids.
        chat_prompts_equal: The same for conversations, by text and number of tokens; None if it shows no prompt.
        greedy_agreement: Share of prompts with the same first tokens.
        differences: For each other prompt: where the answers part, both tokens, and the difference of their logits.
        examples: Some questions with both answers.
    """

    prompts: int
    prompt_ids_equal: bool | None
    chat_prompts_equal: bool | None
    greedy_agreement: float
    differences: list[dict[str, Any]]
    examples: list[dict[str, Any]]


def reference_answers(
    checkpoint_dir: Path,
    template: ChatTemplate,
    prompts: Sequence[list[Message]],
    precision: Precision = "32-true",
    device: str = "cpu",
) -> Reference:
    """LitGPT's greedy answers.

    Args:
        checkpoint_dir: The checkpoint that was exported.
        template: Its chat template.
        prompts: Conversations that end with the user's turn.
        precision: Of weights and arithmetic.
        device: Where LitGPT computes.
    """
    ids = [template.prompt_ids(messages) for messages in prompts]
    longest = max(map(len, ids)) + ANSWER_TOKENS
    model = load_model(checkpoint_dir, precision=precision, max_seq_length=longest, device=device)
    rollouts = generate(model, ids, max_new_tokens=ANSWER_TOKENS, stop_ids=template.stop_ids)
    return Reference(ids, [rollout.ids for rollout in rollouts], model)


def verify_model(
    server: OllamaServer, model: str, template: ChatTemplate, prompts: Sequence[list[Message]], reference: Reference
) -> Verification:
    """Ask Ollama the same prompts and compare ids and answers.

    Args:
        server: The server.
        model: The model's name in it.
        template: The checkpoint's chat template.
        prompts: Conversations of an optional system message and one user message.
        reference: From `reference_answers` for the same prompts.

    Raises:
        UserError: If a prompt's ids differ; the first difference is shown.
    """
    for probe in _PROBES:
        message: Message = {"role": "user", "content": probe}
        _ask(server, model, template, [message], num_predict=1)

    equal, shown = 0, True
    differences: list[dict[str, Any]] = []
    examples: list[dict[str, Any]] = []
    asked = list(zip(prompts, reference.prompts, reference.answers, strict=True))
    for messages, prompt, ours in brief(asked, f"asking {model}", "question"):
        theirs, text, stopped = _ask(server, model, template, messages, num_predict=ANSWER_TOKENS)
        shown = shown and theirs is not None
        answer = [i for i in ours if i not in template.stop_ids]
        our_text = template.decode(answer, skip_special_tokens=False)
        # An answer cut inside a character: each side has its own way to show the half of it.
        same = our_text.rstrip("\ufffd") == text.rstrip("\ufffd") and stopped == (len(answer) < len(ours))
        equal += same
        if not same:
            differences.append(_difference(template, reference.model, prompt, ours, theirs or template.encode(text)))
        if len(examples) < 3 or (not same and len(examples) < 6):
            examples.append({"question": messages[-1]["content"], "litgpt": our_text, "ollama": text, "equal": same})
    return Verification(
        prompts=len(prompts),
        prompt_ids_equal=True if shown else None,
        chat_prompts_equal=check_conversations(server, model, template),
        greedy_agreement=equal / len(prompts),
        differences=differences,
        examples=examples,
    )


def _ask(
    server: OllamaServer, model: str, template: ChatTemplate, messages: list[Message], num_predict: int
) -> tuple[list[int] | None, str, bool]:
    """One question by /api/generate.

    Returns:
        The answer's ids (None if the server shows no ids), its text, and whether it came to its end.

    Raises:
        UserError: If the prompt's ids are not ours.
    """
    system = messages[0]["content"] if messages[0]["role"] == "system" else None
    with explained(server, model):
        response = connect(server).generate(
            model, messages[-1]["content"], system=system or "", options={**_GREEDY, "num_predict": num_predict}
        )
    prompt, text, evaluated = template.render(messages, True), response.response or "", response.prompt_eval_count
    expected = template.encode(prompt)
    number = len(expected)
    context = None if response.context is None else list(response.context)
    if context is None:
        answer = None
    elif context[:number] == expected:
        answer = context[number:]
    elif evaluated == number and context == template.encode(prompt + text):  # they share a token
        answer = template.encode(text)
    else:
        raise _difference_of_prompts(template, expected, context[:number], messages[-1]["content"])
    if evaluated is not None and evaluated != number:
        raise UserError(
            f"Ollama evaluated {evaluated} prompt tokens where the model wants {number} (a BOS too many or too few?), "
            f"for the question {messages[-1]['content'][:80]!r}."
        )
    return answer, text, response.done_reason == "stop"


def _difference_of_prompts(template: ChatTemplate, ours: list[int], theirs: list[int], question: str) -> UserError:
    at = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(len(ours), len(theirs)))

    def around(ids: list[int]) -> str:
        return ", ".join(f"{i} {template.tokenizer.id_to_token(i)!r}" for i in ids[at : at + 4]) or "nothing"

    return UserError(
        f"Ollama's prompt ids differ from the model's at position {at} of {len(ours)}, for the question "
        f"{question[:80]!r}.\n  ours:   {around(ours)}\n  Ollama: {around(theirs)}"
    )


@torch.no_grad()
def _difference(
    template: ChatTemplate, model: GPT, prompt: list[int], ours: list[int], theirs: list[int]
) -> dict[str, Any]:
    """Where two answers part, and how far apart the two tokens' logits are there."""
    at = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(len(ours), len(theirs)))
    ids = torch.tensor([prompt + ours[:at]], device=model.transformer.wte.weight.device)  # (1, T)
    logits = model(ids)[0, -1].float().cpu()  # (padded_vocab_size,)
    our_id = ours[at] if at < len(ours) else int(logits.argmax())
    # Ollama does not show the stop it saw: where its answer ends first, its choice was the likeliest of the stops.
    stops = torch.tensor(template.stop_ids)
    their_id = theirs[at] if at < len(theirs) else int(stops[logits[stops].argmax()])
    gap = float(logits[our_id] - logits[their_id])
    return {
        "position": at,
        "litgpt": template.tokenizer.id_to_token(our_id),
        "ollama": template.tokenizer.id_to_token(their_id),
        "logit_gap": gap,
        "near_tie": abs(gap) < NEAR_TIE,
    }


def check_conversations(
    server: OllamaServer, model: str, template: ChatTemplate, as_text: ChatTemplate | None = None
) -> bool | None:
    """Compare the prompts of conversations with one to three turns, with and without a system message.

    Where the template drops the thoughts of earlier answers, it is also given such answers, and Ollama what a chat of
    ours sends of them.

    Args:
        server: The server.
        model: The model's name in it.
        template: The model's own template.
        as_text: The same without the BOS token's text, for a GGUF whose tokenizer adds that token by itself.

    Returns:
        True if the text that the server logged and the number of its tokens are ours; None if it shows no text.

    Raises:
        UserError: If they differ.
    """
    client = connect(server)
    asked = conversations(with_system=derive(template).system_before is not None)
    if template.drops_thoughts:
        asked += [[_thoughtful(message) for message in messages] for messages in asked if len(messages) > 2]
    for messages in asked:
        mark = server.log.stat().st_size if server.log else 0
        with explained(server, model):
            response = client.chat(model, without_thoughts(messages), options={**_GREEDY, "num_predict": 1})
        number = len(template.prompt_ids(messages))
        expected = (as_text or template).render(messages, add_generation_prompt=True)
        if response.prompt_eval_count is not None and response.prompt_eval_count != number:
            raise UserError(
                f"Ollama evaluated {response.prompt_eval_count} tokens for a conversation of {len(messages)} messages; "
                f"the model's own prompt has {number}."
            )
        if server.log is None:
            return None
        logged = last_logged_prompt(server.log, mark)
        if logged is None:
            return None
        if logged != expected:
            at = next((i for i, (a, b) in enumerate(zip(logged, expected, strict=False)) if a != b), 0)
            raise UserError(
                f"Ollama's prompt for a conversation of {len(messages)} messages differs at character {at}:\n"
                f"  ours:   {expected[at : at + 80]!r}\n  Ollama: {logged[at : at + 80]!r}"
            )
    return True


def _thoughtful(message: Message) -> Message:
    thought = "<think>\nIt may be {{ .Thinking }}.\n</think>\n\n"
    return {**message, "content": thought + message["content"]} if message["role"] == "assistant" else message


def last_logged_prompt(log: Path, offset: int = 0) -> str | None:
    """The last prompt in a server's log (written at OLLAMA_DEBUG=2).

    Args:
        log: The log file.
        offset: Where to begin, in bytes.

    Returns:
        The prompt's text, or None if none is logged.
    """
    with open(log, "rb") as f:
        f.seek(offset)
        lines = f.read().decode("utf-8", errors="replace").splitlines()
    found = [m[1] for line in lines if (m := re.search(r'msg="completion request" prompt=(".*"|[^\s"]\S*)$', line))]
    return _go_unquote(found[-1]) if found else None


_GO_ESCAPE = re.compile(r"\\(x[0-9a-f]{2}|u[0-9a-f]{4}|U[0-9a-f]{8}|.)")
_GO_SIMPLE = {"a": "\a", "b": "\b", "f": "\f", "n": "\n", "r": "\r", "t": "\t", "v": "\v"}


def _go_unquote(text: str) -> str:
    """Undo Go's strconv.Quote, which its log writer uses where a value holds spaces or quotes."""
    if not text.startswith('"'):
        return text

    def replace(match: re.Match[str]) -> str:
        escape = match[1]
        if len(escape) > 1:
            return chr(int(escape[1:], 16))
        return _GO_SIMPLE.get(escape, escape)

    return _GO_ESCAPE.sub(replace, text[1:-1])
