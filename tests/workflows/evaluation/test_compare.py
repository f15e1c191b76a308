"""The paired statistics against SciPy, and the pairing of two runs' samples."""

import json

import numpy as np
import pytest
from scipy import stats

from workflows.errors import UserError
from workflows.evaluation.compare import (
    compare,
    compare_samples,
    interval_of,
    is_share,
    mcnemar,
    wilson_interval,
    with_interval,
)


@pytest.mark.parametrize(
    ("lost", "won"), [(0, 0), (0, 1), (3, 12), (12, 3), (40, 40), (70, 121), (300, 420), (700, 800)]
)
def test_mcnemar_is_the_exact_binomial_test(lost, won):
    expected = stats.binomtest(min(lost, won), lost + won).pvalue if lost + won else 1.0
    assert mcnemar(lost, won) == pytest.approx(expected, rel=1e-9)


def test_right_or_wrong_scores():
    rng = np.random.default_rng(0)
    base = (rng.random(400) < 0.55).astype(float)
    tuned = np.where(rng.random(400) < 0.3, (rng.random(400) < 0.9).astype(float), base)
    result = compare("t", "acc", base.tolist(), tuned.tolist())
    assert result.difference == pytest.approx(tuned.mean() - base.mean())
    assert result.base_stderr == pytest.approx(stats.sem(base))
    assert result.stderr == pytest.approx(stats.sem(tuned - base))
    expected = stats.norm.interval(0.95, loc=result.difference, scale=result.stderr)
    assert (result.low, result.high) == pytest.approx(expected, abs=1e-4)
    lost, won = int(((base == 1) & (tuned == 0)).sum()), int(((base == 0) & (tuned == 1)).sum())
    assert (result.test, result.p_value) == ("mcnemar", pytest.approx(stats.binomtest(lost, lost + won).pvalue))
    assert result.stderr < np.hypot(result.base_stderr, result.tuned_stderr)  # what pairing is for
    assert result.row()["n"] == 400


def test_graded_scores_use_the_bootstrap():
    rng = np.random.default_rng(1)
    base = rng.random(150)
    tuned = base + rng.normal(0.03, 0.15, 150)
    result = compare("t", "f1", base.tolist(), tuned.tolist())
    exact = stats.ttest_rel(tuned, base)
    low, high = exact.confidence_interval(0.95)
    assert result.test == "bootstrap"
    assert (result.low, result.high) == pytest.approx((low, high), abs=0.003)
    assert result.p_value == pytest.approx(exact.pvalue, abs=0.02)
    assert compare("t", "f1", base.tolist(), tuned.tolist()) == result  # the same seed, the same interval


def test_unequal_lists_are_refused():
    with pytest.raises(ValueError, match="same length"):
        compare("t", "acc", [1.0], [])


def sample(doc_id, acc, doc_hash=None):
    return {
        "doc_id": doc_id,
        "filter": "none",
        "doc_hash": doc_hash or f"hash {doc_id}",
        "metrics": ["acc", "pair"],
        "acc": acc,
        "pair": [1, 2],
    }


def write(directory, task, samples):
    directory.mkdir(exist_ok=True)
    (directory / f"samples_{task}.jsonl").write_text("".join(json.dumps(s) + "\n" for s in samples))


def test_runs_are_paired_by_question(tmp_path):
    write(tmp_path, "t", [sample(i, float(i == 2)) for i in (2, 0, 1, 3)])
    after = [sample(i, 1.0) for i in range(3)]
    (only,), remarks = compare_samples(tmp_path, {"t": after, "other": after})
    assert (only.n, only.base, only.tuned) == (3, pytest.approx(1 / 3), 1.0)
    assert remarks == ["t: 3 questions compared, of 4 (baseline) and 3", "other is not among the baseline's tasks"]


def test_baselines_that_do_not_fit(tmp_path):
    after = {"t": [sample(0, 1.0)]}
    with pytest.raises(UserError, match="is not a folder"):
        compare_samples(tmp_path / "absent", after)
    with pytest.raises(UserError, match="nothing there can be compared"):
        compare_samples(tmp_path, after)
    write(tmp_path, "t", [sample(0, 1.0, doc_hash="other")])
    with pytest.raises(UserError, match="another one there"):
        compare_samples(tmp_path, after)
    (tmp_path / "samples_t.jsonl").write_text(json.dumps(sample(0, 1.0)) + "\n{half")
    with pytest.raises(UserError, match="line 2: not a sample"):
        compare_samples(tmp_path, after)


@pytest.mark.parametrize(("right", "n"), [(0, 1), (1, 1), (4, 4), (0, 40), (3, 40), (200, 400), (399, 400)])
def test_the_interval_of_a_share_is_wilsons(right, n):
    expected = stats.binomtest(right, n).proportion_ci(0.95, method="wilson")
    low, high = wilson_interval(right / n, n)
    assert (low, high) == pytest.approx((expected.low, expected.high), abs=1e-4)
    assert 0 <= low <= right / n <= high <= 1 and low < high


def test_right_or_wrong_scores_are_told_from_graded_ones_by_their_standard_error():
    rng = np.random.default_rng(2)
    binary, graded = (rng.random(50) < 0.7).astype(float), rng.random(50)
    assert is_share(binary.mean(), stats.sem(binary), 50) and not is_share(graded.mean(), stats.sem(graded), 50)
    assert is_share(1.0, 0.0, 50) and not is_share(1.0, None, 50) and not is_share(12.5, 0.3, 50)
    assert not is_share(0.5, float("nan"), 50)
    assert is_share(1.0, None, 1) and is_share(0.0, 0.0, 1) and not is_share(0.7, None, 1)


def test_tables_show_95_percent_intervals():
    assert with_interval({"value": 1.0, "stderr": None, "low": 0.51011, "high": 1.0}) == "1.000 (0.510 to 1.000)"
    assert with_interval({"value": 0.5, "stderr": 0.1}, digits=1, in_percent=True) == "50.0% (30.4 to 69.6)"
    assert interval_of({"value": 0.5, "stderr": None}) is None and interval_of({"value": 1.0, "stderr": 0.0}) is None
    assert with_interval({"value": 1.0, "stderr": 0.0}) == "1.000"
    right, graded = compare("t", "acc", [0.0] * 8, [1.0] * 8), compare("t", "f1", [0.5, 0.25], [0.25, 0.125])
    assert [with_interval(row) for row in right.means()] == ["0.000 (0.000 to 0.324)", "1.000 (0.676 to 1.000)"]
    assert [with_interval(row) for row in graded.means()] == ["0.375 (0.130 to 0.620)", "0.188 (0.065 to 0.310)"]
