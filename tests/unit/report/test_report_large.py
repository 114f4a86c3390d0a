"""Large studies: what is drawn of them, what is said of the rest, and that small ones lose nothing."""

import csv
import math
import re
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from invented_study import invent
from test_report_page import Page

from megatron_demix.pipeline import reporting
from megatron_demix.report import caveats, figures, selection
from megatron_demix.report.build import build_report, proxy_table, render
from megatron_demix.report.data import Fit, Proxy, ReportData, Round
from megatron_demix.report.drawing import MOST_TIPS
from megatron_demix.report.ranks import draw_ranks
from megatron_demix.report.selection import MOST_DOMAINS, MOST_ROWS, MOST_SCORES
from megatron_demix.report.verdict import judge


@pytest.fixture(scope="module")
def large() -> ReportData:
    return invent(100, 120, 800)


@pytest.fixture(scope="module")
def page(large) -> str:
    return render(large)


@pytest.fixture(scope="module")
def medium() -> ReportData:
    return invent(13, 25, 201)


def plot(page: str, label: str) -> str:
    (found,) = re.findall(rf'<svg [^>]*aria-label="{label}".*?</svg>', page, re.DOTALL)
    return found


def table_of(page: str, summary: str) -> list[str]:
    """The rows of the body of the first table after these words."""
    return re.findall(r"<tr.*?</tr>", page.split(summary, 1)[1].split("<tbody>", 1)[1].split("</tbody>", 1)[0], re.DOTALL)


def test_a_large_study_gives_a_page_that_opens(page):
    """71 MB and 715,000 elements before there were limits."""
    assert len(page.encode()) < 3_000_000
    assert len(re.findall("<[a-z]", page)) < 30_000
    Page(page)


def test_only_the_scores_that_matter_are_drawn_and_all_are_listed(large, page):
    assert page.count('aria-label="predicted against measured') == MOST_SCORES
    assert len(re.findall(r'aria-label="\S+ against the share of', page)) == MOST_SCORES
    said = (
        "Of 120 scores 24 are drawn: the first 16 of 106 with the same, largest weight, and of the others the 8 "
        "whose surrogates rank worst."
    )
    assert page.count(said) == 2
    assert 'The others are in <a href="#all-scores">' in page
    rows = table_of(page, "All scores")
    assert len(rows) == 120
    assert sum("<td>yes</td>" in row for row in rows) == MOST_SCORES
    fit = large.rounds[-1].fit["papers-biology-3"]
    cells = re.findall("<td>(.*?)</td>", next(row for row in rows if "papers-biology-3<" in row))
    assert cells == ["papers-biology-3", "1", "log linear", fit.correlation, f"{fit.rmse:.2g}", "yes"]
    assert (
        "Of 106 scores in the objective 4 are drawn, each against each: the first 4 of 106 with the same, largest weight."
        in page
    )
    assert page.count('aria-label="Pareto front') == 6


def test_the_largest_weights_and_the_worst_surrogates_are_chosen(large):
    objective = {name: float(i) for i, name in enumerate(large.objective)}
    order = selection.drawn_scores(replace(large, objective=objective))
    assert order[:16] == list(reversed(objective))[:16]
    fits = large.rounds[-1].fit
    others = {name: fits[name].spearman for name in objective if name not in order}
    assert max(fits[name].spearman for name in order[16:]) <= min(others.values())
    three = replace(large, objective=dict.fromkeys(order[:3], 1.0))
    assert "24 are drawn: the 3 in the objective, and of the others the 21 whose" in selection.said_of_scores(three)
    assert "24 are drawn: the 16 with the largest weights, and of the others the 8 whose" in selection.said_of_scores(
        replace(large, objective=objective)
    )
    unfitted = replace(three, rounds=[replace(r, fit={}) for r in large.rounds])
    assert "the 3 in the objective, and of the others 21." in selection.said_of_scores(unfitted)
    assert len(selection.drawn_scores(unfitted)) == MOST_SCORES


