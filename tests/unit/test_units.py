"""Quantities as people write them, read and written."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_demix.errors import ConfigError
from megatron_demix.units import format_bytes, format_count, format_duration, parse_bytes, parse_duration, parse_tokens


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("30B", 30 * 10**9),
        ("1.5M", 1_500_000),
        (" 4 m ", 4_000_000),
        ("250_000", 250_000),
        (1e6, 10**6),
        ("2e3k", 2_000_000),
        ("0", 0),
        (7, 7),
        ("1.2T", 1_200_000_000_000),
    ],
)
def test_tokens(text, tokens):
    assert parse_tokens(text) == tokens


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [("256MiB", 2**28), ("256M", 2**28), ("256MB", 256 * 10**6), ("512b", 512), ("1.5GiB", 3 * 2**29), (4096, 4096)],
)
def test_bytes(text, num_bytes):
    assert parse_bytes(text) == num_bytes


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("90", 90),
        ("90s", 90),
        ("30min", 1800),
        ("30m", 1800),
        ("4h", 14400),
        ("2d", 172800),
        ("1-12:00:00", 129600),
        ("1-12:00", 129600),
        ("02:30:00", 9000),
        ("45:30", 2730),
        (15, 15),
    ],
)
def test_durations_in_words_and_in_slurms_forms(text, seconds):
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "B", "-3M", "3X", "1.2.3", "inf", "nan", "four", None, True, [1], "1e999999999", "3 M B"])
@pytest.mark.parametrize("parse", [parse_tokens, parse_bytes, parse_duration])
def test_what_is_not_a_quantity_is_refused_with_examples(parse, text):
    with pytest.raises(ConfigError, match=r"is not understood\. Write it like "):
        parse(text)


def test_a_part_of_a_unit_is_refused():
    with pytest.raises(ConfigError, match=r"tokens: '1\.2345k' is 1234\.5\S*, not a whole number"):
        parse_tokens("1.2345k")


@given(st.integers(0, 10**17))
def test_whole_numbers_read_as_themselves(n):
    assert parse_tokens(str(n)) == parse_bytes(n) == parse_duration(n) == n


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (999, "999"),
        (999.7, "1k"),
        (1000, "1k"),
        (1_234_567, "1.23M"),
        (999_600, "1M"),
        (30 * 10**9, "30B"),
        (0.5, "0.5"),
        (2 * 10**16, "20000T"),
        (-1500, "-1.5k"),
    ],
)
def test_counts_have_three_digits(value, text):
    assert format_count(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0 B"),
        (1000, "1000 B"),
        (1023, "1023 B"),
        (1024, "1 KiB"),
        (1023 * 1024, "1023 KiB"),
        (2**28, "256 MiB"),
        (3 * 2**40, "3 TiB"),
    ],
)
def test_sizes_are_binary(value, text):
    assert format_bytes(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0.0s"), (9.94, "9.9s"), (59.96, "1m00s"), (75.2, "1m15s"), (3599.7, "1h00m"), (3700, "1h02m"), (90000, "1d01h")],
)
def test_durations_as_shown(seconds, text):
    assert format_duration(seconds) == text


@given(st.integers(1, 2**60))
def test_a_shown_size_is_within_half_a_percent_of_the_size(num_bytes):
    number, unit = format_bytes(num_bytes).split()
    scale = 1024 ** ["B", "KiB", "MiB", "GiB", "TiB"].index(unit)
    assert float(number) * scale == pytest.approx(num_bytes, rel=0.005)
