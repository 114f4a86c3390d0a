"""What is done with SLURM's answers, which are given here; with a real SLURM in end_to_end/test_slurm.py."""

import os
from dataclasses import replace
from types import SimpleNamespace

import pytest

from megatron_demix.artifact import write_json
from megatron_demix.errors import ConfigError, Incomplete, StageFailed
from megatron_demix.launch import slurm, slurm_commands
from megatron_demix.launch.attempts import Attempts
from megatron_demix.launch.backend import Activity
from megatron_demix.launch.background import Background
from megatron_demix.launch.run_lock import only_one
from megatron_demix.launch.started import Started
from megatron_demix.pipeline.stage import Stage
from megatron_demix.study.launch import SlurmSpec

ALL = Started({}, None)


@pytest.fixture
def dag(tmp_path):
    first = [Stage(f"data/{name}", tmp_path, {}, (), lambda folder: None) for name in ("a", "b")]
    base = Stage("base/base", tmp_path, {}, tuple(first), lambda folder: None, ranks=2)
    study = SimpleNamespace(name="s", launch=SimpleNamespace(slurm=SlurmSpec()), model_dump=lambda mode: {})
    dag = SimpleNamespace(study=study, run=tmp_path, all=[*first, base])
    dag.until = lambda part: dag.all
    return dag


@pytest.fixture
def answers(monkeypatch):
    """Commands that were given, and what squeue lists."""
    found = SimpleNamespace(commands=[], listed=[])

    def answer(*command, unless=()):
        found.commands.append(command)
        return "".join(line + "\n" for line in found.listed) if command[0] == "squeue" else f"{len(found.commands)}\n"

    monkeypatch.setattr(slurm_commands, "call", answer)
    return found


def line(dag, job, index, group, state, reason, uid=None):
    return f"{job}\t{index}\ts.{group}\t{state}\t{reason}\t{os.getuid() if uid is None else uid}\tann\t{dag.run}"


def test_jobs_under_way_are_named_and_others_left_alone(dag, answers):
    backend = slurm.Slurm(dag, dag.run, ALL)
    (dag.run / "slurm").mkdir()
    write_json(dag.run / "slurm" / "groups.json", {"data": ["data/a", "data/b"], "base.base": ["base/base"]})
    answers.listed = [
        line(dag, 7, 0, "data", "RUNNING", "None"),
        line(dag, 7, 1, "data", "PENDING", "None"),
        line(dag, 8, "N/A", "base.base", "PENDING", "Dependency"),
        line(dag, 10, "N/A", "conclude", "PENDING", "Dependency"),
        "",
        "CLUSTER: other",
        "9\tN/A\ts.base.base\tRUNNING\tNone\t0\troot\t/elsewhere",
    ]
    assert backend.activity() == {
        "data/a": Activity("running", "7_0"),
        "data/b": Activity("queued", "7_1"),
        "base/base": Activity("queued", "8", "Dependency"),
        "conclude": Activity("queued", "10"),
    }
    with pytest.raises(
        Incomplete, match=r"already being worked on by the SLURM jobs 7, 8, 10: see `demix status`, or `demix cancel`"
    ):
        backend.submit()


def test_work_by_other_means_is_refused_while_jobs_are_left(dag, answers, tmp_path):
    answers.listed = [line(dag, 7, 0, "data", "PENDING", "None")]
    slurm.refuse_beside_jobs(dag.run, "s")
    assert not answers.commands  # it was never submitted
    (dag.run / "slurm").mkdir()
    with pytest.raises(Incomplete, match=r"already being worked on by the SLURM jobs 7: see `demix status`, or `demix cancel`"):
        slurm.refuse_beside_jobs(dag.run, "s")
    with pytest.raises(Incomplete, match="the SLURM jobs 7"):
        Background(dag, []).submit()
    answers.listed = []
    slurm.refuse_beside_jobs(dag.run, "s")


