"""The rounds of a study on invented scores: nothing is trained, so the optimum is known."""

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
from small_texts import write_texts
from task_files import ARC, GSM8K, write_lines

from megatron_demix.artifact import publish, read_json, write_json
from megatron_demix.cli import main
from megatron_demix.errors import ConfigError, CorruptInput, IncompatibleInputs, MixtureError
from megatron_demix.evaluate.scores import Score, ScoreTable
from megatron_demix.pipeline import preflight, search_stages
from megatron_demix.pipeline.dag import Dag, build_dag
from megatron_demix.pipeline.reporting import write_report
from megatron_demix.pipeline.surrogates import fit_surrogates
from megatron_demix.pipeline.task_inputs import check_tasks
from megatron_demix.printing import show_choice
from megatron_demix.search.objective import Objective
from megatron_demix.study.load import load_study
from megatron_demix.terminal import shown

STUDY = """
name: s
domains:
  - {name: code, inputs: [code.jsonl], max_epochs: 100}
  - {name: english, inputs: [english.jsonl], max_epochs: 100}
  - {name: math, inputs: [math.jsonl], max_epochs: 100}
tokenizer: {type: byte}
model: {num_layers: 2, hidden_size: 32, num_attention_heads: 2}
train: {seq_length: 16, global_batch_size: 4}
base: {tokens: 640}
component: {maturity_seeds: 0, tokens: 320, anchor: {share: 0.2}}
search: {rounds: [24, 8], objective: {code: 6, math: 3, english: 1}, surrogate: ridge, candidates: 4000, top: 16,
         proxy_score: merged, bootstraps: 10}
final: {tokens: 1k}
"""


@pytest.fixture
def study_path(tmp_path: Path) -> Path:
    write_texts(tmp_path, "code", "english", "math")
    (tmp_path / "study.yaml").write_text(STUDY)
    return tmp_path / "study.yaml"


@pytest.mark.parametrize(
    "overrides",
    [
        ["domains.0.min_share=0.5", "domains.1.min_share=0.3", "domains.2.min_share=0.2"],
        ["search.groups={g: {domains: [code, math], highest: 0.1}}", "domains.1.max_share=0.9", "component.anchor.share=0.15"],
        ["domains.0.min_share=0.8666666666666667"],  # as large as the anchor lets it be
        ["search.groups={g: {domains: [code], lowest: 0.8666666666666667}}"],
    ],
)
def test_bounds_that_leave_one_mixture_are_refused(study_path, overrides):
    dag = build_dag(load_study(study_path, overrides), study_path, study_path.parent / "run")
    for stage in (dag.tokenizer, *dag.data.values()):
        stage.finish()
    with pytest.raises(MixtureError, match=r"leave one mixture, code 0\.\d+, english .* nothing to search for"):
        preflight.check(dag.foreseen("train"))


def searched(
    study_path: Path,
    *overrides: str,
    higher: bool = False,
    tasks: Mapping[str, Callable] | None = None,
    without: tuple[str, ...] = (),
) -> Dag:
    """The rounds, with -log(share) as every domain's loss (or its negative, as a score of which more is better).

    tasks: by name, what scores of tasks are at given shares; more is better. without: proxies whose loss of code is no number.
    """
    dag = build_dag(load_study(study_path, list(overrides)), study_path, study_path.parent / "run")
    for stage in (dag.tokenizer, *dag.data.values()):
        stage.finish()
    dag.rounds[0].proposal.finish()
    sign = -1 if higher else 1
    for r in dag.rounds:
        table = ScoreTable([Score(name, "", "higher" if higher else "lower") for name in dag.data])
        table.scores += [Score(name, "fraction", "higher") for name in tasks or {}]
        for entry in read_json(r.proposal.folder / "mixtures.json"):
            table.rows[entry["name"]] = {name: -sign * math.log(share) for name, share in entry["shares"].items()}
            table.rows[entry["name"]] |= {name: of(entry["shares"]) for name, of in (tasks or {}).items()}
        for name in table.rows.keys() & set(without):
            del table.rows[name]["code"]
        with publish(r.scores.folder, r.scores.key, "scores", {}) as folder:
            table.write(folder / "scores.json")
            if tasks:
                of_tasks = {"quiz": {"items": 4, "cut": 5}, "sums": {"items": 3, "cut": 0, "endless": 2, "stopped": 0}}
                write_json(folder / "tasks.json", dict.fromkeys(table.rows, of_tasks))
        r.fit.finish()
    return dag


