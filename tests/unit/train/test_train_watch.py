"""Stop requests, and a process that hangs."""

import os
import signal
import subprocess
import sys

from megatron_demix.train.watch import stop_request

HANGING = """
import time
from megatron_demix.train.watch import Watchdog

def wait_for_a_rank_that_is_gone():
    time.sleep(60)

with Watchdog("run7", 3, timeout_s=2) as watchdog:
    for i in range(4):
        watchdog.progress(f"iteration {i}")
        time.sleep(0.6)
    wait_for_a_rank_that_is_gone()
"""


def test_a_hanging_process_ends_and_shows_where_it_hung():
    process = subprocess.run([sys.executable, "-c", HANGING], timeout=120, capture_output=True, text=True, check=False)
    assert process.returncode == 8
    assert "error (rank 3): run run7: iteration 3 has not ended within" in process.stderr
    assert "in wait_for_a_rank_that_is_gone" in process.stderr


def test_signals_become_requests_and_handlers_come_back():
    before = signal.getsignal(signal.SIGTERM)
    with stop_request() as request:
        assert not request
        os.kill(os.getpid(), signal.SIGTERM)
        assert request
        assert request.signal is signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) is before
