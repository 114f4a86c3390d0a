"""Studies in which no proxy is scored itself: the components' scores, or every token's probability, say what proxies score."""

import html
import math
from pathlib import Path

import numpy as np
import pytest
from small_texts import write_texts
from task_files import ARC, GSM8K, write_lines

from megatron_demix.artifact import publish, read_json
from megatron_demix.errors import ConfigError, IncompatibleInputs
from megatron_demix.evaluate.ensemble import DomainText, TaskText, Texts, keep
from megatron_demix.evaluate.job import EvaluateJob
from megatron_demix.evaluate.scores import Score, ScoreTable
from megatron_demix.evaluate.tasks.choices import Choices
from megatron_demix.pipeline.dag import Dag, build_dag
from megatron_demix.pipeline.reporting import collect, write_report
from megatron_demix.report.maturity import gaps
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
component: {maturity_seeds: 0, tokens: 320}
search: {rounds: [8, 8], objective: {code: 1, quiz/acc: 1}, surrogate: ridge, candidates: 1000, top: 16, bootstraps: 0,
         proxy_score: ensemble}
evaluate:
  losses: [code]
  tasks:
    - {name: quiz, format: arc, path: quiz.jsonl, scores: [acc]}
    - {name: sums, format: gsm8k, path: sums.jsonl, scores: [exact_match], max_new_tokens: 4}
