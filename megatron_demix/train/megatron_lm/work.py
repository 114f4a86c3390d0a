"""The folder that Megatron-LM saves into: what in it is sound, and when it is a finished run.

Megatron ends with exit code 0 when it was interrupted, too: what counts is the checkpoint that the tracker names.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Collection
from pathlib import Path

from megatron_demix.artifact import write_atomic
from megatron_demix.checkpoint.layout import TRACKER, iteration_folder, iterations_in
from megatron_demix.checkpoint.summary import summarize
from megatron_demix.errors import ConfigError, CorruptInput, EndedEarly, StageFailed, UnsafeInput

logger = logging.getLogger(__name__)

_DAMAGED = ".damaged-"


def reached(work: Path) -> int:
    """The iteration that the tracker names, 0 where there is none or it says nothing: Megatron does not write it at once."""
    try:
        text = (work / TRACKER).read_text().strip()
    except FileNotFoundError:
        return 0
    return int(text) if text.isdecimal() else 0


def settle(work: Path, name: str) -> int:
    """Make the newest sound checkpoint the one the run goes on from, whatever the tracker says. Returns its iteration, or 0.

    A checkpoint's .metadata is written when all ranks have written, so an interrupted save is none. Those that are not sound
    get a hidden name, and are removed when the run has finished. Raises UnsafeInput where one is refused for what its pickles
    name, StageFailed where the disk does not say what it holds: it may be sound, and stays.
    """
    for iteration in reversed(iterations_in(work)):
        folder = work / iteration_folder(iteration)
        try:
            summarize(folder)
        except UnsafeInput:
            raise
        except (CorruptInput, ConfigError) as e:
            if isinstance(e.__cause__, OSError) and not isinstance(e.__cause__, FileNotFoundError):
                raise StageFailed(
                    f"run {name}: {e} Nobody knows whether it is damaged. Run again when it can be read; or delete {folder}, "
                    "and the run goes on from the one before."
                ) from e
            logger.warning("run %s: %s is damaged (%s); going on from the one before.", name, folder, e)
            shutil.rmtree(folder.with_name(_DAMAGED + folder.name), ignore_errors=True)
            folder.rename(folder.with_name(_DAMAGED + folder.name))
            continue
        if reached(work) != iteration:
            write_atomic(work / TRACKER, str(iteration))
        return iteration
    (work / TRACKER).unlink(missing_ok=True)
    return 0


def prune(work: Path, newest: int, keep: Collection[int] = ()) -> None:
    """Delete all finished checkpoints but so many of the newest, and those of `keep`. One being written is left alone."""
    tracked = reached(work)
    for iteration in [i for i in iterations_in(work) if (i <= tracked and i not in keep) or i == tracked][:-newest]:
        shutil.rmtree(work / iteration_folder(iteration), ignore_errors=True)


def check_finished(work: Path, name: str, train_iters: int, keep: Collection[int] = ()) -> None:
    """Raises EndedEarly where the tracker is short of train_iters, CorruptInput where its checkpoint, or one of `keep`, is not
    whole. Then drops all other checkpoints."""
    tracked = reached(work)
    if tracked < train_iters:
        raise EndedEarly(
            f"run {name}: its process ended without an error after iteration {tracked} of {train_iters}, by what it has saved "
            f"in {work}. Run the same command again to go on."
        )
    for iteration in (*keep, tracked):
        if not (folder := work / iteration_folder(iteration)).is_dir():
            raise CorruptInput(f"run {name}: {folder} has to stay, but is gone. Delete {work} to train again from the start.")
        summarize(folder)
    prune(work, 1, keep)
    for damaged in work.glob(f"{_DAMAGED}*"):
        shutil.rmtree(damaged, ignore_errors=True)
