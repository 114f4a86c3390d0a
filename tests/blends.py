"""One small pool and mixture, built as tests of blends build it."""

from pathlib import Path
from typing import Any

import numpy as np
from indexed_data import make_pool

from megatron_demix.data.blend import Pool, build_blend
from megatron_demix.mixture import Mixture

MIXTURE = Mixture({"code": 0.5, "prose": 0.2, "math": 0.3})


def three_domains(folder: Path) -> Pool:
    rng = np.random.default_rng(0)
    sizes = {"code": 300, "prose": 500, "math": 80}
    return make_pool(folder, {name: rng.integers(1, 200, n) for name, n in sizes.items()})


def build(pool: Pool, output: Path, target: int = 60_000, mixture: Mixture = MIXTURE, **options: Any) -> dict[str, Any]:
    return build_blend(pool, mixture, target, output, **{"seed": 3, "progress": False, **options})


def flip_last_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))
