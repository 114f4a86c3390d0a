"""What launch.ranks changes of torchrun."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

from megatron_demix.launch import ranks


def test_sigterm_keeps_its_handler_and_other_signals_do_not():
    def ours(signum, frame):
        pass

    def torchruns(signum, frame):
        pass

    before = {s: signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)}
    try:
        signal.signal(signal.SIGTERM, ours)
        with ranks._keeping_sigterm():
            assert signal.signal(signal.SIGTERM, torchruns) is ours
            assert signal.signal(signal.SIGINT, torchruns) is before[signal.SIGINT]
        assert signal.getsignal(signal.SIGTERM) is ours
        assert signal.getsignal(signal.SIGINT) is torchruns
        signal.signal(signal.SIGTERM, torchruns)
        assert signal.getsignal(signal.SIGTERM) is torchruns
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def test_torchrun_is_given_its_arguments_alone(monkeypatch):
    """Of those that it has had since torch 2.6: --signals-to-handle is newer."""
    import torch.distributed.run as torchrun

    given, ran = [], []
    parse_args = torchrun.parse_args
    monkeypatch.setattr(torchrun, "parse_args", lambda words: given.append(words) or parse_args(words))
    monkeypatch.setattr(torchrun, "run", ran.append)
    monkeypatch.setattr(ranks, "die_with_parent", lambda: None)
    monkeypatch.setattr("sys.argv", ["ranks", "--standalone", "-m", "module"])
    before = signal.getsignal(signal.SIGTERM)
    try:
        assert ranks.main() == 0
    finally:
        signal.signal(signal.SIGTERM, before)
    assert given == [["--standalone", "-m", "module"]]
    # torchrun's own way to be alone is a store that listens on all addresses, and unpickles what anyone puts there.
    (arguments,) = ran
    assert (arguments.standalone, arguments.rdzv_backend) == (False, "c10d")
    assert arguments.rdzv_conf == "store_type=file,keep_alive_interval=60"


def test_nothing_is_left_in_the_folder_for_temporary_files(tmp_path):
    """torchrun alone leaves a folder for its logs there, each time."""
    (tmp_path / "rank.py").write_text("pass")
    (tmp_path / "temporary").mkdir()
    command = [sys.executable, "-m", "megatron_demix.launch.ranks", "--standalone", str(tmp_path / "rank.py")]
    subprocess.run(command, check=True, env=os.environ | {"TMPDIR": str(tmp_path / "temporary")})
    assert not list((tmp_path / "temporary").iterdir())
