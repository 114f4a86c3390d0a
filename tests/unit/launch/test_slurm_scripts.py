"""A study as sbatch files: which stages share a job array, and what each asks for. Nothing here needs SLURM."""

import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_demix.errors import ConfigError
from megatron_demix.launch.slurm_scripts import Scripts, check_kinds, group
from megatron_demix.pipeline.stage import Stage
from megatron_demix.study.launch import SlurmSpec

RUN = Path("/runs/my run")


def stage(name, *needs, ranks=0):
    return Stage(name, RUN, {}, needs, lambda folder: None, ranks=ranks)


@pytest.fixture
def stages():
    code, math = stage("data/code"), stage("data/math")
    base = stage("base/base", code, math, ranks=16)
    parts = [stage(f"components/{n}", base, ranks=16) for n in ("code", "math")]
    sample = stage("rounds/1/sample", code, math)
    scores = stage("rounds/1/scores", sample, *parts, ranks=4)
    uniform, found = stage("blend/uniform", code), stage("blend/found", scores)
    return [code, math, base, sample, *parts, scores, uniform, found]


def render(stages, name, **spec):
    chosen = next(g for g in group(stages) if g.name == name)
    return Scripts(SlurmSpec(**spec), "s", RUN, Path("/studies")).of_group(chosen)


def test_what_is_alike_is_one_array(stages):
    groups = {g.name: ([s.name for s in g.stages], set(g.needs)) for g in group(stages)}
    assert groups == {
        "data": (["data/code", "data/math"], set()),
        "base.base": (["base/base"], {"data"}),
        "rounds.1.sample": (["rounds/1/sample"], {"data"}),
        "blend.uniform": (["blend/uniform"], {"data"}),
        "components": (["components/code", "components/math"], {"base.base"}),
        "rounds.1.scores": (["rounds/1/scores"], {"rounds.1.sample", "components"}),
        "blend.found": (["blend/found"], {"rounds.1.scores"}),
    }
    seen: set[str] = set()
    for g in group(stages):
        assert set(g.needs) <= seen
        seen.add(g.name)


def test_parts_are_an_array_that_their_stages_wait_for(stages):
    code, math, base, *_ = stages
    code = Stage("data/code", RUN, {}, (), lambda folder: None, make_part=lambda folder, part: None)
    groups = group([code, math, stage("base/base", code, math)], {"data": 3, "base": 2})
    assert [(g.name, [s.name for s in g.stages], g.needs) for g in groups] == [
        ("data.parts", ["data/code@0-of-3", "data/code@1-of-3", "data/code@2-of-3"], ()),
        ("data", ["data/code", "data/math"], ("data.parts",)),
        ("base.base", ["base/base"], ("data",)),
    ]
    text = Scripts(SlurmSpec(parts={"data": 3}), "s", RUN, Path("/studies")).of_group(groups[0])
    assert "#SBATCH --array=0-2\n" in text
    assert "    data/code@2-of-3\n" in text
    with pytest.raises(ConfigError, match=r"launch\.slurm\.parts: 'base' is not one of data\."):
        check_kinds(SlurmSpec(parts={"base": 2}), [code, base])
    with pytest.raises(ConfigError, match=r"launch\.slurm\.parts: 'data' is not one of this study \(none\)\."):
        check_kinds(SlurmSpec(parts={"data": 2}), [math])


def test_two_arrays_of_one_kind_have_two_names():
    first = [stage("blend/a"), stage("blend/b")]
    second = [stage("blend/c", *first), stage("blend/d", *first)]
    assert [g.name for g in group([*first, *second])] == ["blend", "blend.2"]


