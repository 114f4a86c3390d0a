"""examples/slurm: valid bash, with what SLURM and Megatron-LM have to be told."""

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted((ROOT / "examples" / "slurm").glob("*.sbatch"))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda p: p.name)
def test_they_are_bash(path):
    subprocess.run(["bash", "-n", path], check=True)
    options = re.findall(r"^#SBATCH (--[a-z-]+)", path.read_text(), re.MULTILINE)
    assert {"--signal", "--requeue", "--ntasks-per-node", "--time"} <= set(options)
    assert "\n##SBATCH --cpus-per-task=EDIT\n" in path.read_text()


def test_megatron_lm_is_given_what_it_insists_on():
    """For more than one tensor parallel rank, on GPUs before Blackwell."""
    text = (ROOT / "examples/slurm/megatron_lm.sbatch").read_text()
    assert "--tensor-model-parallel-size 2" in text
    assert "\nexport CUDA_DEVICE_MAX_CONNECTIONS=1\n" in text


def test_megatron_lm_reads_the_file_that_build_blend_writes():
    text = (ROOT / "examples/slurm/megatron_lm.sbatch").read_text()
    prefix = re.search(r"--mode args --output (\S+)", text)
    assert prefix
    assert f"\nblend={prefix[1]}.args.txt\n" in text
