"""Keys: a setting changes what depends on it and nothing else, so that everything still valid is used again."""

import json
import threading
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
from dist_checkpoints import small_model, write_checkpoint
from indexed_data import make_indexed
from small_texts import SMALL_STUDY, write_texts

from megatron_demix import artifact, progress
from megatron_demix.artifact import fingerprint, hash_file
from megatron_demix.errors import ConfigError, CorruptInput, MixtureError
from megatron_demix.mixture import Mixture
from megatron_demix.pipeline import inputs
from megatron_demix.pipeline.dag import Dag, build_dag
from megatron_demix.pipeline.data_stages import prefixes
from megatron_demix.pipeline.given_scores import given_scores
from megatron_demix.pipeline.reporting import _timings
from megatron_demix.pipeline.stage import with_needs
from megatron_demix.pipeline.train_stages import _filled, num_iterations, num_tokens, training_settings
from megatron_demix.printing import result
from megatron_demix.study.load import load_study


@pytest.fixture
def study_path(tmp_path: Path) -> Path:
    write_texts(tmp_path, "code", "english", "math")
    (tmp_path / "study.yaml").write_text(SMALL_STUDY)
    return tmp_path / "study.yaml"


def keys(study_path: Path, *overrides: str) -> dict[str, str]:
    dag = build_dag(load_study(study_path, list(overrides)), study_path, study_path.parent / "run")
    return {stage.name: stage.key for stage in dag.all}


def changed(study_path: Path, *overrides: str) -> set[str]:
    before, after = keys(study_path), keys(study_path, *overrides)
    return {name.split("/")[0] for name in after if before.get(name) != after[name]}


def test_where_and_how_fast_it_runs_changes_nothing(study_path):
    overrides = ["parallel.data=2", "train.micro_batch_size=2", "launch.jobs=2", "prepare.workers=1", "train.save_interval=7"]
    assert changed(study_path, *overrides, "evaluate.replicas=2") == set()
    assert changed(study_path, "launch.slurm.parts={data: 4, blend: 2}") == set()


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("final.lr=1e-4", {"final"}),
        ("search.objective={english: 1}", {"rounds", "merge", "blend", "final"}),
        ("component.tokens=640", {"components", "rounds", "merge", "blend", "final"}),
        ("component.average=[0.4, 0.6]", {"components", "averages", "rounds", "merge", "blend", "final"}),
        ("base.tokens=1280", {"base", "components", "rounds", "merge", "blend", "final"}),
        ("merge={method: ties, density: 0.5}", {"rounds", "merge", "blend", "final"}),
        ("evaluate.tokens_per_domain=1k", {"rounds", "merge", "blend", "final"}),
    ],
)
def test_a_setting_changes_what_depends_on_it(study_path, override, expected):
    assert changed(study_path, override) == expected


@pytest.mark.parametrize(
    "override",
    ["tokenizer={type: byte, train_bytes: 5M}", "model.moe_router_topk=1"],
)
def test_a_setting_without_effect_changes_nothing(study_path, override):
    assert changed(study_path, override) == set()


def test_an_unused_anchor_changes_nothing(study_path):
    none = keys(study_path, "component.anchor={share: 0}")
    assert keys(study_path, "component.anchor={share: 0, mixture: natural}") == none


def test_whose_duplicate_stays_depends_on_the_order_of_the_domains(study_path):
    pair = ["{name: english, inputs: [english.jsonl]}", "{name: code, inputs: [code.jsonl]}"]
    before = keys(study_path, "prepare.clean={}")
    after = keys(study_path, "prepare.clean={}", f"domains.0={pair[0]}", f"domains.1={pair[1]}")
    assert before["clean/text"] != after["clean/text"]


def test_a_trained_tokenizer_depends_on_where_the_text_is(study_path):
    assert "tokenizer" in changed(study_path, "tokenizer={type: bpe, train_vocab_size: 300}")
    before = keys(study_path, "tokenizer={type: bpe, train_vocab_size: 300}")
    after = keys(study_path, "tokenizer={type: bpe, train_vocab_size: 300}", "domains.0.json_key=content")
    assert before["tokenizer/bpe"] != after["tokenizer/bpe"]


