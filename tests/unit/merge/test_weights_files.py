"""Files of mixtures for tools/merge_dist_ckpt.py --weights."""

import pytest

from megatron_demix.errors import ConfigError, MixtureError
from megatron_demix.merge.weights import read_weights, weight_matrix


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("w.jsonl", '{"name": "mix_0", "weights": {"code": 0.25, "math": 0.75}}\n\n{"name": "b", "weights": {"code": 1}}\n'),
        (
            "w.jsonl",
            '\ufeff{"name": "mix_0", "weights": {"code": 0.25, "math": 0.75}}\r\n{"name": "b", "weights": {"code": 1}}',
        ),
        ("w.csv", "id,code,math\nmix_0,0.25,0.75\nb,1,0\n"),
        ("w.csv", "merge_weights,code,math\nmix_0,0.25,0.75\nb,1,0\n"),
        ("w.csv", '\ufeffid, "code", math\r\n\r\n"mix_0", 0.25, "0.75"\r\nb,1,0\r\n'),
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
        ("w.csv", "id,code\na,1\n a ,1\n", r"line 3: mixture 'a' appears twice"),
        ("w.csv", 'id,code\n"a\nb",1\nc,half\n', r"line 4: expected a name and 1 numbers, found 'c,half'"),
        ("w.csv", "id,code\n../a,1\n", r"'../a' cannot name an output folder"),
        ("w.csv", "", r"holds no mixtures"),
        (
            "w.csv",
            "shares,code\na,1\n",
            r"line 1: the first cell, 'shares', says that .* actual data shares; expected merge weights",
        ),
        ("w.csv", "id,code,math,code\na,1,0,0\n", r"line 1: column 'code' is given twice"),
        ("w.csv", 'id,code\n"a,1\n', r"line 2: not CSV"),
        ("w.jsonl", '{"name": "a", "weights": {"code": 0.5, "math": 0.5, "code": 1}}', r"line 1: 'code' is given twice"),
        ("w.jsonl", '{"name": "a", "weights": [["code", 1]]}', r"line 1: expected .*weights are a list"),
        ("w.jsonl", "[" * 100_000, r"line 1: expected .*RecursionError"),
        ("w.jsonl", r'{"name": "\ud800", "weights": {"code": 1}}', r"'\\ud800' cannot name an output folder"),
    ],
)
def test_malformed(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_weights(tmp_path / name)


@pytest.mark.parametrize("weight", ["1e39", "9" * 400, "-1e39", "Infinity"])
def test_weights_that_float32_does_not_hold(tmp_path, weight):
    (tmp_path / "w.jsonl").write_text(f'{{"name": "a", "weights": {{"code": {weight}}}}}')
    with pytest.raises(MixtureError, match=r"mixture a: weight of 'code' is .*, expected a finite number \(in float32"):
        weight_matrix(read_weights(tmp_path / "w.jsonl"), ["code"], "off")