def test_nothing_is_submitted_while_a_process_works_here(dag, answers):
    with only_one(dag.run), pytest.raises(Incomplete, match=r"another demix process that works on .*: still running"):
        slurm.Slurm(dag, dag.run, ALL).submit()
    assert not answers.commands


def test_where_slurm_cannot_be_asked_there_is_a_warning(tmp_path, monkeypatch, capsys):
    (tmp_path / "slurm").mkdir()
    monkeypatch.setenv("PATH", "")
    slurm.refuse_beside_jobs(tmp_path, "s")
    assert "was submitted to SLURM, which cannot be asked here whether jobs of it are left" in capsys.readouterr().err


@pytest.mark.parametrize("reason", ["launch failed requeued held", "JobHoldMaxRequeue"])
def test_what_slurm_holds_is_released(dag, answers, reason):
    answers.listed = [
        line(dag, 8, "N/A", "base.base", "PENDING", reason),
        line(dag, 9, "N/A", "conclude", "PENDING", "Dependency"),
    ]
    said = slurm.Slurm(dag, dag.run, ALL).submit()["said"]
    assert said == "released 8, which SLURM had put back into the queue and held, as a node could not start it"
    assert answers.commands[-1] == ("scontrol", "release", "8")


def test_a_submission_that_was_broken_off_is_made_anew(dag, answers):
    """Its last job is missing. While jobs that were cancelled save, it is missing, too."""
    answers.listed = [line(dag, 7, 0, "data", "PENDING", "None")]
    backend = slurm.Slurm(dag, dag.run, ALL)
    assert list(backend.submit()["jobs"]) == ["data", "base.base", "conclude"]
    assert ("scancel", "7") in answers.commands
    backend._scripts.cancelled.touch()
    with pytest.raises(Incomplete, match="already being worked on by the SLURM jobs 7:"):
        backend.submit()


def test_jobs_of_another_person_are_seen_and_left_alone(dag, answers):
    answers.listed = [line(dag, 7, 0, "data", "PENDING", "None", uid=os.getuid() + 1)]
    for command in (slurm.Slurm(dag, dag.run, ALL).submit, slurm.Slurm(dag, dag.run, ALL).cancel):
        with pytest.raises(Incomplete, match=r"^this run's job 7 belongs to ann, who can cancel it\.$"):
            command()
    assert {command[0] for command in answers.commands} == {"squeue"}


def test_a_last_job_that_slurm_starts_twice_submits_nothing_twice(dag, answers, capsys):
    """Nor are stages failures that were submitted and had no time to begin."""
    backend = slurm.Slurm(dag, dag.run, ALL)
    backend.submit()
    answers.commands.clear()
    answers.listed = [line(dag, 7, 0, "data", "PENDING", "None"), line(dag, 8, "N/A", "conclude", "PENDING", "Dependency")]
    backend.conclude()
    assert capsys.readouterr().out == "7, 8 work on it: nothing is left for this job to do\n"
    assert {command[0] for command in answers.commands} == {"squeue"}
    answers.listed.pop()
    backend.conclude()
    assert "3 stages are not done: submitted again as" in capsys.readouterr().out
    commands = [command[0] for command in answers.commands]
    assert commands.index("scancel") < commands.index("sbatch")
    assert not any(Attempts.read(stage).failed for stage in dag.all)


def test_every_start_is_progress(dag, answers):
    """Also one that was asked to stop, again and again."""
    backend = slurm.Slurm(dag, dag.run, ALL)
    seen = set()
    for _ in range(4):
        attempts = Attempts.read(dag.all[2])
        attempts.begin(dag.all[2])
        attempts.asked = True
        attempts.write(dag.all[2])
        seen.add(backend._progress())
    assert len(seen) == 4


