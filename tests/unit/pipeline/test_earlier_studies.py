"""Proxies of an earlier study in a search whose domains are others. Scores are invented, so the optimum is known."""

import math
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import pytest
from small_texts import write_texts

from megatron_demix.artifact import publish, read_json, write_json
from megatron_demix.errors import ConfigError, IncompatibleInputs
from megatron_demix.evaluate.scores import Score, ScoreTable
from megatron_demix.pipeline.dag import Dag, build_dag
from megatron_demix.pipeline.reporting import write_report
from megatron_demix.study.load import load_study

STUDY = """
name: s
domains:
  - {name: code, inputs: [code.jsonl], max_epochs: 100}
  - {name: english, inputs: [english.jsonl], max_epochs: 100}
  - {name: math, inputs: [math.jsonl], max_epochs: 100}
tokenizer: {type: byte}
model: {num_layers: 2, hidden_size: 32, num_attention_heads: 2}
train: {seq_length: 16, global_batch_size: 4}
base: {tokens: 640, mixture: {english: 1}}
component: {maturity_seeds: 0, tokens: 320, anchor: {mixture: {english: 1}, share: 0.2}}
search: {rounds: [16, 8], objective: {code: 6, english: 1}, surrogate: ridge, candidates: 2000, top: 16, bootstraps: 10}
final: {tokens: 1k}
"""
MATH = "  - {name: math, inputs: [math.jsonl], max_epochs: 100}\n"
LAW = "  - {name: law, inputs: [law.jsonl], max_epochs: 100}\n"
PARTS = "  - {name: sums, inputs: [sums.jsonl], max_epochs: 100}\n  - {name: proofs, inputs: [proofs.jsonl], max_epochs: 100}\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    sizes = {"code": 200, "english": 200, "math": 200, "law": 200, "sums": 300, "proofs": 100}
    for name, num in sizes.items():
        write_texts(tmp_path, name, num=num)
    (tmp_path / "v1.yaml").write_text(STUDY)
    return tmp_path


def write(folder: Path, name: str, text: str, earlier: str = "{study: v1.yaml}") -> Path:
    path = folder / name
    path.write_text(text.replace("search: {", f"search: {{earlier: [{earlier}], "))
    return path


def dag_of(path: Path, *overrides: str) -> Dag:
    return build_dag(load_study(path, list(overrides)), path, path.parent / "runs" / "s")


def finish_earlier(dag: Dag) -> None:
    for stage in (dag.tokenizer, *dag.data.values(), *(e.stage for e in dag.earlier)):
        if not stage.done():
            stage.finish()


def loss(name: str, shares: Mapping[str, float]) -> float:
    """-log(share), and math helps code."""
    return -math.log(shares.get(name, 0) + 1e-3) - (0.5 * shares.get("math", 0) if name == "code" else 0)


def searched(path: Path, *overrides: str, diverged: Collection[str] = ()) -> Dag:
    """Its rounds, with `loss` as what each model scores, components included; nothing for proxies that diverged."""
    dag = dag_of(path, *overrides)
    finish_earlier(dag)
    for r in dag.rounds:
        if not r.proposal.done():
            r.proposal.finish()
        table = ScoreTable([Score(name, "", "lower") for name in dag.data])
        models = {m["name"]: m["shares"] for m in read_json(r.proposal.folder / "mixtures.json")}
        if r.number == 1 and dag.study.search.proxy_score != "merged":
            models |= {f"component-{d}": {e: 0.8 * (e == d) + 0.2 * (e == "english") for e in dag.data} for d in dag.data}
            models |= {f"component-{name}": dict.fromkeys(dag.data, 0.5) for name in dag.mixed}
        for model, shares in models.items():
            table.rows[model] = {} if model in diverged else {name: loss(name, shares) for name in dag.data}
        if not r.scores.done():
            with publish(r.scores.folder, r.scores.key, "scores", {}) as work:
                table.write(work / "scores.json")
        if not r.fit.done():
            r.fit.finish()
    return dag


def fits(dag: Dag) -> list[dict[str, Any]]:
    return [read_json(r.fit.folder / "fit.json") for r in dag.rounds]


def keys(dag: Dag) -> dict[str, str]:
    return {stage.name: stage.key for stage in dag.all}


