"""A folder of a small Llama, and a copy that a test may spoil."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    from huggingface_models import save_model

    folder = tmp_path_factory.mktemp("hf") / "llama"
    save_model(folder, "Llama")
    return folder


@pytest.fixture
def copy(llama, tmp_path) -> Path:
    return Path(shutil.copytree(llama, tmp_path / "copy"))