def test_nodes_are_counted_and_ranks_find_one_another(stages):
    text = render(
        stages, "components", gpus_per_node=8, partition="gpu", account="a1", qos="high", time="2-06:30:00", mem="900G"
    )
    for option in (
        "job-name=s.components", "nodes=2", "ntasks-per-node=1", "gpus-per-node=8", "array=0-1", "partition=gpu", "account=a1",
        "qos=high", "time=2-06:30:00", "mem=900G", "signal=B:USR1@300", "requeue", "chdir='/runs/my run'",
    ):  # fmt: skip
        assert f"#SBATCH --{option}\n" in text
    assert "MASTER_ADDR=$(patiently scontrol show node --oneliner" in text
    assert 'scontrol requeue "$job"' in text  # SLURM_JOB_ID is, in one of its elements, the number of the whole array
    assert "'/runs/my run/slurm/study.json' \"$stage\" \\\n    --run '/runs/my run' --root /studies --nodes 2 --outcome" in text
    assert "MASTER_ADDR" not in render(stages, "rounds.1.scores", gpus_per_node=8)
    assert "--gpus-per-node=4\n" in render(stages, "rounds.1.scores", gpus_per_node=8)
    with pytest.raises(
        ConfigError, match=r"stage base/base has 16 ranks, which is not a multiple of 5 a node. Change ranks_per"
    ):
        render(stages, "base.base", ranks_per_node=5)


def test_light_stages_and_kinds_override(stages):
    spec = {
        "partition": "gpu", "gpus_per_node": 8, "time": "1d", "array_limit": 3, "light": {"partition": "cpu"},
        "kinds": {"blend": {"time": "2h", "sbatch": ["--exclusive"]}},
    }  # fmt: skip
    data, blend = render(stages, "data", **spec), render(stages, "blend.found", **spec)
    assert "--partition=cpu\n" in data
    assert "--time=1-00:00:00\n" in data
    assert "--array=0-1%3\n" in data
    assert "gpus" not in data
    assert "--partition=cpu\n" in blend
    assert "--time=02:00:00\n#SBATCH --signal" in blend
    assert "#SBATCH --exclusive\n" in blend
    assert "--partition=gpu\n" in render(stages, "base.base", **spec)
    light = SlurmSpec(**spec | {"light": {"partition": "cpu", "mem": "1G", "sbatch": ["--exclusive", '-C "a=b&c"']}})
    last = Scripts(light, "s", RUN, Path("/studies")).of_conclusion()
    assert "#SBATCH --partition=cpu\n" in last
    assert '#SBATCH --mem=1G\n#SBATCH --nodes=1\n#SBATCH --ntasks=1\n#SBATCH --exclusive\n#SBATCH -C "a=b&c"\n' in last
    check_kinds(SlurmSpec(**spec), stages)
    with pytest.raises(ConfigError, match=r"launch.slurm.kinds: 'blends' is not one of data, base, rounds, components, blend"):
        check_kinds(SlurmSpec(kinds={"blends": {}}), stages)


def test_containers_and_set_up(stages):
    setup = "module load cuda\nsource env/bin/activate"
    text = render(stages, "base.base", container="nvcr.io#nvidia/nemo:26.04", mounts=["/data:/data", "/runs"], setup=setup)
    assert (
        "    --container-image='nvcr.io#nvidia/nemo:26.04' --container-mounts=/data:/data,/runs \\\n    python3 -P -m" in text
    )
    assert f"\n{setup}\n" in text
    inside = {"container": "image", "python": "/opt/venv/bin/python", "setup": setup}
    assert "/opt/venv/bin/python -P -m" in render(stages, "base.base", **inside)
    last = Scripts(SlurmSpec(**inside), "s", RUN, Path("/studies")).of_conclusion()
    assert "container" not in last
    assert f"exec {shlex.quote(sys.executable)} -P -m megatron_demix.launch.slurm" in last, (
        "beside the container its python is not there"
    )
    assert last.endswith(f"{setup}\n")


@pytest.mark.skipif(not shutil.which("bash"), reason="no bash")
def test_scripts_are_valid_bash(stages):
    spec = {"container": "i", "mounts": ["/a b"], "setup": "true", "cpus_per_task": 2, "ranks_per_node": 4}
    for g in group(stages):
        subprocess.run(["bash", "-n"], input=render(stages, g.name, **spec), text=True, check=True)