def test_an_added_domain(folder):
    first = searched(folder / "v1.yaml")
    path = write(folder, "v2.yaml", STUDY.replace(MATH, MATH + LAW).replace("code: 6,", "code: 6, law: 2,"))
    dag = searched(path, "search.rounds=[8, 4]")
    kept = {name for name, key in keys(first).items() if keys(dag).get(name) == key}
    assert {"base/base", "components/code", "components/math", "data/english"} <= kept
    assert dag.rounds[0].proposal.name == "rounds/1/sample", "no earlier proxy has any law"
    without_aim = dag_of(write(folder, "v3.yaml", STUDY.replace(MATH, MATH + LAW)))
    assert without_aim.rounds[0].proposal.name == "rounds/1/sample", "whether that is aimed at or not"
    for number, fit in enumerate(fits(dag)):
        new = (8, 12)[number]
        assert len(fit["surrogates"]["code"]["models"]) == new + 24
        assert len(fit["surrogates"]["law"]["models"]) == new
        assert len(fit["objective"]) == new, "the objective has the loss of law, which only the new proxies have"
        assert fit["earlier"]["v1"] == {
            "proxies": 24,
            "scores": ["code", "english", "math"],
            "left_out": {"law": "no domain of it"},
            "split": {},
            "dropped": [],
        }
    rows = read_json(dag.earlier[0].stage.folder / "mixtures.json")
    assert [row["name"] for row in rows][:2] == ["v1/r1_000", "v1/r1_001"]
    assert all(row["shares"]["law"] == 0 for row in rows)
    assert list(rows[0]["weights"]) == ["code", "english", "math"]
    found = read_json(dag.choice.folder / "mixture.json")
    assert set(found["predicted"]) == {"code", "english", "math", "law"}
    assert found["weights"]["code"] > found["weights"]["law"] > found["weights"]["math"]
    assert dag.earlier[0].said("24 proxies") == "v1: 24 proxies, with code, english, math; not law: no domain of it"
    page = write_report(dag).page.read_text()
    assert (
        "of an earlier study, and not shown here: v1: 24 proxies, with code, english, math; not law: no domain of it." in page
    )


def test_corrected_proxies_count_where_the_same_mixed_components_correct_them(folder):
    first = STUDY.replace("share: 0.2}}", "share: 0.2}, mixed: {skills: {code: 0.5, math: 0.5}}}")
    (folder / "v1.yaml").write_text(first)
    searched(folder / "v1.yaml")
    path = write(folder, "v2.yaml", first.replace(MATH, MATH + LAW))
    dag = searched(path)
    assert dag.earlier[0].second_order.names == ["code", "english", "math", "skills"]
    made = dag.earlier[0].stage.folder
    rows, table = read_json(made / "mixtures.json"), read_json(made / "scores.json")["rows"]
    fit = fits(dag)[1]["surrogates"]["code"]
    values = dict(zip(fit["models"], fit["measured"], strict=True))
    used = [row for row in rows if row["name"] in values]
    assert len(used) > 12
    for row in used:
        code, mathematics = row["weights"]["code"], row["weights"]["math"]
        half = 2 * code * mathematics
        weights = row["weights"] | {"code": code - half, "math": mathematics - half, "skills": 2 * half}
        interpolated = sum(weight * table[f"v1/component-{name}"]["code"] for name, weight in weights.items())
        assert values[row["name"]] == pytest.approx((interpolated + table[row["name"]]["code"]) / 2)
    for override in (
        "component.mixed=null",
        "component.mixed={other: {code: 0.5, math: 0.5}}",
        "component.mixed={skills: {code: 0.5, law: 0.5}}",
    ):
        with pytest.raises(IncompatibleInputs, match=r"component\.mixed: skills there"):
            dag_of(path, override)