final: {tokens: 1k}
"""
# 3 x 4 tokens of code; two questions of two options with a token each, of which the second is right.
TEXTS = Texts(
    {"code": DomainText(3, 4, 20)},
    {"quiz": TaskText(np.ones(4, int), Choices(np.array([2, 2]), np.array([1, 1]), np.ones(4, int), 2), {"acc": "quiz/acc"})},
)
NATS_KT = np.random.default_rng(3).gamma(2.0, 1.0, (2, 16)).astype(np.float32)
# The first component knows one answer, the second the other one, less clearly: which are right depends on the weights.
NATS_KT[:, 12:] = [[3.0, 0.1, 0.2, 1.5], [0.4, 1.0, 3.0, 0.3]]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    write_texts(tmp_path, "code", "english")
    write_lines(tmp_path / "quiz.jsonl", ARC)
    write_lines(tmp_path / "sums.jsonl", GSM8K)
    (tmp_path / "study.yaml").write_text(STUDY)
    return tmp_path / "study.yaml"


def dag_of(path: Path, *overrides: str) -> Dag:
    return build_dag(load_study(path, list(overrides)), path, path.parent / "run")


def searched(path: Path, *overrides: str) -> Dag:
    """With the tokens above as what the components have left."""
    dag = dag_of(path, *overrides)
    for stage in (dag.tokenizer, *dag.data.values(), dag.rounds[0].proposal):
        stage.finish()
    components = dag.rounds[0].scores
    scores = [Score("code", "bits/byte", "lower"), Score("quiz/acc", "", "higher"), Score("sums/exact_match", "", "higher")]
    rows = {
        "component-code": {"code": 7.0, "quiz/acc": 0.5, "sums/exact_match": 0.2},
        "component-english": {"code": 9.0, "quiz/acc": 0.5, "sums/exact_match": 0.8},
    }
    with publish(components.folder, components.key, components.kind, {}) as work:
        ScoreTable(scores, rows).write(work / "scores.json")
        for name, nats_T in zip(rows, NATS_KT, strict=True):
            keep(work / "tokens", name, TEXTS, [nats_T])
    for r in dag.rounds:
        r.fit.finish()
    return dag


def weights_of(dag: Dag) -> np.ndarray:
    mixtures = [m for r in dag.rounds for m in read_json(r.proposal.folder / "mixtures.json")]
    return np.array([[*m["weights"].values()] for m in mixtures])


def test_a_surrogate_is_fitted_to_the_mean_probability_of_every_token(path):
    dag = searched(path)
    weights_MK = weights_of(dag)
    assert len(weights_MK) == 16
    nats_MT = -np.log(weights_MK @ np.exp(-NATS_KT.astype(np.float64)))
    fitted = read_json(dag.choice.folder / "fit.json")["surrogates"]
    assert fitted["code"]["measured"] == pytest.approx(nats_MT[:, :12].sum(axis=1) / math.log(2) / 20)
    right_M = ((nats_MT[:, 13] < nats_MT[:, 12]) * 1 + (nats_MT[:, 15] < nats_MT[:, 14])) / 2
    assert len(set(right_M)) > 1
    assert fitted["quiz/acc"]["measured"] == right_M.tolist()
    # What is generated has no probabilities here: it is interpolated.
    assert fitted["sums/exact_match"]["measured"] == pytest.approx(weights_MK @ [0.2, 0.8])
    assert "those of generated answers are interpolated from" in html.unescape(write_report(dag).page.read_text())


def test_interpolated_losses_and_tasks_go_through_the_trained_centroid(path):
    """By default, also where no loss is measured."""
    overrides = ["search.proxy_score=stack", "component.maturity_seeds=null", "search.rounds=[8]"]
    assert dag_of(path, *overrides, "evaluate.losses=[]", "search.objective={quiz/acc: 1}").maturity is not None
    dag = dag_of(path, *overrides)
    assert dag.maturity is not None
    for stage in (dag.tokenizer, *dag.data.values(), dag.rounds[0].proposal):
        stage.finish()
    dag.maturity.scores.begin()
    job = EvaluateJob.model_validate(read_json(dag.maturity.scores.job))
    assert [task.name for task in job.tasks] == ["quiz", "sums"]
    scores = [Score("code", "bits/byte", "lower"), Score("quiz/acc", "", "higher"), Score("sums/exact_match", "", "higher")]
    mixtures = read_json(dag.rounds[0].proposal.folder / "mixtures.json")
    # Both laws have the limit 1: of the weight w of code, 1 + 4 ^ (1 - w) bits, and 1 - .8 / 4 ^ w of the answers.
    code_M = [m["weights"]["code"] for m in mixtures]
    made = {
        dag.rounds[0].scores: {
            "component-code": {"code": 2.0, "quiz/acc": 0.8, "sums/exact_match": 0.0},
            "component-english": {"code": 5.0, "quiz/acc": 0.2, "sums/exact_match": 0.0},
            **{m["name"]: {"code": 3.0, "quiz/acc": 0.5, "sums/exact_match": w} for m, w in zip(mixtures, code_M, strict=True)},
        },
        dag.maturity.scores: {
            "seed0": {"code": 3.0, "quiz/acc": 0.6, "sums/exact_match": 0.1},
            "merged": {"code": 3.0, "quiz/acc": 0.75, "sums/exact_match": 0.2},
            "base": {"code": 6.0, "quiz/acc": 0.1, "sums/exact_match": 0.0},
        },
    }
    for stage, rows in made.items():
        with publish(stage.folder, stage.key, stage.kind, {}) as work:
            ScoreTable(scores, rows).write(work / "scores.json")
    dag.choice.finish()
    fit = read_json(dag.choice.folder / "fit.json")
    through = fit["through_centroid"]
    assert through["code"] == pytest.approx({"limit": 1.0, "merged_part": 1.0})
    assert through["quiz/acc"] == pytest.approx({"limit": 1.0, "merged_part": 0.4})
    # What all components have alike does not bend; the trained centroid has .1, half of what the merged one has.
    assert through["sums/exact_match"] == {"limit": None, "merged_part": pytest.approx(0.5)}
    measured = {name: fit["surrogates"][name]["measured"] for name in through}
    assert measured["code"] == pytest.approx([(1 + 4 ** (1 - w) + 3.0) / 2 for w in code_M])
    averaged_M = [0.2 + 0.6 * w for w in code_M]
    between_M = [a + 0.4 * (0.5 - a) for a in averaged_M]
    assert measured["quiz/acc"] == pytest.approx([(1 - 0.8 * 0.25**w + b) / 2 for w, b in zip(code_M, between_M, strict=True)])
    assert measured["sums/exact_match"] == pytest.approx([0.25 * w for w in code_M])


@pytest.mark.parametrize("overrides", [["component.maturity_seeds=1"], ["component.mixed=centroid"]])
def test_what_is_made_of_a_trained_centroid_is_part_of_the_key(path, overrides, monkeypatch):
    def keys():
        dag = dag_of(path, "search.proxy_score=stack", *overrides)
        return {stage.name: stage.key for stage in dag.all}

    before = keys()
    monkeypatch.setattr("megatron_demix.pipeline.search_stages.REVISION", 99)
    changed = {name for name, key in keys().items() if before[name] != key}
    assert "rounds/1/fit" in changed
    assert not changed & {"rounds/1/sample", "rounds/1/scores", "maturity/scores"}


def test_what_the_maturity_check_scores_is_known_before_the_first_round_is(path):
    dag = dag_of(path, "component.maturity_seeds=1")
    with publish(dag.maturity.scores.folder, dag.maturity.scores.key, "maturity", {}) as work:
        scores = [Score("code", "bits/byte", "lower"), Score("quiz/acc", "fraction", "higher")]
        rows = {"seed0": {"code": 3.0, "quiz/acc": 0.6}, "merged": {"code": 3.5, "quiz/acc": 0.5}}
        ScoreTable(scores, rows | {"base": {"code": 4.0, "quiz/acc": 0.2}}).write(work / "scores.json")
    assert [(g.gap, g.kept) for g in gaps(collect(dag))] == [(0.5, 0.5), (pytest.approx(0.1), pytest.approx(0.75))]


def test_interpolated_scores_need_the_components_alone(path):
    dag = searched(path, "search.proxy_score=interpolated")
    measured = read_json(dag.choice.folder / "fit.json")["surrogates"]["code"]["measured"]
    assert measured == pytest.approx(weights_of(dag) @ [7.0, 9.0])


@pytest.mark.parametrize("proxy_score", ["interpolated", "ensemble"])
def test_one_stage_scores_the_components_for_all_rounds(path, proxy_score):
    dag = dag_of(path, f"search.proxy_score={proxy_score}")
    names = [stage.name for stage in dag.all if stage.kind == "rounds"]
    assert names == ["rounds/components", "rounds/1/sample", "rounds/1/fit", "rounds/2/fit"]
    stage = dag.rounds[0].scores
    assert stage is dag.rounds[1].scores
    assert stage.key == dag_of(path, f"search.proxy_score={proxy_score}", "search.rounds=[16]").rounds[0].scores.key
    for need in (dag.tokenizer, *dag.data.values()):
        need.finish()
    assert stage.begin()
    job = EvaluateJob.model_validate(read_json(stage.job))
    assert job.mixtures == {"component-code": {"code": 1, "english": 0}, "component-english": {"code": 0, "english": 1}}
    assert job.keep_tokens == (job.models if proxy_score == "ensemble" else [])


@pytest.mark.parametrize("merge", ["{method: ties, density: 0.5}", "{scale: 0.8}"])
@pytest.mark.parametrize("proxy_score", ["stack", "ensemble"])
def test_components_are_scored_as_they_are_where_merging_would_change_them(path, proxy_score, merge):
    dag = dag_of(path, f"search.proxy_score={proxy_score}", f"merge={merge}")
    stage = dag.rounds[0].scores
    for need in (dag.tokenizer, *dag.data.values(), *([dag.rounds[0].proposal] if proxy_score == "stack" else [])):
        need.finish()
    assert stage.begin()
    job = EvaluateJob.model_validate(read_json(stage.job))
    assert job.checkpoints == {f"component-{n}": dag.components[n].folder for n in ("code", "english")}
    assert not any(name.startswith("component") for name in job.mixtures)


@pytest.mark.parametrize("expert", [1, 2])
@pytest.mark.parametrize("layout", ["{context: 2}", "{data: 2, expert: 2}", "{pipeline: 2, context: 2}"])
def test_scoring_starts_as_many_ranks_as_its_job_is_for(path, layout, expert):
    """Replicas have mixtures of their own, so texts are not spread over ranks, and experts only as evaluate says."""
    overrides = [f"parallel={layout}", "evaluate.replicas=2", "model.num_layers=2", "train.global_batch_size=8"]
    overrides += [f"evaluate.expert={expert}"]
    with_experts = ["model.num_experts=2"] if expert > 1 or "expert" in layout else []
    dag = dag_of(path, *overrides, *with_experts)
    stage = dag.rounds[0].scores
    for need in (dag.tokenizer, *dag.data.values(), *stage.needs):
        if need.ranks == 0 and not need.done():
            need.finish()
    assert stage.begin()
    job = EvaluateJob.model_validate(read_json(stage.job))
    assert (job.parallel.context, job.parallel.expert, job.parallel.data) == (1, expert, 2 * expert)
    assert job.parallel.world_size == stage.ranks


def test_experts_of_scoring_divide_those_of_the_model(path):
    with pytest.raises(ConfigError, match=r"evaluate\.expert 2 shares experts out.*the model has none"):
        dag_of(path, "evaluate.expert=2")
    keys = [dag_of(path, "model.num_experts=4", f"evaluate.expert={n}").rounds[0].scores.key for n in (1, 2)]
    assert keys[0] == keys[1], "who shares the work out changes no score"


def test_only_what_depends_on_it_has_another_key(path):
    keys = {kind: {s.name: s.key for s in dag_of(path, f"search.proxy_score={kind}").all} for kind in ("stack", "ensemble")}
    changed = {name for name, key in keys["ensemble"].items() if keys["stack"].get(name) != key}
    assert {name.split("/")[0] for name in changed} == {"rounds", "merge", "blend", "final"}
    assert "rounds/1/sample" not in changed
    other = dag_of(path, "search.proxy_score=interpolated").rounds[0].scores.key
    assert other != keys["ensemble"]["rounds/components"]


def test_the_report_says_what_a_proxy_s_score_is(path):
    dag = searched(path)
    data = collect(dag)
    assert data.kind_of_proxies == "ensemble"
    measured = read_json(dag.choice.folder / "fit.json")["surrogates"]["code"]["measured"]
    shown = [data.rounds[n].scores[m.name]["code"] for n in (0, 1) for m in data.rounds[n].mixtures]
    assert shown == measured
    page = write_report(dag).page.read_text()
    assert "16 ensemble proxies" in page
    assert "those of the components&#39; probabilities, averaged for every token" in page
    assert "No proxy was merged for them" in page
    assert "Whether the components&#39; own scores predict more than merged proxies" in page


def test_before_the_first_fit_there_is_nothing_to_show(path):
    dag = dag_of(path)
    for stage in (dag.tokenizer, *dag.data.values(), dag.rounds[0].proposal):
        stage.finish()
    assert collect(dag).rounds[0].scores == {}


def test_what_an_ensemble_does_not_go_with(path):
    with pytest.raises(
        ConfigError, match=r"proxy_score ensemble needs what every token costs.*set proxy_score to interpolated"
    ):
        dag_of(path, "search.earlier=[{study: v1.yaml}]")
    with pytest.raises(ConfigError, match=r"component\.mixed corrects with weights below 0.*another than ensemble"):
        dag_of(path, "component.mixed=centroid")
    with pytest.raises(ConfigError, match=r"proxy_score says what the score of a merged proxy is"):
        dag_of(path, "search.proxies=trained")


def test_an_earlier_study_without_scores_of_its_own_proxies(path):
    searched(path)
    again = path.parent / "again.yaml"
    again.write_text(STUDY.replace("proxy_score: ensemble", "earlier: [{study: study.yaml}], proxy_score: stack"))
    with pytest.raises(
        IncompatibleInputs, match=r"search\.proxy_score: ensemble there, so that only its components have scores"
    ):
        dag_of(again)
    # Interpolated, its proxies count: the scores of its components are there.
    dag = dag_of(again, "search.proxy_score=interpolated", "search.objective={code: 1, sums/exact_match: 1}")
    dag.earlier[0].stage.finish()
    dag.rounds[0].proposal.finish()
    assert dag.rounds[0].proposal.name == "rounds/0/fit"
    fit = read_json(dag.rounds[0].proposal.folder / "fit.json")["surrogates"]["code"]
    assert len(fit["measured"]) == 16
    assert all(7 <= value <= 9 for value in fit["measured"])
