"""Files of mixtures for tools/merge_dist_ckpt.py --weights."""

import pytest

from megatron_demix.errors import ConfigError
from megatron_demix.merge.weights import read_weights


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("w.jsonl", '{"name": "mix_0", "weights": {"code": 0.25, "math": 0.75}}\n\n{"name": "b", "weights": {"code": 1}}\n'),
        ("w.csv", "id,code,math\nmix_0,0.25,0.75\nb,1,0\n"),
    ],
)
def test_both_forms(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    found = read_weights(tmp_path / name)
    assert found["mix_0"] == {"code": 0.25, "math": 0.75}
    assert found["b"]["code"] == 1


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("w.jsonl", '{"name": "a"}\n', r"line 1: expected {\"name\": ..., .*'weights'"),
        ("w.csv", "id,code,math\na,0.5\n", r"line 2: expected a name and 2 numbers, found 'a,0.5'"),
        ("w.csv", "id,code\na,half\n", r"line 2: expected a name and 1 numbers, found 'a,half'"),
        ("w.csv", "id,code\na,1\na,1\n", r"mixture 'a' appears twice"),
        ("w.csv", "id,code\n../a,1\n", r"'../a' cannot name an output folder"),
        ("w.csv", "", r"holds no mixtures"),
    ],
)
def test_malformed(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_weights(tmp_path / name)