def test_a_dropped_domain_stays_a_feature_and_the_first_round_goes_on_from_a_fit(folder):
    searched(folder / "v1.yaml")
    path = write(folder, "v2.yaml", STUDY.replace(MATH, ""))
    dag = searched(path, "search.rounds=[3, 2]")
    assert dag.rounds[0].proposal.name == "rounds/0/fit"
    assert len(read_json(dag.rounds[0].proposal.folder / "mixtures.json")) == 3
    for number, fit in enumerate(fits(dag)):
        # Corners of two domains were corners of three as well, and count once.
        assert fit["earlier"]["v1"]["proxies"] in (22, 23, 24)
        assert fit["earlier"]["v1"]["dropped"] == ["math"]
        for name in ("code", "english"):
            assert len(fit["surrogates"][name]["models"]) == fit["earlier"]["v1"]["proxies"] + (3, 5)[number]
    row = read_json(dag.earlier[0].stage.folder / "mixtures.json")[0]
    column = f"math-{dag_of(folder / 'v1.yaml').data['math'].key}"
    assert list(row["shares"]) == ["code", "english", column]
    assert sum(row["shares"].values()) == pytest.approx(1)
    found = read_json(dag.choice.folder / "mixture.json")
    # 6 : 1, and at least a fifth english by the anchor.
    assert found["weights"] == pytest.approx({"code": 0.8, "english": 0.2}, abs=0.03)
    assert found["predicted"]["code"][0] == pytest.approx(loss("code", found["weights"]), abs=0.1)


def test_a_trained_centroid_calibrates_the_first_round_as_it_does_the_others(folder):
    """That round scores the components; before it, their scores are the earlier study's."""
    searched(folder / "v1.yaml")
    path, overrides = write(folder, "v2.yaml", STUDY.replace(MATH, "")), ["component.maturity_seeds=1", "search.rounds=[3, 2]"]
    centroid = dag_of(path, *overrides).maturity.scores
    rows = {name: {"code": code, "english": 9.0} for name, code in {"merged": 4.0, "seed0": 3.7, "base": 9.0}.items()}
    with publish(centroid.folder, centroid.key, centroid.kind, {}) as work:
        ScoreTable([Score(name, "", "lower") for name in ("code", "english")], rows).write(work / "scores.json")
    dag = searched(path, *overrides)
    interpolated = (loss("code", {"code": 0.8}) + loss("code", {})) / 2
    found = [read_json(stage.folder / "fit.json") for stage in (dag.rounds[0].proposal, *(r.fit for r in dag.rounds))]
    part = (3.7 - interpolated) / (4 - interpolated)
    assert 0.1 < part < 0.4
    through = [{name: facts["merged_part"] for name, facts in fit["through_centroid"].items()} for fit in found]
    assert through == [pytest.approx({"code": part, "english": 1})] * 3
    before, after = (
        dict(zip(f["models"], f["measured"], strict=True)) for f in (fit["surrogates"]["code"] for fit in found[:2])
    )
    assert len(before) == 24
    assert len(after) == found[1]["earlier"]["v1"]["proxies"] + 3
    assert all(after[name] == pytest.approx(before[name]) for name in before.keys() & after.keys())
    merged = dag_of(path, *overrides, "search.proxy_score=merged").rounds[0].proposal
    assert not [need for need in merged.needs if need.kind == "maturity"], "what calibrates nothing is not waited for"


def test_a_split_domain_gives_its_share_to_its_parts_by_their_tokens(folder):
    searched(folder / "v1.yaml")
    text = STUDY.replace(MATH, PARTS)
    dag = searched(write(folder, "v2.yaml", text, "{study: v1.yaml, split: {math: [sums, proofs]}}"), "search.rounds=[8, 4]")
    tokens = {n: read_json(dag.data[n].folder / "stats.json")["splits"]["train"]["tokens"] for n in ("sums", "proofs")}
    before = read_json(dag_of(folder / "v1.yaml").rounds[0].proposal.folder / "mixtures.json")
    for old, new in zip(before, read_json(dag.earlier[0].stage.folder / "mixtures.json"), strict=False):
        for name, num in tokens.items():
            assert new["shares"][name] == pytest.approx(old["shares"]["math"] * num / sum(tokens.values()))
        assert new["shares"]["code"] == old["shares"]["code"]
        assert sum(new["shares"].values()) == pytest.approx(1)
    assert dag.rounds[0].proposal.name == "rounds/1/sample", "the parts have never varied by themselves"
    assert [len(fits(dag)[0]["surrogates"][n]["models"]) for n in ("code", "sums")] == [32, 8]


def test_domains_that_become_one_add_their_shares(folder):
    (folder / "v1.yaml").write_text(STUDY.replace(MATH, PARTS))
    first = searched(folder / "v1.yaml")
    dag = dag_of(write(folder, "v2.yaml", STUDY, "{study: v1.yaml, split: {sums: [math], proofs: [math]}}"))
    finish_earlier(dag)
    before = read_json(first.rounds[0].proposal.folder / "mixtures.json")
    for old, new in zip(before, read_json(dag.earlier[0].stage.folder / "mixtures.json"), strict=False):
        assert new["shares"]["math"] == pytest.approx(old["shares"]["sums"] + old["shares"]["proofs"])
        assert list(new["shares"]) == ["code", "english", "math"]