def test_a_job_that_ended_before_its_stage_began_is_a_failure_with_its_log(dag, answers):
    backend = slurm.Slurm(dag, dag.run, ALL)
    backend.submit()
    (dag.run / "logs" / "slurm" / "data-1_0.log").write_text("srun: error\nno such file: python3\n")
    dag.all[1].finish()
    write_json(dag.run / "slurm" / "progress.json", backend._progress())
    with pytest.raises(StageFailed, match=r"2 stages are not done:\nstage data/a: its job ended before the stage began"):
        backend.conclude()
    assert "data-1_0.log, which ends\n    srun: error\n    no such file: python3" in Attempts.read(dag.all[0]).failed
    assert not Attempts.read(dag.all[2]).failed


def test_a_last_job_that_could_not_conclude_is_named_with_its_log(dag, answers, monkeypatch):
    """Where a node has no such Python, nothing notes what failed."""
    backend = slurm.Slurm(dag, dag.run, ALL)
    backend.submit()
    assert backend.activity() == {}  # none has begun
    log = dag.run / "logs" / "slurm" / "conclude-3.log"
    log.write_text("no such file: python3\n")
    said = backend.activity()["conclude"]
    assert said.state == "failed"
    assert said.reason.startswith("the last job, which submits again what is missing, ended before it could.")
    assert said.reason.endswith(f"`demix resume` goes on. Log: {log}, which ends\n    no such file: python3")

    answers.listed = [line(dag, 3, "N/A", "conclude", "RUNNING", "None")]
    assert backend.activity() == {"conclude": Activity("running", "3")}
    answers.listed = []
    os.utime(log, (0, 0))  # of an earlier submission
    assert backend.activity() == {}
    os.utime(log)
    (dag.run / "slurm" / "cancelled").touch()
    assert backend.activity() == {}
    (dag.run / "slurm" / "cancelled").unlink()

    with pytest.raises(StageFailed):  # that it says by the stages
        backend.conclude()
    assert backend.activity() == {}
    backend.submit()
    os.utime(log)
    assert backend.activity()["conclude"].state == "failed"
    for stage in dag.all:
        stage.finish()
    monkeypatch.setattr("megatron_demix.pipeline.reporting.write_report", lambda dag: ("page", "sentence"))
    backend.conclude()
    assert backend.activity() == {}


def test_the_last_job_waits_for_a_controller_that_does_not_answer(dag, answers, monkeypatch, capsys):
    """What it had submitted by then is cancelled, so that no stage has two jobs."""
    backend = slurm.Slurm(dag, dag.run, ALL)
    backend.submit()
    write_json(dag.run / "slurm" / "progress.json", "another")
    answer, away = slurm_commands.call, iter([False, True])

    def break_off(*command, **more):
        if command[0] == "sbatch" and next(away, False):
            answers.listed = [line(dag, 12, 0, "data", "PENDING", "None")]
            raise slurm_commands.NoAnswer("sbatch: Unable to contact slurm controller (connect failure)")
        return answer(*command, **more)

    monkeypatch.setattr(slurm_commands, "call", break_off)
    monkeypatch.setattr(slurm.time, "sleep", lambda s: None)
    backend.conclude()
    said = capsys.readouterr()
    assert said.err == "demix: sbatch: Unable to contact slurm controller (connect failure) Trying again.\n"
    assert "3 stages are not done: submitted again as" in said.out
    assert ("scancel", "12") in answers.commands
    monkeypatch.setattr(slurm_commands, "CONTROLLER_WAIT_S", 0)
    write_json(dag.run / "slurm" / "progress.json", "another")
    away = iter([True])
    with pytest.raises(slurm_commands.NoAnswer, match="Unable to contact"):
        backend.conclude()