def test_what_a_tokenizer_is_copied_from_decides_and_nothing_else(study_path):
    folder = study_path.parent / "tok"
    (folder / ".cache").mkdir(parents=True)
    (folder / "tokenizer.json").write_text("{}")
    (folder / "tokenizer_config.json").write_text('{"eos_token": "a"}')

    def key(model: str) -> str:
        return keys(study_path, f"tokenizer={{type: huggingface, model: {model}}}")["tokenizer/huggingface"]

    of_folder, of_file = key("tok"), key("tok/tokenizer.json")
    assert of_folder == of_file
    (folder / "README.md").write_text("words")
    assert key("tok") == of_folder
    (folder / "tokenizer_config.json").write_text('{"eos_token": "b"}')
    assert key("tok") != of_folder
    assert key("tok/tokenizer.json") != of_file


def test_cleaning_is_a_stage_that_text_depends_on(study_path):
    """Off by default; a model of other bytes under the same name is another cleaning."""
    model = study_path.parent / "quality.bin"
    model.write_bytes(b"one")
    assert "clean/text" not in keys(study_path)
    cleaned = keys(study_path, "prepare.clean={quality: {model: quality.bin}}")
    assert set(keys(study_path)) | {"clean/text"} == set(cleaned)
    assert changed(study_path, "prepare.clean={}") >= {"clean", "data", "base", "final"}
    model.write_bytes(b"two")
    again = keys(study_path, "prepare.clean={quality: {model: quality.bin}}")
    assert cleaned["clean/text"] != again["clean/text"]
    assert cleaned["data/code"] != again["data/code"]
    with pytest.raises(ConfigError, match=r"prepare\.clean\.quality\.model: .* does not exist"):
        keys(study_path, "prepare.clean={quality: {model: nowhere.bin}}")


def test_a_study_cleans_before_it_prepares(study_path):
    """Text that is in two domains stays in the first alone, and what was removed is kept."""
    import json

    pytest.importorskip("datatrove")
    shared = json.dumps({"text": "the same words in both domains " * 10}) + "\n"
    for name in ("code", "english"):
        path = study_path.parent / f"{name}.jsonl"
        path.write_text(path.read_text() + shared)
    overrides = ["prepare.clean={near_duplicates: null}", "prepare.workers=1"]
    dag = build_dag(load_study(study_path, overrides), study_path, study_path.parent / "run")
    for stage in (s for s in dag.all if s.kind in ("clean", "tokenizer", "data")):
        stage.finish()
    documents = {
        name: sum(split["documents"] for split in json.loads((stage.folder / "stats.json").read_text())["splits"].values())
        for name, stage in dag.data.items()
    }
    assert documents == {"code": 201, "english": 200}
    cleaned = next(s for s in dag.all if s.kind == "clean").folder
    assert len(list((cleaned / "removed" / "exact_duplicate" / "english").iterdir())) == 1


def test_a_domain_with_too_few_documents_says_what_cleaning_kept(study_path):
    pytest.importorskip("datatrove")
    (study_path.parent / "code.jsonl").write_text('{"text": "the same"}\n' * 50)
    overrides = ["prepare.clean={near_duplicates: null}", "prepare.workers=1"]
    dag = build_dag(load_study(study_path, overrides), study_path, study_path.parent / "run")
    cleaning, tokenizer, code = (dag.stage(name) for name in ("clean/text", "tokenizer/byte", "data/code"))
    with pytest.warns(UserWarning, match="49 of 50"):
        cleaning.finish()
    tokenizer.finish()
    with pytest.raises(ConfigError, match=r"'code', of which cleaning \(prepare\.clean\) kept 1 of 50 documents.*fell into"):
        code.finish()


def test_rules_are_read_before_anything_runs(study_path):
    with pytest.raises(ConfigError, match=r"merge\.rules of the study, rule 1: weights sum to 0\.5, expected 1"):
        keys(study_path, "merge.rules=[{weights: {code: 0.5}}]")


def test_what_the_anchor_leaves_no_room_for_is_refused_before_anything_runs(study_path):
    with pytest.raises(MixtureError, match=r"'code': .* 0\.1, but the anchor alone gives it 0\.25"):
        keys(study_path, "domains.0.max_share=0.1")
    keys(study_path, "domains.0.max_share=0.1", "component.anchor={mixture: natural}")
    keys(study_path, "domains.0.max_share=0.1", "search.proxies=trained", "search.proxy_tokens=64")


def test_a_merges_result_is_the_checkpoint(study_path):
    dag = build_dag(load_study(study_path), study_path, study_path.parent / "run")
    merging = dag.stage("merge/proxies")
    assert result(merging) == merging.folder / "proxies" / "found"
    assert result(dag.base) == dag.base.folder


