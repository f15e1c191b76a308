"""The encoder-decoder: transformers' T5 in logits, greedy search and beam search; the paper's by torch's own layers."""

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import T5Config, T5ForConditionalGeneration

from custom_models.beam_search import beam_search
from custom_models.encoder_decoder import EncoderDecoder, main
from custom_models.encoder_decoder_checkpoint import (
    config_from_hf,
    load_encoder_decoder,
    load_hf,
    save_encoder_decoder,
    save_hf,
)
from custom_models.encoder_decoder_config import t5, t5_v1_1, transformer
from custom_models.generation import generate
from workflows.errors import UserError

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


@pytest.mark.parametrize("n_beam", [1, 3])
def test_constrained_text_is_that_of_transformers(pair, n_beam: int):
    theirs, ours = pair

    def allowed(text: int, ids: list[int]) -> list[int]:
        """The end from the third token on, and some others, which depend on the text and on what is written."""
        return [1] * (len(ids) > 2) + [2 + (7 * i + sum(ids) + text) % 50 for i in range(5)]

    expected = written(theirs, num_beams=n_beam, prefix_allowed_tokens_fn=lambda i, ids: allowed(i, ids[1:].tolist()))
    writer = ours.writer(source(), LENGTHS)
    assert beam_search(writer, writer.prompts, 14, n_beam=n_beam, stop_ids=[1], allowed=allowed).ids == expected


@torch.no_grad()
def test_the_papers_model_is_that_of_torchs_own_layers():
    """torch's nn.Transformer adds a norm after each stack, which the paper lacks; its layers alone are the paper's."""
    torch.manual_seed(0)
    ours = EncoderDecoder(transformer(VOCABULARY, **TINY, max_length=20)).eval()
    opinionated(ours)
    encoder = [nn.TransformerEncoderLayer(32, 4, 48, batch_first=True).eval() for _ in ours.encoder]
    decoder = [nn.TransformerDecoderLayer(32, 4, 48, batch_first=True).eval() for _ in ours.decoder]
    for theirs, layer in [*zip(encoder, ours.encoder, strict=True), *zip(decoder, ours.decoder, strict=True)]:
        copy_layer(theirs, layer)

    def embed(ids: Tensor) -> Tensor:
        return ours.tokens(ids) * 32**0.5 + ours.positions(torch.arange(ids.shape[1]))

    ids, answers = source(), torch.randint(0, VOCABULARY, (3, 12), generator=torch.Generator().manual_seed(3))
    padding = torch.arange(9) >= LENGTHS[:, None]
    x, y = embed(ids), embed(answers)
    for layer in encoder:
        x = layer(x, src_key_padding_mask=padding)
    later = torch.ones(12, 12, dtype=torch.bool).triu(1)
    for layer in decoder:
        y = layer(y, x, tgt_mask=later, memory_key_padding_mask=padding)
    torch.testing.assert_close(ours(ids, answers, LENGTHS), y @ ours.tokens.weight.T, atol=1e-4, rtol=1e-5)


def copy_layer(theirs: Any, ours: Any) -> None:
    """Give a layer of torch's the weights of one of ours."""
    parts = [(theirs.self_attn, ours.attention)]
    norms = [(theirs.norm1, ours.attention_norm), (theirs.norm2, ours.feed_forward_norm)]
    if ours.cross is not None:
        parts.append((theirs.multihead_attn, ours.cross))
        norms = [norms[0], (theirs.norm2, ours.cross_norm), (theirs.norm3, ours.feed_forward_norm)]
    for attention, layer in parts:
        attention.in_proj_weight.data = torch.cat([layer.q.weight, layer.k.weight, layer.v.weight])
        attention.in_proj_bias.data = torch.cat([layer.q.bias, layer.k.bias, layer.v.bias])
        attention.out_proj.load_state_dict(layer.out.state_dict())
    for norm, layer in norms:
        norm.load_state_dict(layer.state_dict())
    theirs.linear1.load_state_dict(ours.feed_forward.up.state_dict())
    theirs.linear2.load_state_dict(ours.feed_forward.down.state_dict())


CONFIGS: dict[str, Callable[..., Any]] = {"the Transformer": transformer, "T5": t5, "T5 v1.1": t5_v1_1}


@pytest.fixture(scope="module", params=CONFIGS)
def model(request) -> EncoderDecoder:
    torch.manual_seed(0)
    model = EncoderDecoder(CONFIGS[request.param](VOCABULARY, **TINY)).eval()
    opinionated(model, 0.2)
    return model


