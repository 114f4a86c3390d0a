"""Studies whose scores are continued to the final run's length: their stages and fits, and what that does not go with."""

from pathlib import Path

import pytest
from small_texts import write_texts

from megatron_demix.artifact import publish, read_json
from megatron_demix.cli import main
from megatron_demix.errors import ConfigError
from megatron_demix.evaluate.scores import Score, ScoreTable
from megatron_demix.pipeline.dag import Dag, build_dag
from megatron_demix.pipeline.reporting import write_report
from megatron_demix.pipeline.stage import Stage
from megatron_demix.study.load import load_study

STUDY = """
name: s
domains:
  - {name: code, inputs: [code.jsonl], max_epochs: 100}
  - {name: english, inputs: [english.jsonl], max_epochs: 100}
tokenizer: {type: byte}
model: {num_layers: 2, hidden_size: 32, num_attention_heads: 2}
train: {seq_length: 16, global_batch_size: 4}
base: {tokens: 640}
component: {maturity_seeds: 0, tokens: 640, lr_decay_style: constant}
search: {rounds: [8, 8], objective: {code: 1}, surrogate: ridge, candidates: 1000, top: 16, bootstraps: 0, extrapolate: [0.5]}
final: {tokens: 2560}
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    write_texts(tmp_path, "code", "english")
    (tmp_path / "study.yaml").write_text(STUDY)
    return tmp_path / "study.yaml"


def dag_of(path: Path, *overrides: str) -> Dag:
    return build_dag(load_study(path, list(overrides)), path, path.parent / "run")


def score(stage: Stage, values: dict[str, float]) -> None:
    if not stage.done():
        with publish(stage.folder, stage.key, stage.kind, {}) as work:
            ScoreTable([Score("code", "", "lower")], {m: {"code": v} for m, v in values.items()}).write(work / "scores.json")


@pytest.mark.parametrize("proxy_score", ["merged", "interpolated", "stack"])
def test_every_proxy_s_score_is_continued(path, proxy_score):
    """From 5 and 10 iterations to 40, two doublings: three times the late score less two times the early one."""
    dag = dag_of(path, f"search.proxy_score={proxy_score}")
    for stage in (dag.tokenizer, *dag.data.values(), dag.rounds[0].proposal):
        stage.finish()
    expected = []
    for r in dag.rounds:
        mixtures = {m["name"]: m["weights"]["code"] for m in read_json(r.proposal.folder / "mixtures.json")}
        early = dag.stage(f"{r.scores.name}_after_5")
        for stage, merged, alone in ((early, 5.0, (2.0, 4.0)), (r.scores, 4.0, (1.0, 3.0))):
            rows = {name: merged + weight**2 for name, weight in mixtures.items()} if proxy_score != "interpolated" else {}
            score(stage, rows | {"component-code": alone[0], "component-english": alone[1]})
        for weight in mixtures.values():
            of_merges = 3 * (4 + weight**2) - 2 * (5 + weight**2)
            interpolated = 3 * (3 - 2 * weight) - 2 * (4 - 2 * weight)
            expected.append(
                {"merged": of_merges, "interpolated": interpolated, "stack": (of_merges + interpolated) / 2}[proxy_score]
            )
        r.fit.finish()
    fit = read_json(dag.choice.folder / "fit.json")
    assert fit["surrogates"]["code"]["measured"] == pytest.approx(expected)
    assert fit["extrapolated"]["coefficients"] == pytest.approx({"5": -2, "10": 3})
    page = write_report(dag).page.read_text()
    assert "Shown are scores after 5 and 10 iterations, continued on a line in their logarithm to 40, with 3.6 times" in page
    assert "search.extrapolate multiplies the noise of scores by 3.6." in page


def test_each_part_is_scored_in_a_stage_of_its_own(path):
    dag = dag_of(path, "search.extrapolate=[0.2, 0.5]")
    names = {stage.name for stage in dag.all if stage.kind == "rounds"}
    assert {"rounds/1/scores_after_2", "rounds/1/scores_after_5", "rounds/1/scores", "rounds/2/scores_after_2"} <= names
    assert dag.components["code"].settings["kept"] == [2, 5, 10]
    once = dag_of(path, "search.proxy_score=ensemble")
    assert [stage.name for stage in once.all if stage.name.startswith("rounds/components")] == [
        "rounds/components_after_5",
        "rounds/components",
    ]
    for stage in (once.tokenizer, *once.data.values()):
        stage.finish()
    early = once.stage("rounds/components_after_5")
    assert early.begin()
    job = read_json(early.job)
    assert {Path(p).name for p in job["components"].values()} == {"iter_0000005"}
    assert job["keep_tokens"] == ["component-code", "component-english"]


def test_without_it_components_keep_their_end_alone(path):
    dag = dag_of(path, "search.extrapolate=null")
    assert "kept" not in dag.components["code"].settings
    assert not any("after" in stage.name for stage in dag.all)


def test_demix_plan_says_what_it_does_to_noise(path, capsys):
    assert main(["plan", str(path), "--runs", str(path.parent / "runs")]) == 0
    said = capsys.readouterr().out
    assert "search.extrapolate takes scores after 5 and 10 iterations, continued on a line in their logarithm to 40" in said
    assert "warning: search.extrapolate multiplies the noise of scores by 3.6" in said
    quieter = ["--set", "search.extrapolate=[0.1]", "--set", "final.tokens=1280"]
    assert main(["plan", str(path), "--runs", str(path.parent / "runs"), *quieter]) == 0
    assert "warning" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("search.extrapolate=[0.5, 0.25]", r"extrapolate: \[0\.5, 0\.25\] has to ascend"),
        ("search.extrapolate=[1.0]", r"a number below 1"),
        ("search.proxies=trained", r"extrapolate continues scores of merged proxies"),
        ("search.earlier=[{study: v1.yaml}]", r"extrapolate needs scores after parts of a run; of an earlier study"),
        ("component.average=[0.4, 0.6]", r"search\.extrapolate: the components are means of checkpoints"),
        ("component.lr_decay_style=cosine", r"search\.extrapolate: the components' lr_decay_style is cosine.*to constant"),
        ("final.init=scratch", r"search\.extrapolate: .*set final\.init to base"),
        ("final.tokens=640", r"final\.tokens \(640\) is not more than component\.tokens \(640\)"),
        ("search.extrapolate=[0.5, 0.51]", r"search\.extrapolate: \[0\.5, 0\.51, 1\.0\] of 10 iterations are \[5, 5, 10\]"),
    ],
)
def test_what_cannot_be_extrapolated(path, override, message):
    with pytest.raises(ConfigError, match=message):
        dag_of(path, override)
