"""The whole method on a tiny study, undisturbed and killed again and again: the artifacts are the same, byte for byte."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_demix.artifact import hash_file
from megatron_demix.study.search import TASK_SCORES

pytestmark = pytest.mark.timeout(1800)
DEMIX = [sys.executable, "-m", "megatron_demix.cli"]
# What a run leaves beside its artifacts: caches, logs with times, and the report made of them.
NOT_ARTIFACTS = {"cache", "logs", "tensorboard", "report"}

# demix, but the kernel kills it in the middle of writing, or just before publishing, an artifact under <run>/<kind>/.
KILLED = """
import os, signal, sys
kind, moment = sys.argv[1], sys.argv[2]
fsync, rename = os.fsync, os.rename
def killing_fsync(descriptor):
    number = descriptor if isinstance(descriptor, int) else descriptor.fileno()
    if moment == "writing" and f"/{kind}/" in os.readlink(f"/proc/self/fd/{number}"):
        os.kill(os.getpid(), signal.SIGKILL)
    return fsync(descriptor)
def killing_rename(source, target, **options):
    if moment == "publishing" and os.path.dirname(str(target)).endswith("/" + kind):
        os.kill(os.getpid(), signal.SIGKILL)
    return rename(source, target, **options)
os.fsync, os.rename = killing_fsync, killing_rename
from megatron_demix.cli import main
sys.exit(main(sys.argv[3:]))
"""


def demix(command, study_folder: Path, runs: Path, *more) -> subprocess.CompletedProcess:
    arguments = [*DEMIX, command, str(study_folder / "study.yaml"), "--runs", str(runs), *more]
    return subprocess.run(arguments, capture_output=True, text=True, timeout=900)


def artifacts(run: Path) -> dict[str, str]:
    return {
        p.relative_to(run).as_posix(): hash_file(p)
        for p in sorted(run.rglob("*"))
        if p.is_file() and p.relative_to(run).parts[0] not in NOT_ARTIFACTS and len(p.relative_to(run).parts) > 1
    }


@pytest.fixture(scope="module")
def undisturbed(study_folder, tmp_path_factory) -> Path:
    runs = tmp_path_factory.mktemp("undisturbed")
    result = demix("run", study_folder, runs)
    assert result.returncode == 0, result.stderr
    assert "report:" in result.stdout
    return runs / "tiny"


def test_every_stage_leaves_its_artifact(undisturbed, study_folder):
    result = demix("plan", study_folder, undisturbed.parent, "--json")
    stages = json.loads(result.stdout)
    assert {s["state"] for s in stages} == {"done"}
    assert {s["stage"].split("/")[0] for s in stages} == {
        "tokenizer", "data", "base", "components", "rounds", "merge", "blend", "final",
    }  # fmt: skip
    page = (undisturbed / "report" / "index.html").read_text()
    assert "found" in page
    assert "http://" not in page.replace("http://www.w3.org", "")


def test_a_second_run_has_nothing_to_do(undisturbed, study_folder):
    before = artifacts(undisturbed)
    result = demix("run", study_folder, undisturbed.parent)
    assert result.returncode == 0
    assert "everything is already done" in result.stderr
    assert artifacts(undisturbed) == before


def test_the_test_split_scores_everything(undisturbed):
    """The base, the found mixture's proxy and the final runs all have every score."""
    scores = json.loads(next(undisturbed.glob("final/scores-*/scores.json")).read_text())
    assert set(scores["rows"]) == {"base", "proxy", "found-seed0", "uniform-seed0"}
    assert [s["name"] for s in scores["scores"]] == ["code", "english", *(f"quiz/{s}" for s in TASK_SCORES["arc"])]
    assert all(0.5 < row[name] < 12 for row in scores["rows"].values() for name in ("code", "english", "quiz/bits_per_byte"))
    assert all(0 <= row[name] <= 1 for row in scores["rows"].values() for name in ("quiz/acc", "quiz/acc_norm"))


def test_killed_anywhere_it_ends_with_the_same_bytes(undisturbed, study_folder, tmp_path):
    run = tmp_path / "tiny"

    def kill_when(reached) -> None:
        process = subprocess.Popen(
            [*DEMIX, "run", str(study_folder / "study.yaml"), "--runs", str(tmp_path), "--quiet"], stderr=subprocess.DEVNULL
        )
        deadline = time.monotonic() + 600
        while not reached():
            assert process.poll() is None, "the study ended before it could be killed"
            assert time.monotonic() < deadline
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        process.wait()

    def kill_itself(kind: str, moment: str) -> None:
        arguments = [
            sys.executable,
            "-c",
            KILLED,
            kind,
            moment,
            "run",
            str(study_folder / "study.yaml"),
            "--runs",
            str(tmp_path),
        ]
        result = subprocess.run(arguments, capture_output=True, text=True, timeout=900)
        assert result.returncode == -signal.SIGKILL, result.stderr

    # In the middle of training: a third of it has been saved.
    kill_when(lambda: any(run.glob("base/.base-*.work/iter_0000010")))
    assert not list(run.glob("base/base-*"))
    kill_itself("merge", "writing")
    assert not list(run.glob("merge/proxies-*"))
    kill_itself("blend", "publishing")
    kill_itself("blend", "writing")
    result = demix("run", study_folder, tmp_path)
    assert result.returncode == 0, result.stderr
    same, killed = artifacts(undisturbed), artifacts(run)
    assert killed.keys() == same.keys()
    assert dict(killed.items() - same.items()) == {}
    assert not list(run.rglob(".*tmp-*"))


def test_disk_full_is_one_clear_error(study_folder, tmp_path):
    """A file size limit stands for the full disk: the kernel refuses the write in the same way."""
    script = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000));"
        "from megatron_demix.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    arguments = [sys.executable, "-c", script, "prepare", str(study_folder / "study.yaml"), "--runs", str(tmp_path), "--quiet"]
    result = subprocess.run(arguments, capture_output=True, text=True, timeout=400, env=os.environ)
    assert result.returncode == 74, result.stderr
    assert "Free space or choose another disk" in result.stderr
    assert not list((tmp_path / "tiny" / "data").glob("[!.]*"))  # what is hidden is unfinished, and gone on with
