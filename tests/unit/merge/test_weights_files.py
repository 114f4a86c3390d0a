"""Merge weights: files of them for tools/merge_dist_ckpt.py --weights, and what becomes of those that do not sum to 1."""

import math
import warnings
from typing import get_args

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_demix.errors import ConfigError, MixtureError
from megatron_demix.merge.weights import Normalize, read_weights, weight_matrix


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
        ("w.jsonl", '{"name": "a"}\n', r"line 1: expected {\"name\": ..., .*, found '{\"name\": \"a\"}'\.\Z"),
        ("w.jsonl", "3", r"line 1: expected {.*}, found '3'\.\Z"),
        ("w.jsonl", "{name: 3}", r"line 1: '{name: 3}' is not JSON \(Expecting property name"),
        ("w.csv", "id,code,math\na,0.5\n", r"line 2: expected a name and 2 numbers, found 'a,0.5'"),
        ("w.csv", "id,code\na,half\n", r"line 2: expected a name and 1 numbers, found 'a,half'\.\Z"),
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
        ("w.jsonl", '{"name": "a", "weights": [["code", 1]]}', r"line 1: expected {.*}, found .*\[\[\"code\", 1\]\]}'\.\Z"),
        ("w.jsonl", "[" * 100_000, r"line 1: '\[+' is not JSON \(maximum recursion"),
        ("w.jsonl", '{"name": 3, "weights": {"code": 1}}', r"line 1: 3 cannot name an output folder"),
        ("w.jsonl", r'{"name": "\ud800", "weights": {"code": 1}}', r"'\\ud800' cannot name an output folder"),
    ],
)
def test_malformed(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_weights(tmp_path / name)


@pytest.mark.parametrize("weight", ["1e39", "9" * 400, "-1e39", "Infinity", "true"])
def test_weights_that_are_no_numbers_of_float32(tmp_path, weight):
    (tmp_path / "w.jsonl").write_text(f'{{"name": "a", "weights": {{"code": {weight}}}}}')
    with pytest.raises(MixtureError, match=r"mixture a: weight of 'code' is .*, expected a finite number \(in float32"):
        weight_matrix(read_weights(tmp_path / "w.jsonl"), ["code"], "off")


@given(
    st.lists(st.sampled_from([0.0, 0.25, 0.5, 1.0, 3.0, -0.5, -1.0]), min_size=3, max_size=3),
    st.sampled_from(get_args(Normalize)),
    st.sampled_from([0.0, 5e-7, -5e-7, 2e-6, -2e-6]),
)
def test_weights_are_used_as_given_or_divided_by_their_sum_or_refused(values, normalize, off):
    """Components that a mixture does not name have none; a sum within 1e-6 of 1 is 1."""
    given_weights = {"c": values[0], "a": values[1] + off, "b": values[2]}
    row = np.array([given_weights[name] for name in "abc"])
    total, negative = math.fsum(row), (row < 0).any()
    as_given = normalize == "off" or (abs(total - 1) <= 1e-6 and not (negative and normalize == "error"))
    refused = not as_given and (normalize in ("error", "affine") or total <= 0)
    mixtures = {"m": given_weights, "one": {"d": 1.0}}
    if refused:
        with pytest.raises(MixtureError, match=r"mixture m: (weights sum to|a weight is negative)"):
            weight_matrix(mixtures, list("abcd"), normalize)
        return
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        found = weight_matrix(mixtures, list("abcd"), normalize)
    expected = row if as_given else row / total
    np.testing.assert_allclose(found, [[*expected, 0], [0, 0, 0, 1]], rtol=1e-12, atol=1e-15)
    assert [str(w.message).split(":")[0] for w in said] == (["mixture m"] if normalize == "warn" and not as_given else [])
