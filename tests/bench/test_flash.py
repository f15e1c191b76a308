"""The bench of FlashAttention: its contenders compute the same, and growth and shares are computed as it says."""

import json

import pytest
import torch

from bench import flash


def row(seconds: float, extra: int) -> dict[str, object]:
    spread = {"median": seconds, "min": seconds, "max": seconds}
    return {part: {"seconds": spread, "extra_bytes": extra} for part in flash.PASSES}


@pytest.mark.parametrize("causal", [False, True])
def test_all_contenders_compute_the_same(causal):
    torch.manual_seed(0)
    q, k, v = flash.inputs(50, 2)
    ours, naive, sdpa = (flash.attend(name, q, k, v, causal) for name in flash.CONTENDERS)
    torch.testing.assert_close(ours, naive, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ours, sdpa, atol=1e-5, rtol=1e-5)


def test_growth_is_told_by_the_exponent_and_a_straight_line():
    curves = {str(n): {"ours": row(1.0, 100 + 4 * n), "naive": row(1.0, n * n), "sdpa": row(1.0, 0)}
              for n in (1000, 2000, 4000)}  # fmt: skip
    grown = flash.growth(curves)
    assert grown["naive"]["exponent"] == pytest.approx(2.0) and grown["sdpa"]["exponent"] == 0.0
    assert grown["ours"]["exponent"] == pytest.approx(1.0, abs=0.05)
    assert grown["ours"]["bytes_per_token"] == pytest.approx(4.0)
    assert grown["ours"]["bytes_at_zero"] == pytest.approx(100.0)


@pytest.mark.parametrize(("seconds", "extra", "kept"), [(2.0, 50, True), (2.1, 50, False), (2.0, 51, False)])
def test_a_promise_is_kept_if_memory_and_time_are_within_their_limits(seconds, extra, kept):
    told = flash.promises({"ours": row(seconds, extra), "naive": row(1.0, 1000), "sdpa": row(1.0, 1)})
    assert all(part["kept"] is kept for part in told.values())
    assert told["forward"]["memory_share"] == pytest.approx(extra / 1000)


def test_it_measures_reports_and_draws(monkeypatch, tmp_path, capsys):
    def alternate(module, contenders, arguments, rounds):
        length = int(arguments[arguments.index("--length") + 1])
        runs = {name: [flash.measure(name, length, 1, False, 0.01) for _ in range(rounds)] for name in contenders}
        return {name: [{**run, "peak_bytes": 1} for run in done] for name, done in runs.items()}

    monkeypatch.setattr(flash, "alternate", alternate)
    monkeypatch.setattr(flash, "REPORTS", tmp_path)
    flash.setup(lengths=[64, 128], n_head=1, rounds=1, seconds=0.01)
    reported = json.loads((tmp_path / "flash.json").read_text())
    assert set(reported["curves"]) == {"64", "128"} and reported["settings"]["head_size"] == 64
    assert (tmp_path / "flash.png").stat().st_size > 10_000
    assert "grows as T^" in capsys.readouterr().out
