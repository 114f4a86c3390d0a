"""--demix-blend for scripts that call Megatron-LM's pretrain()."""

from __future__ import annotations

import argparse
import json

import pytest
import yaml
from indexed_data import make_pool

from megatron_demix.data.extra_args import add_demix_args


@pytest.fixture
def files(tmp_path):
    """pool.yaml and mixture.json."""
    pool = make_pool(tmp_path / "data", {"code": [[10] * 30, [10] * 10], "math": [5] * 80, "rest": [5] * 80})
    entries = {n: {"prefixes": [str(p) for p in s.prefixes], "max_epochs": 2} for n, s in pool.items()}
    entries["code"]["valid"] = [str(tmp_path / "data" / "code_0")]
    (tmp_path / "pool.yaml").write_text(yaml.safe_dump({"domains": entries}))
    (tmp_path / "mixture.json").write_text(json.dumps({"weights": {"code": 0.25, "math": 0.75, "rest": 0}}))
    return str(tmp_path / "pool.yaml"), str(tmp_path / "mixture.json")


def parse(*words):
    """By a parser with Megatron-LM's data options, as it makes them."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    for name in ("data-path", "train-data-path", "valid-data-path", "test-data-path"):
        parser.add_argument(f"--{name}", nargs="*", default=None)
    parser.add_argument("--mock-data", action="store_true")
    return add_demix_args(parser).parse_args(words)


def test_it_fills_in_the_data(files, tmp_path):
    from megatron.core.datasets.utils import get_blend_from_list

    found = parse("--demix-blend", *files, "400")
    prefixes, weights = get_blend_from_list(found.train_data_path)
    assert prefixes == [str(tmp_path / "data" / name) for name in ("code_0", "code_1", "math_0")]
    assert weights == [0.1875, 0.0625, 0.75]
    assert get_blend_from_list(found.valid_data_path) == ([str(tmp_path / "data" / "code_0")], [1.0])
    assert found.test_data_path is None
    assert parse().train_data_path is None


@pytest.mark.parametrize("other", [["--data-path", "a"], ["--train-data-path", "1", "a"], ["--mock-data"]])
def test_not_together_with_another_way_to_name_data(files, capsys, other):
    for words in ([*other, "--demix-blend", *files, "400"], ["--demix-blend", *files, "400", *other]):
        with pytest.raises(SystemExit):
            parse(*words)
        assert "not allowed with argument" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("tokens", "mixture", "message"),
    [
        ("2k", {"weights": {"code": 0.25, "math": 0.75}}, "math"),
        ("400", {"weights": {"code": 0.25, "math": 0.7}}, "weights sum to 0.95"),
        ("400", {"weights": {"code": 0.25, "prose": 0.75}}, "prose"),
        ("400", {"stages": []}, "one mixture"),
        ("lots", {"weights": {"code": 1.0}}, "lots"),
    ],
)
def test_what_cannot_be_is_said(files, capsys, tmp_path, tokens, mixture, message):
    (tmp_path / "mixture.json").write_text(json.dumps(mixture))
    with pytest.raises(SystemExit):
        parse("--demix-blend", *files, tokens)
    said = capsys.readouterr().err
    assert "error: --demix-blend: " in said
    assert message in said
