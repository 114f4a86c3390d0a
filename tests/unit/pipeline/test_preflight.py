"""What the data cannot fill is refused as soon as the data is there, before anything is trained for it."""

import json
import sys
from pathlib import Path

import pytest
from dist_checkpoints import small_model, write_checkpoint
from small_texts import SMALL_STUDY, write_texts

from megatron_demix.artifact import publish
from megatron_demix.cli import main
from megatron_demix.errors import ConfigError, MixtureError
from megatron_demix.launch import stage as task
from megatron_demix.launch.attempts import Attempts
from megatron_demix.launch.run_lock import only_one
from megatron_demix.launch.started import Started
from megatron_demix.pipeline import preflight
from megatron_demix.pipeline.dag import Dag, build_dag
from megatron_demix.pipeline.reporting import collect
from megatron_demix.study.load import load_study

STUDY = SMALL_STUDY + "prepare: {workers: 1, split: [0.8, 0.1, 0.1]}\nevaluate: {tokens_per_domain: 200}\n"


@pytest.fixture
def study(tmp_path: Path) -> Path:
    """Domain code has ten times the text of english, about 2,700 tokens in 160 documents for training."""
    write_texts(tmp_path, "code", num=2000)
    write_texts(tmp_path, "english")
    (tmp_path / "study.yaml").write_text(STUDY)
    return tmp_path / "study.yaml"


def prepared(study: Path, *overrides: str) -> Dag:
    """With its tokenizer and data done."""
    dag = build_dag(load_study(study, list(overrides)), study, study.parent / "runs" / "s")
    for stage in (dag.tokenizer, *dag.data.values()):
        if not stage.done():
            stage.finish()
    return dag


def test_a_study_that_its_data_fills_passes(study):
    preflight.check(prepared(study).all)


def test_a_surrogate_that_is_not_installed_is_known_before_anything_is_trained(study, monkeypatch):
    preflight.check(prepared(study, "search.surrogate=lightgbm").all)
    monkeypatch.setitem(sys.modules, "lightgbm", None)
    preflight.check(prepared(study).all)
    dag = prepared(study, "search.surrogate=lightgbm")
    with pytest.raises(ConfigError, match=r"surrogate 'lightgbm' needs the package lightgbm .* 'megatron-demix\[search\]'"):
        preflight.check(dag.all)
    for fit in (r.fit for r in dag.rounds):
        with publish(fit.folder, fit.key, fit.kind, {}):
            pass
    preflight.check(dag.all)  # what is done needs nothing any more


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (
            ["train.seq_length=1000", "train.global_batch_size=1", "base.tokens=1k", "component.tokens=1k"],
            r"stage rounds/1/scores: the valid split of domain 'english' has [3-4]\d\d tokens in \d\d documents, but one "
            r"evaluation window is 1,001 \(train\.seq_length \+ 1\)\. Give it more text, or prepare\.split another share, or "
            r"leave it out of evaluate\.losses\.",
        ),
        (["base={tokens: 40k, mixture: uniform}"], r"stage base/base: its share 0\.5 of domain 'english' .* base\.tokens to"),
        (["domains.1.max_epochs=0.001"], r"stage base/base: .*; max_epochs is 0\.001\. Give it more text, or raise its max"),
        (["component.tokens=16k"], r"stage components/english: its share 0\.75 of domain 'english' .* component\.tokens"),
        (
            ["final.tokens=40k"],
            r"stage blend/uniform: its share 0\.5 of domain 'english' is 20k tokens, which repeats the 2\.\d*k there are .* "
            r"times; max_epochs is 4\. Set final\.tokens to at most \d+, leave uniform out of final\.baselines, give it more "
            r"text, or raise its max_epochs\.",
        ),
    ],
)  # fmt: skip
def test_what_the_data_cannot_fill_is_named(study, overrides, said):
    dag = prepared(study, *overrides)
    with pytest.raises((ConfigError, MixtureError), match=said):
        preflight.check(dag.all)


