"""Multi-token prediction is the report's equations, token by token, and reads a checkpoint's own layers."""

from pathlib import Path

import pytest
import safetensors.torch
import torch
from transformers.models.deepseek_v3 import modeling_deepseek_v3 as hf

from custom_models.deepseek_checkpoint import load_deepseek
from custom_models.multi_token_prediction import MultiTokenPrediction, main
from tests.custom_models.test_deepseek import random_decoder, texts, tiny
from workflows.errors import UserError


def random_prediction(model, depth: int) -> MultiTokenPrediction:
    torch.manual_seed(3)
    prediction = MultiTokenPrediction(model.config, depth).eval()
    for parameter in prediction.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape)
    return prediction


def rms(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x / (x.square().mean() + 1e-6).sqrt() * weight


def log_probabilities(model, prediction, text: list[int]) -> dict[tuple[int, int], torch.Tensor]:
    """Equations 21 to 23 for one text t_1 .. t_T+1: log P^k_i, by (k, i), i counted from 1 as in the report."""
    t = [None, *text]  # so that t[1] is the first
    last = len(text) - 1  # T
    h = dict(enumerate(model.states(torch.tensor([text[:-1]]))[0], start=1))
    found = {}
    for k, module in enumerate(prediction.depths, start=1):
        joined = []
        for i in range(1, last - k + 1):
            embedded = rms(model.tokens.weight[t[i + k]], module.embedding_norm.weight)
            state = rms(h[i], module.state_norm.weight)
            m_embedded, m_state = module.join.weight.chunk(2, dim=1)  # the report has them the other way round
            joined.append(m_state @ state + m_embedded @ embedded)  # 21
        written = module.layer(torch.stack(joined)[None], model.rope(0, last - k))[0]  # 22
        h = {i: rms(state, module.norm.weight) for i, state in enumerate(written, start=1)}
        for i in h:
            found[k, i + k + 1] = (model.head.weight @ h[i]).log_softmax(0)  # 23
    return found


@pytest.mark.parametrize("depth", [1, 3])
def test_the_reports_equations_token_by_token(depth):
    model, ids = random_decoder(), texts(9)
    prediction = random_prediction(model, depth)
    with torch.no_grad():
        logits = prediction(model, ids[:, :-1])
        total, told = prediction.loss(model, ids, weight=0.3)
        losses = torch.zeros(depth)
        for row, text in enumerate(ids.tolist()):
            expected = log_probabilities(model, prediction, text)
            for k in range(1, depth + 1):
                for i in range(2 + k, 8 + 2):  # T is 8
                    ours = logits[k][row, i - k - 2].log_softmax(0)
                    torch.testing.assert_close(ours, expected[k, i], atol=1e-4, rtol=0)
                    losses[k - 1] -= expected[k, i][text[i - 1]] / 8 / len(ids)  # 24
        next_token = torch.nn.functional.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
    assert [tuple(found.shape) for found in logits] == [(3, 8 - k, 99) for k in range(depth + 1)]
    torch.testing.assert_close(logits[0], model(ids[:, :-1]))
    for k in range(depth):
        assert float(told[f"loss_{k + 1}"]) == pytest.approx(float(losses[k]), abs=1e-4)
    assert float(told["loss"]) == pytest.approx(float(next_token), abs=1e-5)
    assert float(total) == pytest.approx(float(next_token + 0.3 / depth * losses.sum()), abs=1e-4)  # 25


def test_no_depth_sees_the_token_that_it_names():
    model, ids = random_decoder(), texts(12)
    prediction, other = random_prediction(model, 2), ids.clone()
    other[:, 8] = 98 - other[:, 8]
    with torch.no_grad():
        before, after = prediction(model, ids), prediction(model, other)
    for k in range(3):  # at i it names token i + k + 1; that at 8 is known from i = 8 - k on
        torch.testing.assert_close(before[k][:, : 8 - k], after[k][:, : 8 - k], atol=1e-5, rtol=0)
        assert (before[k][:, 8 - k] - after[k][:, 8 - k]).abs().max() > 0.01


def test_gradients_reach_the_modules_and_the_model():
    model, ids = random_decoder(), texts(64)
    prediction = random_prediction(model, 2)
    prediction.loss(model, ids)[0].backward()
    for part in (model, prediction):
        for name, parameter in part.named_parameters():
            assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name
    shared = {id(p) for p in model.parameters()} & {id(p) for p in prediction.parameters()}
    assert not shared  # embeddings and head are the model's, and no part of the modules


def with_prediction(folder: Path) -> tuple[torch.nn.Module, torch.nn.ModuleDict]:
    """A random model whose file has a layer of multi-token prediction, made of transformers' parts."""
    model = tiny(folder)
    config, file = model.config, folder / "model.safetensors"
    torch.manual_seed(4)
    parts = torch.nn.ModuleDict({
        "enorm": hf.DeepseekV3RMSNorm(32), "hnorm": hf.DeepseekV3RMSNorm(32), "norm": hf.DeepseekV3RMSNorm(32),
        "eh_proj": torch.nn.Linear(64, 32, bias=False), "layer": hf.DeepseekV3DecoderLayer(config, 3),
    }).eval()  # fmt: skip
    for parameter in parts.parameters():
        parameter.data = 0.25 * torch.randn(parameter.shape) + (parameter.dim() == 1)  # norms are about 1
    parts["layer"].mlp.gate.e_score_correction_bias.data = 0.1 * torch.randn(8)
    tensors = safetensors.torch.load_file(file)
    for name, tensor in parts.state_dict().items():
        name = "shared_head.norm.weight" if name == "norm.weight" else name.removeprefix("layer.")
        if name == "mlp.experts.gate_up_proj":  # in files each expert stands by itself
            for i, expert in enumerate(tensor):
                gate, up = expert.chunk(2)
                tensors[f"model.layers.3.mlp.experts.{i}.gate_proj.weight"] = gate.contiguous()
                tensors[f"model.layers.3.mlp.experts.{i}.up_proj.weight"] = up.contiguous()
        elif name == "mlp.experts.down_proj":
            for i, expert in enumerate(tensor):
                tensors[f"model.layers.3.mlp.experts.{i}.down_proj.weight"] = expert.clone()
        else:
            tensors[f"model.layers.3.{name}"] = tensor
    tensors["model.layers.3.embed_tokens.weight"] = tensors["model.embed_tokens.weight"].clone()
    tensors["model.layers.3.shared_head.head.weight"] = tensors["lm_head.weight"].clone()
    safetensors.torch.save_file(tensors, file)
    return model, parts


def test_a_checkpoints_layer_gives_the_logits_of_transformers_parts(tmp_path):
    theirs, parts = with_prediction(tmp_path)
    ours, prediction = load_deepseek(tmp_path)
    assert prediction is not None and len(prediction.depths) == 1
    ids = texts()
    with torch.no_grad():
        inner = theirs.model
        states, embedded = inner(ids).last_hidden_state[:, :-1], inner.embed_tokens(ids)[:, 1:]
        joined = parts["eh_proj"](torch.cat([parts["enorm"](embedded), parts["hnorm"](states)], dim=-1))
        positions = torch.arange(19)[None]
        mask = torch.full((19, 19), -torch.inf).triu(1)[None, None]
        out = parts["layer"](joined, mask, position_embeddings=inner.rotary_emb(joined, positions))
        expected = theirs.lm_head(parts["norm"](out))
        own, found = prediction.eval()(ours.eval(), ids)
        torch.testing.assert_close(own, theirs(ids).logits, atol=1e-4, rtol=0)
    assert expected.std() > 0.5
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


def test_what_does_not_fit_is_told(tmp_path):
    model = random_decoder()
    with pytest.raises(UserError, match="depth of at least 1, not 0"):
        MultiTokenPrediction(model.config, 0)
    with pytest.raises(UserError, match="4 tokens at once cannot be predicted from a text of 3"):
        random_prediction(model, 3).loss(model, texts(4))
    with pytest.raises(UserError, match="go from 0 to 99"):
        random_prediction(model, 1)(model, torch.tensor([[0, 99, 3]]))
    with_prediction(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = safetensors.torch.load_file(file)
    safetensors.torch.save_file({k: v for k, v in tensors.items() if not k.endswith("hnorm.weight")}, file)
    with pytest.raises(UserError, match=r"lacks depths\.0\.state_norm\.weight"):
        load_deepseek(tmp_path)
    safetensors.torch.save_file({k: v for k, v in tensors.items() if not k.endswith("eh_proj.weight")}, file)
    with pytest.raises(UserError, match=r"has layers\.3\..*which the model has not"):
        load_deepseek(tmp_path)


@pytest.mark.long
def test_the_files_command_learns_and_counts_confirmed_drafts(english, tmp_path, capsys):
    (tmp_path / "text.txt").write_text(english[:60_000], encoding="utf-8")
    main(steps=24, depth=2, file=tmp_path / "text.txt")
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    first, last = (list(map(float, row[1:])) for row in (rows[1], rows[5]))
    assert rows[1][0] == "1" and rows[5][0] == "24" and all(b < a - 0.5 for a, b in zip(first, last, strict=True))
    assert rows[6][0] == rows[7][0] == "Held-out" and rows[7][-1].endswith("%.")