@torch.no_grad()
def test_the_cache_changes_nothing(model):
    answers = torch.randint(0, VOCABULARY, (3, 12), generator=torch.Generator().manual_seed(3))
    writer = model.writer(source(), LENGTHS)
    whole = writer(answers)
    for cuts in ([12], [1] * 12, [5, 1, 6]):
        caches, pieces = writer.new_caches(3, 12), answers.split(cuts, dim=1)
        found = torch.cat([writer(piece, caches) for piece in pieces], dim=1)
        torch.testing.assert_close(found, whole, atol=1e-4, rtol=1e-5)
    for n_beam in (1, 3):
        search = [
            beam_search(writer, writer.prompts, 10, n_beam=n_beam, stop_ids=[1], use_cache=use_cache).ids
            for use_cache in (True, False)
        ]
        assert search[0] == search[1]


@torch.no_grad()
def test_padding_changes_nothing(model):
    answers = torch.randint(0, VOCABULARY, (3, 12), generator=torch.Generator().manual_seed(3))
    together = model(source(), answers, LENGTHS)
    for i, length in enumerate(LENGTHS.tolist()):
        alone = model(source()[i : i + 1, :length], answers[i : i + 1])
        torch.testing.assert_close(together[i : i + 1], alone, atol=1e-4, rtol=1e-5)


def test_a_beam_writes_nothing_but_what_is_allowed(model):
    writer = model.writer(source(), LENGTHS)
    asked: list[tuple[int, list[int]]] = []

    def allowed(text: int, ids: list[int]) -> list[int]:
        asked.append((text, ids))
        return [10 * (text + 1) + len(ids)] if len(ids) < 4 else [1]

    for n_beam in (1, 3):  # with more beams than ways to go on
        written = beam_search(writer, writer.prompts, 9, n_beam=n_beam, stop_ids=[1], allowed=allowed)
        assert written.ids == [[10 * i, 10 * i + 1, 10 * i + 2, 10 * i + 3, 1] for i in (1, 2, 3)]
    assert {text for text, _ in asked} == {0, 1, 2}


def test_no_n_gram_occurs_twice(model):
    writer = model.writer(source(), LENGTHS)
    for n in (1, 2, 3):
        for ids in beam_search(writer, writer.prompts, 14, n_beam=3, stop_ids=[1], no_repeat_ngram=n).ids:
            grams = [tuple(ids[i : i + n]) for i in range(len(ids) - n + 1)]
            assert len(set(grams)) == len(grams)


def tokenizer(size: int = VOCABULARY) -> Tokenizer:
    from tokenizers import models

    return Tokenizer(models.WordLevel({f"w{i}": i for i in range(size)}, unk_token="w0"))


def test_a_checkpoint_of_our_own_comes_back(model, tmp_path):
    save_encoder_decoder(model, model.config, tokenizer(), tmp_path / "final", note="mine")
    again, read = load_encoder_decoder(tmp_path / "final")
    assert again.config == model.config and read.get_vocab_size() == VOCABULARY
    answers = torch.zeros(3, 1, dtype=torch.long)
    with torch.no_grad():
        assert torch.equal(again(source(), answers, LENGTHS), model(source(), answers, LENGTHS))