def test_the_budget_that_is_named_fits(study):
    with pytest.raises(MixtureError) as error:
        preflight.check(prepared(study, "final.tokens=40k").all)
    most = int(str(error.value).split("at most ")[1].split(",")[0])
    preflight.check(prepared(study, f"final.tokens={most}").all)
    with pytest.raises(MixtureError):
        preflight.check(prepared(study, f"final.tokens={most + 64}").all)


EMBEDDING = [
    (["model.padded_vocab_size=256"], r"model\.padded_vocab_size is 256, expected at least 257, .*, such as 257\.$"),
    (["model.padded_vocab_size=259", "parallel.tensor=2"], r"at least 257, .* a multiple of parallel\.tensor 2, such as 260\."),
    (["tokenizer={type: bpe, train_vocab_size: 400}", "model.padded_vocab_size=399"],
     r"at least 400, the ids of the tokenizer, .* such as 400\. Or set tokenizer\.train_vocab_size to at most 399\.$"),
]  # fmt: skip


@pytest.mark.parametrize(("overrides", "said"), EMBEDDING)
def test_an_embedding_that_does_not_fit_is_known_before_there_is_any_data(study, overrides, said):
    dag = build_dag(load_study(study, overrides), study, study.parent / "runs" / "s")
    with pytest.raises(ConfigError, match=said):
        preflight.check(dag.all)


@pytest.mark.parametrize(("overrides", "said"), EMBEDDING)
@pytest.mark.parametrize("kind", ["tokenizer", "data"])
def test_an_embedding_that_does_not_fit_is_known_whatever_is_done_already(study, kind, overrides, said):
    dag = build_dag(load_study(study, overrides), study, study.parent / "runs" / "s")
    for stage in dag.of_kinds({kind}):
        stage.finish()
    with pytest.raises(ConfigError, match=said):
        preflight.check(dag.all)


def test_a_base_of_another_tokenizer_is_known_before_there_is_any_data(study):
    write_checkpoint(study.parent / "given", small_model(0))
    dag = build_dag(load_study(study, ["base={checkpoint: given}"]), study, study.parent / "runs" / "s")
    with pytest.raises(ConfigError, match=r"is 96, expected at least 257, .* Or give the study the tokenizer of its base"):
        preflight.check(dag.all)


def test_a_tokenizer_that_cannot_be_read_is_not_what_a_plan_is_about(study):
    (study.parent / "tokenizer.json").write_text("{}")
    overrides = ["tokenizer={type: huggingface, model: tokenizer.json}", "model.padded_vocab_size=256"]
    dag = build_dag(load_study(study, overrides), study, study.parent / "runs" / "s")
    preflight.check(dag.all)
    with pytest.raises(ConfigError, match=r"padded_vocab_size is 256, .* of parallel\.tensor 3, such as 258"):
        preflight.check(build_dag(load_study(study, [*overrides, "parallel.tensor=3", "model.num_attention_heads=3",
                                                     "model.hidden_size=12"]), study, dag.run).all)  # fmt: skip


def test_proxies_that_are_trained_are_checked_when_their_mixtures_are_known(study):
    dag = prepared(study, "search={proxies: trained, proxy_tokens: 64k, objective: {code: 1}, rounds: [8, 4]}")
    preflight.check(dag.all)
    dag.rounds[0].proposal.finish()
    with pytest.raises(
        MixtureError, match=r"stage rounds/1/proxy_\d+, mixture r1_\d+: its share .* Set search\.proxy_tokens to"
    ):
        preflight.check(dag.all)


def test_components_are_not_trained_for_a_search_that_is_impossible(study, capsys):
    overrides = ["--set", "domains.1.max_epochs=0.2", "--set", "final.tokens=4k", "--runs", str(study.parent / "runs")]
    assert main(["train", str(study), *overrides]) == 4
    assert "max_epochs" in capsys.readouterr().err
    assert not (study.parent / "runs" / "s" / "base").exists()


