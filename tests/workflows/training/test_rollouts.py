"""Batched decoding against one-by-one decoding, transformers' generate, and LitGPT's uncached forward."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.rounding import assert_greedy_up_to_a_near_tie
from workflows.chat_template import ChatTemplate
from workflows.errors import UserError
from workflows.training import decoding, rollouts
from workflows.training.model import LoRAArgs, load_model
from workflows.training.rollouts import generate
from workflows.training.sampling import choose

STOP = (2,)


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    g = torch.Generator().manual_seed(7)
    return [torch.randint(3, 300, (n,), generator=g).tolist() for n in (1, 5, 17, 3, 40, 8, 2)]


@pytest.fixture(scope="module")
def model(tiny_llama: Path):
    torch.manual_seed(3)  # before the adapters are drawn: the same ones whatever tests ran before
    model = load_model(tiny_llama, LoRAArgs(r=4))  # with adapters that do something, as in GRPO
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def frequent_stop(model, prompts, n: int) -> int:
    """An id that some of the greedy continuations reach before n tokens, and some do not."""
    rollouts = generate(model, prompts, max_new_tokens=n, stop_ids=())
    counts = {i: sum(i in r.ids[:-1] for r in rollouts) for r in rollouts for i in r.ids}
    stop = next(i for i, c in sorted(counts.items(), key=lambda item: -item[1]) if 0 < c < len(prompts))
    return stop


@pytest.mark.parametrize("family", ["tiny_llama", "tiny_qwen2"])
def test_ragged_batch_equals_transformers(request, prompts, family):
    ours = load_model(request.getfixturevalue(family))
    hf = AutoModelForCausalLM.from_pretrained(request.getfixturevalue(f"{family}_hf"), dtype=torch.float32).eval()
    stop = frequent_stop(ours, prompts, 24)
    rollouts = generate(ours, prompts, max_new_tokens=24, stop_ids=[stop], batch_size=3)
    assert {r.stopped for r in rollouts} == {True, False}
    for prompt, rollout in zip(prompts, rollouts, strict=True):
        ids = torch.tensor([prompt])
        expected = hf.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, do_sample=False, eos_token_id=stop
        )
        assert rollout.ids == expected[0, len(prompt) :].tolist()
        assert rollout.stopped == (rollout.ids[-1] == stop)


def test_batched_equals_one_by_one_and_the_uncached_forward(model, prompts):
    stop = frequent_stop(model, prompts, 24)
    batched = generate(model, prompts, max_new_tokens=24, stop_ids=[stop])
    alone = generate(model, prompts, max_new_tokens=24, stop_ids=[stop], batch_size=1)
    assert [r.ids for r in batched] == [r.ids for r in alone]
    for prompt, rollout in zip(prompts, batched, strict=True):
        ids = torch.tensor([prompt + rollout.ids])
        with torch.no_grad():
            logprobs = model(ids)[0, len(prompt) - 1 : -1].log_softmax(-1)
        assert rollout.ids == logprobs.argmax(-1).tolist()
        expected = logprobs.gather(1, torch.tensor(rollout.ids)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(rollout.logprobs), expected, atol=1e-5, rtol=0)


def test_a_shared_prompt_is_computed_once_and_each_row_goes_its_own_way(model, prompts, monkeypatch):
    many = [prompt for prompt in prompts[:3] for _ in range(4)]
    settings = {"max_new_tokens": 12, "stop_ids": STOP, "temperature": 1.0, "seed": 5}
    alone = generate(model, many, **settings, batch_size=1)
    seen: list[int] = []
    forward = rollouts._forward
    monkeypatch.setattr(rollouts, "_forward", lambda m, ids, *a, **k: seen.append(len(ids)) or forward(m, ids, *a, **k))
    together = generate(model, many, **settings)
    assert seen[0] == 3 and max(seen[1:]) == 12
    assert [r.ids for r in together] == [r.ids for r in alone]
    assert len({tuple(r.ids) for r in together}) > 6
    for one, other in zip(together, alone, strict=True):
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-5)


@pytest.mark.parametrize("seen_multiple", [8, 128])
def test_recorded_steps_give_what_steps_give(model, prompts, monkeypatch, seen_multiple):
    """Recording is a GPU's; here what it does with shapes, rows that are done and the cache is done step by step."""
    stop = frequent_stop(model, prompts, 40)
    settings = {"max_new_tokens": 40, "stop_ids": [stop], "temperature": 1.0, "seed": 5}
    expected = generate(model, prompts, **settings)
    made: list[int] = []
    played: list[int] = []

    def record(run):
        run()
        made.append(1)
        return lambda: (played.append(1), run())

    monkeypatch.setattr(decoding, "can_record", lambda device: True)
    monkeypatch.setattr(decoding, "record", record)
    monkeypatch.setattr(decoding, "SEEN_MULTIPLE", seen_multiple)
    found = generate(model, prompts, **settings)
    assert [r.ids for r in found] == [r.ids for r in expected]
    for one, other in zip(found, expected, strict=True):
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-5)
    assert len(made) >= (1 if seen_multiple == 128 else 4) and len(played) > 3 * len(made)


