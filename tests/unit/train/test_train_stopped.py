"""Signals, and what an evaluation does to them: a run saves first, and can be stopped at any time; on one rank."""

from __future__ import annotations

import os
from unittest import mock

import pytest
from folders import contents

from megatron_demix.errors import Incomplete
from megatron_demix.train.compat import cpu_compat
from megatron_demix.train.losses import read_losses
from megatron_demix.train.trainer import train


def test_a_signal_during_a_step_stops_after_it(tmp_path, make_train_job):
    import signal

    with cpu_compat():
        from megatron_demix.train import step
    forward, passes = step._forward_step, []

    def forward_and_signal(*arguments):
        passes.append(None)
        if len(passes) == 10:  # of four in a step
            os.kill(os.getpid(), signal.SIGTERM)
        return forward(*arguments)

    with (
        mock.patch.object(step, "_forward_step", forward_and_signal),
        pytest.raises(Incomplete, match="stopped by SIGTERM after iteration 3 of 6"),
    ):
        train(make_train_job(tmp_path))


@pytest.mark.parametrize(("train_iters", "evaluation"), [(6, 1), (2, 0)], ids=["on_the_way", "at_the_end"])
def test_a_signal_during_an_evaluation_ends_it_with_all_saved(tmp_path, make_train_job, byte_corpus, train_iters, evaluation):
    """The second of its batches is not run; the evaluation is done when the run goes on, which then has the same bytes."""
    import signal

    with cpu_compat():
        from megatron_demix.train.step import Stepper
    options = {"valid": {"a": byte_corpus["a"], "b": byte_corpus["b"]}, "eval_interval": 2, "train_iters": train_iters}
    whole = make_train_job(tmp_path / "whole", **options)
    train(whole)
    job = make_train_job(tmp_path / "stopped", **options)
    passes, run = [], Stepper._run

    def run_and_signal(self, dataset, first_sample, *, forward_only):
        passes.append(forward_only)
        if sum(passes) == 8 * evaluation + 5:  # four batches of the first set, then one of the second
            os.kill(os.getpid(), signal.SIGTERM)
        return run(self, dataset, first_sample, forward_only=forward_only)

    last = 2 * evaluation + 2
    with (
        mock.patch.object(Stepper, "_run", run_and_signal),
        pytest.raises(Incomplete, match=f"stopped by SIGTERM after iteration {last} of {train_iters}, saved in"),
    ):
        train(job)
    assert sum(passes) == 8 * evaluation + 5
    assert (job.work / "latest_checkpointed_iteration.txt").read_text() == str(last)
    train(job)
    assert contents(job.work) == contents(whole.work)
    assert len(read_losses(job.work / "validation.jsonl")) == train_iters / 2


def test_a_run_that_is_killed_while_it_evaluates_has_saved_before(tmp_path, make_train_job, byte_corpus, capsys):
    with cpu_compat():
        from megatron_demix.train.step import Stepper
    job = make_train_job(tmp_path, valid={"b": byte_corpus["b"]})
    with mock.patch.object(Stepper, "evaluate", side_effect=KeyboardInterrupt), pytest.raises(KeyboardInterrupt):
        train(job)
    assert (job.work / "latest_checkpointed_iteration.txt").read_text() == "6"
    train(job)
    assert [row["iteration"] for row in read_losses(job.work / "validation.jsonl")] == [6]
    capsys.readouterr()
    train(job)
    assert capsys.readouterr().out == f"run tiny: all 6 iterations are done and saved in {job.work}.\n"


def test_every_batch_of_an_evaluation_is_progress(tmp_path, make_train_job, byte_corpus, monkeypatch):
    """To the watchdog a long evaluation is no hang."""
    with cpu_compat():
        from megatron_demix.train import loop
    said = []
    monkeypatch.setattr(loop.Watchdog, "progress", lambda self, what: said.append(what))
    train(make_train_job(tmp_path, valid={"b": byte_corpus["b"]}, eval_iters=3, train_iters=1))
    assert said == ["iteration 1", "saving iteration 1", *["evaluating iteration 1"] * 3]
