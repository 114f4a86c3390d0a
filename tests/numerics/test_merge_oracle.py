"""What a written merge is verified by: it accepts what rounds right, and nothing that is off by more."""

import numpy as np
import pytest
import torch

from megatron_demix.merge.oracle import HALF_ULP, Expected, error_bound, linear
from megatron_demix.merge.verify import _agree

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def rounded(values: np.ndarray, dtype: str) -> np.ndarray:
    return torch.from_numpy(values).to(DTYPES[dtype]).double().numpy()


@pytest.mark.parametrize("num", [1, 2, 7])
@pytest.mark.parametrize("size", [1.0, 1e-6, 1000.0])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_sum_in_float32_is_right_and_one_a_unit_off_is_not(dtype, size, num):
    rng = np.random.default_rng(num)
    # Of one sign: where terms cancel, what float32 loses is no longer small beside the sum.
    values_KN = rounded(size * rng.uniform(0.5, 4, (num, 4000)), dtype)
    weights_K = rng.dirichlet(np.ones(num))
    sums_N = np.zeros(4000, np.float32)
    for weight, values_N in zip(weights_K.astype(np.float32), values_KN.astype(np.float32), strict=True):
        sums_N += weight * values_N
    exact_N = linear(weights_K, values_KN)
    expected = Expected(exact_N, error_bound(weights_K, values_KN, dtype))
    assert _agree(rounded(sums_N, dtype), expected, dtype).all()
    smallest = {"float32": 2.0**-149, "bfloat16": 2.0**-133, "float16": 2.0**-24}[dtype]
    unit_N = 2 * (exact_N * (HALF_ULP[dtype] + (num + 1) * 2.0**-24) + smallest)
    for sign in (1, -1):
        assert not _agree(exact_N + sign * unit_N, expected, dtype).any()


@pytest.mark.parametrize(("dtype", "largest"), [("float32", 3.4028e38), ("bfloat16", 3.3895e38), ("float16", 65504.0)])
def test_what_is_no_number_is_told_from_numbers(dtype, largest):
    inf, nan = np.inf, np.nan
    cases = [
        (inf, inf, True),
        (-inf, inf, False),
        (inf, -inf, False),
        (nan, nan, True),
        (nan, 1.0, False),
        (1.0, nan, False),
        (inf, nan, False),
        (inf, largest / 2, False),
        (largest, inf, False),
        (inf, 1.01 * largest, True),  # rounded up
        (-inf, 1.01 * largest, False),
        (0.0, largest, False),
    ]
    found_N, values_N, right_N = (np.array(column) for column in zip(*cases, strict=True))
    expected = Expected(values_N, np.where(np.isfinite(values_N), np.abs(values_N) * HALF_ULP[dtype], 0.0))
    assert _agree(found_N, expected, dtype).tolist() == right_N.tolist()