def test_points_without_room_for_texts_have_none_and_lines_are_a_selection(page):
    dense = plot(page, 'wiki-english-0 against the share of [^"]*')
    assert dense.count("h0") == 800
    assert "<title>" not in dense
    lines = plot(page, "shares of every proxy and its objective")
    assert lines.count("<title>") == figures.MOST_LINES
    assert "Drawn are the best tenth and some of the others, 250 of 800 proxies." in page
    few = invent(3, 3, MOST_TIPS)
    assert plot(render(few), 'wiki-english-0 against the share of [^"]*').count("<title>") == MOST_TIPS


def test_points_beyond_a_thousand_are_thinned_and_it_is_said():
    data = invent(2, 2, 1200)
    page = render(data)
    assert plot(page, "predicted against measured wiki-english-0").count("h0") == 1000
    assert page.count("Drawn are 1000 of 1200 proxies.") == 2


def test_of_many_domains_the_largest_are_drawn_and_the_others_added_up(large, page):
    spread = plot(page, "distribution of the optimum over resampled proxies")
    drawn = selection.drawn_domains(large)
    assert len(drawn) == MOST_DOMAINS
    assert all(f">{name}<" in spread for name in drawn)
    others = 1 - sum(large.choice.shares[name] for name in drawn)
    assert f"The 88 others have {100 * others:.1f} % of the data together, and at these optima" in page
    assert (
        "Of 100 domains the 7 that are largest in the found or the natural mixture have a colour; all are in the table." in page
    )
    assert page.count("93 others") >= 4  # bars, and a curve of the components
    sizes = {d.name: max(d.natural_share, large.choice.shares[d.name]) for d in large.domains}
    assert min(sizes[name] for name in drawn) >= max(size for name, size in sizes.items() if name not in drawn)
    assert len(table_of(page, "93 others")) == 100
    colours = [index for index in selection.colour_indices(large).values() if index is not None]
    assert colours == list(range(7))


def test_the_table_of_proxies_has_the_best_and_the_latest_and_names_the_file_with_all(large, page):
    rows = table_of(page, "proxies, one by one")
    assert len(rows) == MOST_ROWS
    assert "Of 800 proxies the best 150 and the latest 50, with 24 of 120 scores and 12 of 100 domains." in page
    assert 'and with merge weights: <a href="proxies.csv">proxies.csv</a>, beside this page.' in page
    assert all(len(re.findall("<td>", row)) == 3 + MOST_SCORES + MOST_DOMAINS for row in rows)
    names = {re.search("<td>(.*?)</td>", row)[1] for row in rows}
    assert names >= {p.name for p in large.rounds[-1].mixtures[-50:]}
    values = {p.name: large.objective_of(r.scores[p.name]) for r in large.rounds for p in r.mixtures}
    assert names >= set(sorted(values, key=values.__getitem__)[:150])


def test_tables_with_a_column_a_score_are_turned(large, page):
    assert len(table_of(page, "What the search predicts for it")) == 121
    final = table_of(page, '<section id="final">')
    assert len(final) == 121
    assert "<th>found</th><th>natural</th><th>uniform</th><th>base</th>" in page
    assert "Seeds: found 2, natural 2, uniform 2. base: a model that had no final run, on the same split." in page
    assert "<th>found, seed 1</th><th>found, seed 2</th>" in page
    assert "Objective: the mean of 106 scores (wiki-english-0, " in page
    uneven = replace(large, objective=large.objective | {"wiki-law-5": 2.0})
    assert "Objective: 2 × wiki-law-5 + 1 × wiki-english-0 + " in render(replace(uneven, rounds=[], choice=None))


def test_many_runs_of_one_group_are_told_apart_by_the_domains_coloured_elsewhere(large, page):
    curves = plot(page, "loss curves of components")
    assert re.findall(r">([^<>]+)</text>", curves)[-8:] == [*selection.drawn_domains(large)[:7], "93 others"]
    long = {
        f"components/{i}": {"iteration": list(range(9000)), "lm loss": [2.0 + j % 7 for j in range(9000)]} for i in range(20)
    }
    assert len(figures.loss_curves("components", long)) < 150_000