NAMED = [
    "tokenizer={type: bpe, train_vocab_size: 300, domains: [english]}",
    "base.mixture={english: 1}",
    "component.anchor={mixture: {english: 1}}",
]
"""Everything that would depend on all domains names those it depends on."""
CODE = "  - {name: code, inputs: [code.jsonl]}\n"


@pytest.mark.parametrize(
    ("domains", "search", "components"),
    [
        (f"{CODE}  - {{name: math, inputs: [math.jsonl]}}\n", "code", {"code", "english"}),  # one more
        ("  - {name: math, inputs: [math.jsonl]}\n", "math", {"english"}),  # another
        ("  - {name: a, inputs: [code.jsonl]}\n  - {name: b, inputs: [math.jsonl]}\n", "a", {"english"}),  # code, split
    ],
)
def test_when_domains_change_the_tokenizer_the_base_and_the_other_components_stay(study_path, domains, search, components):
    before = keys(study_path, *NAMED)
    study_path.write_text(SMALL_STUDY.replace(CODE, domains).replace("{code: 1}", f"{{{search}: 1}}"))
    after = keys(study_path, *NAMED)
    kept = {name for name in before if before[name] == after.get(name)}
    assert kept == {"tokenizer/bpe", "base/base"} | {f"{kind}/{c}" for kind in ("data", "components") for c in components}


def test_a_mixture_that_says_nothing_depends_on_every_domain(study_path):
    before = keys(study_path)
    study_path.write_text(SMALL_STUDY.replace(CODE, f"{CODE}  - {{name: math, inputs: [math.jsonl]}}\n"))
    after = keys(study_path)
    assert {name for name in before if before[name] == after[name]} == {"tokenizer/byte", "data/code", "data/english"}


def test_the_text_decides_not_its_place_or_age(study_path):
    before = keys(study_path)
    text = study_path.with_name("code.jsonl").read_text()
    study_path.with_name("code.jsonl").write_text(text)
    assert keys(study_path) == before
    study_path.with_name("code.jsonl").write_text(text + "more")
    assert keys(study_path)["data/code"] != before["data/code"]
    assert keys(study_path)["data/english"] == before["data/english"]


def test_every_byte_of_ready_made_data_decides_and_is_read_once(study_path, monkeypatch):
    code, valid, test = (make_indexed(study_path.parent / name, [5, 6, 7]) for name in ("code", "valid", "test"))
    ready = f"domains.0={{name: code, prefixes: {{train: [{code}], valid: [{valid}], test: [{test}]}}}}"
    before = keys(study_path, ready)
    assert before["data/code"] != keys(study_path)["data/code"]
    data = bytearray(code.with_suffix(".bin").read_bytes())
    data[0] ^= 1
    code.with_suffix(".bin").write_bytes(bytes(data))
    after = keys(study_path, ready)
    assert [n for n in before if before[n] != after[n]][:2] == ["data/code", "base/base"]
    monkeypatch.setattr(inputs, "_digest", lambda path, advance: pytest.fail(f"{path} was read again"))
    assert keys(study_path, ready) == after


def test_ready_made_data_is_read_where_it_lies_now(study_path):
    """Moved, with other data in its former place, it is the same stage, which is done."""

    def ready(prefix: Path) -> Dag:
        held_out = f"valid: [{prefix}_valid], test: [{prefix}_test]"
        domain = f"domains.0={{name: code, prefixes: {{train: [{prefix}], {held_out}}}}}"
        return build_dag(load_study(study_path, [domain]), study_path, study_path.parent / "run")

    old, new = (study_path.parent / place / "code" for place in ("old", "new"))
    for prefix in (old, new):
        for split in ("", "_valid", "_test"):
            make_indexed(prefix.with_name(f"code{split}"), [5, 6, 7])
    first = ready(old)
    for stage in (first.tokenizer, first.data["code"]):
        stage.finish()
    make_indexed(old, [50], seed=1)
    moved = ready(new).data["code"]
    assert moved.done()
    assert prefixes(moved, "train") == [new]
    assert str(study_path.parent) not in (moved.folder / "stats.json").read_text()


