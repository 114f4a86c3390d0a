"""losses.jsonl and the divergence guard."""

import math

import pytest

from megatron_demix.errors import CorruptInput, Diverged
from megatron_demix.study.training import TrainSpec
from megatron_demix.train.losses import DivergenceGuard, LossLog, read_losses

SIZES = {"seq_length": 8, "global_batch_size": 1}


def row(iteration, loss=1.0):
    return {"iteration": iteration, "lm loss": loss, "learning-rate": 1e-3, "grad-norm": 0.5}


def test_lines_beyond_the_checkpoint_are_cut_off(tmp_path):
    path = tmp_path / "losses.jsonl"
    log = LossLog(path, iteration=0)
    for i in range(1, 6):
        log.append(row(i, 1 / i))
    log.close()
    with open(path, "a") as file:
        file.write('{"iteration": 6, "lm lo')  # killed while writing
    assert [r["iteration"] for r in read_losses(path)] == [1, 2, 3, 4, 5]
    log = LossLog(path, iteration=3)
    log.append(row(4, 0.25))
    log.close()
    rows = read_losses(path)
    assert [r["iteration"] for r in rows] == [1, 2, 3, 4]
    assert rows[2]["lm loss"] == 1 / 3  # as exact as it was measured


def test_missing_and_foreign_lines_are_corrupt(tmp_path):
    path = tmp_path / "losses.jsonl"
    log = LossLog(path, iteration=0)
    log.append(row(1))
    log.close()
    with pytest.raises(CorruptInput, match=r"losses.jsonl has 1 of the lines 1 to 2, though the run was saved at iteration 2"):
        LossLog(path, iteration=2)
    for line in (b"iteration 1", b"\xff"):
        path.write_bytes(line + b"\n")
        with pytest.raises(CorruptInput, match=r"losses.jsonl line 1: not JSON"):
            read_losses(path)
    for line in ("5", '{"lm loss": 1.0}'):
        path.write_text(line + "\n")
        with pytest.raises(CorruptInput, match=r"losses.jsonl line 1: .* says no iteration"):
            read_losses(path)
    assert read_losses(tmp_path / "absent.jsonl") == []


@pytest.mark.parametrize(("loss", "norm", "said"), [(math.nan, 1.0, "loss is nan"), (1.0, math.inf, "gradient norm is inf")])
def test_what_is_not_finite_stops_at_once(loss, norm, said):
    guard = DivergenceGuard(TrainSpec(**SIZES), "r", [])
    with pytest.raises(Diverged, match=rf"run r: {said} at iteration 7, expected a finite number. The last checkpoint is"):
        guard.check(7, loss, norm)


def test_lasting_spikes_stop_short_ones_do_not():
    settings = TrainSpec(**SIZES, loss_spike_window=8, loss_spike_factor=1.5, loss_spike_patience=3)
    guard = DivergenceGuard(settings, "r", [])
    losses = [9.0, 2.0, 2.1, 1.9, 2.0, 2.0, 2.0, 2.0, 3.5, 3.5, 2.0, 3.5, 3.5]
    for i, loss in enumerate(losses, start=1):
        guard.check(i, loss, 1.0)
    message = r"above 1.5 x its recent median 2.0000 for 3 iterations, to 9.0000 at iteration 14.*Lower the learning rate"
    with pytest.raises(Diverged, match=message):
        guard.check(14, 9.0, 1.0)
    resumed = DivergenceGuard(settings, "r", losses)
    with pytest.raises(Diverged, match=r"for 3 iterations, to 9.0000 at iteration 14"):
        resumed.check(14, 9.0, 1.0)


def test_a_resumed_guard_remembers_all_that_was_no_spike():
    """Short spikes stay out of the reference; a guard that begins among them would take them in."""
    settings = TrainSpec(**SIZES, loss_spike_window=4, loss_spike_factor=1.5, loss_spike_patience=3)
    past = [2.0] * 4 + [3.2, 3.2, 2.0] * 4
    guards = [DivergenceGuard(settings, "r", []), DivergenceGuard(settings, "r", past)]
    for i, loss in enumerate(past, start=1):
        guards[0].check(i, loss, 1.0)
    for guard in guards:
        guard.check(17, 3.5, 1.0)
        guard.check(18, 3.5, 1.0)
        with pytest.raises(Diverged, match=r"recent median 2.0000 for 3 iterations"):
            guard.check(19, 3.5, 1.0)
