"""The page: self-contained, whole or partial, and the same bytes from the same data."""

import dataclasses
import math
import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest

from megatron_demix.errors import ConfigError
from megatron_demix.report import caveats
from megatron_demix.report.build import build_report, render
from megatron_demix.report.data import FinalRun, Fit, Proxy, ReportData, Round, Task
from megatron_demix.report.verdict import judge
from megatron_demix.search.outcome import natural_in_words

VOID = {"meta", "br", "hr", "img", "input", "link"}


class Page(HTMLParser):
    """Checks nesting, and collects ids, links, sources and headings."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.headings: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        if tag not in VOID:
            self.open.append(tag)
        for name, value in attributes:
            if name == "id":
                self.ids.append(value)
            if name in ("href", "src", "xlink:href"):
                self.links.append(value)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        self.handle_endtag(tag)

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] == "h2":
            self.headings.append(data)


@pytest.fixture(scope="module")
def text(whole) -> str:
    return render(whole)


def test_every_section_is_there(text):
    assert Page(text).headings == [
        "The found mixture won",
        "The mixture",
        "Final runs",
        "The search",
        "Predicted against measured",
        "Training",
        "The found mixture as data",
        "What it cost",
        "How far to trust this",
    ]


def test_it_needs_nothing_from_outside(text):
    page = Page(text)
    assert {link for link in page.links if not link.startswith("#")} == {"proxies.csv"}  # nothing is lost without it here
    assert not re.search(r"url\((?!#)|@import|https?://(?!www\.w3\.org/)", text)


def test_ids_are_unique_and_every_link_leads_somewhere(text):
    page = Page(text)
    assert len(page.ids) == len(set(page.ids))
    wanted = {link[1:] for link in page.links if link.startswith("#")} | set(re.findall(r"url\(#([^)]+)\)", text))
    assert wanted <= set(page.ids)


def test_plots_follow_the_theme(text):
    """Every stand-in colour was replaced by a variable, and each variable is defined."""
    assert not re.search(r"#010[0-9a-f]{3}", text)
    defined = set(re.findall(r"(--[a-z0-9]+):", text))
    assert set(re.findall(r"var\((--[a-z0-9]+)\)", text)) <= defined


def test_numbers_and_names_are_in_it(text):
    for expected in (
        "60.0 %",
        "70.0 %",
        "1.2020",
        "0.0028",
        "r2_5",
        "2m03s",
        "model.num_layers",
        "quadratic",
        "valid, test: held-out tokens / documents.",
        "1.23k / 21",
    ):
        assert expected in text, expected
    assert not re.search(r">\s*-?(nan|inf)\b", text, re.IGNORECASE)


def test_names_are_escaped(text):
    assert "tiny &lt;b&gt;study&lt;/b&gt;" in text
    assert "<b>study</b>" not in text


def test_the_same_data_give_the_same_bytes(whole, text, tmp_path):
    build_report(whole, tmp_path / "index.html")
    assert (tmp_path / "index.html").read_text(encoding="utf-8") == text
    assert sorted(p.name for p in tmp_path.iterdir()) == ["index.html", "proxies.csv"]


@pytest.mark.parametrize(
    ("present", "headings"),
    [
        ((), []),
        (("domains",), ["The domains"]),
        (("domains", "losses", "timings_s"), ["The domains", "Training", "What it cost"]),
        (("costs",), ["What it cost"]),
        (("rounds", "choice"), ["The mixture", "The search", "Predicted against measured"]),
        (("final",), ["Final runs"]),
    ],
)
def test_a_partial_run_gives_a_partial_report(whole, present, headings):
    data = ReportData("s", {}, whole.objective, **{name: getattr(whole, name) for name in present})
    verdict = "The found mixture won" if "final" in present else "No verdict yet"
    assert Page(render(data)).headings == [verdict, *headings, "How far to trust this"]


def test_rounds_that_are_proposed_but_not_scored(whole):
    proposed = dataclasses.replace(whole.rounds[1], scores={}, fit={})
    page = render(ReportData("s", {}, whole.objective, rounds=[whole.rounds[0], proposed]))
    assert "r2_3" in page
    assert "Predicted against measured" in page


def test_losses_that_are_not_numbers_are_left_out_of_plots_and_said(whole):
    first = whole.rounds[0]
    scores = {name: {**row, "code": math.nan} if name == "r1_0" else row for name, row in first.scores.items()}
    fit = {"code": Fit("ridge", math.nan, 0.1, [1.0, math.nan, 1.2], [1.1, 1.2, 1.3])}
    losses = {"base": {"iteration": [1, 2, 3], "lm loss": [7.0, math.inf, math.nan]}}
    page = render(
        ReportData("s", {}, whole.objective, losses=losses, rounds=[dataclasses.replace(first, scores=scores, fit=fit)])
    )
    assert "Round 1: 1 of 6 proxies have no finite objective" in page
    assert "code · ρ undefined" in page
    assert not re.search(r">[^<]*\bnan\b[^<]*<", page.split("<script")[0], re.IGNORECASE)


def test_the_smallest_data_of_every_kind(whole):
    """One proxy, scores that are all the same, a curve of one step, final runs without any difference."""
    alone = Proxy("p", {"code": 1.0}, {"code": 1.0})
    same = Fit("ridge", 0.0, 0.0, [1.0, 1.0], [1.0, 1.0])
    page = render(
        ReportData(
            "s",
            {},
            {"code": 1},
            losses={"base": {"iteration": [1], "lm loss": [2.0]}, "empty": {"iteration": [], "lm loss": []}},
            rounds=[Round([alone], {"p": {"code": 1.0}}, {"code": same})],
            final=[FinalRun(name, seed, {"code": 1.0}) for name in ("found", "uniform") for seed in (1, 2)],
        )
    )
    assert "No clear winner: within the seed noise" in page


def test_a_folder_is_no_place_for_the_page(whole, tmp_path):
    with pytest.raises(ConfigError, match=r"is a folder, expected the path of the HTML file to write, as in .*/index\.html"):
        build_report(whole, tmp_path)


def test_the_objective_is_a_weighted_mean_with_higher_scores_negated():
    data = ReportData("s", {}, {"a": 3, "b": 1, "c": 0}, higher_is_better=frozenset({"b"}))
    assert data.objective_of({"a": 1.0, "b": 3.0, "c": math.nan}) == pytest.approx(0.0)
    assert math.isnan(data.objective_of({"a": 1.0}))
    assert data.unit == "weighted mean"


def test_each_column_says_what_is_better_and_what_the_search_saw(whole):
    page = render(whole)
    assert "<th>objective ↓</th><th>code ↓</th><th>math ↓</th>" in page
    assert "which the search never saw. ↓: lower is better, losses being in bits per byte. ±" in page
    tasks = {"quiz": Task(unseen=True), "sums": Task(unseen=False)}
    page = render(dataclasses.replace(whole, higher_is_better=frozenset({"math"}), tasks=tasks))
    assert "<th>objective ↓</th><th>code ↓</th><th>math ↑</th>" in page
    assert "never saw, but for sums: scored on the very items of the search. ↓:" in page
    assert "bits per byte; ↑: higher is better. ±" in page


def test_deviations_below_the_last_digit_shown_are_only_bounded(whole):
    assert whole.choice
    sure = dataclasses.replace(
        whole.choice.optimum,
        samples={"code": [0.6, 0.6 + 1e-7, 0.6 - 1e-7], "math": [0.4, 0.4, 0.4]},
        gain=(0.05, 2e-6),
        expected_regret=3e-8,
    )
    choice = dataclasses.replace(whole.choice, optimum=sure, objective=(1.5, 2e-6), predicted={"code": (1.5, 7e-5)})
    page = render(dataclasses.replace(whole, choice=choice))
    assert "60.0 ± &lt;0.01 %" in page
    assert "is 0.05 ± &lt;0.0001 (bits per byte) better than natural" in page
    assert "a perfect one could win &lt;0.0001 more on average" in page
    assert page.count('1.5000 <span class="sd">± &lt;0.0001</span>') == 2
    assert "e-0" not in page


def test_how_sure_the_mixture_is_what_it_trades_and_what_binds(whole):
    page = render(whole)
    assert "60.0 ± 2 %" in page
    assert "is 0.05 ± 0.01 (bits per byte) better than natural, as the other half predicts" in page
    assert "better at all in 100.0 % of such halves" in page
    assert "a perfect one could win 0.0004 more on average" in page
    assert "not told apart" not in page
    assert "<li>max_epochs of code: at most 60.0 % of the data.</li>" in page
    assert 'aria-label="Pareto front of code and math"' in page
    assert "in the triangle" not in page  # two domains
    assert whole.choice
    unsure = dataclasses.replace(whole.choice.optimum, probability=0.7)
    away = dataclasses.replace(whole.choice, optimum=unsure, compared=natural_in_words(0.3))
    page = render(dataclasses.replace(whole, choice=away))
    assert "better than the reachable mixture nearest to natural (30% of the data away from it), as the other" in page
    assert "70.0 % of such halves, with the surrogates' families chosen on all proxies: <b>not told apart from it</b>" in page
    bare = dataclasses.replace(whole.choice, optimum=None, pareto=[], binding=[])
    page = render(dataclasses.replace(whole, choice=bare))
    assert "Predicted to be 0.05 ± 0.01 better than natural (bits per byte), by the same proxies" in page
    assert "half of the proxies" not in page
    assert "No bound holds it back." in page
    assert "Pareto" not in page


@pytest.mark.parametrize("num", [4, 2, 1])
def test_three_domains_are_drawn_in_a_triangle(num):
    thirds = [{"a": x, "b": 0.7 - x, "c": 0.3} for x in (0.1, 0.2, 0.3, 0.4)[:num]]
    mixtures = [Proxy(f"p{i}", shares, shares) for i, shares in enumerate(thirds)]
    found = ReportData("s", {}, {"a": 1}, rounds=[Round(mixtures, {p.name: {"a": p.shares["a"]} for p in mixtures})])
    page = render(found)
    assert 'aria-label="every proxy in the triangle of its domains"' in page
    assert "p0: 0.1000  a 10.0%, b 60.0%, c 30.0%" in page


def test_trained_proxies_have_no_merge_weights(whole):
    assert "merge weight" in render(whole)
    page = render(replace(whole, proxies="trained"))
    assert "merge weight" not in page
    assert "base and proxies were trained once" in page


def test_other_aims_are_named_and_a_round_may_be_empty(whole):
    rounds = [*whole.rounds[:1], dataclasses.replace(whole.rounds[1], mixtures=[], scores={})]
    values = {p.name: i / 10 for i, p in enumerate(whole.rounds[0].mixtures)}
    rounds[1] = dataclasses.replace(rounds[1], objective=values)
    data = dataclasses.replace(whole, aim="percentile_rank", rounds=rounds)
    assert [value for _, value in data.measured(0)] == list(values.values())
    page = render(data)
    assert "the search minimised their mean rank among feasible mixtures" in page
    assert "mean rank, 0 to 1" in page
    assert "Round 2 was left empty" in page


def test_a_found_mixture_far_from_all_proxies_is_said_to_be_extrapolated(whole):
    def said(distance):
        data = replace(whole, choice=replace(whole.choice, distance=distance))
        return [text for text in caveats.warnings(data, judge(data)) if "extrapolated" in text]

    (text,) = said((0.21, 0.1))
    assert text.startswith(
        "The found mixture is 21.0% of the data away from that of any proxy, and 9 in 10 proxies have another "
    )
    assert said((0.05, 0.1)) == []
    assert said(None) == []


def test_a_round_whose_mixtures_repeat_says_so(whole):
    same = replace(whole, rounds=[replace(whole.rounds[0], mixtures=[whole.rounds[0].mixtures[0]] * 3, scores={})])
    assert "Round 1: 1 of 3 mixtures is distinct: the bounds leave no others." in caveats.warnings(same, judge(same))


def test_costs_are_shown_beside_their_part(text):
    section = text[text.index("What it cost") :]
    assert "<td>1 trained</td>" in section
    assert '<td data-value="9600">9.6k</td><td data-value="1000000000.0">1e+09</td><td data-value="0.25">25.0 %</td>' in section
