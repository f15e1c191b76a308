"""A folder with the Makefile for each test."""

import shutil
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.make.project import Project


@pytest.fixture
def default_project(tmp_path: Path) -> Project:
    """The folder as one finds it."""
    shutil.copy(ROOT / "Makefile", tmp_path)
    for folder in ("workflows", "custom_models"):
        shutil.copytree(ROOT / folder / "recipes", tmp_path / folder / "recipes")
    (tmp_path / "checkpoints").mkdir()
    shutil.copy(ROOT / "checkpoints" / "registry.yaml", tmp_path / "checkpoints")
    shutil.copy(Path(__file__).parent / "stand_in.py", tmp_path)
    for name in ("pyproject.toml", "constraints.txt", "installed"):
        (tmp_path / name).touch()
    return Project(tmp_path)


@pytest.fixture
def project(default_project: Project) -> Project:
    """The folder with data that takes no other steps before it is trained on."""
    return Project(default_project.root, ("DATA=hpo",))
