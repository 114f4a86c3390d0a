from pathlib import Path

import pytest

from megatron_demix.errors import ConfigError, MixtureError
from megatron_demix.search.space_file import load_space


def written(folder: Path, text: str) -> Path:
    path = folder / "domains.yaml"
    path.write_text(text)
    return path


def test_a_domains_file_becomes_a_space(tmp_path: Path) -> None:
    space = load_space(
        written(
            tmp_path,
            """
domains:
  code: {tokens: 30B, max_epochs: 2}
  math: {tokens: 10B, max_epochs: 4, max_share: 0.3}
  general: {tokens: 60B, min_share: 0.2}
target_tokens: 100B
anchor: {mixture: {general: 1}, share: 0.25}
groups: {skills: {domains: [code, math], highest: 0.7}}
max_kl: 0.5
""",
        )
    )
    assert dict(space.natural) == {"code": 0.3, "math": 0.1, "general": 0.6}
    assert space.epoch_caps == {"code": 0.6, "math": 0.4, "general": 1.0}
    assert space.max_shares == {"math": 0.3}
    assert space.min_shares == {"general": 0.2}
    assert space.anchor["general"] == 1
    assert space.anchor_share == 0.25
    assert space.groups["skills"].highest == 0.7
    assert space.max_kl == 0.5


def test_without_an_anchor_weights_are_shares(tmp_path: Path) -> None:
    space = load_space(written(tmp_path, "domains: {a: {tokens: 1M}, b: {tokens: 1M}}\ntarget_tokens: 1M\n"))
    assert space.anchor_share == 0
    assert (space.bounds_D2 == [[0, 1], [0, 1]]).all()


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("domains: [", ConfigError, "cannot be read"),
        ("domains: 2024-13-45", ConfigError, "cannot be read: month must be in 1..12"),
        ("- code\n- math\n", ConfigError, r"yaml: not a domains file:\n  expected a mapping, found a list\Z"),
        ("", ConfigError, "expected a mapping, found nothing"),
        (
            "domains: {a: 30B, 1: {tokens: 1M}}\ntarget_tokens: 1\n5: 6",
            ConfigError,
            r"a: expected a mapping, found '30B'\n  domains\.1: expected text, in quotes where .*, found 1\n  5: unknown key\.",
        ),
        (
            "domains: {a: {tokens: 1}, b: {tokens: 1}}\ntarget_tokens: 1\nanchor: {mixture: {a: 0.4}}",
            MixtureError,
            r"domains\.yaml: anchor: weights sum to 0\.4",
        ),
        ("target_tokens: 1M\ntarget_tokens: 2M\n", ConfigError, r"(?s)'target_tokens' is given twice, first in line 1.*line 2"),
        ("max_kl: .inf\n", ConfigError, r"max_kl: expected a finite number"),
        ("domains: {a: {tokens: 1M}}\ntarget_tokens: 1M\n", ConfigError, "domains: expected 2 or more entries, found 1"),
        (
            "domains: {a: {tokens: 1M, epochs: 2}, b: {tokens: 1}}\ntarget_tokens: 1M\n",
            ConfigError,
            r"domains\.a\.epochs: unknown key; did you mean 'max_epochs'\?",
        ),
        ("domains: {a: {tokens: 1M}, b: {tokens: 1M}}\n", ConfigError, r"target_tokens: missing\Z"),
        ("domains: {a: {tokens: lots}, b: {tokens: 1}}\ntarget_tokens: 1M\n", ConfigError, "'lots' is not understood"),
        (
            "domains: {a: {tokens: 1M, max_epochs: 1}, b: {tokens: 1M, max_epochs: 2}}\ntarget_tokens: 4M\n",
            MixtureError,
            r"sum to 0\.75, expected at least 1: 0\.25 short",
        ),
    ],
)
def test_bad_domains_files(tmp_path: Path, text: str, error, message: str) -> None:
    with pytest.raises(error, match=message):
        load_space(written(tmp_path, text))