def test_sampling_is_a_function_of_the_seed_and_gives_untruncated_logprobs(model, prompts):
    settings = {"max_new_tokens": 12, "stop_ids": STOP, "temperature": 0.7, "top_k": 20, "top_p": 0.9}
    one = generate(model, prompts, **settings, seed=5)
    again = generate(model, prompts, **settings, seed=5, batch_size=2)
    other = generate(model, prompts, **settings, seed=6)
    assert [r.ids for r in one] == [r.ids for r in again]
    assert [r.ids for r in one] != [r.ids for r in other]
    for prompt, rollout in zip(prompts, one, strict=True):
        with torch.no_grad():
            logprobs = (model(torch.tensor([prompt + rollout.ids]))[0, len(prompt) - 1 : -1] / 0.7).log_softmax(-1)
        expected = logprobs.gather(1, torch.tensor(rollout.ids)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(rollout.logprobs), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("top_k", "top_p"), [(None, 1.0), (3, 1.0), (None, 0.8), (3, 0.8)])
def test_samples_follow_the_truncated_distribution(top_k, top_p):
    probs = torch.tensor([0.05, 0.4, 0.1, 0.3, 0.15])
    kept = {(None, 1.0): probs, (3, 1.0): probs * (probs >= 0.15), (None, 0.8): probs * (probs >= 0.15)}
    kept[3, 0.8] = probs * (probs >= 0.3)  # 0.4 and 0.3 make up 0.82 of the three most likely
    expected = kept[top_k, top_p] / kept[top_k, top_p].sum()
    draws = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000  # every quantile: no chance in the outcome
    logits = (2 * probs.log()).expand(20_000, 5)  # temperature 2 undoes the factor
    tokens, logprobs = choose(logits, draws, 2.0, top_k, top_p)
    share = torch.bincount(tokens, minlength=5) / 20_000
    torch.testing.assert_close(share, expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(logprobs, probs.log()[tokens], atol=1e-5, rtol=0)


def test_stop_when_ends_one_row_only(model, prompts):
    free = generate(model, prompts, max_new_tokens=10, stop_ids=())
    ended = generate(model, prompts, max_new_tokens=10, stop_ids=(), stop_when=lambda ids: ids == free[2].ids[:4])
    assert ended[2].ids == free[2].ids[:4] and ended[2].stopped
    others = [r.ids for i, r in enumerate(free) if r.ids[:4] != free[2].ids[:4]]
    assert [r.ids for i, r in enumerate(ended) if free[i].ids[:4] != free[2].ids[:4]] == others


def test_model_is_left_as_it_was(model, prompts):
    model.train()
    generate(model, prompts[:2], max_new_tokens=2, stop_ids=STOP)
    assert model.training
    assert all(block.attn.kv_cache is None for block in model.transformer.h)
    assert generate(model, [], max_new_tokens=2, stop_ids=STOP) == []


def test_too_long_is_explained(model):
    assert generate(model, [[5] * 510], max_new_tokens=2, stop_ids=())[0].ids  # just fits
    with pytest.raises(UserError, match="511 tokens and 2 new ones exceed the context of 512"):
        generate(model, [[5], [5] * 511], max_new_tokens=2, stop_ids=())


@pytest.mark.checkpoint
def test_real_checkpoint_equals_transformers(embedded_checkpoint, embedded_hf):
    template = ChatTemplate.from_checkpoint(embedded_checkpoint)
    questions = ["What is anaemia?", "Name a sign of pneumonia, and say how it is found.", "Hi"]
    prompts = [template.prompt_ids([{"role": "user", "content": question}]) for question in questions]
    model = load_model(embedded_checkpoint)
    rollouts = generate(model, prompts, max_new_tokens=16, stop_ids=template.stop_ids)
    hf = AutoModelForCausalLM.from_pretrained(embedded_hf, dtype=torch.float32).eval()
    for prompt, rollout in zip(prompts, rollouts, strict=True):
        ids = torch.tensor([prompt])
        expected = hf.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=16, do_sample=False)
        with torch.no_grad():
            logits = model(torch.tensor([prompt + rollout.ids]))[0, len(prompt) - 1 : -1]  # (T, padded_vocab_size)
        assert_greedy_up_to_a_near_tie(rollout.ids, expected[0, len(prompt) :].tolist(), logits, within=1e-3)
        said = torch.tensor(rollout.logprobs)
        wanted = logits.log_softmax(-1).gather(1, torch.tensor(rollout.ids)[:, None])[:, 0]
        torch.testing.assert_close(said, wanted, atol=1e-3, rtol=0)
