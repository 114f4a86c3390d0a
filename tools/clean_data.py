#!/usr/bin/env python3
"""Remove near-duplicate documents, within and across domains, and documents that heuristics call junk, before tokenizing.

Writes OUTPUT/<domain>/*.jsonl.gz, OUTPUT/removed/<reason>/<domain>/*.jsonl.gz and OUTPUT/clean.json, the account of both. The
steps are datatrove's (pip install 'megatron-demix[data]'); the defaults are the paper's: 24-grams, 20 bands of 13 MinHashes.
"""

import argparse
import json
import sys
from pathlib import Path

from megatron_demix.data.clean import HEURISTICS, CleanSpec, clean_domains
from megatron_demix.data.inputs import resolve_inputs
from megatron_demix.errors import ConfigError, DemixError


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", nargs="+", required=True, metavar="DOMAIN=PATH", help="JSON Lines files, folders, globs; of "
                        "duplicates across domains the domain named first keeps its own")  # fmt: skip
    parser.add_argument("--output", type=Path, required=True, metavar="DIR")
    parser.add_argument("--json-key", default="text", metavar="KEY")
    parser.add_argument("--heuristics", nargs="*", default=[], choices=HEURISTICS, metavar="NAME", help=", ".join(HEURISTICS))
    parser.add_argument(
        "--ngram", type=int, default=CleanSpec.ngram, help="words in a shingle; 0 keeps duplicates (default: 24)"
    )
    parser.add_argument("--bands", type=int, default=CleanSpec.bands, help="default: 20")
    parser.add_argument("--hashes", type=int, default=CleanSpec.hashes, help="MinHashes in a band (default: 13)")
    parser.add_argument("--workers", type=int, default=1, metavar="N")
    arguments = parser.parse_args()
    try:
        inputs: dict[str, list[Path]] = {}
        for given in arguments.input:
            domain, equals, pattern = given.partition("=")
            if not equals:
                raise ConfigError(f"--input {given}: expected DOMAIN=PATH.")
            inputs.setdefault(domain, []).extend(resolve_inputs([pattern]))
        spec = CleanSpec(tuple(arguments.heuristics), arguments.ngram, arguments.bands, arguments.hashes)
        report = clean_domains(inputs, arguments.output, spec, json_key=arguments.json_key, workers=arguments.workers)
    except DemixError as e:
        print(f"error: {e}", file=sys.stderr)
        return e.exit_code
    print(json.dumps(report, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
