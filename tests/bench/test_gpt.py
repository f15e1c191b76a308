"""The bench's peer is nanoGPT's setting; what it asks of ours is computed from the curves as it says."""

import json
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from bench import gpt
from bench.gpt import NanoGPT, compare, judge, nano_optimizer, nano_share, read_recipe, train_nano, train_ours
from custom_models.gpt import GPT, GPTConfig, count_parameters
from custom_models.projects.gpt_data import read_corpus, token_files
from workflows.errors import UserError


@pytest.fixture
def files(tmp_path):
    (tmp_path / "text.txt").write_text("To be, or not to be, that is the question.\n" * 20)
    return token_files(read_corpus(str(tmp_path / "text.txt")), "characters", 0, tmp_path)


def test_the_peer_is_gpt2_in_nanogpts_small_setting():
    torch.manual_seed(0)
    peer = NanoGPT(65)
    ours = GPT(GPTConfig(65, 64, 128, 4, 4, bias=False)).eval()
    assert count_parameters(peer) == count_parameters(ours) == 804_096
    with torch.no_grad():
        ours.tokens.weight.copy_(peer.tokens.weight)
        ours.positions.weight.copy_(peer.positions.weight)
        ours.last_norm.weight.copy_(peer.norm.weight)
        for mine, other in zip(ours.blocks, peer.blocks, strict=True):
            for name, part in zip("qkv", other.qkv.weight.chunk(3), strict=True):
                getattr(mine.attention, name).weight.copy_(part)
            mine.attention.out.weight.copy_(other.out.weight)
            mine.feed_forward.up.weight.copy_(other.up.weight)
            mine.feed_forward.down.weight.copy_(other.down.weight)
        ids = torch.randint(65, (2, 64))
        # nanoGPT's GELU is the exact one, GPT-2's an approximation that differs by 0.001 at most
        torch.testing.assert_close(peer(ids), ours(ids), atol=5e-3, rtol=0)


def test_its_rate_and_its_optimizer_are_nanogpts():
    assert [nano_share(step) for step in (0, 99, 100, 1050, 2000)] == pytest.approx([1 / 101, 100 / 101, 1, 0.55, 0.1])
    optimizer = nano_optimizer(NanoGPT(65))
    decays = [(len(group["params"]), group["weight_decay"]) for group in optimizer.param_groups]
    assert decays == [(2 + 4 * 4, 0.1), (9, 0.0)] and optimizer.defaults["betas"] == (0.9, 0.99)


def test_ours_has_no_more_parameters():
    config, _ = read_recipe()
    assert count_parameters(GPT(replace(config, vocab_size=65))) <= 804_096


@pytest.mark.long
def test_both_are_trained_by_one_loop_and_measured_alike(files):
    config, fit = read_recipe()
    nano = train_nano(files, 10, 5, 1)
    ours = train_ours(files, config, replace(fit, max_steps=10, warmup_steps=2), 5, 1)
    for run in (nano, ours):
        assert [step for step, _, _ in run["curve"]] == [5, 10] and run["loss"] == run["curve"][-1][2] < 3.5
        assert 0 < run["curve"][0][1] < run["curve"][1][1] == run["seconds"]
    model = NanoGPT(files.vocab_size)
    ids = torch.from_numpy(files.read("validation").astype("int64"))
    with torch.no_grad():  # the last, shorter window included
        parts = [(ids[i : i + 64], ids[i + 1 : i + 65]) for i in range(0, len(ids) - 1, 64)]
        total = sum(
            float(F.cross_entropy(model(x[None, : len(y)])[0], y, reduction="sum")) for x, y in parts
        )  # fmt: skip
    assert gpt.validation_loss(model, files, 64) == pytest.approx(total / (len(ids) - 1), abs=1e-5)


def run(loss: float, curve: list[tuple[int, float, float]], parameters: int = 10) -> dict[str, object]:
    seconds = curve[-1][1]
    return {"rate": 1.0, "seconds": seconds, "loss": loss, "curve": curve, "parameters": parameters, "peak_bytes": 1}


def runs(seconds: float = 10.0, **changes: object) -> dict[str, list[dict[str, object]]]:
    ours = run(1.8, [(1, 1.0, 2.0), (2, 3.0, 1.88), (3, 5.0, 1.8)])
    longer = run(1.6, [(1, 4.0, 1.9), (2, 9.0, 1.65), (3, 12.0, 1.6)])
    return {"nanogpt": [run(1.89, [(1, seconds, 1.89)])], "ours": [{**ours, **changes}], "ours_equal_time": [longer]}


def test_the_ratio_is_of_times_to_the_peers_final_loss():
    reported = compare(runs())
    assert reported["ratio"]["nanogpt"]["median"] == pytest.approx(10 / 3)
    assert reported["equal_time"]["loss"]["median"] == 1.65  # 1.6 came after nanogpt had ended
    assert reported["seconds"]["ours"]["median"] == 3.0 and json.dumps(reported, allow_nan=False)
    judge(reported)


def test_what_is_missed_is_told():
    with pytest.raises(UserError, match=r"2\.50x as fast and gets to 1\.6500"):
        judge(compare(runs() | {"ours": [run(1.8, [(1, 4.0, 1.8)])]}))
    with pytest.raises(UserError, match=r"5\.00x as fast and gets to 1\.9000"):
        judge(compare(runs() | {"ours": [run(1.8, [(1, 2.0, 1.8)])], "ours_equal_time": [run(1.9, [(1, 9.0, 1.9)])]}))
    with pytest.raises(UserError, match="11 parameters, more than nanoGPT's 10"):
        compare(runs(parameters=11))
    with pytest.raises(UserError, match=r"Ours ended at 1\.9000, above nanoGPT's 1\.8860"):
        compare(runs() | {"ours": [run(1.9, [(1, 1.0, 1.9)])]})
    with pytest.raises(UserError, match=r"not validated before nanoGPT ended: lower --eval_interval"):
        compare(runs(seconds=3.5))