def test_many_domains_of_which_little_is_known(medium):
    def said(**present):
        data = ReportData("s", {}, medium.objective, **{name: getattr(medium, name) for name in present if present[name]})
        Page(render(data))
        return selection.said_of_domains(data)

    assert said(rounds=True) == "Of 13 domains the 12 that are largest in any proxy are drawn."
    assert said(domains=True) == "Of 13 domains the 12 that are largest in the natural mixture are drawn."
    assert said(choice=True) == "Of 13 domains the 12 that are largest in the found mixture are drawn."


def test_just_beyond_every_limit(medium):
    page = render(medium)
    Page(page)
    assert "Of 25 scores 24 are drawn" in page
    assert "Of 13 domains the 12 that are largest" in page
    assert "with 24 of 25 scores and 12 of 13 domains." in page
    assert "6 others" in page  # 7 of 13 have a colour


def test_at_every_limit_nothing_is_left_out():
    data = invent(MOST_DOMAINS, MOST_SCORES, MOST_ROWS)
    page = render(data)
    assert not re.search(r"scores \d+ are drawn|domains the|Drawn are|\d others|All scores|one by one", page)
    assert page.count("are drawn") == 1  # of pairs of scores
    assert page.count('aria-label="predicted against measured') == MOST_SCORES
    assert len(table_of(page, "every proxy</summary>")) == MOST_ROWS
    assert selection.drawn_domains(data) == data.domain_names
    assert selection.drawn_scores(data) == data.score_names


def test_a_small_study_says_nothing_of_limits(whole):
    page = render(whole)
    assert not re.search(r"are drawn|Drawn are|\d others|All scores|one by one|class=\"scroll tall\"", page)


