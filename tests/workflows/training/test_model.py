"""The packed model equals the plain one: log-probabilities, gradients, adapters, precision, loading."""

import shutil

import litgpt.lora
import litgpt.model
import pytest
import torch
import yaml
from litgpt.lora import merge_lora_weights

from workflows.errors import UserError
from workflows.training.attention import RowAttention
from workflows.training.batch import Tree, pack_row
from workflows.training.model import LoRAArgs, load_model


def random_ids(generator, count):
    return torch.randint(0, 300, (count,), generator=generator).tolist()


@pytest.fixture
def trees():
    g = torch.Generator().manual_seed(1)
    system = random_ids(g, 7)
    return [
        Tree([*system, *random_ids(g, 5)], [random_ids(g, 3), random_ids(g, 6)]),
        Tree([*system, *random_ids(g, 9)], [random_ids(g, 1)]),
        Tree([*system, *random_ids(g, 2)], [random_ids(g, 4), random_ids(g, 4), random_ids(g, 300)]),
    ]


def with_random_adapters(model):
    torch.manual_seed(5)
    for name, parameter in model.named_parameters():
        if "lora_A" in name:  # again: it was drawn from whatever state the test before left
            torch.nn.init.kaiming_uniform_(parameter, a=5**0.5)
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def plain_logprobs(model, trees):
    """The same numbers from LitGPT's own forward, sample by sample."""
    parts = []
    for tree in trees:
        for completion in tree.completions:
            logits = litgpt.lora.GPT.forward(model, torch.tensor([tree.prompt + completion]))
            logprobs = logits[0, len(tree.prompt) - 1 : -1].float().log_softmax(-1)
            parts.append(logprobs.gather(1, torch.tensor(completion)[:, None])[:, 0])
    return torch.cat(parts)


@pytest.mark.parametrize("checkpoint", ["tiny_llama", "tiny_qwen2"])
def test_packed_equals_plain_in_logprobs_and_gradients(checkpoint, request, trees):
    model = with_random_adapters(load_model(request.getfixturevalue(checkpoint), LoRAArgs(r=4)))
    packed, plain = model(pack_row(trees, 32)), plain_logprobs(model, trees)
    torch.testing.assert_close(packed, plain, atol=1e-5, rtol=1e-5)
    parameters = [p for p in model.parameters() if p.requires_grad]
    weights = torch.randn(len(plain), generator=torch.Generator().manual_seed(2))
    got = torch.autograd.grad((packed * weights).sum(), parameters)
    expected = torch.autograd.grad((plain * weights).sum(), parameters)
    for a, b in zip(got, expected, strict=True):
        assert (a - b).abs().max() <= 5e-5 * b.abs().max()


def test_packed_equals_plain_on_many_short_samples(tiny_llama):
    g = torch.Generator().manual_seed(4)
    system = random_ids(g, 9)
    short = [Tree([*system, *random_ids(g, 4 + i % 3)], [random_ids(g, 2 + i % 4)]) for i in range(8)]
    assert [piece.hidden.size(0) for piece in RowAttention(pack_row(short)).pieces] == [1, 8]  # the shared, the rest
    model = with_random_adapters(load_model(tiny_llama, LoRAArgs(r=4)))
    packed, plain = model(pack_row(short)), plain_logprobs(model, short)
    torch.testing.assert_close(packed, plain, atol=1e-5, rtol=1e-5)
    parameters = [p for p in model.parameters() if p.requires_grad]
    for a, b in zip(
        torch.autograd.grad(packed.sum(), parameters), torch.autograd.grad(plain.sum(), parameters), strict=True
    ):
        assert (a - b).abs().max() <= 5e-5 * b.abs().max()


def test_full_weights_have_the_same_gradients_too(tiny_llama, trees):
    model = load_model(tiny_llama)
    parameters = dict(model.named_parameters())
    got = torch.autograd.grad(model(pack_row(trees)).sum(), parameters.values())
    expected = torch.autograd.grad(plain_logprobs(model, trees).sum(), parameters.values())
    for name, a, b in zip(parameters, got, expected, strict=True):
        assert (a - b).abs().max() <= 5e-5 * b.abs().max(), name


