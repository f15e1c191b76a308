"""The real checkpoint in Hugging Face's form, as the reference of several test files."""

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def embedded_hf(embedded_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded checkpoint, exported."""
    from workflows.hf_export import write_hf

    directory = tmp_path_factory.mktemp("hf") / "smollm2-135m-instruct"
    write_hf(embedded_checkpoint, directory, card="test")
    return directory