def test_of_a_revised_domain_only_the_share_counts(folder):
    """Its text is another, so its loss is; whether it stands for the former one is the user's to say."""
    searched(folder / "v1.yaml")
    (folder / "new").mkdir()
    (folder / "new" / "math.jsonl").write_text((folder / "math.jsonl").read_text().replace("math", "better math"))
    text = STUDY.replace("inputs: [math.jsonl]", "inputs: [new/math.jsonl]")
    other = dag_of(write(folder, "v2.yaml", text)).earlier[0]
    assert (list(other.dropped), other.same, other.left_out) == (["math"], ["code", "english"], {"math": "other text there"})
    dag = dag_of(write(folder, "v2.yaml", text, "{study: v1.yaml, split: {math: [math]}}"))
    assert not dag.earlier[0].dropped
    finish_earlier(dag)
    assert list(read_json(dag.earlier[0].stage.folder / "mixtures.json")[0]["shares"]) == ["code", "english", "math"]


def test_nothing_of_the_earlier_study_is_needed_once_it_was_taken_over(folder):
    import shutil

    first = searched(folder / "v1.yaml")
    path = write(folder, "v2.yaml", STUDY.replace(MATH, ""))
    dag = dag_of(path)
    finish_earlier(dag)
    shutil.rmtree(first.rounds[0].scores.folder)
    assert dag_of(path).earlier[0].stage.done()


def test_a_proxy_that_has_no_score_there_has_none_here(folder):
    searched(folder / "v1.yaml", diverged=["r1_003"])
    dag = searched(write(folder, "v2.yaml", STUDY.replace(MATH, MATH + LAW)), "search.rounds=[8, 4]")
    models = fits(dag)[0]["surrogates"]["code"]["models"]
    assert len(models) == 8 + 23
    assert "v1/r1_002" in models
    assert "v1/r1_003" not in models


def test_mixtures_that_were_scored_in_both_count_once(folder):
    searched(folder / "v1.yaml")
    (folder / "copy.yaml").write_text(STUDY)
    text = STUDY.replace("code: 6, english: 1", "code: 2, math: 1")
    dag = searched(write(folder, "v2.yaml", text, "{study: v1.yaml}, {study: copy.yaml}"), "search.rounds=[4]")
    facts = read_json(dag.choice.folder / "fit.json")["earlier"]
    assert (facts["v1"]["proxies"], facts["copy"]["proxies"]) == (24, 0)


@pytest.mark.parametrize("proxy_score", ["merged", "interpolated", "stack"])
def test_what_a_proxy_scores_is_this_studys_to_say(folder, proxy_score):
    first = searched(folder / "v1.yaml")
    dag = searched(write(folder, "v2.yaml", STUDY.replace(MATH, "")), f"search.proxy_score={proxy_score}", "search.rounds=[8]")
    rows = ScoreTable.read(first.rounds[0].scores.folder / "scores.json").rows
    entry = read_json(first.rounds[0].proposal.folder / "mixtures.json")[5]
    interpolated = sum(weight * rows[f"component-{d}"]["code"] for d, weight in entry["weights"].items())
    merged = rows[entry["name"]]["code"]
    fit = fits(dag)[0]["surrogates"]["code"]
    value = dict(zip(fit["models"], fit["measured"], strict=True))["v1/" + entry["name"]]
    assert value == pytest.approx(
        {"merged": merged, "interpolated": interpolated, "stack": (merged + interpolated) / 2}[proxy_score]
    )


def test_another_run_folder_lends_what_is_done_there(folder):
    first = searched(folder / "v1.yaml")
    path = write(folder, "v2.yaml", STUDY.replace("name: s\n", "name: other\n").replace(MATH, MATH + LAW))
    dag = build_dag(load_study(path), path, folder / "runs" / "other")
    assert dag.data["math"].folder == first.data["math"].folder
    assert dag.data["math"].done()
    assert dag.data["law"].run == dag.components["code"].run == folder / "runs" / "other", "neither is done elsewhere"
    assert dag.earlier[0].stage.run == folder / "runs" / "other"
    finish_earlier(dag)
    assert not (folder / "runs" / "other" / "data" / "math").exists()


