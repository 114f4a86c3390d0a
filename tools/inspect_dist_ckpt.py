#!/usr/bin/env python3
"""Show what a Megatron distributed checkpoint (torch_dist) holds: tensors, chunks, types, layout, iteration.

Nothing is loaded or unpickled, so it is safe on checkpoints from elsewhere, and quick on large ones. Truncated files are found.
"""

import argparse
import json
import sys
from pathlib import Path

from megatron_demix.checkpoint.summary import format_summary, summarize
from megatron_demix.exits import exit_code


def main() -> int:
    return exit_code(run)


def run() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", type=Path, help="a run's root, an iter_* or release folder, or a bare torch_dist folder")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    arguments = parser.parse_args()
    facts = summarize(arguments.path)
    print(json.dumps(facts, indent=1) if arguments.json else format_summary(facts))
    return 0


if __name__ == "__main__":
    sys.exit(main())