def test_a_domain_goes_on_where_it_was_stopped(study_path, monkeypatch):
    from megatron_demix.data import inputs, outputs
    from megatron_demix.data.encode_blocks import Recipe

    monkeypatch.setattr(inputs, "BLOCK_BYTES", 256)
    monkeypatch.setattr(outputs, "CHECKPOINT_S", 0.0)
    tokenize, seen = Recipe.__call__, []

    def stopped(self, block):
        if len(seen) == 9:
            raise KeyboardInterrupt
        seen.append(block.number)
        return tokenize(self, block)

    monkeypatch.setattr(Recipe, "__call__", stopped)
    dag = build_dag(load_study(study_path, ["prepare.workers=1"]), study_path, study_path.parent / "run")
    dag.tokenizer.finish()
    with pytest.raises(KeyboardInterrupt):
        dag.data["code"].finish()
    assert (dag.data["code"].state(), seen[-1]) == ("partial", 8)
    monkeypatch.setattr(Recipe, "__call__", lambda self, block: (seen.append(block.number), tokenize(self, block))[1])
    dag.data["code"].finish()
    assert seen == list(range(len(seen)))
    assert dag.data["code"].state() == "done"


@pytest.mark.parametrize("base", ["{tokens: 640}", "{checkpoint: given/base}"])
def test_keys_of_what_was_read_are_known_when_it_is_gone(study_path, base):
    folder = study_path.parent
    given = folder / "given"
    write_texts(folder, "task")
    write_checkpoint(given / "base" / "release", small_model(0))
    (given / "base" / "latest_checkpointed_iteration.txt").write_text("release")
    for name in ("code.jsonl", "task.jsonl"):
        (folder / name).rename(given / name)
    (given / "tokens").mkdir()
    for name in ("english", "valid", "test"):
        make_indexed(given / "tokens" / name, [np.arange(9)] * 9)
    (given / "tok").mkdir()
    (given / "tok" / "tokenizer.json").write_text("{}")
    (given / "kenlm").write_text("")
    settings = [
        "domains.0.inputs=[given/*.jsonl]",
        "domains.1={name: english, prefixes: {train: [given/tokens/english], valid: [given/tokens/valid], "
        "test: [given/tokens/test]}}",
        "prepare.clean={contamination: {tasks: {t: [given/task.jsonl]}}, perplexity: {model: given/kenlm}}",
        "tokenizer={type: huggingface, model: given/tok}",
        f"base={base}",
    ]
    study = load_study(study_path, settings)
    found = build_dag(study, study_path, folder / "run")
    given.rename(folder / "moved")
    with pytest.raises((ConfigError, CorruptInput)):
        build_dag(study, study_path, folder / "run")
    again = build_dag(study, study_path, folder / "run", absent_inputs="remembered")
    assert [(s.name, s.key) for s in again.all] == [(s.name, s.key) for s in found.all]
    with pytest.raises((ConfigError, CorruptInput)):
        build_dag(study, study_path, folder / "another", absent_inputs="remembered")
    build_dag(study, study_path, folder / "another", absent_inputs="allowed")


@pytest.mark.parametrize("absent", ["refused", "allowed"])
def test_what_was_read_of_inputs_is_remembered_where_that_is_all(study_path, monkeypatch, absent):
    """Ctrl-C while a large corpus is read; `submit --dry-run`."""
    digest, finished, read = inputs._digest, [], []

    def interrupted(path, *how):
        if path.name == "english.jsonl" and absent == "refused":
            while not finished:
                threading.Event().wait(0.01)
            raise KeyboardInterrupt
        found = digest(path, *how)
        finished.append(path)
        return found

    monkeypatch.setattr(inputs, "_digest", interrupted)
    study, run = load_study(study_path), study_path.parent / "run"
    with pytest.raises(KeyboardInterrupt) if absent == "refused" else nullcontext():
        build_dag(study, study_path, run, absent_inputs=absent)
    monkeypatch.setattr(inputs, "_digest", lambda path, *how: [digest(path, *how), read.append(path.name)][0])
    build_dag(study, study_path, run)
    assert read == (["english.jsonl"] if absent == "refused" else [])


def test_any_large_input_has_a_bar(study_path, monkeypatch, capsys):
    monkeypatch.setattr(inputs, "_WORTH_A_BAR", 0)
    monkeypatch.setattr(artifact, "_PIECE", 64)
    monkeypatch.setattr(progress.time, "monotonic", iter(range(0, 10**9, 11)).__next__)
    path = study_path.parent / "code.jsonl"
    found = inputs.InputDigests(study_path.parent / "cache.json")
    assert found.of([path]) == fingerprint([[path.name, hash_file(path)]])
    assert f"hashing {path}: 100 %" in capsys.readouterr().err


