"""What a study costs, as `demix plan` says it before anything runs."""

import json
from pathlib import Path

import pytest
from small_texts import SMALL_STUDY, write_texts
from task_files import ARC, write_lines

from megatron_demix.artifact import publish, write_json
from megatron_demix.cli import main
from megatron_demix.pipeline import cost as cost_module
from megatron_demix.pipeline.cost import Cost, by_kind, costs
from megatron_demix.pipeline.dag import build_dag
from megatron_demix.pipeline.data_stages import num_ids
from megatron_demix.study.load import load_study
from megatron_demix.train.derived import checkpoint_bytes, flops_per_token

STUDY = SMALL_STUDY.replace("1k}", "1k, baselines: [uniform], seeds: 2}") + "evaluate: {tokens_per_domain: 160}\n"
ROWS = 384
"""Of the embedding: 257 ids, padded."""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    write_texts(tmp_path, "code", "english")
    (tmp_path / "study.yaml").write_text(STUDY)
    return tmp_path / "study.yaml"


def costs_of(path: Path, *overrides: str) -> dict[tuple[str, str], Cost]:
    dag = build_dag(load_study(path, list(overrides)), path, path.parent / "run")
    return {(cost.kind, cost.does): cost for cost in by_kind(costs(dag, dag.all).values())}


def counted(found: dict[tuple[str, str], Cost]) -> dict[tuple[str, str], tuple[int, int]]:
    return {key: (cost.models, cost.tokens) for key, cost in found.items()}


def test_every_model_and_token_counts(path):
    """The first round scores the two components beside its proxies; the final scores are those of the base, the proxy and four
    runs. 1,000 tokens are 16 whole steps of 64."""
    found = costs_of(path)
    assert counted(found) == {
        ("base", "trains"): (1, 640),
        ("components", "trains"): (2, 640),
        ("rounds", "scores"): (14, 14 * 320),
        ("final", "trains"): (4, 4 * 1024),
        ("final", "scores"): (6, 6 * 320),
    }
    study = load_study(path)
    each = flops_per_token(study.model, 16, ROWS)
    assert found["final", "trains"].flop == pytest.approx(4096 * each)
    assert found["final", "scores"].flop == pytest.approx(6 * 320 * each / 3)
    assert found["components", "trains"].checkpoint_bytes == 2 * checkpoint_bytes(study.model, study.train, ROWS)
    assert found["rounds", "scores"].checkpoint_bytes == 0


def test_settings_that_cost(path):
    trained = counted(costs_of(path, "search.proxies=trained", "search.proxy_tokens=128"))
    assert trained["rounds", "trains"] == (12, 12 * 128)
    assert trained["rounds", "scores"] == (12, 12 * 320)
    assert ("components", "trains") not in trained
    assert counted(costs_of(path, "component.mixed=centroid"))["components", "trains"] == (3, 960)
    checked = counted(costs_of(path, "component.maturity_seeds=2"))
    assert (checked["components", "trains"], checked["maturity", "scores"]) == ((4, 1280), (4, 4 * 320))
    assert counted(costs_of(path, "search.proxy_score=interpolated"))["rounds", "scores"] == (2, 2 * 320)
    larger = costs_of(path, "tokenizer={type: bpe, train_vocab_size: 1000}")["base", "trains"]
    assert larger.flop == pytest.approx(640 * flops_per_token(load_study(path).model, 16, 1024)), "before it is trained"
    kept = costs_of(path, "component.average=[0.4, 0.8]")["components", "trains"]
    assert (kept.tokens, kept.checkpoint_bytes) == (2 * 256, 2 * costs_of(path)["components", "trains"].checkpoint_bytes)


