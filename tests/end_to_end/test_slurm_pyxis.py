"""A study whose stages run in containers, by the real pyxis and enroot; docs/DECISIONS.md says how to get them.

DEMIX_PYXIS=/path/spank_pyxis.so pytest tests/end_to_end/test_slurm_pyxis.py      # with enroot and mksquashfs in PATH
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from folders import contents
from slurm_cluster import Cluster, private_cluster
from slurm_study import demix, iterations, job_of, make_again, needs_slurm, states, wait_for, write_study

PYXIS = Path(os.environ.get("DEMIX_PYXIS", "/nowhere"))
pytestmark = [
    pytest.mark.timeout(900),
    needs_slurm,
    pytest.mark.skipif(
        not (PYXIS.is_file() and shutil.which("enroot") and shutil.which("mksquashfs")),
        reason="DEMIX_PYXIS does not name a spank_pyxis.so, or enroot or mksquashfs is not installed",
    ),
]
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory) -> Iterator[Cluster]:
    """Of one node: two on one machine would share the folder that enroot unpacks images in."""
    folder = tmp_path_factory.mktemp("pyxis")
    (folder / "plugstack.conf").write_text(f"required {PYXIS} runtime_path={folder}/runtime\n")
    with private_cluster(folder / "cluster", num_nodes=1, more=f"PlugStackConfig={folder}/plugstack.conf\n") as running:
        yield running


@pytest.fixture
def image(tmp_path) -> Path:
    """Folders to mount this machine's programs into, and nothing else."""
    root = tmp_path / "root"
    for name in ("usr", "etc", "tmp", "proc", "sys", "dev", "var", "run", "root"):
        (root / name).mkdir(parents=True)
    for name in ("bin", "sbin", "lib", "lib64"):
        (root / name).symlink_to(f"usr/{name}")
    for name in ("passwd", "group", "nsswitch.conf", "ld.so.cache"):
        shutil.copy(f"/etc/{name}", root / "etc")
    (root / "etc" / "environment").write_text("PATH=/usr/local/bin:/usr/bin:/bin\n")
    (root / "etc" / "fstab").touch()
    subprocess.run(["mksquashfs", root, tmp_path / "image.sqsh", "-quiet", "-no-progress"], check=True)
    return tmp_path / "image.sqsh"


def test_stages_run_in_containers_and_are_told_to_save(cluster, image, study_folder, tmp_path):
    study = write_study(tmp_path / "study", study_folder / "corpus")
    seen = {Path(p).resolve() for p in ("/usr", sys.base_prefix, ROOT, study_folder, tmp_path, *sys.path) if Path(p).is_dir()}
    mounts = [p for p in sorted(seen) if not any(other in p.parents for other in seen)]
    settings = {
        "container": image,
        "mounts": f"[{', '.join(f'{p}:{p}' for p in mounts)}]",
        "python": sys.executable,
        "ranks_per_node": 2,
        "cpus_per_task": 1,
    }
    more = [word for name, value in settings.items() for word in ("--set", f"launch.slurm.{name}={value}")]
    submitted = demix(cluster, "submit", study, *more)
    _, errors = submitted.communicate(timeout=120)
    assert submitted.returncode == 0, errors
    run = study.parent / "two-nodes"
    wait_for("a component", lambda: iterations(run, "components.code") > 60)
    cluster.run("scancel", "--signal=USR1", "--batch", job_of(cluster, "two-nodes", "components", 0))
    wait_for("the report", lambda: (run / "report" / "index.html").exists())
    assert {row["state"] for row in states(cluster, study, *more).values()} == {"done"}

    log = next((run / "logs" / "slurm").glob("components-*_0.log")).read_text()
    assert "stopped by SIGTERM after iteration" in log
    assert "components/code is not finished (code 75): back into the queue" in log
    started = (cluster.folder / "log" / "slurmd.n1.log").read_text().count("pyxis: starting container")
    assert started > len(list((run / "logs" / "slurm").glob("*.log"))) - 1  # all but the last, which calls sbatch; one twice
    published = next(run.glob("components/code-*"))
    again = make_again(run, f"components.{published.name}.json", tmp_path / "again", ranks=2)
    assert {name: digest for name, digest in contents(published).items() if name != "manifest.json"} == again
