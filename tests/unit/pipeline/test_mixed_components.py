"""Components that are trained on mixtures: their stages, what stays as it was without them, and what they do not go with."""

from pathlib import Path

import numpy as np
import pytest
from small_texts import write_texts

from megatron_demix.artifact import publish, read_json
from megatron_demix.errors import ConfigError, MixtureError
from megatron_demix.evaluate.scores import Score, ScoreTable
from megatron_demix.pipeline.dag import Dag, build_dag
from megatron_demix.pipeline.merging import second_order
from megatron_demix.pipeline.reporting import write_report
from megatron_demix.pipeline.stage import Stage
from megatron_demix.study.load import load_study

STUDY = """
name: s
domains:
  - {name: code, inputs: [code.jsonl]}
  - {name: english, inputs: [english.jsonl]}
  - {name: math, inputs: [math.jsonl]}
tokenizer: {type: byte}
model: {num_layers: 2, hidden_size: 32, num_attention_heads: 2}
train: {seq_length: 16, global_batch_size: 4}
base: {tokens: 640}
component: {maturity_seeds: 0, tokens: 320, anchor: {mixture: {english: 1}}}
search: {rounds: [8], objective: {code: 1}, surrogate: ridge, candidates: 1000, top: 16, bootstraps: 0}
final: {tokens: 1k}
"""
SKILLS = "component.mixed={skills: {code: 0.25, math: 0.75}}"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    write_texts(tmp_path, "code", "english", "math")
    (tmp_path / "study.yaml").write_text(STUDY)
    return tmp_path / "study.yaml"


def dag_of(path: Path, *overrides: str) -> Dag:
    return build_dag(load_study(path, list(overrides)), path, path.parent / "run")


def mixed_stages(dag: Dag) -> dict[str, Stage]:
    return {stage.name: stage for stage in dag.all if stage.name.startswith("components/mixed/")}


def test_what_is_trained(path):
    assert list(mixed_stages(dag_of(path, "component.mixed=centroid"))) == ["components/mixed/centroid"]
    pairs = [f"components/mixed/{pair}" for pair in ("code+english", "code+math", "english+math")]
    assert list(mixed_stages(dag_of(path, "component.mixed=pairs"))) == pairs
    skills = mixed_stages(dag_of(path, SKILLS))["components/mixed/skills"]
    assert skills.settings["weights"] == {"code": 0.25, "math": 0.75}
    # Of the data, it needs that of its domains and of the anchor.
    assert {need.name for need in skills.needs if need.kind == "data"} == {"data/code", "data/english", "data/math"}
    unanchored = mixed_stages(dag_of(path, SKILLS, "component.anchor.share=0"))["components/mixed/skills"]
    assert {need.name for need in unanchored.needs if need.kind == "data"} == {"data/code", "data/math"}
    averaged = dag_of(path, SKILLS, "component.average=[0.4, 0.6]", "component.tokens=640")
    assert averaged.mixed["skills"].name == "averages/components/mixed/skills"


def test_weights_are_part_of_the_key_and_everything_else_stays(path):
    before, after = ({s.name: s.key for s in dag_of(path, *overrides).all} for overrides in ((), (SKILLS,)))
    changed = {name for name, key in after.items() if before.get(name) != key}
    assert "components/mixed/skills" in changed
    assert {name.split("/")[0] for name in changed - {"components/mixed/skills"}} == {"rounds", "merge", "blend", "final"}
    assert not any(name.startswith(("components/code", "blend/natural", "final/natural")) for name in changed)
    other = mixed_stages(dag_of(path, "component.mixed={skills: {code: 0.5, math: 0.5}}"))
    assert other["components/mixed/skills"].key != after["components/mixed/skills"]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("component.mixed=centriod", r"component.mixed: expected 'centroid' or 'pairs', found 'centriod'"),
        ("component.mixed={}", r"component.mixed: .*1 or more entries"),
        ("component.mixed={x: {code: 0.5, maths: 0.5}}", r"component.mixed.x: 'maths' is not one of .*did you mean 'math'\?"),
        (
            "component.mixed={code: {code: 0.5, math: 0.5}}",
            r"component.mixed: mixed component 'code' has the name of a domain's",
        ),
        ("component.mixed={x: {code: 1.0}}", r"component.mixed: mixed component 'x' is of one domain alone"),
        (
            "component.mixed={x: {code: 0.5, math: 0.5}, y: {code: 0.4, math: 0.6}}",
            r"component.mixed: mixed component 'y' corrects nothing beside x",
        ),
    ],
)
def test_what_is_no_mixed_component(path, override, message):
    with pytest.raises(ConfigError, match=message):
        dag_of(path, override)


