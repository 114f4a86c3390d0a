"""A study that is sound, to be changed."""

import copy

import pytest
import yaml
from sound_study import GOOD

from megatron_demix.study.load import load_study
from megatron_demix.study.study import Study


@pytest.fixture
def load(tmp_path):
    def load_changed(change=None, overrides=None) -> Study:
        data = copy.deepcopy(GOOD)
        if change:
            change(data)
        path = tmp_path / "study.yaml"
        path.write_text(yaml.safe_dump(data))
        return load_study(path, overrides)

    return load_changed