def test_what_is_not_asked_for_is_not_refused(study):
    preflight.check(prepared(study, "final.tokens=40k").until("search"))


def test_nothing_is_said_of_data_that_is_not_there(study):
    dag = build_dag(load_study(study, ["final.tokens=40k"]), study, study.parent / "runs" / "s")
    preflight.check(dag.all)


@pytest.mark.parametrize("command", ["run", "plan", "submit"])
def test_commands_refuse_it_before_anything_is_trained(study, capsys, command):
    overrides = ["--runs", str(study.parent / "runs"), "--set", "final.tokens=40k"]
    if command != "run":
        prepared(study, "final.tokens=40k")
    assert main([command, str(study), *overrides]) == 4
    shown = capsys.readouterr()
    assert "demix: stage blend/uniform: its share 0.5" in shown.err
    assert not (study.parent / "runs" / "s" / "base").exists()
    assert command != "plan" or "blend/uniform" in shown.out
    if command == "run":
        assert main(["status", str(study), *overrides, "--json"]) == 0
        states = {row["stage"]: row["state"] for row in json.loads(capsys.readouterr().out)}
        assert states["blend/uniform"] == "failed"


def test_preparing_says_what_will_be_refused(study, capsys):
    overrides = ["--runs", str(study.parent / "runs"), "--set", "final.tokens=40k"]
    for asked in (["prepare", str(study)], ["run", str(study), "--until", "prepare"]):
        assert main([*asked, *overrides]) == 0
        assert "warning: stage blend/uniform: its share 0.5" in capsys.readouterr().err


def test_a_schedulers_first_stage_after_the_data_refuses_it(study, monkeypatch):
    overrides = ["final.tokens=40k"]
    dag = prepared(study, *overrides)
    (study.parent / "given.yaml").write_text(json.dumps(dag.study.model_dump(mode="json")))

    def code() -> int:
        asked = ["stage", str(study.parent / "given.yaml"), "rounds/1/sample", "--run", str(dag.run)]
        monkeypatch.setattr("sys.argv", asked)
        return task.main()

    monkeypatch.setattr(task, "die_with_parent", lambda: None)
    monkeypatch.setattr(task._Stop, "__init__", lambda self: None)
    monkeypatch.setattr(task._Stop, "ignore", lambda self: None)
    with only_one(dag.run):
        Started.of(dag.study, None).write(dag.run)
    assert code() == 4
    assert "stage blend/uniform: its share 0.5" in Attempts.read(dag.rounds[0].proposal).failed
    Started.of(dag.study, "search").write(dag.run)
    assert code() == 0


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["evaluate.tokens_per_domain=2k"], r"the valid split of domain 'english' has \d+ tokens in \d+ documents, and "
         r"evaluate\.tokens_per_domain asks for 2,000: what the search sees of it may be chance\. Give it more text"),
        (["prepare.split=[0.92, 0.04, 0.04]", "evaluate.tokens_per_domain=16"],
         r"the test split of domain 'english' has \d+ tokens in \d+ documents: what the comparison of the final runs sees"),
    ],
)  # fmt: skip
def test_scores_on_little_are_warned_of(study, overrides, said):
    dag = prepared(study, *overrides)
    with pytest.warns(UserWarning, match=said):
        preflight.check(dag.all)


def test_the_report_shows_what_is_held_out_and_warns_of_little(study):
    data = collect(prepared(study, "evaluate.tokens_per_domain=2k"))
    tokens, documents = data.domains[1].held_out["valid"]
    assert any(s.startswith(f"The valid split of domain 'english' has {tokens:,} tokens in {documents} doc") for s in data.few)
    assert collect(prepared(study, "evaluate={tokens_per_domain: 2k, losses: [code]}")).few == []