def test_the_search_command_shows_the_mixture_and_where_it_is(study_path, capsys):
    dag = searched(study_path)
    for stage in dag.until("search"):
        if not stage.done():
            with publish(stage.folder, stage.key, stage.kind, {}):
                pass
    asked = ["search", str(study_path), "--runs", str(study_path.parent), "--set", "name=run"]
    assert main(asked) == 0
    lines = capsys.readouterr().out.splitlines()
    found = read_json(dag.choice.folder / "mixture.json")
    assert [line.split() for line in lines[1:4]] == [
        [name, f"{share:.1%}", f"{found['merge_weights'][name]:.1%}"] for name, share in found["weights"].items()
    ]
    assert lines[4].startswith(f"expected to be {found['optimum']['judged_gain'][0]:.2g} ± ")
    assert lines[5:] == [str(dag.choice.folder / "mixture.json")]
    assert main([*asked, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == found


def test_a_stack_lies_between_merged_and_interpolated_scores(study_path):
    dag = searched(study_path)
    merged = read_json(dag.rounds[0].fit.folder / "fit.json")["surrogates"]["code"]
    table = ScoreTable.read(dag.rounds[0].scores.folder / "scores.json")
    table.rows |= {f"component-{name}": {"code": 3.0, "english": 3.0, "math": 3.0} for name in dag.data}
    stacked = build_dag(load_study(study_path, ["search.proxy_score=stack"]), study_path, study_path.parent / "run")
    with publish(stacked.rounds[0].scores.folder, stacked.rounds[0].scores.key, "scores", {}) as folder:
        table.write(folder / "scores.json")
    stacked.rounds[0].fit.finish()
    measured = read_json(stacked.rounds[0].fit.folder / "fit.json")["surrogates"]["code"]["measured"]
    assert measured == pytest.approx([(value + 3) / 2 for value in merged["measured"]])


def test_the_search_goes_on_without_proxies_that_have_no_number(study_path):
    dag = searched(study_path, without=("r1_003", "r2_001"))
    fit = read_json(dag.rounds[-1].fit.folder / "fit.json")
    fitted = {name: facts["models"] for name, facts in fit["surrogates"].items()}
    assert set(fitted["math"]) - set(fitted["code"]) == {"r1_003", "r2_001"}
    assert read_json(dag.choice.folder / "mixture.json")["weights"]["code"] > 0.5
    assert "Round 1: 1 of 24 proxies have no finite objective" in write_report(dag).page.read_text()


def test_a_score_that_is_no_number_of_any_proxy_ends_the_search(study_path):
    with pytest.raises(CorruptInput, match="'code' is no finite number for any of 24 proxies"):
        searched(study_path, without=tuple(f"r1_{n:03d}" for n in range(24)))


def test_a_trained_proxy_has_its_own_score(study_path):
    with pytest.raises(ConfigError, match="proxy_score says what the score of a merged proxy is"):
        load_study(study_path, ["search.proxies=trained"])


def test_the_choice_carries_how_sure_it_is_what_it_gives_up_and_what_binds(study_path):
    dag = searched(study_path, "domains.0.max_share=0.5")
    found = read_json(dag.choice.folder / "mixture.json")
    # -log(share) weighted 6 : 3 : 1 is least at these shares; code may have .5, and the rest splits 3 : 1.
    assert found["weights"]["code"] == pytest.approx(0.5, abs=0.01)
    assert found["weights"]["math"] == pytest.approx(0.375, abs=0.04)
    assert [(b["constraint"], b["of"], b["side"], b["limit"]) for b in found["binding"]] == [
        ("max_share", "code", "at most", 0.5)
    ]
    assert found["expected_gain"][0] > 0.1
    assert set(found["predicted"]) == set(found["natural"]) == {"code", "english", "math"}
    assert found["optimum"]["shares"]["code"]["std"] < 0.05
    assert len(found["optimum"]["samples"]) == 10
    assert found["optimum"]["judged_probability"] == 1
    codes = [point["predicted"]["code"] for point in found["pareto"]]
    assert codes == sorted(codes)
    assert len(codes) > 8
    fit = read_json(dag.choice.folder / "fit.json")
    assert set(fit["surrogates"]) == {"code", "english", "math"}
    assert len(fit["objective"]) == 32


def test_groups_a_leash_fixed_shares_and_the_design_hold_in_every_round(study_path):
    settings = ("search.groups={skills: {domains: [code, math], highest: 0.6}}", "search.design=sobol", "search.max_kl=0.3")
    dag = searched(study_path, *settings, "domains.2.min_share=0.25", "domains.2.max_share=0.25")
    mixtures = [m["shares"] for r in dag.rounds for m in read_json(r.proposal.folder / "mixtures.json")]
    assert len(mixtures) == 32
    for shares in mixtures:
        assert shares["math"] == pytest.approx(0.25)
        assert shares["code"] + shares["math"] <= 0.6 + 1e-9
    assert {b["constraint"] for b in read_json(dag.choice.folder / "mixture.json")["binding"]} >= {"group", "max_share"}


@pytest.mark.parametrize("aim", ["worst", "percentile_rank"])
def test_other_aims(study_path, aim):
    dag = searched(study_path, f"search.aim={aim}", "search.objective={code: 1, math: 1, english: 1}", "search.bootstraps=0")
    found = read_json(dag.choice.folder / "mixture.json")
    assert found["aim"] == aim
    assert "optimum" not in found
    # All domains alike: near a third each, whatever is made of their losses.
    assert all(share == pytest.approx(1 / 3, abs=0.12) for share in found["weights"].values())


def test_proxies_and_the_found_mixture_have_one_objective(study_path):
    """The report draws both on one axis: their ranks have to be among the same random mixtures."""
    dag = searched(study_path, "search.aim=percentile_rank", "search.bootstraps=0")
    space = search_stages.search_space(dag.study, dag.data)
    fitted = fit_surrogates(dag.study, space, [[r.scores for r in dag.rounds]], [r.proposal for r in dag.rounds], None)
    objective, aim = dag.study.search.objective, dag.study.search.aim
    goal = Objective(space, fitted.surrogates, objective, aim=aim, seed=dag.study.seed + len(dag.rounds))
    found = read_json(dag.choice.folder / "mixture.json")
    values_1, stds_1 = goal.predict(np.array([list(found["weights"].values())]))
    assert found["objective"] == pytest.approx([values_1[0], stds_1[0]])
    told = read_json(dag.choice.folder / "fit.json")["objective"]
    assert told == pytest.approx(dict(zip(fitted.names, goal.measured(), strict=True)))


def test_a_score_of_weight_0_is_predicted_and_has_no_part_in_the_choice(study_path):
    found = read_json(searched(study_path, "search.objective={code: 1, math: 1, english: 0}").choice.folder / "mixture.json")
    assert set(found["predicted"]) == {"code", "english", "math"}
    assert found["weights"]["english"] == pytest.approx(0.2 / 3, abs=0.03), "no more than the anchor's part"
    assert set(found["pareto"][0]["predicted"]) == {"code", "math"}


def test_scores_of_which_more_is_better_are_maximised(study_path):
    found = read_json(searched(study_path, higher=True).choice.folder / "mixture.json")
    assert found["weights"]["code"] == pytest.approx(0.6, abs=0.06)


def test_rounds_that_would_win_nothing_stay_empty(study_path):
    dag = searched(study_path, "search.stop=0.5", "search.rounds=[24, 8, 8]")
    assert read_json(dag.rounds[0].fit.folder / "fit.json")["spread"]["enough"]
    assert [len(read_json(r.proposal.folder / "mixtures.json")) for r in dag.rounds] == [24, 0, 0]
    assert read_json(dag.choice.folder / "mixture.json")["weights"]["code"] == pytest.approx(0.6, abs=0.06)
    # A round without mixtures is finished without starting any rank.
    for name in ("base", "components/code"):
        assert not (study_path.parent / "run" / name).exists()
    scores = dag.rounds[1].scores
    assert not scores.begin()
    assert ScoreTable.read(scores.work / "scores.json").rows == {}


def test_once_a_round_is_empty_all_later_ones_are(study_path, monkeypatch):
    spreads = iter([{"enough": True, "expected_regret": 0.1, "expected_gain": 2.0}, {"enough": False}])
    monkeypatch.setattr(search_stages, "_spread_so_far", lambda *of: next(spreads))
    dag = searched(study_path, "search.stop=0.05", "search.rounds=[24, 8, 8, 8]")
    assert [len(read_json(r.proposal.folder / "mixtures.json")) for r in dag.rounds] == [24, 0, 0, 0]
    told = [read_json(r.fit.folder / "fit.json").get("spread", {}).get("expected_gain") for r in dag.rounds]
    assert told == [2.0, 2.0, 2.0, None]


def test_what_decides_whether_a_round_stays_empty_is_in_its_key(study_path):
    def key(*overrides: str) -> str:
        dag = build_dag(load_study(study_path, list(overrides)), study_path, study_path.parent / "run")
        return dag.rounds[0].fit.key

    stop = "search.stop=0.05"
    assert len({key(stop), key(stop, "search.bootstraps=20"), key(stop, "search.top=8")}) == 3
    assert key() == key("search.bootstraps=20") == key("search.top=8")


def test_a_space_without_mixtures_names_the_setting(study_path):
    with pytest.raises(MixtureError, match=r"'math': min_share asks for 0\.8, but max_epochs x its tokens .* allow a share of"):
        searched(study_path, "domains.2.min_share=0.8", "domains.2.max_epochs=0.1")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("search.groups={g: {domains: [law]}}", "search.groups.g: 'law' is not one of code, english, math"),
        ("search.rounds=[7, 20]", "rounds: the first has 7 proxies, but a surrogate needs 8"),
        ("search.aim=worst", "aim 'worst' compares scores as equals"),
        ("search={rounds: [8], objective: {code: 1}, stop: 0.1, bootstraps: 2}", "stop needs bootstraps of 10 or more"),
        ("search.bootstraps=1", "bootstraps: one search says nothing of how sure it is; set it to 0, or to 2 or more"),
        ("search.design=grid", "'dirichlet', 'sobol', 'lattice' or 'optimal'"),
        ("search.max_kl=0", "a number above 0, found 0"),
        ("domains.0.max_share=1.5", "a number of at most 1, found 1.5"),
    ],
)
def test_unusable_settings_are_refused(study_path, override, message):
    with pytest.raises(ConfigError, match=message):
        load_study(study_path, [override])