def test_weights_that_are_no_mixture(path):
    with pytest.raises(MixtureError, match=r"component\.mixed\.x: weights sum to 0\.75, expected 1"):
        dag_of(path, "component.mixed={x: {code: 0.5, math: 0.25}}")


def test_what_they_do_not_go_with(path):
    with pytest.raises(ConfigError, match=r"component\.mixed corrects merged proxies; trained ones"):
        dag_of(path, SKILLS, "search.proxies=trained")
    with pytest.raises(ConfigError, match=r"component\.mixed: .* no meaning for merge\.method ties; take method linear"):
        dag_of(path, SKILLS, "merge={method: ties, density: 0.5}")


def test_the_maturity_check_asks_what_proxies_are_at_the_centroid_unless_that_is_trained(path):
    maturity = dag_of(path, "component.mixed=pairs", "component.maturity_seeds=2").maturity
    assert next(iter(maturity.trained.values())).name == "components/centroid/seed0"
    by_hand = "component.mixed={even: {code: 0.3333333, english: 0.3333333, math: 0.3333334}}"
    dag = dag_of(path, by_hand, "component.maturity_seeds=2")
    assert dag.study.mixed_centroid == "even"
    assert [stage.name for stage in dag.maturity.trained.values()] == ["components/mixed/even", "components/centroid/seed1"]


@pytest.mark.parametrize("average", ["null", "[0.4, 0.6]"])
def test_training_ends_with_all_that_is_trained_as_components_are(path, average):
    dag = dag_of(path, f"component.average={average}", "component.tokens=640", "component.maturity_seeds=1")
    made = [stage.name for stage in dag.until("train")]
    assert {stage.name for stage in dag.maturity.trained.values()} <= {*made}
    assert "maturity/scores" not in made


def scored(dag: Dag, tables: dict[Stage, dict[str, float]]) -> dict:
    """Publish these values by model, the same for all scores, and fit. Returns what fit.json says."""
    for stage, values in tables.items():
        rows = {name: dict.fromkeys(dag.data, value) for name, value in values.items()}
        with publish(stage.folder, stage.key, stage.kind, {}) as work:
            ScoreTable([Score(name, "", "lower") for name in dag.data], rows).write(work / "scores.json")
    dag.rounds[0].fit.finish()
    return read_json(dag.rounds[0].fit.folder / "fit.json")


def report_of(dag: Dag) -> str:
    return write_report(dag).page.read_text()


ALONE = {"component-code": 1.0, "component-english": 2.0, "component-math": 4.0}
"""On the law with limit 0, a mixture has 2 ^ (english + 2 math), and the centroid 2."""