@pytest.mark.parametrize(
    "config",
    [
        t5(VOCABULARY, **TINY),
        t5_v1_1(VOCABULARY, **TINY, n_bucket=8, max_distance=9),
        t5_v1_1(VOCABULARY, **{**TINY, "head_size": None}, tied=True, scale_embeddings=True),
    ],
    ids=["v1.0", "v1.1", "v1.1, tied, its embeddings scaled"],
)
@torch.no_grad()
def test_transformers_reads_what_we_write(config, tmp_path):
    from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

    torch.manual_seed(0)
    ours = EncoderDecoder(config).eval()
    opinionated(ours, 0.2)
    save_hf(ours, tokenizer(), tmp_path / "t5")
    theirs = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "t5").eval()
    ids, answers = source(), torch.randint(0, VOCABULARY, (3, 12), generator=torch.Generator().manual_seed(3))
    expected = ours(ids, answers, LENGTHS)
    found = theirs(input_ids=ids, attention_mask=torch.arange(9) < LENGTHS[:, None], decoder_input_ids=answers)
    torch.testing.assert_close(found.logits, expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(load_hf(tmp_path / "t5").eval()(ids, answers, LENGTHS), expected, atol=1e-4, rtol=0)
    read = AutoTokenizer.from_pretrained(tmp_path / "t5")
    assert dict(read("w5")) == {"input_ids": [5, 1], "attention_mask": [1, 1]}
    assert read.eos_token_id == 1 and read.pad_token_id == 0


def test_only_a_t5_is_written_as_one(tmp_path):
    with pytest.raises(UserError, match="Only a model of T5's architecture"):
        save_hf(EncoderDecoder(transformer(VOCABULARY, **TINY)), tokenizer(), tmp_path / "t5")
    assert not (tmp_path / "t5").exists()


def hf_config(**changes: Any) -> dict[str, Any]:
    fields = {"model_type": "t5", "vocab_size": 60, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2,
              "num_heads": 4, "relative_attention_num_buckets": 32}  # fmt: skip
    return {**fields, **changes}


def test_old_and_new_files_say_in_their_own_ways_whether_the_heads_input_is_scaled():
    for changes, scaled in (
        ({}, True),
        ({"tie_word_embeddings": False}, False),
        ({"tie_word_embeddings": True, "scale_decoder_outputs": False}, False),
    ):
        assert config_from_hf(hf_config(**changes), "x", tied=True).scale_head is scaled


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "bart"}, "architecture 'bart'"),
        ({"feed_forward_proj": "gated-silu"}, "feed-forward layer 'gated-silu'"),
        ({"is_encoder_decoder": False}, "half of a T5"),
        ({"num_heads": 0}, "n_head must be at least 1"),
        ({"d_model": "abc"}, r"x/config\.json has 'abc' for d_model, which it cannot be"),
        ({"d_ff": None, "dropout_rate": [0.1]}, r"2 problems:\n.*None for d_ff.*\n.*\[0\.1\] for dropout_rate"),
        ({"num_decoder_layers": 10**6}, "1000000 for num_decoder_layers"),
        ({"feed_forward_proj": ["relu"]}, "feed-forward layer"),
        (
            {"relative_attention_max_distance": 4},
            r"x/config\.json: .*max_distance must be above 16, half of its buckets",
        ),
    ],
)
def test_foreign_configurations_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        config_from_hf(hf_config(**changes), "x", tied=True)
    with pytest.raises(UserError, match="lacks d_kv"):
        config_from_hf({key: value for key, value in hf_config().items() if key != "d_kv"}, "x", tied=True)


def test_damaged_checkpoints_are_refused(model, tmp_path):
    folder = tmp_path / "final"
    with pytest.raises(UserError, match="There is no folder"):
        load_encoder_decoder(folder)
    folder.mkdir()
    with pytest.raises(UserError, match=r"no config\.json"):
        load_encoder_decoder(folder)
    save_encoder_decoder(model, model.config, tokenizer(), folder)
    (folder / "model.safetensors").write_bytes(b"cut short")
    with pytest.raises(UserError, match="damaged"):
        load_encoder_decoder(folder)
    save_encoder_decoder(model, model.config, tokenizer(VOCABULARY + 1), folder)
    with pytest.raises(UserError, match="do not belong together"):
        load_encoder_decoder(folder)
    config = json.loads((folder / "config.json").read_text())
    config["encoder_decoder"]["width"] = 64
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="do not fit the model"):
        load_encoder_decoder(folder)
    config["encoder_decoder"]["width"] = 32.5
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"config\.json has 32\.5 for width, which it cannot be"):
        load_encoder_decoder(folder)


def test_what_makes_no_sense_is_refused(model):
    with pytest.raises(UserError, match="n_layer must be at least 1"):
        t5(VOCABULARY, n_layer=0)
    bad: list[dict[str, Any]] = [{"n_bucket": 3}, {"max_distance": -3}, {"max_distance": 16}, {"norm_eps": -1.0}]
    for changes in bad:
        with pytest.raises(UserError, match=next(iter(changes))):
            t5(VOCABULARY, **changes)
    near = EncoderDecoder(t5(VOCABULARY, **{**TINY, "n_bucket": 4, "max_distance": 3})).eval()
    assert near.encode(torch.ones(1, 9, dtype=torch.long)).isfinite().all()
    transformer(VOCABULARY, n_bucket=1)  # sine waves have no buckets
    with pytest.raises(UserError, match="pad_id 60 is no token"):
        t5(VOCABULARY, pad_id=60)
    with pytest.raises(UserError, match="nothing to read"):
        model.encode(torch.zeros(2, 0, dtype=torch.long))
    with pytest.raises(UserError, match="Token ids must be from 0"):
        model.encode(torch.tensor([[VOCABULARY]]))
    writer = model.writer(source(), LENGTHS)
    with pytest.raises(UserError, match="n_beam must be at least 1"):
        beam_search(writer, writer.prompts, 3, n_beam=0)
    if model.positions is not None:
        with pytest.raises(UserError, match="longer than its 512 positions"):
            model.encode(torch.ones(1, 513, dtype=torch.long))
        with pytest.raises(UserError, match="more than the 512"):
            beam_search(writer, writer.prompts, 600)


def test_its_command_shows_three_models(capsys):
    main()
    shown = capsys.readouterr().out
    assert "T5 small" in shown and "60.5 M" in shown and "77.0 M" in shown and "63.1 M" in shown
