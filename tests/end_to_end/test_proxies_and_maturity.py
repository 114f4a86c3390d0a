"""Stage by stage in this process: a study that trains its proxies (no components, nothing merged), and the maturity check."""

import contextlib
from pathlib import Path

import numpy as np
import pytest
from in_process import make

from megatron_demix.artifact import read_json
from megatron_demix.errors import ConfigError
from megatron_demix.mixture import Mixture
from megatron_demix.pipeline.dag import Dag, build_dag
from megatron_demix.pipeline.given_scores import given_scores, named_checkpoints, table
from megatron_demix.pipeline.reporting import collect
from megatron_demix.pipeline.stage import with_needs
from megatron_demix.pipeline.train_stages import num_iterations
from megatron_demix.search.mixing_law import MixingLaw
from megatron_demix.study.load import load_study

TRAINED = ["search.proxies=trained", "search.rounds=[8, 2]", "search.bootstraps=0", "search.surrogate=ridge", "base.tokens=1k"]


def dag_of(study_folder: Path, runs: Path, *overrides: str) -> Dag:
    path = study_folder / "study.yaml"
    return build_dag(load_study(path, [*TRAINED, *overrides]), path, runs / "run")


def test_rounds_of_trained_proxies_find_a_mixture(study_folder, tmp_path):
    dag = dag_of(study_folder, tmp_path)
    for stage in dag.of_kinds({"rounds"}):
        make(stage)
    names = [stage.name for stage in dag.of_kinds({"rounds"})]
    assert not any(name.startswith("components/") for name in names)
    assert sum(name.startswith("rounds/1/proxy_") for name in names) == 8
    assert sum(name.startswith("rounds/2/proxy_") for name in names) == 2
    entries = read_json(dag.rounds[1].proposal.folder / "mixtures.json")
    scores = read_json(dag.rounds[1].scores.folder / "scores.json")["rows"]
    assert [e["name"] for e in entries] == list(scores)
    assert all(e["weights"] == pytest.approx(e["shares"]) for e in entries)  # no anchor between weights and shares
    Mixture(read_json(dag.choice.folder / "mixture.json")["weights"])
    # The model is trained on the shares it was proposed for.
    proxy = next(s for s in dag.rounds[0].scores.needs if s.name == "rounds/1/proxy_003")
    wanted = read_json(dag.rounds[0].proposal.folder / "mixtures.json")[3]["shares"]
    given = {Path(path).parent.name.split("-")[0]: share for path, share in read_json(proxy.job)["blend"]}
    assert given == pytest.approx({name: share for name, share in wanted.items() if share > 0})
    # A checkpoint that is given by its path has the scores of the study's own.
    stage = given_scores(dag, named_checkpoints([f"mine={proxy.folder}"]), final=False)
    for needed in [s for s in with_needs([stage]) if not s.done()]:
        make(needed)
    of_round = read_json(dag.rounds[0].scores.folder / "scores.json")["rows"]
    assert read_json(stage.folder / "scores.json")["rows"] == {"mine": of_round["r1_003"]}
    titles, rows = table(stage)
    assert titles[3:] == ["mine"]
    assert [row[:3] for row in rows][-1] == ["quiz/bits_per_byte", "bits/byte", "lower"]


def test_by_default_all_trained_proxies_cost_what_the_components_would(study_folder, tmp_path):
    study = load_study(study_folder / "study.yaml", [*TRAINED, "component.tokens=5120"])
    assert num_iterations(study, "proxy") * sum(study.search.rounds) == len(study.domains) * num_iterations(study, "component")
    assert num_iterations(load_study(study_folder / "study.yaml", [*TRAINED, "search.proxy_tokens=2560"]), "proxy") == 10


def test_a_round_that_another_made_unnecessary_trains_nothing(study_folder, tmp_path):
    dag = dag_of(study_folder, tmp_path)
    proxy = next(s for s in dag.rounds[1].scores.needs if s.name == "rounds/2/proxy_001")
    proposal = dag.rounds[1].proposal
    proposal.folder.mkdir(parents=True)
    (proposal.folder / "mixtures.json").write_text("[]")
    dag.tokenizer.finish()
    assert not proxy.begin()


