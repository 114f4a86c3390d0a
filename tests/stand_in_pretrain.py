"""Behaves to the outside as stock pretrain_gpt.py does, and trains nothing: it prints lines, and saves copies of one folder.
Of several ranks the last one does so, and the others say that they were there.

--finetune: --load names that folder, and it starts afresh.
--stand-in HOW: early (ends without an error after half of the iterations, when started afresh), nan, or an exit code to end
with.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from pathlib import Path


def main() -> int:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    for option in ("--load", "--save", "--pretrained-checkpoint"):
        parser.add_argument(option, type=Path)
    for option in ("--train-iters", "--save-interval", "--global-batch-size"):
        parser.add_argument(option, type=int)
    parser.add_argument("--finetune", action="store_true")
    parser.add_argument("--stand-in", default="")
    arguments, _ = parser.parse_known_args()
    source = arguments.pretrained_checkpoint or arguments.load
    tracker = arguments.load / "latest_checkpointed_iteration.txt"
    first = int(tracker.read_text()) if tracker.exists() and not arguments.finetune else 0
    print(f"rank {os.environ['RANK']} starting after iteration {first}, with {arguments.pretrained_checkpoint}", flush=True)
    if os.environ["RANK"] != str(int(os.environ["WORLD_SIZE"]) - 1):
        return 0
    if arguments.stand_in.isdecimal():
        return int(arguments.stand_in)
    source = max(p for p in source.iterdir() if p.is_dir())
    for iteration in range(first + 1, arguments.train_iters + 1):
        loss = "" if arguments.stand_in == "nan" and iteration == 3 else f" lm loss: {5 - 0.1 * iteration:.6E} |"
        print(
            f" [2026-01-01 00:00:00.000000] iteration {iteration:8d}/{arguments.train_iters:8d} | consumed samples: "
            f"{iteration * arguments.global_batch_size:12d} | elapsed time per iteration (ms): 20.0 | learning rate: "
            f"{1e-3:.6E} | global batch size: {arguments.global_batch_size:5d} |{loss} loss scale: 1.0 | grad norm: 1.250 | "
            "number of skipped iterations:   0 | number of nan iterations:   0 |",
            flush=True,
        )
        if iteration % arguments.save_interval == 0 or iteration == arguments.train_iters:
            shutil.copytree(source, arguments.save / f"iter_{iteration:07d}")
            written = arguments.save / f"{tracker.name}.new"
            written.write_text(str(iteration))
            written.replace(arguments.save / tracker.name)  # another rank may be reading it
        if arguments.stand_in == "early" and first == 0 and 2 * iteration >= arguments.train_iters:
            break
    return 0


if __name__ == "__main__":
    sys.exit(main())