SRUN = """for word in "$@"; do outcome=$word; done
[ "$SAID" ] && echo "$SAID" > "$outcome"
[ "$SECOND" ] && echo "$SECOND" > "$outcome.1"
[ "$SIGNAL" ] && kill -$SIGNAL $PPID
sleep "$SRUN_S"
[ -e "$outcome.asked" ] && touch asked
exit "$SRUN_CODE"
"""
SCONTROL = """echo "$*" >> commands
[ "$1" != show ] || echo "Requeue=1 PreemptTime=${PREEMPTED:-None} SuspendTime=None"
[ "$1" != requeue ] || [ "$(grep -c requeue commands)" -gt "$REFUSED" ]
"""


@pytest.fixture
def job(stages, tmp_path):
    """job(nodes, srun's code, what node 0 said, ...) -> exit code of a job's script, and whether it is back in the queue."""
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL), ("sleep", '/bin/sleep "${1/10/0}"')):
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    (tmp_path / "slurm").mkdir()

    def run(ranks, srun_code, said="", *, second="", signal="", srun_s=0.0, refused=0, restart=0, setup="", **more):
        chosen = next(g for g in group(stages) if g.stages[0].ranks == ranks)
        text = Scripts(SlurmSpec(ranks_per_node=8, setup=f"set -euo pipefail\n{setup}"), "s", tmp_path, tmp_path).of_group(
            chosen
        )
        environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "SLURM_JOB_ID": "7", "SLURMD_NODENAME": "n1", "SAID": said}
        environment |= {
            "SECOND": second,
            "SIGNAL": signal,
            "SRUN_CODE": str(srun_code),
            "SRUN_S": str(srun_s),
            "REFUSED": str(refused),
        }
        environment |= {"SLURM_RESTART_COUNT": str(restart)} | more
        (tmp_path / "commands").write_text("")
        ended = subprocess.run(["bash"], input=text, text=True, capture_output=True, cwd=tmp_path, env=environment, timeout=30)
        assert not list((tmp_path / "slurm").glob("*.outcome*"))
        requeued = (tmp_path / "commands").read_text().count("requeue 7")
        back = "is not finished (code" in ended.stdout
        return ended.returncode, requeued if back else 0

    return run


@pytest.mark.skipif(not shutil.which("bash"), reason="no bash")
def test_what_node_0_says_decides_what_becomes_of_a_job(job):
    """srun's own code is the highest of all tasks', those included that SLURM killed when node 0's had ended."""
    assert job(0, 0) == (0, 0)
    assert job(0, 2) == (2, 0)
    assert job(0, 75) == (75, 1)
    assert job(0, 137) == (137, 1)
    assert job(16, 143, "75") == (75, 1)
    assert job(16, 143, "9") == (9, 0)
    assert job(16, 143, "0") == (0, 0)
    # Another node's counts where it is final, and node 0's is not.
    assert job(16, 75, "75", second="74") == (74, 0)
    assert job(16, 137, second="9") == (9, 0)
    assert job(16, 143, "0", second="74") == (0, 0)
    assert job(16, 143, "9", second="74") == (9, 0)


@pytest.mark.skipif(not shutil.which("bash"), reason="no bash")
def test_a_task_that_is_killed_at_every_start_is_not_started_for_ever(job):
    assert [job(0, 137, restart=n) for n in range(10)] == [(137, 1)] * 10
    assert job(0, 75, "75", restart=10) == (75, 1)  # it began: from here on it is counted anew
    assert [job(0, 137, restart=n) for n in range(11, 22)] == [(137, 1)] * 10 + [(137, 0)]
    assert job(0, 137) == (137, 1)  # another job


@pytest.mark.skipif(not shutil.which("bash"), reason="no bash")
def test_what_ends_before_node_0_has_begun_is_not_started_for_ever(job):
    """Node 0, if srun stopped it during its imports, leaves the counting to the script. Being asked to stop does not count."""
    assert [job(16, 75, restart=n) for n in range(11)] == [(75, 1)] * 10 + [(75, 0)]
    assert [job(16, 75, signal="USR1", srun_s=0.2, restart=n) for n in range(11)] == [(138, 1)] * 11


