"""Merges that must end with an error, and leave nothing."""

import pytest

from megatron_demix.merge.engine import merge_checkpoints


def refuse(error, match, parts, tmp_path, mixtures=None, **settings):
    with pytest.raises(error, match=match):
        merge_checkpoints(
            parts, mixtures or {"m": {k: 1 / len(parts) for k in parts}}, tmp_path / "out", progress=False, **settings
        )
    out = tmp_path / "out"
    assert not out.exists() or not [p for p in out.rglob("*") if p.is_file()]
