"""The merged centroid against trained ones: what counts as a gap, and what the page says of it."""

from dataclasses import replace

import pytest

from megatron_demix.report import caveats
from megatron_demix.report.build import build_report
from megatron_demix.report.data import Maturity
from megatron_demix.report.maturity import gaps, maturity_warning
from megatron_demix.report.verdict import judge

BASE = {"code": 3.0, "math": 3.0}


def checked(whole, merged, *trained):
    return replace(whole, objective={"code": 1.0, "math": 1.0}, maturity=Maturity(merged, trained, BASE))


def test_a_gap_beyond_the_seed_noise_warns(whole):
    seeds = {"code": 2.0, "math": 2.0}, {"code": 2.02, "math": 2.02}
    data = checked(whole, {"code": 2.5, "math": 2.01}, *seeds)
    code, mathematics = gaps(data)
    # Two scores of two seeds .02 apart: sd .02 / sqrt 2, 2 degrees of freedom (t = 4.303), and the merged one's own noise.
    half = 4.303 * (0.02 / 2**0.5) * 1.5**0.5
    assert code.gap == pytest.approx(0.49)
    assert code.interval == pytest.approx((0.49 - half, 0.49 + half), abs=1e-4)
    assert code.kept == pytest.approx(1 - 0.49 / 0.99)
    assert code.beyond_noise
    assert not mathematics.beyond_noise
    warning = maturity_warning(data)
    assert warning is not None
    assert "beyond the seed noise: code by 0.4900." in warning
    assert warning in caveats.warnings(data, judge(data))


def test_where_a_mixed_component_is_the_centroid_the_gap_is_that_of_merging_without_it(whole, tmp_path):
    seeds = {"code": 2.0, "math": 2.0}, {"code": 2.02, "math": 2.02}
    data = checked(whole, {"code": 2.5, "math": 2.01}, *seeds)
    assert data.maturity is not None
    data = replace(data, maturity=replace(data.maturity, is_mixed=True), mixed=["centroid", "skills"])
    warning = maturity_warning(data)
    assert warning is not None
    assert warning.startswith("The merged centroid without component.mixed is worse")
    assert "may rank mixtures wrongly away from the mixed components" in warning
    assert any("correction by centroid, skills is noise" in item for item in caveats.not_measured(data, judge(data)))
    build_report(data, tmp_path / "index.html")
    page = (tmp_path / "index.html").read_text()
    assert "by 2 components that were trained on mixtures (component.mixed): centroid, skills." in page
    assert "with it, a proxy at this mixture is the first of these models" in page


def test_one_seed_says_nothing_of_noise_and_warns_of_nothing(whole, tmp_path):
    data = checked(whole, {"code": 2.9, "math": 2.0}, {"code": 2.0, "math": 2.0})
    assert [gap.interval for gap in gaps(data)] == [None, None]
    assert maturity_warning(data) is None
    build_report(data, tmp_path / "index.html")
    page = (tmp_path / "index.html").read_text()
    assert "Did the base branch late enough?" in page
    assert "one seed: unknown" in page


def test_a_score_of_which_more_is_better_turns_the_gap_round(whole):
    data = checked(whole, {"code": 0.4, "math": 2.0}, {"code": 0.9, "math": 2.0})
    data = replace(data, higher_is_better=frozenset({"code"}))
    assert gaps(data)[0].gap == pytest.approx(0.5)


def test_noise_is_pooled_over_scores_of_one_unit(whole):
    """Bits per byte say nothing of how much shares of right answers scatter."""
    base, merged = {**BASE, "quiz/acc": 0.1}, {"code": 2.1, "math": 2.0, "quiz/acc": 0.4}
    trained = [{"code": 2.0, "math": 2.0, "quiz/acc": 0.5}, {"code": 2.0, "math": 2.02, "quiz/acc": 0.7}]
    data = replace(whole, maturity=Maturity(merged, trained, base), higher_is_better=frozenset({"quiz/acc"}))
    halves = [gap.interval[1] - gap.gap for gap in gaps(data) if gap.interval]
    # Losses: a pair .02 apart and one of equals (2 degrees of freedom); the task: one pair .2 apart (1).
    of_losses, of_task = 4.303 * 0.01 * 1.5**0.5, 12.706 * 0.2 / 2**0.5 * 1.5**0.5
    assert halves == pytest.approx([of_losses, of_losses, of_task], rel=1e-3)


def test_a_score_that_some_model_lacks_is_left_out(whole):
    """One that was no finite number is in no table."""
    data = checked(whole, {"code": 2.5, "math": 2.0}, {"code": 2.0})
    assert [gap.score for gap in gaps(data)] == ["code"]


def test_without_the_check_there_is_no_section(whole, tmp_path):
    assert gaps(whole) == []
    build_report(whole, tmp_path / "index.html")
    assert "branch late enough" not in (tmp_path / "index.html").read_text()