def test_the_table_beside_the_page_has_every_proxy_score_and_share(large, tmp_path):
    build_report(large, tmp_path / "index.html")
    with (tmp_path / "proxies.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["proxy"] for row in rows] == [p.name for r in large.rounds for p in r.mixtures]
    assert len(rows[0]) == 3 + 120 + 100 + 100
    proxy, scores = large.rounds[1].mixtures[5], large.rounds[1].scores
    row = next(row for row in rows if row["proxy"] == proxy.name)
    assert row["round"] == "2"
    assert float(row["objective"]) == pytest.approx(large.objective_of(scores[proxy.name]))
    for kind, values in (("score", scores[proxy.name]), ("share", proxy.shares), ("weight", proxy.weights)):
        assert {k: float(row[f"{kind}:{k}"]) for k in values} == pytest.approx(dict(values), rel=1e-6)


def test_what_is_not_known_of_a_proxy_is_an_empty_cell(whole):
    first = whole.rounds[0]
    scores = {name: row | {"code": math.nan} for name, row in first.scores.items() if name != "r1_1"}
    text = proxy_table(replace(whole, rounds=[replace(first, scores=scores)], final=[], proxies="trained"))
    header, one, two, *_ = text.splitlines()
    assert header == "proxy,round,objective,score:code,score:math,share:code,share:math"  # trained: no merge weights
    assert one.startswith("r1_0,1,,,")
    assert two.startswith("r1_1,1,,,,0.")


def test_a_report_without_proxies_leaves_no_table_of_another(whole, tmp_path):
    build_report(whole, tmp_path / "index.html")
    build_report(replace(whole, rounds=[]), tmp_path / "index.html")
    assert [p.name for p in tmp_path.iterdir()] == ["index.html"]
    assert "proxies.csv" not in (tmp_path / "index.html").read_text()


def test_a_finished_report_has_a_table_of_its_own(whole, tmp_path, monkeypatch):
    dag = SimpleNamespace(run=tmp_path, final_scores=SimpleNamespace(key="0123456789ab"))
    monkeypatch.setattr(reporting, "collect", lambda dag: whole)
    folder = reporting.write_report(dag).page.parent
    page = folder / "finished-0123456789ab.html"
    assert reporting.finished_reports(tmp_path) == [page]
    assert 'href="finished-0123456789ab-proxies.csv"' in page.read_text()
    monkeypatch.setattr(reporting, "collect", lambda dag: ReportData("s", {}, {"code": 1}))
    reporting.write_report(dag)
    assert sorted(p.name for p in folder.iterdir()) == ["finished-0123456789ab-proxies.csv", page.name, "index.html"]
    assert (folder / "finished-0123456789ab-proxies.csv").read_text() == proxy_table(whole)


def test_warnings_of_one_kind_become_one(large):
    fits = {name: Fit("ridge", i / 200, 0.1, [1.0], [1.0], little_skill=i >= 100) for i, name in enumerate(large.objective)}
    last = replace(large.rounds[-1], fit=fits, constant=dict.fromkeys(large.objective, 0.25))
    data = replace(large, rounds=[*large.rounds[:-1], last], few=[f"The valid split of {i} is small." for i in range(200)])
    said = caveats.warnings(data, judge(data))
    assert len(said) < 20
    assert any(
        text.startswith("The surrogates of 100 scores of the objective order proxies they have not seen") for text in said
    )
    assert any(text.startswith("106 scores were the same for every proxy (wiki-english-0 0.25, ") for text in said)
    assert "So it is with 194 more splits of domains, which demix plan names." in said
    hardly = {name: replace(fit, little_skill=True) for name, fit in fits.items()}
    data = replace(data, rounds=[replace(last, fit=hardly)])
    assert any(
        "of 106 scores of the objective are hardly better than the mean" in t for t in caveats.warnings(data, judge(data))
    )


def test_many_rounds_are_numbered_on_the_axis():
    one = [Round([Proxy(f"r{n}", {"a": 1.0}, {"a": 1.0})], {f"r{n}": {"a": 1.0 + n}}) for n in range(40)]
    drawn = figures.objective_by_round(ReportData("s", {}, {"a": 1}, rounds=one))
    assert "round 17" not in drawn
    assert ">round<" in drawn


def test_the_strongest_domain_is_that_of_spearman_s_correlation(medium):
    from scipy.stats import spearmanr

    ranked = figures.RankedShares(medium)
    values = [r.scores[p.name]["wiki-english-0"] for r in medium.rounds for p in r.mixtures]
    values[3] = math.nan
    finite = np.isfinite(values)
    shares = {d: np.array([p.shares[d] for p in ranked.proxies]) for d in medium.domain_names}
    expected = {d: spearmanr(x[finite], np.array(values)[finite]).statistic for d, x in shares.items()}
    domain, correlation = ranked.strongest(values)
    assert domain == max(expected, key=lambda d: abs(expected[d]))
    assert correlation == pytest.approx(expected[domain])
    assert ranked.strongest([1.0] * len(values))[1] == 0.0


def test_an_even_selection_keeps_both_ends():
    assert selection.evenly(range(10), 4) == [0, 3, 6, 9]
    assert selection.evenly([1, 2], 4) == [1, 2]
    assert selection.evenly(range(5), 1) == [0]


def test_the_rank_plot_has_panels_for_the_scores_that_agree_least():
    rng = np.random.default_rng(0)
    references = {f"score_{i}": rng.normal(size=20) for i in range(30)}
    columns = {name: (x + i / 10 * rng.normal(size=20), x, None) for i, (name, x) in enumerate(references.items())}
    scores = {name: {"spearman": {"value": 1 - i / 60, "low": 0.4, "high": 1.0}} for i, name in enumerate(columns)}
    text = draw_ranks(columns, {"num_mixtures": 20, "scores": scores}, [], ".svg").decode()
    assert "in panels the 24 lowest of 30 scores" in text
    assert "score_29 · ρ" in text
    assert "score_5 · ρ" not in text
