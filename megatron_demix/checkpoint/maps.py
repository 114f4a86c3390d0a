"""How many files this process may have mapped at once: Linux counts maps, and allows 65,530 of them unless told otherwise."""

from __future__ import annotations

from pathlib import Path

from megatron_demix.errors import ConfigError

_LIMIT, _MAPS = Path("/proc/sys/vm/max_map_count"), Path("/proc/self/maps")
_OTHERS = 1024
"""Maps beside those of files: what torch's libraries take (measured: 330), stacks of threads, memory."""
_AT_LIMIT = 16
"""What one more file takes for a moment."""


def check_maps(num_files: int, what: str) -> None:
    """Raises ConfigError if this process cannot map so many files more. what: whose they are, in the plural."""
    if (counted := _counted()) and num_files + _OTHERS > counted[0] - counted[1]:
        raise _too_few(counted, f"{what} lie in {num_files} files", num_files)


def out_of_maps(path: Path) -> ConfigError:
    """What a file is refused with that could not be mapped for lack of memory (ENOMEM)."""
    counted = _counted()
    if counted and counted[0] - counted[1] < _AT_LIMIT:
        return _too_few(counted, f"{path} is one file too many", counted[1] // 2)
    return ConfigError(
        f"{path}: the system maps no more of it (Cannot allocate memory): a limit on this process's address space is reached "
        "(ulimit -v). Raise it; the file may be sound."
    )


def _counted() -> tuple[int, int] | None:
    """(how many maps a process may have, how many this one has), where the system says so."""
    try:
        return int(_LIMIT.read_text()), _MAPS.read_bytes().count(b"\n")
    except (OSError, ValueError):
        return None


def _too_few(counted: tuple[int, int], seen: str, wanted: int) -> ConfigError:
    limit, in_use = counted
    enough = 1 << (in_use + wanted + _OTHERS).bit_length()
    return ConfigError(
        f"{seen}, but this process has {in_use} of the {limit} maps it may have, and each file is mapped. Raise the system's "
        f"limit as root (sysctl -w vm.max_map_count={enough}), or share the work among processes (--workers), of which each "
        "maps only what its part is made of."
    )