def test_a_given_checkpoint_may_be_called_as_the_stage_that_scores_it(study_path):
    given = write_checkpoint(study_path.parent / "given", small_model(0), {})
    dag = build_dag(load_study(study_path), study_path, study_path.parent / "run")
    stages = with_needs([given_scores(dag, {"scores": given}, final=False)])
    assert {s.name for s in stages} >= {"evaluate/scores", "evaluate/given/scores"}


def test_a_script_of_ones_own_counts_by_its_bytes(study_path):
    script = study_path.parent / "pretrain_own.py"
    stock = [f"trainer={{backend: megatron_lm, checkout: {study_path.parent}, script: {script}}}"]

    def training() -> dict:
        return training_settings(load_study(study_path, stock), "component", 1)["trainer"]

    script.write_text("one")
    before = training()
    script.write_text("two")
    assert training() != before


def test_torn_lines_of_the_log_of_times_are_passed_over(study_path):
    dag = build_dag(load_study(study_path), study_path, study_path.parent / "run")
    whole = json.dumps({"event": "stage", "key": dag.tokenizer.key, "wall_s": 2.5})
    (dag.run / "metrics.jsonl").write_text(f'{whole[:20]}{whole}\n"text"\n\n{whole}\n')
    assert _timings(dag) == {"tokenizer/byte": 2.5}


def test_a_stage_and_its_parts_have_names(study_path):
    dag = build_dag(load_study(study_path), study_path, study_path.parent / "run")
    assert dag.stage("data/code") is dag.data["code"]
    part = dag.stage("data/code@1-of-3")
    assert (part.whole, part.name) == (dag.data["code"], "data/code@1-of-3")
    for name, near in {"data/coed": "data/code", "data/code@1": "data/code", "base/base@0-of-2": "base/base"}.items():
        with pytest.raises(ConfigError, match=rf"study 's' has no stage '{name}'; did you mean '{near}'\? `demix plan` lists"):
            dag.stage(name)
    with pytest.raises(ConfigError, match=r"has no stage 'x'\. `demix plan` lists them"):
        dag.stage("x")


def test_missing_text_is_named(study_path):
    with pytest.raises(ConfigError, match=r"nothing\.txt"):
        keys(study_path, "domains.0={name: code, inputs: [nothing.txt]}")


@pytest.mark.parametrize("same", ["pattern", "link"])
def test_a_file_in_two_domains_is_refused(study_path, same):
    code, english = (study_path.parent / f"{name}.jsonl" for name in ("code", "english"))
    if same == "link":
        english.unlink()
        english.hardlink_to(code)
    pattern = "domains.1={name: english, inputs: ['*.jsonl']}" if same == "pattern" else "seed=1"
    said = r"domains: .*\.jsonl is an input of 'english', and of 'code'"
    with pytest.raises(ConfigError, match=f"{said}, there as {code}" if same == "link" else rf"{said}\. Nobody could tell"):
        keys(study_path, pattern)
    keys(study_path, pattern, "domains.0.json_key=title")  # other text of the same file


def test_missing_tokenizer_is_named(study_path):
    with pytest.raises(ConfigError, match=r"tokenizer\.model: .*tok\.json does not exist"):
        keys(study_path, "tokenizer={type: huggingface, model: tok.json}")


def test_iterations_round_to_whole_steps(study_path):
    study = load_study(study_path, ["final.tokens=1000"])
    assert num_iterations(study, "final") == 16  # 1000 / 64 = 15.6
    assert num_tokens(study, "final") == 1024


def test_training_never_repeats_a_domain_silently(study_path):
    study = load_study(study_path, ["base.tokens=64k", "domains.0.max_epochs=2"])
    dag = build_dag(study, study_path, study_path.parent / "run")
    for stage in (dag.tokenizer, *dag.data.values()):
        stage.finish()
    with pytest.raises(
        MixtureError, match=r"base: its share 0\.75 of domain 'code' is 48k tokens, which repeats the .* there are"
    ):
        _filled(study, "base", dag.data, lambda: ("base", Mixture({"code": 0.75, "english": 0.25}))).sources()
    filling = _filled(load_study(study_path), "base", dag.data, lambda: ("base", Mixture({"code": 1.0, "english": 0.0})))
    assert filling.sources() == [(dag.data["code"].folder / "train", 1.0)]