def test_a_trained_centroid_of_the_same_domains_is_lent_too(folder):
    searched(folder / "v1.yaml")
    (there,) = dag_of(folder / "v1.yaml", "component.maturity_seeds=1").maturity.trained.values()
    with publish(there.folder, there.key, there.kind, {}):
        pass
    path = write(folder, "v2.yaml", STUDY.replace("name: s\n", "name: other\n").replace("maturity_seeds: 0, ", ""))
    dag = build_dag(load_study(path), path, folder / "runs" / "other")
    assert [stage.folder for stage in dag.maturity.trained.values()] == [there.folder]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("base.tokens=1280", r"base/base: train_iters: 10 there, 20 here"),
        ("base.mixture=natural", r"base/base: mixture.*names its domains keeps it"),
        ("component.tokens=640", r"component: train_iters: 5 there, 10 here"),
        ("component.lr=0.1", r"component: train.lr: 0.0003 there, 0.1 here"),
        ("component.anchor.share=0.5", r"component.anchor: 0.2 of \{'english': 1.0\} there, 0.5 of \{'english': 1.0\} here"),
        ("component.anchor.mixture=uniform", r"component.anchor: 0.2 of .* there, 0.2 of uniform over code, english here"),
        ("merge.scale=1.5", r"merge: scale: nothing there, 1.5 here"),
        ("tokenizer={type: bpe, train_vocab_size: 300}", r"tokenizer/bpe: .*tokenizer.domains keeps one as it is"),
        ("search.proxies=trained;search.proxy_tokens=64", r"search.proxies: merged there, trained here"),
        ("train.seq_length=32", r"train.seq_length|train_iters"),
        ("evaluate.tokens_per_domain=1k", r"code: evaluate.tokens_per_domain was 32768, is 1000"),
    ],
)
def test_studies_that_would_not_measure_the_same_are_refused_and_the_difference_is_named(folder, override, message):
    path = write(folder, "v2.yaml", STUDY.replace(MATH, ""))
    with pytest.raises(IncompatibleInputs, match=rf"nothing that v1 measured would be the same here.*\n(.*\n)*.*{message}"):
        dag_of(path, *override.split(";"))


def test_an_anchor_in_other_words_is_the_same(folder):
    uniform = STUDY.replace("{english: 1}, share", "uniform, share")
    (folder / "v1.yaml").write_text(uniform)
    searched(folder / "v1.yaml")
    words = "component.anchor.mixture={code: 0.333333333333, english: 0.333333333333, math: 0.333333333334}"
    assert dag_of(write(folder, "v2.yaml", uniform.replace(MATH, MATH + LAW)), words, "search.rounds=[8]").earlier[0].scores


def test_components_that_were_not_scored_cannot_be_interpolated(folder):
    (folder / "v1.yaml").write_text(STUDY.replace("search: {", "search: {proxy_score: merged, "))
    searched(folder / "v1.yaml")
    path = write(folder, "v2.yaml", STUDY.replace(MATH, ""))
    with pytest.raises(IncompatibleInputs, match=r"search.proxy_score: merged there, so that its components have no scores"):
        dag_of(path)
    assert dag_of(path, "search.proxy_score=merged").earlier[0].scores == ["code", "english"]


def test_a_study_that_is_not_done_is_not_run_again_but_named(folder):
    path = write(folder, "v2.yaml", STUDY.replace(MATH, ""))
    with pytest.raises(ConfigError, match=r"v1 is not done: .*rounds/1/sample-\w+ does not exist\. .*`demix search v1.yaml`"):
        dag_of(path)
    searched(folder / "v1.yaml")
    dag_of(path)
    (folder / "v1.yaml").write_text(STUDY.replace("seq_length: 16, ", "seq_length: 16, weight_decay: 0.2, "))
    with pytest.raises(IncompatibleInputs, match=r"train.weight_decay: 0.2 there, 0.1 here"):
        dag_of(path)
    (folder / "v1.yaml").write_text(STUDY.replace("top: 16", "top: 16, design: sobol"))
    with pytest.raises(ConfigError, match=r"\(there is sample-\w+, of other text or settings\)"):
        dag_of(path)