@pytest.mark.parametrize(
    ("parts", "array", "advice"),
    [
        ({"data": 6}, "data.parts is an array of 12 jobs", r"Set launch\.slurm\.parts\.data to at most 5\."),
        ({}, "data is an array of 2 jobs", "or a larger MaxArraySize"),
    ],
)
def test_an_array_that_the_cluster_does_not_take_is_refused_at_once(dag, answers, monkeypatch, parts, array, advice):
    dag.study.launch.slurm = SlurmSpec(parts=parts)
    dag.all[:2] = [replace(stage, make_part=lambda folder, part: None) for stage in dag.all[:2]]
    limit, answer = 10 if parts else 1, slurm_commands.call
    monkeypatch.setattr(
        slurm_commands,
        "call",
        lambda *c, **k: f"X = 1\nMaxArraySize            = {limit}\n" if "config" in c else answer(*c, **k),
    )
    with pytest.raises(ConfigError, match=f"{array}, but MaxArraySize of this cluster is {limit}.*{advice}"):
        slurm.Slurm(dag, dag.run, ALL).submit()
    assert not any(command[0] == "sbatch" for command in answers.commands)
    limit = 12
    slurm.Slurm(dag, dag.run, ALL).submit()


ENDED = "scancel: error: Kill job error on job id 7: Invalid job id specified"


@pytest.mark.parametrize(
    ("said", "raised"),
    [
        (ENDED, None),
        (f"{ENDED}\n{ENDED.replace('Invalid job id specified', 'Job/step already completing or completed')}", None),
        (f"{ENDED}\n{ENDED.replace('Invalid job id specified', 'Access/permission denied')}", ConfigError),
        (ENDED.replace("Invalid job id specified", "Unable to contact slurm controller (connect failure)"), Incomplete),
        ("", ConfigError),
    ],
)
def test_a_job_that_has_ended_meanwhile_does_not_keep_others_from_being_cancelled(tmp_path, monkeypatch, said, raised):
    (tmp_path / "scancel").write_text(f"#!/bin/sh\nprintf '%s' '{said}' >&2\nexit 1\n")
    (tmp_path / "scancel").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    if raised is None:
        slurm_commands.scancel("7", "8")
    else:
        with pytest.raises(raised, match=r"^scancel: (scancel: error: Kill job error on job id 7: [AU]|failed$)"):
            slurm_commands.scancel("7", "8")


def test_many_jobs_are_named_by_the_first_and_the_last():
    assert slurm_commands.job_ids(["9", "10", "9"]) == "9, 10"
    assert slurm_commands.job_ids(map(str, range(8, 14))) == "8 to 13 (6 jobs)"


def test_new_jobs_know_nothing_of_the_job_that_submits_them(monkeypatch):
    """Nor do variables change what is listed, or what a study says."""
    for name in ("SLURM_MEM_PER_NODE", "SLURM_ARRAY_TASK_ID", "SBATCH_EXPORT", "SBATCH_ACCOUNT", "SQUEUE_PARTITION"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("SLURM_CONF", "ours")
    kept = {k: v for k, v in slurm_commands._environment().items() if k.startswith(("SLURM", "SBATCH", "SQUEUE"))}
    assert kept == {"SLURM_CONF": "ours"}
    assert slurm_commands._environment()["PATH"] == os.environ["PATH"]


@pytest.mark.parametrize(
    ("script", "options"),
    [
        ("#SBATCH --qos=high\n#SBATCH --time-min=5", ["--partition=p", "--time=1:00"]),
        ("#SBATCH --exclusive -pgpu\n#SBATCH -t 5", ["--qos=q"]),
        ("#SBATCH --partition gpu\necho --time=5 -q", ["--qos=q", "--time=1:00"]),
    ],
)
def test_a_persons_defaults_count_where_a_script_says_nothing(monkeypatch, script, options):
    """Of each script by itself: light stages may have a partition where others have none."""
    for name, value in (("PARTITION", "p"), ("QOS", "q"), ("TIMELIMIT", "1:00"), ("EXPORT", "NONE")):
        monkeypatch.setenv(f"SBATCH_{name}", value)
    assert slurm_commands._defaults(f"#!/bin/bash\n{script}\n") == options
