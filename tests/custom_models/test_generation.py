"""Writing on gives the same text with the cache and without; settings and lengths that cannot be are told."""

import pytest
import torch

from custom_models.generation import Decoder, generate
from custom_models.gpt import GPT, GPTConfig, modern
from workflows.errors import UserError

SMALL = {"vocab_size": 30, "context": 32, "width": 32, "n_layer": 2, "n_head": 4}


def with_opinions(model: torch.nn.Module) -> Decoder:
    """A random model whose probabilities lie far apart, so that a wrong number shows in what is drawn."""
    for parameter in model.parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()  # type: ignore[return-value]


def decoders() -> dict[str, Decoder]:
    torch.manual_seed(0)
    models = {
        "gpt2": GPT(GPTConfig(**SMALL)),
        "modern": GPT(modern(**SMALL)),
        "grouped": GPT(modern(**SMALL, n_kv_head=2, feed_forward="swiglu")),
    }
    return {name: with_opinions(model) for name, model in models.items()}


SETTINGS = [{}, {"temperature": 1.0}, {"temperature": 0.8, "top_k": 5}, {"temperature": 1.2, "top_p": 0.7}]


@pytest.mark.parametrize("name", decoders())
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_the_cache_changes_nothing(name, settings):
    model, prompts = decoders()[name], torch.randint(30, (3, 5), generator=torch.Generator().manual_seed(2))
    cached, whole = (generate(model, prompts, 27, **settings, seed=7, use_cache=use) for use in (True, False))
    assert cached.ids == whole.ids and [len(ids) for ids in cached.ids] == [27] * 3
    assert cached.tokens_per_second > 0
    if settings:
        assert generate(model, prompts, 27, **settings, seed=8).ids != cached.ids


@pytest.mark.parametrize("name", decoders())
def test_logits_of_single_steps_are_those_of_the_whole_text(name):
    model, ids = decoders()[name], torch.randint(30, (2, 20), generator=torch.Generator().manual_seed(3))
    caches = model.new_caches(2, 20)
    with torch.no_grad():
        steps = [model(ids[:, :6], caches), *(model(ids[:, i : i + 1], caches) for i in range(6, 20))]
        torch.testing.assert_close(torch.cat(steps, dim=1), model(ids), atol=1e-5, rtol=1e-5)


def test_a_stop_id_ends_a_text():
    model = decoders()["gpt2"]
    prompt = torch.zeros(1, 1, dtype=torch.long)
    ids = generate(model, prompt, 10).ids[0]
    stopped = generate(model, prompt, 10, stop_ids=[ids[2]]).ids[0]
    assert stopped == ids[: ids.index(ids[2]) + 1]


def test_what_cannot_be_is_told():
    model, prompt = decoders()["modern"], torch.zeros(1, 5, dtype=torch.long)
    with pytest.raises(UserError, match="5 tokens and 28 new ones are more than the 32"):
        generate(model, prompt, 28)
    with pytest.raises(UserError, match="5 problems"):
        generate(model, prompt[:, :0], 0, temperature=-1, top_k=0, top_p=0.0)