@pytest.mark.skipif(not shutil.which("bash"), reason="no bash")
@pytest.mark.parametrize("setup", ["true", "set -e; false", "exit 3", "set -u; echo $NOTHING"])
def test_the_last_job_concludes_whatever_becomes_of_the_set_up(tmp_path, setup):
    python = tmp_path / "python"
    python.write_text('#!/bin/bash\necho "$3" "$VALUE"; exit 7\n')
    python.chmod(0o755)
    spec = SlurmSpec(python=str(python), setup=f"export VALUE=set\n{setup}")
    ended = subprocess.run(["bash"], input=Scripts(spec, "s", RUN, RUN).of_conclusion(), text=True, capture_output=True)
    assert (ended.returncode, ended.stdout) == (7, "megatron_demix.launch.slurm set\n")


@pytest.mark.skipif(not shutil.which("bash"), reason="no bash")
@pytest.mark.parametrize("setup", ["kill -USR1 $$", 'bash -c "kill -USR1 $$"'])
def test_a_job_that_is_told_to_save_before_its_stage_begins_goes_back_into_the_queue(job, setup):
    for ranks in (0, 16):
        assert job(ranks, 9, "9", setup=setup) == (75, 1), "the stage is not started"
    # A set-up that leaves no time for its stage is not run for ever.
    assert [job(0, 0, setup=setup, restart=n) for n in range(11)] == [(75, 1)] * 10 + [(75, 0)]
    assert job(0, 0, setup="kill -TERM $$") == (-15, 0), "SLURM decides what becomes of it"


@pytest.mark.skipif(not shutil.which("bash"), reason="no bash")
def test_a_signal_does_not_hide_the_exit_code(job):
    """It ends bash's wait with a code of its own, also where srun has ended by then."""
    assert job(0, 2, signal="USR1", srun_s=0.2) == (138, 1)  # killed by it, as an srun that was just starting
    assert job(0, 2, signal="USR1") in [(2, 0), (138, 1)]


@pytest.mark.skipif(not shutil.which("bash"), reason="no bash")
def test_node_0_is_told_that_slurm_asked(job, tmp_path):
    assert job(16, 75, "75", srun_s=0.2) == (75, 1)
    assert not (tmp_path / "asked").exists()
    assert job(16, 75, "75", signal="TERM", srun_s=0.2) == (75, 0)  # SLURM itself puts it back, if anyone does
    assert (tmp_path / "asked").exists()


@pytest.mark.skipif(not shutil.which("bash"), reason="no bash")
def test_a_pre_empted_job_leaves_a_note_for_its_next_start(job, tmp_path):
    """Its ranks alone were asked to stop; the batch script hears nothing."""
    note = tmp_path / "slurm" / "7.preempted"
    assert job(16, 75, "75") == (75, 1)
    assert not note.exists()
    assert [job(16, 137, restart=n, PREEMPTED="2026-01-01T00:00:00") for n in range(12)] == [(137, 1)] * 12
    assert note.exists()


@pytest.mark.skipif(not shutil.which("bash"), reason="no bash")
def test_the_number_of_a_node_is_slurms(job, tmp_path):
    """Not that of a launcher around the shell of whoever submits."""
    (tmp_path / "srun").write_text('#!/bin/bash\necho "${NODE_RANK-none} ${WORLD_SIZE-none}" >seen\n')
    assert job(16, 0, NODE_RANK="0", WORLD_SIZE="4") == (0, 0)
    assert (tmp_path / "seen").read_text() == "none none\n"


@pytest.mark.skipif(not shutil.which("bash"), reason="no bash")
def test_a_job_waits_for_the_controller_to_take_it_back(job):
    assert job(0, 75, refused=2) == (75, 3)
    assert job(0, 75, refused=9) == (75, 3)  # it answers, and refuses


def test_no_path_ends_a_line_of_a_script(tmp_path):
    with pytest.raises(ConfigError, match=r"the run's folder is '.*\\ntouch x'"):
        Scripts(SlurmSpec(), "s", tmp_path / "a\ntouch x", tmp_path)
