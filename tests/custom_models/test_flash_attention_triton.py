"""The Triton kernels equal SDPA, forward and gradients: in Triton's interpreter, since the tests have no GPU.

The interpreter must be switched on before anything imports triton, so all cases run in one process of their own.
"""

import json
import os
import subprocess
import sys

import pytest
import torch

from custom_models.attention import attend
from tests.custom_models.triton_cases import DENSE, PACKED
from workflows.errors import UserError

pytest.importorskip("triton", reason="triton runs on Linux only")
SMALLEST_SHARED_MEMORY = 99 * 1024
"""Bytes a program may have on compute capability 8.6 and 8.9, the least of those since 8.0 (CUDA's manual)."""


def run(*arguments, **variables):
    inherited = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, "-m", "tests.custom_models.triton_cases", *arguments],
        env={**inherited, "OMP_NUM_THREADS": "1", **variables},
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.fixture(scope="module")
def interpreted():
    result = run(TRITON_INTERPRET="1")
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(result.stdout.splitlines()[-1])


@pytest.mark.parametrize("case", [*(case for case in DENSE if case != "float16"), *PACKED, "layer"])
def test_the_kernels_equal_sdpa(interpreted, case):
    assert max(interpreted[case]) <= 1e-5, interpreted[case]


def test_the_kernels_in_float16_are_off_by_its_rounding_only(interpreted):
    assert max(interpreted["float16"]) <= 0.01, interpreted["float16"]


def test_what_the_kernels_cannot_do_is_told(interpreted):
    told = interpreted["refusals"]
    assert "heads of one size up to 256" in told["value size"] and "k and v differ" in told["shape"]
    assert "torch.float64" in told["dtype"] and 'Take the backend "flash"' in told["dtype"]


@pytest.mark.slow  # and tests/test_gpu.py runs them
def test_the_kernels_compile_for_a_gpu_within_its_shared_memory(tmp_path):
    result = run("compile", TRITON_CACHE_DIR=str(tmp_path))
    assert result.returncode == 0, result.stderr[-3000:]
    for case, kernels in json.loads(result.stdout.splitlines()[-1]).items():
        assert len(kernels) == 3 and max(kernels.values()) <= SMALLEST_SHARED_MEMORY, (case, kernels)


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="here the interpreter would run it")
def test_without_a_gpu_the_backend_says_what_to_take_instead():
    q = torch.randn(1, 1, 4, 16)
    with pytest.raises(UserError, match=r'needs a GPU; on the CPU take "flash" or "sdpa".*TRITON_INTERPRET=1'):
        attend(q, q, q, backend="triton")


def test_without_triton_the_backend_says_what_to_do(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)  # an import of it then fails
    monkeypatch.delitem(sys.modules, "custom_models.flash_attention_triton", raising=False)
    q = torch.randn(1, 1, 4, 16)
    with pytest.raises(UserError, match=r"pip install triton.*The backend \"flash\" is the same"):
        attend(q, q, q, backend="triton")


def test_it_runs_as_a_program(interpreted):
    assert interpreted["program"].count("differs from SDPA on cpu by: output") == 2