@pytest.mark.parametrize(
    ("overrides", "seeds"),
    [
        (["component.mixed=pairs", "component.maturity_seeds=2"], {"seed0": 1.9, "seed1": 2.1}),
        (["component.mixed={skills: {code: 0.5, math: 0.5}}", "component.maturity_seeds=2"], {"seed0": 1.9, "seed1": 2.1}),
        (["component.mixed=centroid"], {}),
        (["component.mixed=centroid", "component.maturity_seeds=2"], {"seed0": 1.9, "seed1": 2.1}),
    ],
)
def test_proxies_go_through_the_trained_centroid(path, overrides, seeds):
    """Whether that was trained for the maturity check, is a mixed component, or both."""
    dag = dag_of(path, *overrides)
    for stage in (dag.tokenizer, *dag.data.values(), dag.rounds[0].proposal):
        stage.finish()
    mixtures = read_json(dag.rounds[0].proposal.folder / "mixtures.json")
    proxies = {m["name"]: 20.0 + m["weights"]["code"] for m in mixtures}
    mixed = dict.fromkeys((f"component-{name}" for name in dag.mixed), 2.0)
    tables = {dag.rounds[0].scores: proxies | ALONE | mixed}
    if seeds:
        tables[dag.maturity.scores] = {"merged": 1.0, "base": 30.0} | seeds
    facts = scored(dag, tables)
    components_C = [*ALONE.values(), *mixed.values()]
    order = second_order(dag.study)
    averaged = order.centroid_K @ components_C
    # Where the centroid is a component, merges go through it themselves.
    merged_part = 1.0 if "centroid" in dag.mixed else min(max((2.0 - averaged) / (1.0 - averaged), 0), 1)
    assert facts["through_centroid"]["code"] == pytest.approx({"limit": 0.0, "merged_part": merged_part}, abs=1e-9)
    assert f"a part of the way from their average to the merged model&#39;s scores (code {merged_part:.0%}" in report_of(dag)
    for mixture, value in zip(mixtures, facts["surrogates"]["code"]["measured"], strict=True):
        law = 2 ** (mixture["weights"]["english"] + 2 * mixture["weights"]["math"])
        averaged = np.dot([*order.of(mixture["weights"]).values()], components_C)
        assert value == pytest.approx((law + averaged + merged_part * (proxies[mixture["name"]] - averaged)) / 2)


def test_interpolated_scores_are_the_law_beside_the_average_of_all_components(path):
    dag = dag_of(path, "component.mixed=centroid", "search.proxy_score=interpolated")
    for stage in (dag.tokenizer, *dag.data.values(), dag.rounds[0].proposal):
        stage.finish()
    facts = scored(dag, {dag.rounds[0].scores: ALONE | {"component-centroid": 2.0}})
    order = second_order(dag.study)
    mixtures = read_json(dag.rounds[0].proposal.folder / "mixtures.json")
    for mixture, value in zip(mixtures, facts["surrogates"]["code"]["measured"], strict=True):
        law = 2 ** (mixture["weights"]["english"] + 2 * mixture["weights"]["math"])
        assert value == pytest.approx((law + np.dot([*order.of(mixture["weights"]).values()], [1, 2, 4, 2])) / 2)


def test_without_a_trained_centroid_all_components_are_interpolated_to_second_order(path):
    """Component k alone scores k; the three pairs score 10."""
    dag = dag_of(path, "component.mixed=pairs")
    for stage in (dag.tokenizer, *dag.data.values(), dag.rounds[0].proposal):
        stage.finish()
    mixtures = read_json(dag.rounds[0].proposal.folder / "mixtures.json")
    alone = {f"component-{name}": float(k) for k, name in enumerate(["code", "english", "math"])}
    alone |= {f"component-{name}": 10.0 for name in dag.mixed}
    proxies = {m["name"]: 20.0 + m["weights"]["code"] for m in mixtures}
    facts = scored(dag, {dag.rounds[0].scores: proxies | alone})
    assert "through_centroid" not in facts
    assert "scores are the mean of the merged model&#39;s and of the components&#39; own" in report_of(dag)
    for mixture, value in zip(mixtures, facts["surrogates"]["code"]["measured"], strict=True):
        code, english, mathematics = mixture["weights"].values()
        pairs = 4 * (code * english + code * mathematics + english * mathematics)
        own = english + 2 * mathematics
        halves = 2 * (code * english + 2 * code * mathematics + 3 * english * mathematics)
        assert value == pytest.approx((10 * pairs + own - halves + proxies[mixture["name"]]) / 2)