TASKS = "evaluate.tasks=[{name: quiz, format: arc, path: quiz.jsonl}, {name: sums, format: gsm8k, path: sums.jsonl}]"


@pytest.fixture
def with_tasks(study_path: Path) -> Path:
    write_lines(study_path.parent / "quiz.jsonl", ARC)
    write_lines(study_path.parent / "sums.jsonl", GSM8K)
    return study_path


def test_a_task_is_an_objective(with_tasks, capsys):
    """Accuracy is best where english has most, and its weight beats the losses'."""
    quiz = {"quiz/acc": lambda shares: shares["english"] ** 0.5, "sums/exact_match": lambda shares: 0.0}
    objective = "search.objective={code: 0.01, quiz/acc: 1, sums/exact_match: 5}"
    dag = searched(with_tasks, TASKS, objective, "domains.1.max_share=0.8", tasks=quiz)
    found = read_json(dag.choice.folder / "mixture.json")
    assert found["weights"]["english"] == pytest.approx(0.8, abs=0.02)
    assert found["predicted"]["quiz/acc"][0] == pytest.approx(0.8**0.5, abs=0.03)
    assert "sums/exact_match" not in found["predicted"]
    # What is the same for every proxy prefers none: the search goes on without it, and says so.
    assert read_json(dag.choice.folder / "fit.json")["constant"] == {"sums/exact_match": 0.0}
    capsys.readouterr()
    show_choice(dag, as_json=False)
    assert capsys.readouterr().out.splitlines()[-2:] == [
        "left out of the objective, being the same for every proxy: sums/exact_match",
        shown(dag.choice.folder / "mixture.json"),
    ]
    page = write_report(dag).page.read_text()
    assert "sums/exact_match was 0 for every proxy: the search could not use it" in page
    assert "compared on the very items of quiz, sums" in page, "arc has a validation split, but not in this one file"
    assert "Other tasks than quiz, sums." in page
    assert (
        "Of the 96 answers to sums that models gave in the search, 64 did not end by themselves and 0 had to be stopped" in page
    )
    assert "5 texts of quiz are longer than the models read" in page


