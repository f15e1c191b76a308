"""The GPT is transformers' GPT-2, real tokenizer and all; modern parts do what they say; bad input is told."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import transformers

from custom_models.gpt import GPT, GPTConfig, count_parameters, gpt2, main, modern, next_token_loss
from custom_models.gpt_checkpoint import load_gpt, load_hf, save_gpt
from custom_models.tokenization import tokenizer_json
from custom_models.tokenization.bpe import RegexBPE
from custom_models.tokenization.characters import CharacterTokenizer
from workflows.errors import UserError
from workflows.files import read_json, write_json

SMALL: dict[str, Any] = {"vocab_size": 60, "context": 24, "width": 32, "n_layer": 3, "n_head": 4}


def tiny(folder: Path, **changes: Any) -> transformers.GPT2LMHeadModel:
    """A random GPT-2 with biases that are not zero, saved in `folder`."""
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=60, n_positions=24, n_embd=32, n_layer=3, n_head=4, initializer_range=0.3, **changes
    )
    model = transformers.GPT2LMHeadModel(config).eval()
    for parameter in model.parameters():
        if parameter.ndim == 1:
            torch.nn.init.normal_(parameter, mean=float(parameter.detach().mean()), std=0.3)
    model.save_pretrained(folder)
    return model


def some_ids(length: int = 24) -> torch.Tensor:
    return torch.randint(60, (2, length), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("changes", [{}, {"n_inner": 48}, {"tie_word_embeddings": False}])
def test_logits_are_transformers_gpt2s(tmp_path, changes):
    theirs = tiny(tmp_path, **changes)
    ours = load_hf(tmp_path).eval()
    assert count_parameters(ours) == sum(p.numel() for p in theirs.parameters())
    with torch.no_grad():
        expected = theirs(some_ids()).logits
        torch.testing.assert_close(ours(some_ids()), expected, atol=1e-4, rtol=0)
        assert expected.std() > 1  # a random model with opinions


def test_old_checkpoints_without_prefix_and_with_masks_are_read(tmp_path):
    theirs = tiny(tmp_path)
    weights = {name.removeprefix("transformer."): tensor for name, tensor in theirs.transformer.state_dict().items()}
    weights["h.0.attn.bias"] = torch.ones(1, 1, 24, 24, dtype=torch.uint8).tril()
    weights["h.0.attn.masked_bias"] = torch.tensor(-1e4)
    safetensors.torch.save_file(weights, tmp_path / "model.safetensors")
    with torch.no_grad():
        torch.testing.assert_close(load_hf(tmp_path).eval()(some_ids()), theirs(some_ids()).logits, atol=1e-4, rtol=0)


def test_published_sizes():
    with torch.device("meta"):
        sizes = [count_parameters(GPT(gpt2(size))) for size in ("small", "medium", "large", "xl")]
    assert sizes == [124_439_808, 354_823_168, 774_030_080, 1_557_611_200]  # as transformers counts them


def test_gpt2s_own_shape_has_gpt2s_logits(tmp_path):
    config = transformers.GPT2Config(n_layer=2)
    torch.manual_seed(0)
    theirs = transformers.GPT2LMHeadModel(config).eval()
    theirs.save_pretrained(tmp_path)
    ours = load_hf(tmp_path).eval()
    assert ours.config == gpt2(n_layer=2, dropout=0.1)
    ids = torch.randint(50257, (1, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(ours(ids), theirs(ids).logits, atol=1e-4, rtol=0)


def test_a_directory_of_hugging_faces_comes_with_its_tokenizer(tmp_path, gpt2_folder):
    tiny(tmp_path)
    transformers.GPT2TokenizerFast(str(gpt2_folder / "encoder.json"), str(gpt2_folder / "vocab.bpe")).save_pretrained(
        tmp_path
    )
    with pytest.raises(UserError, match=r"has 50,257 tokens, and the model knows 60: they do not belong together"):
        load_gpt(tmp_path)


@pytest.mark.parametrize(
    "changes",
    [
        {"positions": "rope"},
        {"norm": "rms"},
        {"feed_forward": "swiglu"},
        {"feed_forward": "relu2"},
        {"qk_norm": True},
        {"bias": False},
        {"tied_head": False},
        {"n_kv_head": 2},
    ],
)
def test_each_part_changes_what_is_computed_and_looks_back_only(changes):
    torch.manual_seed(0)
    model = GPT(GPTConfig(**SMALL, **changes)).eval()
    ids = some_ids()
    later = ids.clone()
    later[:, 15:] = (later[:, 15:] + 1) % 60
    with torch.no_grad():
        torch.testing.assert_close(model(ids)[:, :15], model(later)[:, :15])
        assert not torch.allclose(model(ids)[:, 15:], model(later)[:, 15:], atol=1e-3)
    plain = GPT(GPTConfig(**SMALL)).eval()
    ours, theirs = model.state_dict(), plain.state_dict()  # what both have is made the same: the part is what differs
    shared = {name: tensor for name, tensor in ours.items() if name in theirs and tensor.shape == theirs[name].shape}
    plain.load_state_dict(theirs | {name: 3 * tensor for name, tensor in shared.items()})
    model.load_state_dict(ours | {name: 3 * tensor for name, tensor in shared.items()})
    with torch.no_grad():
        if changes == {"bias": False}:  # a new model's biases are zero: they count once they are not
            for name, parameter in plain.named_parameters():
                parameter.data += 0.1 * name.endswith("bias")
        assert not torch.allclose(model(ids), plain(ids), atol=1e-4)


def test_relu2_and_swiglu_are_their_equations():
    model = GPT(modern(**SMALL))
    ff, x = model.blocks[0].feed_forward, torch.randn(2, 3, 32)
    expected = torch.relu(x @ ff.up.weight.T) ** 2 @ ff.down.weight.T
    torch.testing.assert_close(ff(x), expected)
    assert ff.up.out_features == 128
    gated = GPT(modern(**SMALL, feed_forward="swiglu")).blocks[0].feed_forward
    assert gated.up.out_features == 88  # 8/3 of 32, to a multiple of 8


def test_normalised_queries_and_keys_bound_the_scores():
    torch.manual_seed(0)
    attention = GPT(modern(**SMALL)).blocks[0].attention
    attention.q.weight.data *= 1000
    attention.k.weight.data *= 1000
    q = attention.q_norm(attention._heads(attention.q(torch.randn(2, 5, 32))))
    torch.testing.assert_close(q.square().mean(-1), torch.ones(2, 4, 5))  # so |q . k| / sqrt(d) is at most sqrt(d)


def test_a_new_model_knows_nothing_and_its_sum_keeps_its_size():
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=60, context=24, width=64, n_layer=8, n_head=4))
    loss = next_token_loss(model(some_ids())[:, :-1], some_ids()[:, 1:])
    assert float(loss) == pytest.approx(math.log(60), abs=0.1)
    assert float(model.blocks[3].attention.out.weight.std()) == pytest.approx(0.02 / 4, rel=0.1)


def test_ours_is_read_back_with_its_tokenizer(tmp_path):
    model = GPT(modern(vocab_size=5, context=8, width=16, n_layer=1, n_head=2))
    save_gpt(model, CharacterTokenizer("abc\n?", "?"), tmp_path / "characters")
    again, tokenizer = load_gpt(tmp_path / "characters")
    assert again.config == model.config and tokenizer.encode("cab!") == [2, 0, 1, 4] and not again.training
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))

    bpe = RegexBPE()
    bpe.train("a liver, a lever, a river", 4)
    save_gpt(GPT(GPTConfig(**{**SMALL, "vocab_size": len(bpe)})), bpe, tmp_path / "bpe")
    assert load_gpt(tmp_path / "bpe")[1].encode("a lever") == bpe.encode("a lever")
    assert tokenizer_json.load(tmp_path / "bpe" / "tokenizer.json").vocabulary == bpe.vocabulary


def test_the_files_command_shows_what_parts_cost(capsys):
    main()
    said = capsys.readouterr().out.splitlines()
    assert said[1].split()[-1] == "124,439,808" and said[6].split()[-1] == "804,096"


def test_what_cannot_be_is_told(tmp_path):
    model = GPT(GPTConfig(**SMALL))
    with pytest.raises(UserError, match="25 tokens, and this model was made for 24"):
        model(some_ids(25))
    caches = model.eval().new_caches(2, 24)
    model(some_ids(20), caches)
    with pytest.raises(UserError, match="25 tokens, and this model was made for 24"):
        model(some_ids(5), caches)
    with pytest.raises(UserError, match="4 problems"):
        GPTConfig(n_layer=0, norm="batch", inner_width=0, dropout=1.0)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="no multiple of n_head"):
        GPT(GPTConfig(**{**SMALL, "width": 30}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "llama"}, "architecture 'llama'; only gpt2"),
        ({"n_embd": None}, "lacks n_embd"),
        ({"activation_function": "relu"}, "activation 'relu'"),
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
        ({"n_layer": 4}, r"lacks blocks\.3\.attention_norm\.weight"),
        ({"n_layer": 2}, r"has blocks\.2\.\S+, which the model has not"),
        ({"n_inner": 48}, r"feed_forward\.up\.weight of shape \(128, 32\), not \(48, 32\)"),
    ],
)
def test_a_checkpoint_that_is_another_is_told(tmp_path, change, message):
    tiny(tmp_path)
    config = {**read_json(tmp_path / "config.json"), **change}
    write_json(tmp_path / "config.json", {name: value for name, value in config.items() if value is not None})
    with pytest.raises(UserError, match=message):
        load_hf(tmp_path)


def test_a_damaged_checkpoint_of_ours_is_told(tmp_path):
    model = GPT(GPTConfig(**{**SMALL, "vocab_size": 3}))
    folder = tmp_path / "final"
    save_gpt(model, CharacterTokenizer("abc"), folder)
    (folder / "characters.json").write_text('{"characters": 3}')
    with pytest.raises(UserError, match="does not hold characters"):
        load_gpt(folder)
    (folder / "characters.json").unlink()
    with pytest.raises(UserError, match="has no tokenizer"):
        load_gpt(folder)
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    with pytest.raises(UserError, match=r"is damaged \(SafetensorError"):
        load_gpt(folder)
    write_json(folder / "config.json", {"model_type": "custom_models.gpt"})
    with pytest.raises(UserError, match="is damaged"):
        load_gpt(folder)
    with pytest.raises(UserError, match=r"no folder .*Train a model first: make gpt"):
        load_gpt(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"has no config\.json: it is no checkpoint"):
        load_gpt(tmp_path / "empty")
    assert json.loads((folder / "config.json").read_text())["model_type"] == "custom_models.gpt"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"n_embd": "32"}, "'32' for n_embd"),
        ({"n_layer": None}, "None for n_layer"),
        ({"n_embd": 32.0}, "32.0 for n_embd"),
        ({"resid_pdrop": "x"}, "'x' for resid_pdrop"),
        ({"layer_norm_epsilon": "x"}, "'x' for layer_norm_epsilon"),
        ({"tie_word_embeddings": "no"}, "'no' for tie_word_embeddings"),
    ],
)
def test_values_of_a_config_that_cannot_be_are_told(tmp_path, changes, said):
    tiny(tmp_path)
    write_json(tmp_path / "config.json", {**read_json(tmp_path / "config.json"), **changes})
    with pytest.raises(UserError, match=rf"config\.json has {said}, which it cannot be"):
        load_hf(tmp_path)


def test_our_own_config_is_read_as_carefully(tmp_path):
    save_gpt(GPT(modern(vocab_size=5, context=8, width=16, n_layer=1, n_head=2)), CharacterTokenizer("abc\n?", "?"),
             tmp_path / "a")  # fmt: skip
    config = read_json(tmp_path / "a" / "config.json")
    for name, value in (("width", 16.0), ("norm_eps", "x")):
        write_json(tmp_path / "a" / "config.json", {**config, "gpt": {**config["gpt"], name: value}})
        with pytest.raises(UserError, match=f"{value!r} for {name}, which it cannot be"):
            load_gpt(tmp_path / "a")
    with pytest.raises(UserError, match=r"config\.json is a file\. Name its folder"):
        load_gpt(tmp_path / "a" / "config.json")
