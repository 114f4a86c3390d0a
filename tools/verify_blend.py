#!/usr/bin/env python3
"""Read a blend again through Megatron's own IndexedDataset, count everything anew, and compare it with the manifest."""

import argparse
import json
import sys
from pathlib import Path

from megatron_demix.data.verify import verify_blend
from megatron_demix.exits import exit_code


def main() -> int:
    return exit_code(run)


def run() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("prefix", type=Path, metavar="PREFIX", help="path prefix of the blend, without .bin/.idx")
    parser.add_argument("--json", action="store_true", help="print the counts as JSON")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    arguments = parser.parse_args()
    counts = verify_blend(arguments.prefix, progress=not arguments.quiet)
    if arguments.json:
        print(json.dumps(counts, indent=1))
    else:
        print(f"{arguments.prefix}: sound. {counts['documents']:,} documents, {counts['tokens']:,} tokens.")
        print(f"  sources: {counts['sources']}")
        for name, domain in counts["domains"].items():
            print(f"  {name}: {domain['documents']:,} documents, {domain['tokens']:,} tokens")
    return 0


if __name__ == "__main__":
    sys.exit(main())