def test_nothing_to_prefer(with_tasks):
    with pytest.raises(IncompatibleInputs, match=r"objective: sums/exact_match is 0 for every proxy.*bits_per_byte"):
        searched(with_tasks, TASKS, "search.objective={sums/exact_match: 1}", tasks={"sums/exact_match": lambda shares: 0.0})


def test_the_objective_names_scores_of_tasks(with_tasks):
    with pytest.raises(
        ConfigError, match=r"search.objective: 'quiz/accuracy' is not one of code, .*; did you mean 'quiz/acc'\?"
    ):
        load_study(with_tasks, [TASKS, "search.objective={quiz/accuracy: 1}"])
    with pytest.raises(ConfigError, match=r"evaluate\.tasks: 'quiz' is named twice"):
        load_study(with_tasks, [TASKS.replace("sums,", "quiz,")])
    with pytest.raises(ConfigError, match="max_new_tokens of 'sums' is 16, but the model reads 16 tokens"):
        load_study(with_tasks, [TASKS.replace("sums.jsonl", "sums.jsonl, max_new_tokens: 16")])
    with pytest.raises(ConfigError, match="scores: format gsm8k has no 'acc', only exact_match, bits_per_byte"):
        load_study(with_tasks, [TASKS.replace("sums.jsonl", "sums.jsonl, scores: [acc]")])