@pytest.mark.parametrize(
    "lora",
    [
        LoRAArgs(r=4),
        LoRAArgs(r=4, key=False, projection=False, mlp=False),
        LoRAArgs(r=3, query=False, value=False),
        LoRAArgs(r=2, query=False, key=False, value=False),
        LoRAArgs(r=2, head=True),
    ],
    ids=["all-linear", "query-value", "key-only", "no-attention", "with-head"],
)
def test_adapter_layers_equal_litgpts(tiny_llama, lora):
    ours = with_random_adapters(load_model(tiny_llama, lora))
    theirs = litgpt.lora.GPT(ours.config)
    theirs.load_state_dict(ours.state_dict())
    ids = torch.randint(0, 300, (2, 20), generator=torch.Generator().manual_seed(3))
    found, expected = ours(ids), theirs(ids)
    # sums in another order: which products are one, and how a processor's kernels add, is not LitGPT's
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_merged_equals_unmerged(tiny_llama, trees):
    model = with_random_adapters(load_model(tiny_llama, LoRAArgs(r=4)))
    batch = pack_row(trees)
    before = model(batch).detach()
    merge_lora_weights(model)
    torch.testing.assert_close(model(batch), before, atol=1e-5, rtol=1e-5)


def test_score_tells_the_most_likely_token(tiny_llama):
    model = load_model(tiny_llama)
    prompt = [5, 6, 7]
    best = int(model(torch.tensor([prompt]))[0, -1].argmax())
    logprobs, greedy = model.score(pack_row([Tree(prompt, [[best], [(best + 1) % 300]])]))
    assert greedy.tolist() == [True, False]
    assert logprobs[0] > logprobs[1]


def test_tied_head_stays_tied_and_untied_stays_untied(tiny_llama, tiny_qwen2):
    tied, untied = load_model(tiny_llama), load_model(tiny_qwen2)
    assert tied.lm_head.linear.weight is tied.transformer.wte.weight
    assert untied.lm_head.linear.weight is not untied.transformer.wte.weight


def test_bf16_model_keeps_float32_adapters(tiny_llama, trees):
    model = load_model(tiny_llama, LoRAArgs(r=4), precision="bf16-true")
    kinds = {("lora_" in name, p.dtype) for name, p in model.named_parameters()}
    assert kinds == {(True, torch.float32), (False, torch.bfloat16)}
    logprobs = model(pack_row(trees))
    assert logprobs.dtype == torch.float32
    exact = load_model(tiny_llama)(pack_row(trees))
    assert (logprobs - exact).abs().mean() < 0.1


def test_dropout_changes_adapters_only_in_training(tiny_llama, trees):
    model = with_random_adapters(load_model(tiny_llama, LoRAArgs(r=4, dropout=0.5)))
    batch = pack_row(trees)
    assert not torch.equal(model.train()(batch), model(batch))
    assert torch.equal(model.eval()(batch), model(batch))


def test_bad_checkpoints_are_explained(tiny_llama, tmp_path):
    with pytest.raises(UserError, match="make download"):
        load_model(tmp_path / "nowhere")
    broken = tmp_path / "broken"
    shutil.copytree(tiny_llama, broken)
    (broken / "lit_model.pth").write_bytes((tiny_llama / "lit_model.pth").read_bytes()[:5000])
    with pytest.raises(UserError, match="cut short"):
        load_model(broken)
    (broken / "lit_model.pth").unlink()
    with pytest.raises(UserError, match=r"lacks lit_model\.pth"):
        load_model(broken)


def test_weights_of_another_shape_are_explained(tiny_llama, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(tiny_llama, other)
    config = yaml.safe_load((other / "model_config.yaml").read_text())
    (other / "model_config.yaml").write_text(yaml.safe_dump({**config, "n_embd": 96, "head_size": 24}))
    with pytest.raises(UserError, match="do not fit"):
        load_model(other)


def test_length_beyond_the_context_is_refused(tiny_llama):
    with pytest.raises(UserError, match="context of 512"):
        load_model(tiny_llama, max_seq_length=513)
