"""The paper's study plans, its numbers add up, and its recipe builds."""

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from feasible_mixtures import feasible

from megatron_demix.cli import main
from megatron_demix.data.curriculum import Stage, build_curriculum
from megatron_demix.data.pool import Pool
from megatron_demix.mixture import Mixture
from megatron_demix.pipeline.train_stages import num_iterations
from megatron_demix.search.space import SearchSpace, epoch_caps
from megatron_demix.study.load import load_study

PAPER = Path(__file__).parents[3] / "examples" / "paper"


def load(name: str):
    sys.path.insert(0, str(PAPER))
    try:
        specification = importlib.util.spec_from_file_location(name, PAPER / f"{name}.py")
        assert specification
        assert specification.loader
        module = importlib.util.module_from_spec(specification)
        sys.modules[name] = module  # dataclasses look their module up
        specification.loader.exec_module(module)
        return module
    finally:
        sys.path.remove(str(PAPER))


recipe, stand_in = load("recipe"), load("stand_in")


@pytest.fixture(scope="module")
def stood_in(tmp_path_factory) -> Path:
    """The folder of the example with its stand-in data."""
    folder = tmp_path_factory.mktemp("paper")
    shutil.copy(PAPER / "study.yaml", folder)
    stand_in.write(folder / "data")
    return folder


def test_the_study_plans(stood_in, capsys):
    assert main(["plan", str(stood_in / "study.yaml"), "--runs", str(stood_in / "runs")]) == 0
    shown = capsys.readouterr().out
    for stage in ("components/code_3", "rounds/3/fit", "blend/found", "final/natural-seed0"):
        assert stage in shown
    assert "31 to do" in shown


def test_it_is_shown_as_sbatch_scripts_before_the_data_is_there(tmp_path, capsys):
    study = shutil.copy(PAPER / "study.yaml", tmp_path)
    assert main(["submit", study, "--runs", str(tmp_path / "runs"), "--dry-run"]) == 0
    written = capsys.readouterr().out.split("# ---- ")[1:]
    scripts = {Path(name).stem: text for name, _, text in (part.partition("\n") for part in written)}
    assert {"data", "base.base", "components", "rounds.1.scores", "rounds.3.fit", "blend", "final", "conclude"} <= set(scripts)
    for name, text in scripts.items():
        subprocess.run(["bash", "-n"], input=text, text=True, check=True)
        of_ranks = name.split(".")[0] in ("base", "components", "final") or name.endswith("scores")
        assert ("#SBATCH --gpus-per-node=8" in text) == of_ranks, name
    assert "#SBATCH --nodes=8" in scripts["components"]
    assert "#SBATCH --array=0-6" in scripts["components"]  # seven components side by side
    assert "#SBATCH --time=2-00:00:00" in scripts["final"]
    assert not (tmp_path / "runs").exists()


def test_the_studys_figures_are_the_papers():
    study = load_study(PAPER / "study.yaml")
    assert study.domain_names == list(recipe.DEMIX_224)
    assert study.train.global_batch_size * study.train.seq_length == 512 * 8192
    assert sum(study.search.rounds) == 224
    assert num_iterations(study, "component") == round(30e9 / (512 * 8192))
    assert study.train.min_lr == pytest.approx(0.2 * study.train.lr)
    assert study.component.anchor.mixture == {"general": 1}
    # Every category weighs one third.
    weights = study.search.objective
    categories = ("general", "math", "code")
    assert len({sum(weight for name, weight in weights.items() if name.startswith(c)) for c in categories}) == 1


def test_the_sources_add_up_to_the_papers_totals():
    sources = recipe.read_sources()
    assert len(sources) == 36
    assert sum(s.tokens for s in sources) == 13417
    assert [sum(s.stages[n] for s in sources) for n in range(3)] == [14388, 5999, 1996]


def test_demix_224_at_its_actual_shares_is_stage_3_of_the_corpora():
    shares = recipe.actual_shares()
    assert sum(shares.values()) == pytest.approx(1)
    assert shares["general"] == pytest.approx(0.609)
    for name, share in shares.items():
        taken = sum(s.stages[2] for s in recipe.read_sources() if s.candidate == name)
        # Weights are printed to three digits, and the 2B of math_2 were left out of the corpora.
        assert 1996 * share == pytest.approx(taken, abs=2.1), name


def test_the_found_mixture_is_feasible_for_the_corpora():
    sources = recipe.read_sources()
    tokens = {name: float(sum(s.tokens for s in sources if s.candidate == name)) for name in recipe.DEMIX_224}
    caps = epoch_caps(tokens, dict.fromkeys(tokens, 4.0), 1996)
    space = SearchSpace(Mixture.proportional(tokens), Mixture({"general": 1.0}), recipe.ANCHOR_SHARE, epoch_caps=caps)
    assert feasible(space, np.array([list(recipe.DEMIX_224.values())])).all()


def test_the_plan_says_how_often_each_source_is_repeated():
    rows = {line.split("  ")[0].strip(): line for line in recipe.table(recipe.read_sources()).splitlines()}
    assert rows["FineWeb-Edu"].endswith("x 6.11 repeated more than 4 times")
    assert "740B x 3.72" in rows["FineWeb-Edu"]
    assert rows["SwallowMath"].endswith("x 1.94 repeated")
    assert rows["StarCoder"].endswith("x 1.00")


def test_the_recipe_builds_as_a_curriculum(stood_in, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["recipe.py", "--write", str(stood_in)])
    assert recipe.main() == 0
    edited = (stood_in / "pool.yaml").read_text()
    (stood_in / "pool.yaml").write_text("# mine\n" + edited)
    assert recipe.main() == 6
    assert "pool.yaml exists, and is not what this command writes there" in capsys.readouterr().err
    pool = Pool.read(stood_in / "pool.yaml")
    assert (stood_in / "pool.yaml").read_text() == "# mine\n" + edited
    written = yaml.safe_load((stood_in / "mixture.json").read_text())
    scale = stand_in.TOKENS_PER_BILLION
    stages = [Stage(Mixture(s["weights"]), int(s["tokens"].removesuffix("B")) * scale) for s in written["stages"]]
    manifests = build_curriculum(pool, stages, tmp_path / "corpora", seed=1, progress=False)
    for number, (manifest, total) in enumerate(zip(manifests, (14388, 5999, 1996), strict=True)):
        assert sum(d["tokens"] for d in manifest["domains"].values()) == pytest.approx(total * scale, rel=0.01)
        source = next(s for s in recipe.read_sources() if s.name == "nemo_sft_math")
        domain = manifest["domains"]["nemo_sft_math"]
        assert domain["epochs"] == pytest.approx(source.epochs(number), rel=0.02)
