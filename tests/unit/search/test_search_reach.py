from pathlib import Path

import numpy as np
import pytest

from megatron_demix.mixture import Mixture
from megatron_demix.search.from_tables import choose_from_tables, predict_scores
from megatron_demix.search.reach import distances, far_off
from megatron_demix.search.space import SearchSpace
from megatron_demix.search.surrogate import fit_surrogate
from megatron_demix.search.tables import Table

DOMAINS = ("code", "math", "law")


def mixtures(most_code: float) -> Table:
    code_M = np.linspace(0, most_code, 21)
    rows_MD = np.stack([code_M, (1 - code_M) / 2, (1 - code_M) / 2], axis=1)
    return Table(Path("m.csv"), "id", tuple(f"m{m}" for m in range(21)), DOMAINS, rows_MD)


def scores(table: Table) -> Table:
    return Table(Path("s.csv"), "id", table.ids, ("loss",), 3 - table.values_MC[:, :1])


def test_distances_are_total_variations_to_what_was_measured() -> None:
    table = mixtures(0.4)
    surrogate = fit_surrogate(table.values_MC, scores(table).values_MC[:, 0], "ridge")
    nearest_N, usual = distances({"loss": surrogate}, np.array([[0.4, 0.3, 0.3], [0.9, 0.05, 0.05], [0.01, 0.495, 0.495]]))
    np.testing.assert_allclose(nearest_N, [0, 0.5, 0.01], atol=1e-12)
    # Neighbours lie .02 of code apart.
    assert usual == pytest.approx(0.02)
    assert [far_off(nearest, usual) for nearest in nearest_N] == [False, True, False]


def test_predictions_beyond_what_was_measured_are_said() -> None:
    table, said = mixtures(0.4), []
    near = Table(Path("w.csv"), "id", ("near",), DOMAINS, np.array([[0.3, 0.35, 0.35]]))
    predict_scores(table, scores(table), near, kind="ridge", seed=0, notice=said.append)
    assert not [text for text in said if "extrapolated" in text]
    both = Table(Path("w.csv"), "id", ("near", "far"), DOMAINS, np.array([[0.3, 0.35, 0.35], [0.9, 0.05, 0.05]]))
    predict_scores(table, scores(table), both, kind="ridge", seed=0, notice=said.append)
    assert "1 of 2 mixtures to predict lie farther from all measured ones" in said[-1]
    assert "far: 0.5" in said[-1]


def test_a_chosen_mixture_beyond_what_was_measured_is_said() -> None:
    natural = Mixture.uniform(DOMAINS)
    space, said = SearchSpace(natural, natural, 0.0), []
    sizes = {"candidates": 2000, "top": 4, "bootstraps": 0, "next_round": 0}
    more = {"aim": "mean", "higher_is_better": (), "kind": "ridge", "seed": 0, "notice": said.append, **sizes}
    table = mixtures(0.4)
    report, _ = choose_from_tables(space, table, scores(table), {"loss": 1}, **more)
    assert report["weights"]["code"] > 0.9
    assert report["distance"]["nearest"] > 0.5
    assert report["distance"]["usual"] == pytest.approx(0.02)
    assert "what is predicted there is extrapolated" in said[-1]
    wide = mixtures(1.0)
    said.clear()
    report, _ = choose_from_tables(space, wide, scores(wide), {"loss": 1}, **more)
    assert report["distance"]["nearest"] < report["distance"]["usual"]
    assert not [text for text in said if "extrapolated" in text]


def test_what_has_any_of_the_scores_counts_as_measured() -> None:
    table = mixtures(0.4)
    first_M = np.arange(21) < 11
    losses_M = scores(table).values_MC[:, 0]
    surrogates = {
        name: fit_surrogate(table.values_MC, losses_M, "ridge", measured_M=measured_M)
        for name, measured_M in {"first": first_M, "second": ~first_M}.items()
    }
    nearest_N, usual = distances(surrogates, table.values_MC)
    np.testing.assert_allclose(nearest_N, 0, atol=1e-12)
    assert usual == pytest.approx(0.02)


def test_mixtures_that_were_measured_again_are_no_neighbours() -> None:
    table = mixtures(0.4)
    rows_MD = np.repeat(table.values_MC, 3, axis=0)
    losses_M = 3 - rows_MD[:, 0] + 0.01 * np.random.default_rng(0).standard_normal(len(rows_MD))
    _, usual = distances({"loss": fit_surrogate(rows_MD, losses_M, "ridge")}, table.values_MC)
    assert usual == pytest.approx(0.02)
