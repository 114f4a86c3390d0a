#!/usr/bin/env python3
"""Coverage-guided fuzzing (atheris, so libFuzzer) of what reads checkpoints: any bytes give a value or CorruptInput.

    python tests/native/fuzz_readers.py metadata|payload|common [libFuzzer's flags] [corpus folders]

Inputs are files: `.metadata`, one item of a .distcp file, common.pt; small sound ones lie in tests/native/corpus/. A crash
leaves its input where the command ran (crash-*); `... metadata crash-x` runs it again. --record FILE keeps the number of
executions.
"""

import contextlib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["megatron_demix.checkpoint"]):
    from megatron_demix.checkpoint import common_state, payload
    from megatron_demix.checkpoint.common_state import merged_common_state, read_common_state
    from megatron_demix.checkpoint.metadata import read_metadata
    from megatron_demix.checkpoint.payload import read_payload
    from megatron_demix.checkpoint.pickles import write_pickle
    from megatron_demix.checkpoint.reader import Checkpoint

import numpy as np

from megatron_demix.errors import CorruptInput

CORPUS = Path(__file__).parent / "corpus"
ITEM_BYTES = {"float32": 4, "float64": 8, "bfloat16": 2, "float16": 2}


def forbidden(*arguments: object) -> None:
    raise SystemError(f"an input ran something: {arguments}")


class Targets:
    """One method a format; each raises nothing but CorruptInput, whatever `data` is."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        (folder / ".metadata").write_bytes((CORPUS / "metadata" / "two_tensors").read_bytes())
        self._checkpoint = Checkpoint(folder)

    def metadata(self, data: bytes) -> None:
        (self._folder / ".metadata").write_bytes(data)
        for info in read_metadata(self._folder).tensors.values():
            assert all(o + n <= g for c in info.chunks for o, n, g in zip(c.offset, c.shape, info.shape, strict=True))

    def payload(self, data: bytes) -> None:
        payload = read_payload(np.frombuffer(data, np.uint8), "input")
        last = sum((n - 1) * s for n, s in zip(payload.shape, payload.strides, strict=True))
        size = ITEM_BYTES.get(payload.dtype, 1)
        assert not all(payload.shape) or 0 <= payload.offset_bytes + last * size <= payload.record.nbytes - size

    def common(self, data: bytes) -> None:
        (self._folder / "common.pt").write_bytes(data)
        merged, _ = merged_common_state(read_common_state(self._checkpoint), 0)
        write_pickle(merged)


def main() -> None:
    target, *flags = sys.argv[1:] or ["--help"]
    if target not in ("metadata", "payload", "common"):
        raise SystemExit(__doc__)
    if "--record" in flags:
        at = flags.index("--record")
        record(target, flags[:at] + flags[at + 2 :], Path(flags[at + 1]))
        return
    # Checksums are not compared: every mutation would end there.
    common_state.check_entry = payload.check_entry = lambda data, *_: data  # type: ignore[assignment]
    for name in ("system", "popen", "execv", "posix_spawn"):
        setattr(os, name, forbidden)
    folder = tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None)
    run = getattr(Targets(Path(folder.name)), target)

    def one(data: bytes) -> None:
        with contextlib.suppress(CorruptInput):
            run(data)

    atheris.Setup([sys.argv[0], *flags], one)
    atheris.Fuzz()


def record(target: str, flags: list[str], path: Path) -> None:
    """Run the target in a process of its own; keep what it did, by target, in a JSON file."""
    started = time.monotonic()
    done = subprocess.run([sys.executable, __file__, target, *flags], stderr=subprocess.PIPE, text=True)
    lines = done.stderr.splitlines()
    found = re.search(r"Done (\d+) runs", done.stderr)
    covered = re.findall(r"cov: (\d+)", done.stderr)
    entry = {
        "command": " ".join(["python tests/native/fuzz_readers.py", target, *flags]),
        "executions": int(found[1]) if found else None,
        "covered_edges": int(covered[-1]) if covered else None,
        "seconds": round(time.monotonic() - started),
        "crashed": done.returncode != 0,
    }
    known = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(known | {target: entry}, indent=1) + "\n")
    print(json.dumps(entry), *(lines[-30:] if done.returncode else ()), sep="\n")
    sys.exit(done.returncode)


if __name__ == "__main__":
    main()
