#!/usr/bin/env python3
"""Which versions of stock Megatron-LM accept, run and read what this project writes.

  git clone https://github.com/NVIDIA/Megatron-LM && cd Megatron-LM && git worktree add ../core_v0.16.1 core_v0.16.1 && ...
  pip install six triton
  python benchmarks/megatron_lm.py CHECKOUT [CHECKOUT ...]

For each checkout it runs tests/end_to_end/test_stock_megatron_lm.py (on a CPU where there is no CUDA device) and notes what
came of it in benchmarks/results/megatron_lm.json; the options that each version has in tests/contract/megatron_lm_options.json,
against which the tests check every option that a study makes. What is noted of other versions stays: 0.18 and newer need Python
3.12, which megatron-core 0.16 is not made for.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

from megatron_demix.artifact import read_json, write_json
from megatron_demix.train.megatron_lm.checkout import SUPPORTED, Checkout

ROOT = Path(__file__).parents[1]
TEST = ROOT / "tests" / "end_to_end" / "test_stock_megatron_lm.py"
RESULTS = ROOT / "benchmarks" / "results" / "megatron_lm.json"
OPTIONS = ROOT / "tests" / "contract" / "megatron_lm_options.json"


def examine(checkout: Checkout, only: str) -> tuple[dict[str, Any], list[str]]:
    """(the tests' outcomes, all options it has)."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            "-o",
            "junit_family=xunit1",
            f"--junitxml={report}",
            "-k",
            only,
            str(TEST),
        ]
        environment = os.environ | {"MEGATRON_LM": str(checkout.path), "OMP_NUM_THREADS": "1"}
        subprocess.run(command, env=environment, cwd=ROOT)
        cases = ET.parse(report).getroot().iter("testcase")
        tests: dict[str, Any] = {}
        options: list[str] = []
        for case in cases:
            failed = case.find("failure") if case.find("failure") is not None else case.find("error")
            facts: dict[str, Any] = {"passed": failed is None and case.find("skipped") is None}
            if failed is not None:
                facts["said"] = (failed.get("message") or "").strip().splitlines()[-1][:300]
            for found in case.iter("property"):
                name, value = found.get("name", ""), json.loads(found.get("value", "null"))
                if name == "options":
                    options = value
                else:
                    facts[name] = value
            tests[case.get("name", "")] = facts
    return tests, options


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkouts", nargs="+", type=Path, metavar="CHECKOUT")
    parser.add_argument("--only", default="", metavar="EXPRESSION", help="some of the tests, as pytest's -k selects them")
    arguments = parser.parse_args()
    results = read_json(RESULTS) if RESULTS.exists() else {}
    options = _options()
    for path in arguments.checkouts:
        checkout = Checkout.open(path)
        version = ".".join(map(str, checkout.version))
        tests, found = examine(checkout, arguments.only)
        results[version] = {"checkout": SUPPORTED[checkout.version], **_machine(), "tests": tests}
        if found:
            options[version] = set(found)
        print(f"{version}: " + ", ".join(f"{name} {'passed' if t['passed'] else 'FAILED'}" for name, t in tests.items()))
        write_json(RESULTS, dict(sorted(results.items())))
        common = set.intersection(*options.values())
        only = {version: sorted(options[version] - common) for version in sorted(options)}
        OPTIONS.write_text(json.dumps({"all": sorted(common), "only": only}, indent=0) + "\n")
    return 0 if all(t["passed"] for r in results.values() for t in r["tests"].values()) else 1


def _options() -> dict[str, set[str]]:
    """By version, as noted."""
    if not OPTIONS.exists():
        return {}
    noted = read_json(OPTIONS)
    return {version: {*noted["all"], *own} for version, own in noted["only"].items()}


def _machine() -> dict[str, str]:
    versions = {name: importlib.metadata.version(name) for name in ("torch", "megatron-core")}
    return {"python": platform.python_version(), **versions, "processor": platform.machine()}


if __name__ == "__main__":
    sys.exit(main())