def test_there_is_nothing_to_merge(study_folder, tmp_path):
    dag = dag_of(study_folder, tmp_path)
    assert dag.proxies is None
    with pytest.raises(ConfigError, match=r"no stage of kind merge: its proxies are trained"):
        dag.of_kinds({"merge"})


def test_the_merged_centroid_is_scored_beside_trained_ones_which_interpolation_goes_through(study_folder, tmp_path):
    path = study_folder / "study.yaml"
    overrides = ["base.tokens=1k", "component.tokens=1k", "component.maturity_seeds=2", "search.rounds=[8]"]
    overrides += ["component.average=[0.5, 0.75]", "train.lr_decay_style=constant"]
    dag = build_dag(load_study(path, [*overrides, "search.surrogate=ridge", "search.bootstraps=0"]), path, tmp_path / "run")
    for stage in dag.of_kinds({"maturity", "rounds"}):
        make(stage)
    rows = read_json(dag.rounds[0].scores.folder / "scores.json")["rows"]
    entries = read_json(dag.rounds[0].proposal.folder / "mixtures.json")
    fit = read_json(dag.rounds[0].fit.folder / "fit.json")
    law, part = MixingLaw(fit["through_centroid"]["code"]["limit"]), fit["through_centroid"]["code"]["merged_part"]
    alone_K = np.array([rows[f"component-{name}"]["code"] for name in dag.components])
    for entry, value in zip(entries, fit["surrogates"]["code"]["measured"], strict=True):
        weights_K = np.array([*entry["weights"].values()])
        averaged = weights_K @ alone_K
        between = averaged + part * (rows[entry["name"]]["code"] - averaged)
        assert value == pytest.approx((law.of(weights_K[None], alone_K)[0] + between) / 2)
    check = collect(dag).maturity
    assert check is not None
    rows = [check.merged, check.base, *check.trained]
    assert len({row["code"] for row in rows}) == 4
    # Components and trained centroids alike are the mean of two checkpoints, and end with the second, of four iterations.
    trained = [next(iter(stage.needs)) for stage in (*dag.components.values(), *dag.maturity.trained.values())]
    for stage in trained:
        assert sorted(p.name for p in stage.folder.glob("iter_*")) == ["iter_0000002", "iter_0000003"]
    blends = [dict(read_json(stage.job)["blend"]) for stage in trained[2:]]
    assert [sorted(blend.values()) for blend in blends] == [[0.5, 0.5]] * 2
    assert check.merged["code"] < check.base["code"]


def test_merged_proxies_have_no_tokens_of_their_own(study_folder):
    with pytest.raises(ConfigError, match=r"proxy_tokens is what trained proxies cost.*set component\.tokens"):
        load_study(study_folder / "study.yaml", ["search.proxy_tokens=1k"])


def test_given_checkpoints_have_names(tmp_path):
    assert named_checkpoints(["a=x/y", "ckpt/proxy/"]) == {"a": Path("x/y"), "proxy": Path("ckpt/proxy/")}
    with pytest.raises(ConfigError, match="'proxy' is given twice"):
        named_checkpoints(["one/proxy", "two/proxy"])
    with pytest.raises(ConfigError, match="expected a path, or NAME=PATH"):
        named_checkpoints(["=x"])
    # A path may have an equals sign in it.
    assert named_checkpoints(["runs/lr=3e-4/iter_0000100"]) == {"iter_0000100": Path("runs/lr=3e-4/iter_0000100")}
    assert named_checkpoints(["a=runs/lr=3e-4"]) == {"a": Path("runs/lr=3e-4")}
    (tmp_path / "lr=1").mkdir()
    with contextlib.chdir(tmp_path):
        assert named_checkpoints(["lr=1"]) == {"lr=1": Path("lr=1")}
