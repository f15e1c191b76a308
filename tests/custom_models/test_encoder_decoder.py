"""The encoder-decoder: transformers' T5 in logits, greedy search and beam search; the paper's by torch's own layers."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import T5Config, T5ForConditionalGeneration

from custom_models.beam_search import beam_search
from custom_models.encoder_decoder import EncoderDecoder
from custom_models.encoder_decoder_checkpoint import (
    load_hf,
)
from custom_models.generation import generate

VOCABULARY = 60
LENGTHS = torch.tensor([9, 4, 7])
TINY: dict[str, Any] = {"width": 32, "n_layer": 2, "n_decoder_layer": 3, "n_head": 4, "inner_width": 48}
KINDS = {
    "v1.0": {"feed_forward_proj": "relu"},
    "v1.1": {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False, "d_kv": 16},
    "v1.1, tied": {"feed_forward_proj": "gated-gelu", "num_decoder_layers": 1, "relative_attention_num_buckets": 8,
                   "relative_attention_max_distance": 6},
}  # fmt: skip


def source() -> Tensor:
    """Texts of the lengths above, padded with 0."""
    ids = torch.randint(2, VOCABULARY, (3, 9), generator=torch.Generator().manual_seed(1))
    return ids.masked_fill(torch.arange(9) >= LENGTHS[:, None], 0)


def opinionated(model: nn.Module, scale: float = 0.3) -> None:
    """Random models agree on everything; this one gets opinions."""
    generator = torch.Generator().manual_seed(2)
    for parameter in model.parameters():
        parameter.data += scale * torch.randn(parameter.shape, generator=generator)


@pytest.fixture(scope="module", params=KINDS)
def pair(request, tmp_path_factory) -> tuple[T5ForConditionalGeneration, EncoderDecoder]:
    """A tiny random T5 of transformers', and ours with its weights, by way of its folder."""
    torch.manual_seed(0)
    fields = {"vocab_size": VOCABULARY, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
    config = T5Config(**{**fields, **KINDS[request.param]}, decoder_start_token_id=0)
    theirs = T5ForConditionalGeneration(config).eval()
    opinionated(theirs)
    if request.param == "v1.1":  # as Google's files are; transformers 5 would tie the two
        theirs.lm_head.weight = nn.Parameter(0.2 * torch.randn(VOCABULARY, 32))
        theirs.config.tie_word_embeddings = False
    folder = tmp_path_factory.mktemp("t5")
    theirs.save_pretrained(folder)
    return theirs, load_hf(folder).eval()


@torch.no_grad()
def test_logits_are_those_of_transformers(pair):
    theirs, ours = pair
    ids, answers = source(), torch.randint(0, VOCABULARY, (3, 12), generator=torch.Generator().manual_seed(3))
    expected = theirs(input_ids=ids, attention_mask=torch.arange(9) < LENGTHS[:, None], decoder_input_ids=answers)
    torch.testing.assert_close(ours(ids, answers, LENGTHS), expected.logits, atol=1e-4, rtol=0)


def written(theirs: T5ForConditionalGeneration, **options: Any) -> list[list[int]]:
    mask = (torch.arange(9) < LENGTHS[:, None]).long()
    texts = theirs.generate(source(), attention_mask=mask, do_sample=False, max_new_tokens=14, **options)[
        :, 1:
    ].tolist()
    return [text[: text.index(1) + 1] if 1 in text else text for text in texts]


def test_greedy_text_is_that_of_transformers(pair):
    theirs, ours = pair
    expected = written(theirs, num_beams=1)
    writer = ours.writer(source(), LENGTHS)
    for use_cache in (True, False):
        assert generate(writer, writer.prompts, 14, stop_ids=[1], use_cache=use_cache).ids == expected
    assert beam_search(writer, writer.prompts, 14, n_beam=1, stop_ids=[1]).ids == expected


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"length_penalty": 2.0},
        {"length_penalty": -1.0},
        {"length_penalty": 0.0, "early_stopping": "never"},
        {"length_penalty": 1.5, "early_stopping": "never"},
        {"early_stopping": True},
        {"no_repeat_ngram": 2},
        {"no_repeat_ngram": 1, "early_stopping": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("n_beam", [2, 4])
def test_beam_search_is_that_of_transformers(pair, n_beam: int, options: dict[str, Any]):
    theirs, ours = pair
    named = {"no_repeat_ngram": "no_repeat_ngram_size"}
    expected = written(theirs, num_beams=n_beam, **{named.get(k, k): value for k, value in options.items()})
    writer = ours.writer(source(), LENGTHS)
    assert beam_search(writer, writer.prompts, 14, n_beam=n_beam, stop_ids=[1], **options).ids == expected
