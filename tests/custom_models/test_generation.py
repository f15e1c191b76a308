"""What every decoder of this folder is held to: the cache changes nothing, a seed decides, settings are obeyed."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from custom_models.attention import KVCache
from custom_models.beam_search import beam_search
from custom_models.beam_search import main as beam_search_program
from custom_models.deepseek import DeepSeek, DeepSeekConfig
from custom_models.generation import generate
from custom_models.gpt import GPT, GPTConfig, modern
from custom_models.llama import Llama, LlamaConfig
from custom_models.mixture_of_experts import ExpertsConfig
from custom_models.rope import RopeScaling
from workflows.errors import UserError

VOCABULARY, LONGEST = 60, 48


def llama(**changes: Any) -> Llama:
    fields: dict[str, Any] = {"width": 32, "n_layer": 3, "n_head": 4, "n_kv_head": 2, "inner_width": 48}
    return Llama(LlamaConfig(vocab_size=VOCABULARY, max_length=LONGEST, **{**fields, **changes}))


def gpt(make: Callable[..., GPTConfig], **changes: Any) -> GPT:
    return GPT(make(vocab_size=VOCABULARY, context=LONGEST, width=32, n_layer=2, n_head=4, **changes))


def deepseek(**changes: Any) -> DeepSeek:
    experts = ExpertsConfig(n_routed=8, n_active=3, inner_width=16, n_group=4, n_active_group=2)
    fields: dict[str, Any] = {"width": 32, "n_layer": 2, "n_dense": 1, "inner_width": 48, "n_head": 4, "q_rank": 24,
                              "kv_rank": 16, "nope_size": 16, "rope_size": 8, "value_size": 12}  # fmt: skip
    sizes: Any = {"vocab_size": VOCABULARY, "max_length": LONGEST, **fields, **changes}
    return DeepSeek(DeepSeekConfig(experts=experts, **sizes))


DECODERS: dict[str, Callable[[], Any]] = {
    "llama": llama,
    "llama, untied, multi-query": lambda: llama(tied=False, n_kv_head=1),
    "llama, RoPE stretched": lambda: llama(rope_scaling=RopeScaling("llama3", 4.0, 16)),
    "llama, heads of another size, biases": lambda: llama(head_size=16, qkv_bias=True),
    "GPT-2": lambda: gpt(GPTConfig),
    "GPT, modern": lambda: gpt(modern),
    "GPT, grouped": lambda: gpt(modern, n_kv_head=2, feed_forward="swiglu"),
    "DeepSeek": deepseek,
    "DeepSeek, direct queries": lambda: deepseek(q_rank=None, tied=True),
}
"""A new decoder adds itself here: a tiny random model with this vocabulary and longest text."""


@pytest.fixture(scope="module", params=DECODERS)
def decoder(request) -> Any:
    torch.manual_seed(0)
    model = DECODERS[request.param]().eval()
    for parameter in model.parameters():  # random models agree on everything; this one has opinions
        parameter.data = parameter.data + 0.2 * torch.randn(parameter.shape)
    assert model.max_length == LONGEST
    return model


def prompts(batch: int = 3, length: int = 5) -> Tensor:
    return torch.randint(0, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def test_logits_with_the_cache_are_those_without(decoder):
    ids = prompts(length=20)
    whole = decoder(ids)
    for cuts in ([20], [1] * 20, [7, 1, 1, 6, 5]):  # at once, one by one, in pieces
        caches, pieces = decoder.new_caches(3, 20), ids.split(cuts, dim=1)
        found = torch.cat([decoder(piece, caches) for piece in pieces], dim=1)
        torch.testing.assert_close(found, whole, atol=1e-4, rtol=0)


@torch.no_grad()
def test_no_token_sees_a_later_one(decoder):
    ids = prompts(length=20)
    changed = torch.cat([ids[:, :11], (ids[:, 11:] + 1) % VOCABULARY], dim=1)
    before, after = decoder(ids), decoder(changed)
    torch.testing.assert_close(before[:, :11], after[:, :11], atol=1e-5, rtol=0)
    assert not torch.allclose(before[:, 11:], after[:, 11:], atol=1e-2)


@pytest.mark.parametrize("settings", [{}, {"temperature": 1.0, "seed": 3}, {"temperature": 0.7, "top_k": 5, "seed": 4}])
def test_cached_text_is_uncached_text(decoder, settings):
    cached = generate(decoder, prompts(), 30, **settings)
    assert cached.ids == generate(decoder, prompts(), 30, use_cache=False, **settings).ids
    assert [len(row) for row in cached.ids] == [30] * 3
    assert len({token for row in cached.ids for token in row}) > 5  # no model that says one word only
    assert cached.seconds > 0 and cached.tokens_per_second == pytest.approx(90 / cached.seconds)


def test_a_texts_neighbours_in_the_batch_change_nothing(decoder):
    together = generate(decoder, prompts(), 12).ids
    assert together == [generate(decoder, row[None], 12).ids[0] for row in prompts()]


def test_a_seed_decides_what_is_drawn(decoder):
    def drawn(seed: int) -> list[list[int]]:
        return generate(decoder, prompts(), 20, temperature=1.5, seed=seed).ids

    assert drawn(5) == drawn(5) != drawn(6)


def test_a_seed_leaves_torchs_own_generator_alone(decoder):
    torch.manual_seed(7)
    expected = torch.rand(1)
    torch.manual_seed(7)
    generate(decoder, prompts(), 2, temperature=1.0, seed=5)
    assert torch.equal(torch.rand(1), expected)
    torch.manual_seed(7)
    first = generate(decoder, prompts(), 20, temperature=1.5).ids
    assert generate(decoder, prompts(), 20, temperature=1.5).ids != first
    torch.manual_seed(7)
    assert generate(decoder, prompts(), 20, temperature=1.5).ids == first


@pytest.mark.parametrize("settings", [{"top_k": 1}, {"top_p": 1e-9}, {"temperature": 1e-6}])
def test_one_candidate_is_greedy(decoder, settings):
    found = generate(decoder, prompts(), 16, **{"temperature": 1.0, "seed": 2, **settings})
    assert found.ids == generate(decoder, prompts(), 16).ids


def test_a_stop_id_ends_its_text_and_no_other(decoder):
    greedy = generate(decoder, prompts(), 16).ids
    stop = greedy[0][6]
    found = generate(decoder, prompts(), 16, stop_ids=[stop, VOCABULARY + 7]).ids
    for row, whole in zip(found, greedy, strict=True):
        assert row == (whole[: whole.index(stop) + 1] if stop in whole else whole)
    assert len(found[0]) <= 7


class Fixed:
    """A decoder that thinks the same of every token: what is drawn must follow it. It counts how often it is asked."""

    max_length = 64

    def __init__(self, probabilities: list[float]) -> None:
        self.logits = torch.tensor(probabilities).log()  # (vocab_size,)
        self.calls = 0

    def __call__(self, ids: Tensor, caches: Any = None) -> Tensor:
        self.calls += 1
        return self.logits.expand(*ids.shape, -1)  # (B, T, vocab_size)

    def new_caches(self, batch: int, length: int) -> list[KVCache]:
        return []


P = [0.4, 0.3, 0.2, 0.1]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, P),
        ({"temperature": 0.5}, [0.16 / 0.3, 0.09 / 0.3, 0.04 / 0.3, 0.01 / 0.3]),  # p^2, made to sum to 1
        ({"top_k": 2}, [4 / 7, 3 / 7, 0, 0]),
        ({"top_p": 0.65}, [4 / 7, 3 / 7, 0, 0]),  # 0.4 is not enough, 0.4 + 0.3 is
        ({"top_p": 0.75}, [4 / 9, 3 / 9, 2 / 9, 0]),
        ({"top_k": 3, "top_p": 0.5}, [4 / 7, 3 / 7, 0, 0]),  # of the three 4/9 is not enough, 7/9 is
    ],
)
def test_what_is_drawn_follows_the_truncated_distribution(settings, expected):
    found = generate(Fixed(P), torch.zeros(500, 1, dtype=torch.long), 40, **{"temperature": 1.0, "seed": 1, **settings})
    counts = torch.bincount(torch.tensor(found.ids).flatten(), minlength=4)  # (4,), of 20,000
    shares = counts / counts.sum()
    torch.testing.assert_close(shares, torch.tensor(expected), atol=0.012, rtol=0)  # 3.5 standard errors of a half
    assert [share == 0 for share in shares.tolist()] == [p == 0 for p in expected]


def test_writing_stops_when_every_text_has_stopped():
    model = Fixed([0.1, 0.9])
    found = generate(model, torch.zeros(3, 1, dtype=torch.long), 40, stop_ids=[1])
    assert found.ids == [[1]] * 3 and model.calls == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, not 0"),
        ({"temperature": -0.1, "top_k": 0}, r"2 problems:\n.*temperature must be .*\n.*top_k must be at least 1"),
        ({"top_p": 0.0}, "top_p must be above 0 and at most 1, not 0.0"),
        ({"top_p": 1.1}, "top_p must be above 0 and at most 1, not 1.1"),
        ({"prompts": torch.zeros(1, 0, dtype=torch.long)}, "the prompt has no token"),
        ({"max_new_tokens": 60}, "5 tokens and 60 new ones are more than the 64"),
    ],
)  # fmt: skip
def test_settings_that_make_no_sense_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        generate(Fixed(P), **{"prompts": prompts(1), "max_new_tokens": 4, **settings})


def test_the_longest_text_just_fits(decoder):
    assert len(generate(decoder, prompts(1), LONGEST - 5).ids[0]) == LONGEST - 5
    with pytest.raises(UserError, match="are more than the 48"):
        generate(decoder, prompts(1), LONGEST - 4)


def test_scores_that_are_no_numbers_and_ids_that_are_no_tokens_are_told(decoder):
    for temperature in (0.0, 1.0):
        weight = decoder.tokens.weight
        kept = weight.data.clone()
        weight.data.fill_(math.nan)
        try:
            with pytest.raises(UserError, match="scores are not finite: its weights are damaged"):
                generate(decoder, prompts(), 3, temperature=temperature)
            with pytest.raises(UserError, match="scores are not finite: its weights are damaged"):
                beam_search(decoder, prompts(), 3)
        finally:
            weight.data.copy_(kept)
    for wrong in (VOCABULARY, -1):
        with pytest.raises(UserError, match=f"from 0 to {VOCABULARY - 1}, and these go from"):
            decoder(torch.tensor([[1, wrong]]))
    with pytest.raises(UserError, match=f"A cache of {LONGEST + 1} tokens is longer than"):
        decoder.new_caches(1, LONGEST + 1)


def test_a_search_that_the_rules_leave_no_way_ends_with_what_it_has(decoder):
    few = [3, 4, 5, 6]
    for n_beam in (1, 3):
        found = beam_search(decoder, prompts(2), 8, n_beam=n_beam, no_repeat_ngram=1, allowed=lambda *_: few)
        assert all(1 <= len(ids) <= 4 and len(set(ids)) == len(ids) and set(ids) <= set(few) for ids in found.ids)
        # the first text comes to where nothing may follow, the second one does not
        found = beam_search(
            decoder,
            prompts(2),
            5,
            n_beam=n_beam,
            allowed=lambda i, written: [] if i == 0 and len(written) == 2 else few,
        )
        assert [len(ids) for ids in found.ids] == [2, 5]
        with pytest.raises(UserError, match="forbid every token after the prompt"):
            beam_search(decoder, prompts(2), 5, n_beam=n_beam, allowed=lambda i, _: [] if i else few)


def test_one_beam_is_greedy_and_more_are_no_worse(decoder):
    def logprob(ids: list[int], prompt: Tensor) -> float:
        text = torch.cat([prompt, torch.tensor(ids)])[None]  # (1, T)
        with torch.no_grad():
            logprobs = decoder(text)[0, len(prompt) - 1 : -1].log_softmax(dim=-1)  # (new tokens, vocab_size)
        return float(logprobs.gather(1, torch.tensor(ids)[:, None]).sum())

    greedy = generate(decoder, prompts(), 8).ids
    assert beam_search(decoder, prompts(), 8, n_beam=1).ids == greedy
    found = [beam_search(decoder, prompts(), 8, n_beam=4, use_cache=use_cache).ids for use_cache in (True, False)]
    assert found[0] == found[1]
    gains = [logprob(a, p) - logprob(b, p) for a, b, p in zip(found[0], greedy, prompts(), strict=True)]
    assert sum(gains) >= -1e-4


def test_beam_search_runs_as_a_program(embedded_checkpoint, capsys):
    beam_search_program(max_new_tokens=3)
    rows = [line.split(maxsplit=3) for line in capsys.readouterr().out.splitlines()]
    assert [row[:2] for row in rows] == [["1", "beam"], ["4", "beams"]] and rows[0][3].startswith("The liver is ")
    assert float(rows[1][2]) >= float(rows[0][2]) - 0.01  # more beams find what is no less likely