def test_a_study_that_was_given_up_lends_the_rounds_that_it_has(folder):
    import shutil

    first = searched(folder / "v1.yaml")
    shutil.rmtree(first.rounds[1].scores.folder)
    path = write(folder, "v2.yaml", STUDY.replace(MATH, ""))
    with pytest.raises(ConfigError, match=r"rounds/2/scores-\w+ does not exist"):
        dag_of(path)
    assert dag_of(path, "search.earlier.0.rounds=1").earlier[0].num_proxies == 16
    with pytest.raises(ConfigError, match="v1 has 2 rounds, not 3"):
        dag_of(path, "search.earlier.0.rounds=3")


@pytest.mark.parametrize(
    ("earlier", "message"),
    [
        ("{study: v2.yaml}", "is this study, or names it as an earlier one"),
        ("{study: v1.yaml}, {study: ./v1.yaml}", "two studies have the file name 'v1'"),
        ("{study: v0.yaml}", r"search.earlier, v0.yaml: study .*v0.yaml: cannot be read"),
        ("{study: v1.yaml, split: {maths: [code]}}", "split: v1 has no domain 'maths'; did you mean 'math'"),
        ("{study: v1.yaml, split: {code: [english]}}", "'code' is the same domain here as in v1; take it out"),
        ("{study: v1.yaml, split: {math: [sums]}}", "search.earlier: split of math: 'sums' is not one of code, english"),
        ("{study: v1.yaml, split: {math: []}}", "expected 1 or more entries"),
        ("{study: v1.yaml, round: 1}", "unknown key; did you mean 'rounds'"),
    ],
)
def test_what_is_wrong_with_a_list_of_earlier_studies(folder, earlier, message):
    searched(folder / "v1.yaml")
    path = write(folder, "v2.yaml", STUDY.replace(MATH, ""), earlier)
    with pytest.raises(ConfigError, match=message):
        dag_of(path)


def test_an_earlier_study_without_proxies_of_its_own_is_named(folder):
    """All of its rounds turned out unnecessary."""
    first = dag_of(folder / "v1.yaml")
    finish_earlier(first)
    for r in first.rounds:
        with publish(r.proposal.folder, r.proposal.key, r.proposal.kind, {}) as work:
            write_json(work / "mixtures.json", [])
        with publish(r.scores.folder, r.scores.key, r.scores.kind, {}) as work:
            ScoreTable([]).write(work / "scores.json")
    dag = dag_of(write(folder, "v2.yaml", STUDY.replace(MATH, MATH + LAW)), "search.proxy_score=merged")
    with pytest.raises(IncompatibleInputs, match=r"search.earlier: v1 has scored no proxies of its own\. Take it out\."):
        dag.earlier[0].stage.finish()


def test_studies_that_name_one_another(folder):
    write(folder, "v1.yaml", STUDY, "{study: v2.yaml}")
    with pytest.raises(ConfigError, match="is this study, or names it as an earlier one"):
        dag_of(write(folder, "v2.yaml", STUDY.replace(MATH, "")))


def test_a_job_knows_the_folder_alone_and_finds_an_earlier_study_of_any_name(folder):
    """It has a frozen copy of the study, which lies elsewhere."""
    (folder / "v1.yaml").rename(folder / "study.yaml")
    searched(folder / "study.yaml")
    path = write(folder, "v2.yaml", STUDY.replace(MATH, LAW), "{study: study.yaml}")
    run = path.parent / "runs" / "s"
    assert keys(build_dag(load_study(path), folder, run)) == keys(build_dag(load_study(path), path, run))


def test_a_score_that_no_earlier_study_has_needs_a_first_round(folder):
    searched(folder / "v1.yaml")
    path = write(folder, "v2.yaml", STUDY.replace(MATH, LAW))
    with pytest.raises(
        ConfigError, match=r"the first has 4 proxies. A surrogate needs 8, and no earlier .* the scores law\. Make it 8"
    ):
        dag_of(path, "search.rounds=[4, 2]")
    dag_of(path, "search.rounds=[8]")
    dag_of(path, "search.rounds=[4, 2]", "evaluate.losses=[code, english]")


def test_studies_can_be_looked_at_without_their_inputs(folder):
    path = write(folder, "v2.yaml", STUDY.replace(MATH, LAW))
    for name in ("code", "law", "english", "math"):
        (folder / f"{name}.jsonl").unlink()
    dag = build_dag(load_study(path), path, folder / "runs" / "s", absent_inputs="allowed")
    assert [stage.name for stage in dag.all if stage.kind == "earlier"] == ["earlier/v1"]