def test_demix_plan_shows_what_is_to_do(path, capsys):
    place = [str(path), "--runs", str(path.parent / "runs")]
    assert main(["plan", *place]) == 0
    shown = capsys.readouterr().out
    begun = [line.split()[:4] for line in shown.splitlines()]
    assert ["components", "2", "trained", "640"] in begun
    assert ["final", "6", "scored", "1.92k"] in begun
    (all_of_it,) = [line for line in shown.splitlines() if line.startswith("to do: ")]
    assert all_of_it.endswith(" of checkpoints")
    assert "H100" not in all_of_it
    base = build_dag(load_study(path), path, path.parent / "runs" / "s").base
    with publish(base.folder, base.key, "base", {}):
        pass
    assert main(["plan", *place]) == 0
    assert all_of_it not in capsys.readouterr().out
    assert main(["plan", *place, "--json"]) == 0
    rows = {row["stage"]: row for row in json.loads(capsys.readouterr().out)}
    assert rows["base/base"]["cost"]["tokens"] == 640
    assert "cost" not in rows["data/code"]


def test_hours_of_a_gpu_where_they_count(path, capsys):
    large = ["model.num_layers=28", "model.hidden_size=2048", "model.padded_vocab_size=151936", "component.tokens=30B"]
    main(["plan", str(path), "--runs", str(path.parent / "runs"), *(word for text in large for word in ("--set", text))])
    shown = capsys.readouterr().out
    assert " hours of an H100 at 40% of its peak, and " in shown
    assert Cost("final", "trains", 1, 10**9, 3 * 3600 * 0.4 * 989e12, 0).gpu_hours == pytest.approx(3)


def test_a_tokenizer_that_cannot_be_read_has_no_cost_yet(path, capsys):
    (path.parent / "tokenizer.json").write_text("{}")
    dag = build_dag(load_study(path, ["tokenizer={type: huggingface, model: tokenizer.json}"]), path, path.parent / "run")
    assert costs(dag, dag.all) == {}


@pytest.mark.parametrize(("proxies", "does"), [("merged", ["scores"]), ("trained", ["trains", "scores"])])
def test_rounds_that_stay_empty_cost_nothing_once_that_is_known(path, proxies, does):
    overrides = [f"search.proxies={proxies}", "search.rounds=[8, 4, 4]", "component.tokens=1k"]
    dag = build_dag(load_study(path, overrides), path, path.parent / "run")

    def of_rounds() -> list[Cost]:
        return by_kind(cost for cost in costs(dag, dag.all).values() if cost.kind == "rounds")

    before, alone = of_rounds(), 2 * (proxies == "merged")  # the components, beside the first round's
    assert [(cost.does, cost.models) for cost in before] == [(what, 16 + alone) for what in does]
    for number, entries in enumerate([[{}] * 8, [{}] * 4, []]):
        proposal = dag.rounds[number].proposal
        with publish(proposal.folder, proposal.key, "rounds", {}) as folder:
            write_json(folder / "mixtures.json", entries)
    assert [cost.models for cost in of_rounds()] == [12 + alone for _ in does]


def test_rows_that_the_model_says_are_taken_as_they_are(path):
    said = ["model.padded_vocab_size=386", "parallel={tensor: 2}"]
    study = load_study(path, said)
    assert costs_of(path, *said)["base", "trains"].checkpoint_bytes == checkpoint_bytes(study.model, study.train, 386)


def test_what_scores_tasks_alone_costs_nothing_that_is_known(path):
    write_lines(path.parent / "arc.jsonl", ARC)
    alone = ["evaluate={losses: [], tasks: [{name: arc, format: arc, path: arc.jsonl}]}", "search.objective={arc/acc: 1}"]
    assert counted(costs_of(path, *alone)).keys() == {("base", "trains"), ("components", "trains"), ("final", "trains")}


def test_a_plan_asks_the_tokenizer_once(path, monkeypatch, capsys):
    """A large vocabulary takes seconds to read, and a study has hundreds of stages."""
    asked = []
    monkeypatch.setattr(cost_module, "num_ids", lambda *of: asked.append(of) or num_ids(*of))
    for flags in ([], ["--json"]):
        asked.clear()
        assert main(["plan", str(path), "--runs", str(path.parent / "runs"), *flags]) == 0
        assert len(asked) == 1
