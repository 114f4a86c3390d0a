"""The example files of docs/FORMATS.md are read by the programs they are for."""

import re
from pathlib import Path

import pytest

from megatron_demix.data.pool import Pool
from megatron_demix.merge.weights import read_weights
from megatron_demix.search.space_file import load_space

PAGE = (Path(__file__).parents[2] / "docs" / "FORMATS.md").read_text(encoding="utf-8")


@pytest.fixture
def example(tmp_path):
    """example("pool.yaml") -> path of a file with the block that follows the paragraph that begins with that name."""

    def write(name: str) -> Path:
        found = re.search(rf"^`{re.escape(name)}`, for .*?```\w+\n(.*?)```", PAGE, re.DOTALL | re.MULTILINE)
        assert found
        (tmp_path / name).write_text(found[1])
        return tmp_path / name

    return write


def test_weights(example):
    assert read_weights(example("weights.jsonl")) == {"mix_0": {"general": 0.5, "code": 0.3, "math": 0.2}}


def test_pool(example):
    path = example("pool.yaml")
    pool = Pool.read(path)
    assert pool["code"].prefixes == (path.parent / "data/code_text_document",)
    assert (len(pool["math"].prefixes), pool["math"].max_epochs) == (2, 6)


def test_domains(example):
    space = load_space(example("domains.yaml"))
    assert list(space.domains) == ["code", "math"]
    assert space.anchor_share == 0.5
    assert space.epoch_caps == {"code": 1.0, "math": 0.4}
