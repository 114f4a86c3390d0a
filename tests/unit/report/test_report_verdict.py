"""The verdict says what the numbers say, and no more."""

import dataclasses

import numpy as np
import pytest

from megatron_demix.errors import ConfigError
from megatron_demix.report.caveats import not_measured, warnings
from megatron_demix.report.data import FinalRun, ReportData
from megatron_demix.report.verdict import judge


def final_runs(objectives):
    """By mixture, the objective of each seed."""
    return [FinalRun(name, s, {"code": v}) for name, values in objectives.items() for s, v in enumerate(values)]


def verdict_on(**objectives):
    return judge(ReportData("s", {}, {"code": 1}, final=final_runs(objectives)))


def test_a_win_beyond_the_noise():
    v = verdict_on(uniform=[1.300, 1.304], found=[1.200, 1.204])
    assert (v.outcome, v.headline) == ("won", "The found mixture won")
    assert [g.mixture for g in v.groups] == ["found", "uniform"]
    assert v.noise.sd == pytest.approx(0.004 / np.sqrt(2))
    (comparison,) = v.comparisons
    assert comparison.difference == pytest.approx(-0.1)
    # Student's t at 0.975 with 2 degrees of freedom is 4.302653; the standard error is sd * sqrt(1/2 + 1/2).
    assert comparison.interval == pytest.approx((-0.1 - 4.302653 * v.noise.sd, -0.1 + 4.302653 * v.noise.sd), abs=1e-6)
    assert "1.2020 bits per byte with the found mixture, against 1.3020 (uniform)" in v.sentence
    assert "That is 0.1000 (7.68 %) better than uniform, the best baseline" in v.sentence
    assert "95% interval of that is +0.0878 to +0.1122" in v.sentence
    assert "seed standard deviation of 0.0028 (2 seeds a mixture, 2 degrees of freedom)" in v.sentence


def test_a_mean_that_mixes_units_has_no_percentage():
    runs = [FinalRun(name, 0, {"code": 1.2, "acc": acc}) for name, acc in (("found", 0.5), ("uniform", 0.4))]

    def sentence(**objective):
        return judge(ReportData("s", {}, objective, higher_is_better=frozenset({"acc"}), final=runs)).sentence

    assert "That is 0.0500 better than uniform" in sentence(code=1, acc=1)
    assert "That is 0.1000 (25.00 %) better than uniform" in sentence(acc=1, code=0)


def test_a_small_difference_is_no_win():
    v = verdict_on(found=[1.200, 1.210], uniform=[1.206, 1.216])
    assert (v.outcome, v.headline) == ("within noise", "No clear winner: within the seed noise")


def test_one_baseline_that_is_clearly_better_is_a_loss():
    v = verdict_on(found=[1.200, 1.201], uniform=[1.300, 1.301], natural=[1.100, 1.101])
    assert v.outcome == "lost"
    assert [c.outcome for c in v.comparisons] == ["won", "lost"]
    assert "worse than natural, the best baseline" in v.sentence


def test_beating_only_some_baselines_is_no_win():
    assert verdict_on(found=[1.200, 1.201], uniform=[1.300, 1.301], natural=[1.200, 1.202]).outcome == "within noise"


def test_one_seed_says_nothing_about_noise():
    v = verdict_on(found=[1.2], uniform=[1.3])
    assert (v.outcome, v.noise) == ("unknown", None)
    assert v.headline == "Compared with one seed each: the noise is unknown"
    assert "Set final.seeds to 2 or more" in v.sentence


def test_unequal_numbers_of_seeds_are_told():
    assert "(seeds: found 3, uniform 1, 2 degrees of freedom)" in verdict_on(found=[1.2, 1.21, 1.22], uniform=[1.3]).sentence


def test_nothing_to_compare():
    assert judge(ReportData("s", {}, {"code": 1})).headline == "No verdict yet"
    assert verdict_on(found=[1.2, 1.3]).sentence == "Mixture found: 1.2500 bits per byte. There is nothing to compare it with."
    assert verdict_on(uniform=[1.2]).outcome == "unknown"


def test_a_run_without_a_score_of_the_objective_is_refused():
    with pytest.raises(
        ConfigError, match=r"final run 'found', seed 1, has no score 'code', which the objective needs; it has math"
    ):
        ReportData("s", {}, {"code": 1}, final=[FinalRun("found", 1, {"math": 1.0})])
    with pytest.raises(ConfigError, match=r"report of 's': objective is \{\}, expected a positive weight"):
        ReportData("s", {}, {})


def test_warnings_name_what_is_weak(whole):
    found = warnings(whole, judge(whole))
    assert any("surrogate of math orders proxies it has not seen with a rank correlation of 0.310" in w for w in found)
    assert not any("surrogate of code" in w for w in found)
    off = [w.split(": it consists of whole documents")[0] for w in found if w.startswith("The final data of")]
    assert off == [
        "The final data of found holds 33.3% math where 40.0% were asked for",
        "The final data of natural holds 39.6% math where 25.0% were asked for",
    ]
    assert any(w.startswith("2 seeds a mixture give a rough estimate") for w in found)
    one_seed = dataclasses.replace(whole, objective={"code": 1}, final=final_runs({"found": [1.2], "uniform": [1.3]}))
    assert any("trained with one seed" in w for w in warnings(one_seed, judge(one_seed)))


def test_a_weak_surrogate_is_named_while_the_next_round_is_scored(whole):
    going_on = dataclasses.replace(whole, rounds=[*whole.rounds, dataclasses.replace(whole.rounds[-1], scores={}, fit={})])
    assert any("surrogate of math orders proxies it has not seen" in w for w in warnings(going_on, judge(going_on)))


def test_a_mixture_at_the_edge_of_what_proxies_stand_for_is_pointed_out(whole):
    edge = dataclasses.replace(whole.choice, weights={"code": 0.999, "math": 0.001}, shares={"code": 0.75, "math": 0.25})
    found = warnings(dataclasses.replace(whole, choice=edge), judge(whole))
    assert any("hardly any merge weight on math: " in w and "component.anchor.share" in w for w in found)
    pure = dataclasses.replace(edge, shares={"code": 0.999, "math": 0.001})
    for choice in (whole.choice, pure):
        assert not any("merge weight" in w for w in warnings(dataclasses.replace(whole, choice=choice), judge(whole)))


def test_what_was_not_measured_is_always_said(whole):
    for data in (whole, ReportData("s", {}, {"code": 1})):
        text = " ".join(not_measured(data, judge(data)))
        assert "no such reference models were trained" in text
        assert "interpolating the components' own scores" in text
        assert "no downstream task was run" in text
    assert "no final run is finished" in text