def test_task_files_are_read_before_anything_runs(with_tasks, capsys):
    def check(*lines: object) -> None:
        write_lines(with_tasks.parent / "quiz.jsonl", lines)
        check_tasks(build_dag(load_study(with_tasks, [TASKS]), with_tasks, with_tasks.parent / "run").tasks)

    check(*ARC)
    with pytest.raises(
        CorruptInput, match=r"quiz\.jsonl line 1: not in the format arc: 'answerKey' is 'Z', expected one of A, B"
    ):
        check({**ARC[0], "answerKey": "Z"})
    with pytest.raises(CorruptInput, match="task 'quiz': no item of split 'validation'"):
        check()
    check(*ARC)
    write_lines(with_tasks.parent / "sums.jsonl", [{**GSM8K[0], "question": "half a smile \ud83d"}])
    with pytest.raises(CorruptInput, match=r"line 1: .*'question' is .*, expected text without halves of surrogate pairs"):
        check(*ARC)
    (with_tasks.parent / "quiz.jsonl").write_text("{")
    assert main(["prepare", str(with_tasks), "--set", TASKS, "--runs", str(with_tasks.parent / "runs")]) == 7
    assert "quiz.jsonl line 1: not JSON" in capsys.readouterr().err
    assert not list(with_tasks.parent.glob("runs/*/tokenizer"))


def test_task_files_that_change_while_a_study_runs_are_not_scored(with_tasks):
    tasks = build_dag(load_study(with_tasks, [TASKS]), with_tasks, with_tasks.parent / "run").tasks
    tasks.search.check_unchanged()
    write_lines(with_tasks.parent / "sums.jsonl", GSM8K[:2])
    with pytest.raises(IncompatibleInputs, match=r"task 'sums': files of .*sums\.jsonl have changed since this run began"):
        tasks.search.check_unchanged()


def test_task_files_are_part_of_the_keys(with_tasks):
    def keys() -> tuple[str, str]:
        dag = build_dag(load_study(with_tasks, [TASKS]), with_tasks, with_tasks.parent / "run")
        return dag.rounds[0].scores.key, dag.final_scores.key

    first = keys()
    assert keys() == first
    write_lines(with_tasks.parent / "sums.jsonl", GSM8K[:2])
    assert all(a != b for a, b in zip(keys(), first, strict=True))
    (with_tasks.parent / "quiz.jsonl").unlink()
    with pytest.raises(ConfigError, match=r"task 'quiz': .*does not exist"):
        keys()
    planned = build_dag(load_study(with_tasks, [TASKS]), with_tasks, with_tasks.parent / "run", absent_inputs="allowed")
    assert planned.rounds[0].scores.ranks == 1
