"""The encoder is transformers' BERT, RoBERTa and DistilBERT, and torch's Transformer encoder; bad input is told."""

import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from custom_models.encoder import Encoder, EncoderConfig, bert, distilbert, main, mean_over_tokens, paper, roberta
from custom_models.encoder_checkpoint import (
    MINILM_DIRECTORY,
    load_encoder,
    load_hf,
    minilm_directory,
    save_encoder,
    split_names,
    tokenizer_of,
)
from workflows.errors import UserError
from workflows.files import read_json, write_json

SIZES = {
    "bert": {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48},
    "distilbert": {"dim": 32, "n_layers": 3, "n_heads": 4, "hidden_dim": 48},
}
SIZES["roberta"] = SIZES["bert"] | {"type_vocab_size": 1, "pad_token_id": 1}
CLASSES = {"bert": "Bert", "roberta": "Roberta", "distilbert": "DistilBert"}


def tiny(family: str, folder: Path, head: str = "Model", **changes: Any) -> transformers.PreTrainedModel:
    """A random model of a family, saved."""
    config = getattr(transformers, f"{CLASSES[family]}Config")(
        vocab_size=60, max_position_embeddings=40, **{**SIZES[family], **changes}
    )
    torch.manual_seed(0)
    model = getattr(transformers, f"{CLASSES[family]}{head}")(config).eval()
    for parameter in model.parameters():  # transformers begins with zeros for biases and ones for norms
        parameter.data += 0.1 * torch.randn(parameter.shape)
    model.save_pretrained(folder)
    return model


