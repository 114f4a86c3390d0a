"""Quantities as people write them: "30B" tokens, "256MiB" bytes, "4h" durations."""

from __future__ import annotations

import re
from decimal import Decimal
from typing import NamedTuple

from megatron_demix.errors import ConfigError

_TOKENS = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "t": 10**12}
_BYTES = {"": 1, "b": 1} | {
    f"{prefix}{suffix}": base**power
    for power, prefix in enumerate("kmgt", start=1)
    for suffix, base in (("b", 1000), ("ib", 1024), ("", 1024))
}
_SECONDS = {"": 1, "s": 1, "m": 60, "min": 60, "h": 3600, "d": 86400}


def _parse(text: str | int | float, table: dict[str, int], what: str, examples: str) -> int:
    match = re.fullmatch(r"\s*([0-9][0-9_]*(?:\.[0-9]+)?(?:[eE][+]?[0-9]{1,2})?)\s*([A-Za-z]*)\s*", str(text))
    if match is None or match[2].lower() not in table:
        raise ConfigError(f"{what}: {text!r} is not understood. Write it like {examples}.")
    value = Decimal(match[1].replace("_", "")) * table[match[2].lower()]
    if value != int(value):
        raise ConfigError(f"{what}: {text!r} is {value}, not a whole number. Write it like {examples}.")
    return int(value)


def parse_tokens(text: str | int | float) -> int:
    """Tokens, decimal multiples: "30B" -> 30_000_000_000. Raises ConfigError."""
    return _parse(text, _TOKENS, "tokens", "250000, 4M or 30B")


def parse_bytes(text: str | int | float) -> int:
    """Bytes: "256MiB" and "256M" are binary multiples, "256MB" decimal. Raises ConfigError."""
    return _parse(text, _BYTES, "bytes", "4096, 256MiB or 2GB")


def parse_duration(text: str | int | float) -> int:
    """Seconds: "90", "30min", "4h", "2d", or SLURM's "[D-]HH:MM:SS". Raises ConfigError."""
    match = re.fullmatch(r"(?:(\d+)-)?(\d+):(\d\d)(?::(\d\d))?", str(text).strip())
    if match:
        days, a, b, c = (int(g) if g else None for g in match.groups())
        # SLURM reads D-HH:MM and HH:MM:SS, but MM:SS when neither days nor a third field is given.
        hours, minutes, seconds = (a, b, c or 0) if c is not None or days is not None else (0, a, b)
        return ((days or 0) * 24 + (hours or 0)) * 3600 + (minutes or 0) * 60 + (seconds or 0)
    return _parse(text, _SECONDS, "duration", "90s, 30min, 4h or 1-12:00:00")


class Cut(NamedTuple):
    """Where a list of scored documents is cut: at a score, or after a share (0 ... 1) of the documents."""

    value: float
    share: bool


def parse_cut(text: str | int | float) -> Cut:
    """ "2%" is a share of the documents, "0.8" or "1e3" a score. Raises ConfigError."""
    match = re.fullmatch(r"\s*([+-]?[0-9]+(?:\.[0-9]+)?(?:[eE][+-]?[0-9]{1,2})?)\s*(%?)\s*", str(text))
    if match is None or (match[2] and not 0 <= float(match[1]) <= 100):
        raise ConfigError(f"cut: {text!r} is not understood. Write 2% for a share of the documents, or a score like 0.8.")
    return Cut(float(Decimal(match[1]) / 100), True) if match[2] else Cut(float(match[1]), False)


def format_count(value: float) -> str:
    """1234567 -> "1.23M". Three significant digits, decimal multiples."""
    for scale, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= scale * 0.9995:
            return f"{_three_digits(value / scale)}{letter}"
    return _three_digits(value) if isinstance(value, float) else str(value)


def format_bytes(value: float) -> str:
    """268435456 -> "256 MiB"."""
    for power, unit in ((4, "TiB"), (3, "GiB"), (2, "MiB"), (1, "KiB")):
        if abs(value) >= 1024**power * 0.9995:
            return f"{_three_digits(value / 1024**power)} {unit}"
    return f"{value:.0f} B"


def format_duration(seconds: float) -> str:
    """75.2 -> "1m15s"; 3700 -> "1h02m"; below a minute one decimal."""
    if seconds < 59.95:
        return f"{seconds:.1f}s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    minutes = round(whole / 60)
    return f"{minutes // 60}h{minutes % 60:02d}m" if minutes < 1440 else f"{minutes // 1440}d{minutes % 1440 // 60:02d}h"


def _three_digits(value: float) -> str:
    return f"{value:.3g}" if abs(value) < 999.5 else f"{value:.0f}"
