"""What a step sets before torch loads, and that a user's own settings stay."""

import subprocess
import sys

import psutil
import pytest

from workflows import environment


@pytest.mark.parametrize(("busy", "looks"), [(3.0, "20000"), (60.0, "1000")])
def test_threads_wait_briefly_where_something_else_runs(busy, looks, monkeypatch):
    monkeypatch.setattr(psutil, "cpu_percent", lambda interval: busy)
    variables: dict[str, str] = {}
    environment.prepare(variables)
    assert variables["GOMP_SPINCOUNT"] == looks
    assert variables["ONEDNN_PRIMITIVE_CACHE_CAPACITY"] == "128"


def test_what_the_user_has_set_stays():
    own = {"GOMP_SPINCOUNT": "7", "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "9", "TOKENIZERS_PARALLELISM": "true",
           "PYTORCH_ALLOC_CONF": "backend:cudaMallocAsync"}  # fmt: skip
    variables = dict(own)
    environment.prepare(variables)
    assert variables == own
    older = {"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:64"}  # its name in older torch, which is still read
    environment.prepare(older)
    assert "PYTORCH_ALLOC_CONF" not in older


def test_lightning_loads_no_packages_that_no_step_uses():
    script = """
import sys
from workflows import environment
environment.prepare()
environment.prepare()
import workflows.grpo, workflows.lora
import torchmetrics
print(sorted({"matplotlib", "scipy", "sklearn", "transformers"} & set(sys.modules)))
print(float(torchmetrics.MeanMetric()(2.0)))
import matplotlib.pyplot, scipy.signal, transformers
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (0, "[]\n2.0\n"), result.stderr