def texts(pad_id: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Three texts of different lengths, padded."""
    ids = torch.randint(5, 60, (3, 12), generator=torch.Generator().manual_seed(1))
    lengths = torch.tensor([12, 7, 3])
    return ids.masked_fill(torch.arange(12) >= lengths[:, None], pad_id), lengths


@pytest.mark.parametrize("backend", ["sdpa", "naive"])
@pytest.mark.parametrize("family", CLASSES)
def test_hidden_states_are_transformers(family, backend, tmp_path):
    model = tiny(family, tmp_path)
    encoder = load_encoder(tmp_path).eval()
    for layer in encoder.layers:
        layer.attention.backend = backend
    ids, lengths = texts(encoder.config.pad_id)
    real = torch.arange(12) < lengths[:, None]
    with torch.no_grad():
        expected = model(ids, attention_mask=real.long(), output_hidden_states=True)
        found = encoder(ids, lengths)
    assert len(found.states) == len(expected.hidden_states) == 4
    for ours, theirs in zip(found.states, expected.hidden_states, strict=True):
        torch.testing.assert_close(ours[real], theirs[real], atol=1e-4, rtol=0)
    if family != "distilbert":
        torch.testing.assert_close(found.pooled, expected.pooler_output, atol=1e-4, rtol=0)


def test_segments_are_berts(tmp_path):
    model, encoder = tiny("bert", tmp_path), load_encoder(tmp_path).eval()
    ids, _ = texts()
    segments = (torch.arange(12) > 5).long().expand(3, 12)
    with torch.no_grad():
        expected = model(ids, token_type_ids=segments).last_hidden_state
        torch.testing.assert_close(encoder(ids, segments=segments).last, expected, atol=1e-4, rtol=0)
        assert not torch.allclose(encoder(ids).last, expected, atol=1e-2)


def test_attention_weights_are_berts(tmp_path):
    tiny("bert", tmp_path)
    model = transformers.BertModel.from_pretrained(tmp_path, attn_implementation="eager").eval()
    ids, lengths = texts()
    real = torch.arange(12) < lengths[:, None]
    with torch.no_grad():
        expected = model(ids, attention_mask=real.long(), output_attentions=True).attentions
        found = load_encoder(tmp_path).eval()(ids, lengths, return_weights=True).weights
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours[real[:, None].expand(3, 4, 12)[..., None].expand_as(ours)],
                                   theirs[real[:, None].expand(3, 4, 12)[..., None].expand_as(theirs)],
                                   atol=1e-5, rtol=0)  # fmt: skip


@pytest.mark.parametrize("norm_first", [False, True])
def test_a_layer_of_the_paper_is_torchs(norm_first):
    config = paper(50, width=32, n_layer=2, n_head=4, inner_width=64, norm_first=norm_first, dropout=0.0)
    encoder = Encoder(config).eval()
    theirs = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(32, 4, 64, 0.0, "relu", 1e-5, batch_first=True, norm_first=norm_first), 2,
        enable_nested_tensor=False, norm=nn.LayerNorm(32) if norm_first else None,
    ).eval()  # fmt: skip
    for ours, layer in zip(encoder.layers, theirs.layers, strict=True):
        attention = layer.self_attn
        for name, part in (("weight", attention.in_proj_weight), ("bias", attention.in_proj_bias)):
            for projection, rows in zip("qkv", part.chunk(3), strict=True):
                getattr(getattr(ours.attention, projection), name).data = rows.data
        ours.attention.out.load_state_dict(attention.out_proj.state_dict())
        ours.feed_forward.up.load_state_dict(layer.linear1.state_dict())
        ours.feed_forward.down.load_state_dict(layer.linear2.state_dict())
    ids, lengths = texts()
    ids = ids % 50
    padding = torch.arange(12) >= lengths[:, None]
    with torch.no_grad():
        found = encoder(ids, lengths)
        expected = theirs(found.states[0], src_key_padding_mask=padding)
    torch.testing.assert_close(found.last[~padding], expected[~padding], atol=1e-5, rtol=0)


def test_the_papers_embeddings_are_scaled_and_get_sine_waves():
    encoder = Encoder(paper(50, width=8, n_layer=1, n_head=2, inner_width=8, dropout=0.0)).eval()
    found = encoder.embed(torch.tensor([[4, 4]]))[0]
    expected = encoder.tokens.weight[4] * 8**0.5 + torch.tensor([0.0, 1.0] * 4)  # sin 0, cos 0
    torch.testing.assert_close(found[0], expected)
    assert float(found[1, 0] - found[0, 0]) == pytest.approx(0.8415, abs=1e-3)  # sin 1


def test_minilms_states_are_transformers():
    directory = minilm_directory()
    assert directory == MINILM_DIRECTORY
    encoder, tokenizer = load_encoder(directory).eval(), tokenizer_of(directory)
    theirs = transformers.BertModel.from_pretrained(directory).eval()
    sentences = ["The patient has a fever.", "An abnormality of the liver, seen by ultrasound in both parents.", "Ow!"]
    encoded = [tokenizer.encode(text).ids for text in sentences]
    assert encoded[0][:3] == [101, 1996, 5776] and encoded[2] == [101, 27593, 999, 102]
    lengths = torch.tensor([len(ids) for ids in encoded])
    ids = torch.zeros(3, int(lengths.max()), dtype=torch.long)
    for row, found in zip(ids, encoded, strict=True):
        row[: len(found)] = torch.tensor(found)
    real = torch.arange(ids.shape[1]) < lengths[:, None]
    with torch.no_grad():
        expected = theirs(ids, attention_mask=real.long(), output_hidden_states=True)
        found = encoder(ids, lengths)
    for ours, other in zip(found.states, expected.hidden_states, strict=True):
        torch.testing.assert_close(ours[real], other[real], atol=1e-4, rtol=0)
    torch.testing.assert_close(found.pooled, expected.pooler_output, atol=1e-4, rtol=0)


def test_padding_changes_nothing():
    encoder = Encoder(bert(60, width=32, n_layer=2, n_head=4, inner_width=48)).eval()
    ids, lengths = texts()
    with torch.no_grad():
        together = encoder(ids, lengths)
        means = mean_over_tokens(together.last, lengths)
        for i, length in enumerate(lengths.tolist()):
            alone = encoder(ids[i : i + 1, :length])
            torch.testing.assert_close(together.last[i, :length], alone.last[0], atol=1e-5, rtol=0)
            torch.testing.assert_close(means[i], mean_over_tokens(alone.last)[0], atol=1e-5, rtol=0)


def test_names_of_the_first_checkpoints_and_of_heads(tmp_path):
    model = tiny("bert", tmp_path, "ForMaskedLM")
    weights = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): tensor
        for name, tensor in model.state_dict().items()
    }
    (tmp_path / "model.safetensors").unlink()
    torch.save(weights, tmp_path / "pytorch_model.bin")
    encoder, heads = load_hf(tmp_path)
    assert encoder.pooler is None  # the checkpoint has none
    assert "cls.predictions.transform.dense.weight" in heads
    ids, _ = texts()
    with torch.no_grad():
        expected = model.bert(ids[:1]).last_hidden_state
        torch.testing.assert_close(encoder.eval()(ids[:1]).last, expected, atol=1e-4, rtol=0)


def test_a_checkpoint_of_ours_is_read_back(tmp_path):
    encoder = Encoder(roberta(60, width=32, n_layer=1, n_head=2, inner_width=48))
    save_encoder(encoder, encoder.config, tokenizer_of(minilm_directory()), tmp_path / "final")
    again = load_encoder(tmp_path / "final")
    assert again.config == encoder.config
    assert all(torch.equal(a, b) for a, b in zip(encoder.parameters(), again.parameters(), strict=True))
    write_json(tmp_path / "final" / "config.json", {"model_type": "custom_models.encoder", "encoder": {"width": 3}})
    with pytest.raises(UserError, match="damaged"):
        load_encoder(tmp_path / "final")


def test_configurations_have_the_published_sizes():
    with torch.device("meta"):
        sizes = [sum(p.numel() for p in Encoder(c).parameters()) for c in (bert(), roberta(), distilbert())]
    assert sizes == [109_482_240, 124_645_632, 66_362_880]  # as transformers counts them


def test_the_files_command_shows_sizes_and_neighbours(capsys):
    main()
    said = capsys.readouterr().out
    assert re.search(r"DistilBERT +6 +768 +66\.4 M +42\.5 M", said)
    fever, temperature = (line.split()[-4:] for line in said.splitlines()[-4:-2])
    assert float(fever[1]) == float(temperature[0]) > float(fever[3])


def test_what_cannot_be_read_is_told(tmp_path):
    encoder = Encoder(bert(60, width=8, n_layer=1, n_head=2, inner_width=8, n_position=10))
    with pytest.raises(UserError, match="11 tokens, and this encoder reads at most 10"):
        encoder(torch.zeros(1, 11, dtype=torch.long))
    with pytest.raises(UserError, match="from 0 to 59, and these go from 3 to 60"):
        encoder(torch.tensor([[3, 60]]))
    with pytest.raises(UserError, match="the texts have no token"):
        encoder(torch.zeros(1, 0, dtype=torch.long))
    with pytest.raises(UserError, match="Segments must be below 2, and these reach 2"):
        encoder(torch.tensor([[3, 4]]), segments=torch.tensor([[0, 2]]))
    with pytest.raises(UserError, match="3 problems"):
        EncoderConfig(0, n_layer=0, activation="swish")  # type: ignore[arg-type]
    tiny("bert", tmp_path)
    config = read_json(tmp_path / "config.json")
    write_json(tmp_path / "config.json", {**config, "model_type": "gpt2"})
    with pytest.raises(UserError, match="architecture 'gpt2'; this encoder reads bert, roberta, distilbert"):
        load_encoder(tmp_path)
    for change in ({"is_decoder": True}, {"position_embedding_type": "relative_key"}):
        write_json(tmp_path / "config.json", {**config, **change})
        with pytest.raises(UserError, match=r"a decoder or .* relative positions, which this encoder lacks"):
            load_encoder(tmp_path)
    more = {"encoder.layer.0.attention.self.distance_embedding.weight": torch.zeros(3, 8)}
    with pytest.raises(UserError, match=r"parts that this encoder lacks: encoder\.layer\.0\.attention\.self\.dist"):
        split_names(more, "bert")
    write_json(tmp_path / "config.json", {**config, "hidden_act": "gelu_new"})
    with pytest.raises(UserError, match=r"config\.json has 'gelu_new' for hidden_act; known are gelu, relu"):
        load_encoder(tmp_path)
    write_json(tmp_path / "config.json", {**config, "num_hidden_layers": 4})
    with pytest.raises(UserError, match=r"lacks layers\.3\.attention\.q\.weight.* and 13 more"):
        load_encoder(tmp_path)
    write_json(tmp_path / "config.json", {**config, "intermediate_size": 40})
    with pytest.raises(UserError, match=r"layers\.0\.feed_forward\.up\.weight of shape \(48, 32\), not \(40, 32\)"):
        load_encoder(tmp_path)
    write_json(tmp_path / "config.json", {k: v for k, v in config.items() if k != "hidden_size"})
    with pytest.raises(UserError, match="lacks hidden_size"):
        load_encoder(tmp_path)
    with pytest.raises(UserError, match="There is no folder"):
        load_encoder("./nowhere")
    assert asdict(bert())["n_segment"] == 2
