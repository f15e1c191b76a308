"""Settings that libraries read from the environment when they load; what the user has set stays."""

import os
import re
from collections.abc import MutableMapping
from typing import Any

_BUSY_PERCENT = 20.0
"""The share of all cores in use from which a machine has something else to do."""
KERNELS = "128"
"""oneDNN keeps its last so many kernels, each with its memory. A row's passes need about 30 for the row's length; its
own limit of 1,024 lets a run over rows of many lengths grow by 0.3 GB (SmolLM2-135M) and makes it no faster."""

_LOADED_FOR_NOTHING = re.compile(r"(matplotlib|scipy|transformers)\b")
"""Packages that torchmetrics, and so Lightning, loads where they are installed, for metrics that no step uses."""


def prepare(variables: MutableMapping[str, str] = os.environ) -> None:
    """Set what suits our steps. To be called before torch is imported.

    Args:
        variables: The environment to change.
    """
    share_cores(variables)
    variables.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", KERNELS)
    variables.setdefault("TOKENIZERS_PARALLELISM", "false")
    # Rows differ in length: blocks that were freed for one do not fit the next, and a GPU fills with them.
    if "PYTORCH_CUDA_ALLOC_CONF" not in variables:
        variables.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    load_less()


def load_less() -> None:
    """Let torchmetrics believe that packages for plots, texts and sound are not installed.

    Lightning cannot be imported without torchmetrics. With these packages that takes 6 s of one core after torch,
    without them 3 s, in every step that loads a model.
    """
    from lightning_utilities.core import imports

    cache, found = imports.RequirementCache, imports.package_available
    checked = cache._check_available
    if checked.__name__ == "check":  # done before, in this process
        return

    def check(self: Any) -> None:
        if _LOADED_FOR_NOTHING.match(self.requirement or ""):
            self.available, self.message = False, f"{self.requirement}: not loaded, no step uses it here"
        else:
            checked(self)

    cache._check_available = check  # type: ignore[method-assign]
    imports.package_available = lambda name: not _LOADED_FOR_NOTHING.match(name) and found(name)  # type: ignore[assignment]


def share_cores(variables: MutableMapping[str, str] = os.environ) -> None:
    """Set how often an OpenMP thread that waits for the others looks again before it sleeps.

    Looking saves the waking up, but where something else runs too, threads that look keep each other from the cores.
    Seconds for the same training steps on two cores, both free or one of them busy: 12.0 and 22 with 1,000 looks; 11.4
    and 32 with 5,000; 11.0 with 20,000; 11.6 and far more with libgomp's own number.

    Args:
        variables: The environment to change.
    """
    import psutil

    if "GOMP_SPINCOUNT" not in variables:
        busy = psutil.cpu_percent(interval=0.1) > _BUSY_PERCENT
        variables["GOMP_SPINCOUNT"] = "1000" if busy else "20000"
