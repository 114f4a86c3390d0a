"""The study file: what is said about each mistake."""

import re

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sound_study import GOOD, put

from megatron_demix.errors import ConfigError, DemixError, MixtureError
from megatron_demix.study.load import load_study
from megatron_demix.study.study import Study

TRAINED = "search.proxies=trained"


@pytest.mark.parametrize(
    ("fits", "too_many", "said"),
    [
        (["final.seeds=100"], ["final.seeds=1000000"], r"final\.seeds: expected a number of at most 100, found 1000000"),
        (["component.maturity_seeds=100"], ["component.maturity_seeds=101"], r"maturity_seeds: .* at most 100, found 101"),
        (["search.rounds=[9990, 10]"], ["search.rounds=[9990, 11]"],
         r"search: rounds: 10,001 merged proxies in all, expected at most 10,000"),
        ([TRAINED, "search.rounds=[4096]"], [TRAINED, "search.rounds=[4097]"],
         r"search: rounds: 4,097 trained proxies in all, expected at most 4,096"),
        ([f"search.rounds={[8] * 100}"], [f"search.rounds={[8] * 101}"],
         r"search\.rounds: expected at most 100 entries, found 101"),
        (["search.bootstraps=10000"], ["search.bootstraps=10001"], r"search\.bootstraps: .* at most 10000, found 10001"),
        (["search.candidates=10000000"], ["search.candidates=10000001"], r"search\.candidates: .* at most 10000000, found"),
        (["launch.slurm.parts={data: 10000}"], ["launch.slurm.parts={data: 10001}"],
         r"launch\.slurm\.parts\.data: .* at most 10000, found 10001"),
    ],
)  # fmt: skip
def test_counts_that_no_machine_comes_to_the_end_of_are_refused(load, fits, too_many, said):
    load(overrides=[*fits, "component.tokens=10B"])
    with pytest.raises(ConfigError, match=said):
        load(overrides=[*too_many, "component.tokens=10B"])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("final.tokens", r"--set 'final\.tokens': expected key\.subkey=value"),
        ("=3", "expected key.subkey=value"),
        ("domains.9.name=x", "the study has no such place"),
        ("domains.first.name=x", "the study has no such place"),
        ("train.lr.x=1", "the study has no such place"),
        ("train.lr=[1,", r"'\[1,' is not YAML"),
        ("name=2024-13-01", r"'2024-13-01' is not YAML \(month must be in 1..12\)"),
        ("trian.lr=1", "trian: unknown key; did you mean 'train'\\?"),
    ],
)
def test_overrides_that_fit_nowhere(load, override, message):
    with pytest.raises(ConfigError, match=message):
        load(overrides=[override])


def test_settings_that_do_not_go_together(load):
    with pytest.raises(ConfigError, match=r"seed is 0, and Megatron-LM \(trainer.backend\) takes seeds of 1 or more"):
        load(overrides=["seed=0", "trainer={backend: megatron_lm, checkout: Megatron-LM}"])
    with pytest.raises(ConfigError, match=r"num_query_groups 6 is neither a multiple nor a divisor of parallel.tensor 4"):
        load(
            overrides=["parallel.tensor=4", "model.hidden_size=96", "model.num_attention_heads=12", "model.num_query_groups=6"]
        )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            put("train", "seq_lenght", 5),
            r"train\.seq_lenght: unknown key; did you mean 'seq_length'\? Known here: seq_length, ",
        ),
        (put("domains", 0, "inptus", []), r"domains\.0\.inptus: unknown key; did you mean 'inputs'\?"),
        (put("component", "anchor", "shar", 0.1), r"component\.anchor\.shar: unknown key; did you mean 'share'\?"),
        (put("zzz", 1), r"zzz: unknown key\. Known here: name, seed"),
        (put("name", "../x"), "name: '../x' becomes part of file names: expected ASCII letters, digits, '_'"),
        (put("name", "数学"), "name: '数学' becomes part of file names: expected ASCII letters"),
        (put("name", "x\n"), r"name: 'x\\n' becomes part of file names: expected ASCII letters"),
        (put("train", "lr", "fast"), r"train\.lr: expected a number, found 'fast'"),
        (
            put("final", "tokens", "lots"),
            r"final\.tokens: tokens: 'lots' is not understood\. Write it like 250000, 4M or 30B\.$",
        ),
        (
            put("base", "mixture", "unifrom"),
            r"base\.mixture: expected 'natural' or 'uniform', found 'unifrom', or expected a mapping, ",
        ),
        (put("base", "mixture", {"cod": 1.0}), r"base\.mixture: 'cod' is not one of code, math; did you mean 'code'\?"),
        (put("search", "proxy_tokens", "1M"), "proxy_tokens is what trained proxies cost; merged ones cost the components"),
        (put("evaluate", {"losses": []}), "evaluate: neither losses nor tasks are measured; name one"),
        (put("trainer", {"backend": "megatron_lm"}), "backend megatron_lm needs `checkout`, the folder of Megatron-LM"),
        (put("tokenizer", {"type": "byte", "domains": ["code"]}), "type 'byte' is not trained, so it takes no `domains`"),
        (
            put("prepare", {"clean": {"heuristics": {"use": ["c4"], "domains": ["cod"]}}}),
            r"prepare\.clean\.heuristics\.domains: 'cod' is not one of code, math; did you mean 'code'\?",
        ),
        (put("base", "checkpoint", "/x"), "base needs one of `tokens` .* `checkpoint` and"),
        (
            put("search", "objective", {"maths": 1}),
            r"search\.objective: 'maths' is not one of code, math; did you mean 'math'\?",
        ),
        (put("search", "objective", {"code": -1, "math": 2}), "objective: weights must be >= 0 and not all 0"),
        (put("evaluate", "losses", ["code"]), r"search\.objective: 'math' is not one of code\."),
        (put("domains", 0, "name", "math"), "domains: 'math' is named twice"),
        (put("domains", 0, "prefixes", {"train": ["x"]}), "domain 'code' needs either `inputs` .* or `prefixes`"),
        (put("tokenizer", {"type": "huggingface"}), "type 'huggingface' needs `model`"),
        (put("tokenizer", {"type": "byte", "model": "x"}), "type 'byte' takes no `model`"),
        (put("prepare", {"split": [0.5, 0.5, 0.5]}), "expected three shares above 0 that sum to 1"),
        (put("prepare", {"split": [1, 0, 0]}), "expected three shares above 0 that sum to 1"),
        (put("parallel", {"data": 3}), "train.global_batch_size 8 is not a multiple of micro_batch_size x parallel.data = 3"),
        (put("parallel", {"pipeline": 3}), "model.num_layers 2 is not a multiple of parallel.pipeline 3"),
        (put("parallel", {"tensor": 3}), "model.num_attention_heads 4 is not a multiple of parallel.tensor 3"),
        (
            put("parallel", {"tensor": 2, "context": 3, "sequence_parallel": True}),
            r"train\.seq_length \d+ is not a multiple of 12: parallel\.context cuts it into twice as many parts",
        ),
        (
            lambda data: (put("parallel", {"tensor": 2})(data), put("model", "num_experts", 4)(data)),
            r"parallel\.tensor is 2 and the model has experts, which megatron\.core trains only with parallel\.sequence_par",
        ),
        (put("launch", {"slurm": {"sbatch": ["--mail-type=FAIL", "--job-name=x"]}}), "--job-name is decided by demix"),
        (put("launch", {"slurm": {"sbatch": ["-M other"]}}), "-M is decided by demix"),
        (put("launch", {"slurm": {"sbatch": ["-N4"]}}), "-N is decided by demix"),
        (put("launch", {"slurm": {"sbatch": ["--error=%j.err"]}}), "--error is decided by demix"),
        (put("launch", {"slurm": {"sbatch": ["--time=1"]}}), "launch.slurm.sbatch: --time has a key of its own: time"),
        (put("launch", {"slurm": {"light": {"sbatch": ["-t 1"]}}}), "light.sbatch: -t has a key of its own: time"),
        (put("launch", {"slurm": {"sbatch": ["-c8"]}}), "-c has a key of its own: cpus_per_task"),
        (put("launch", {"slurm": {"sbatch": ["--exclusive --time=1"]}}), "'--exclusive --time=1': expected one option"),
        (put("launch", {"slurm": {"sbatch": ["-C gpu -t1"]}}), "'-C gpu -t1': expected one option"),
        (put("launch", {"slurm": {"sbatch": ["exclusive"]}}), "'exclusive': expected one option, as in '--exclusive' or"),
        (put("launch", {"slurm": {"sbatch": [" --time=1"]}}), "' --time=1': expected one option"),
        (put("launch", {"slurm": {"sbatch": ["--exclusive\nsleep 9"]}}), "expected one option"),
        (put("launch", {"slurm": {"kinds": {"final": {"tme": 1}}}}), r"kinds\.final\.tme: unknown key; did you mean 'time'\?"),
        (put("search", "groups", {"g": {"lowst": 1}}), r"search\.groups\.g\.lowst: unknown key; did you mean 'lowest'\?"),
        (put("merge", {"rules": [{"tensor": "x"}]}), r"merge\.rules\.0\.tensor: unknown key; did you mean 'tensors'\?"),
        (put("merge", {"rules": [{"layers": 1.5}]}), r"merge\.rules\.0\.layers: [^\n]*found 1\.5, or [^\n]*found 1\.5$"),
        (
            put("launch", {"slurm": {"time": "4min"}}),
            r"launch\.slurm: .*time is 240 s, and jobs are told to save 300 s \(grace\)",
        ),
        (put("launch", {"slurm": {"kinds": {"final": {"time": 60}}}}), r"kinds\.final\.time is 60 s"),
        (put("model", "hidden_size", 65), "hidden_size 65 is not a multiple of num_attention_heads 4"),
        (put("domains", 0, "max_epochs", float("inf")), r"domains\.0\.max_epochs: expected a finite number, found inf"),
        (
            put("search", "objective", "code", float("nan")),
            r"search\.objective\.code: expected a finite number, found nan",
        ),
        (put("prepare", {"split": [float("nan"), 0.5, 0.5]}), r"prepare\.split\.0: expected a finite number, found nan"),
        (put("model", "kv_channels", 9), r"kv_channels 9 .* is odd, but rope turns pairs of channels"),
        (
            put("model", {**GOOD["model"], "num_experts": 2, "moe_router_topk": 3}),
            "moe_router_topk 3 is more than num_experts 2",
        ),
        (
            put("model", {**GOOD["model"], "position_embedding_type": "learned_absolute", "max_position_embeddings": 64}),
            r"max_position_embeddings 64 is less than train\.seq_length 128, and learned_absolute",
        ),
        (put("parallel", {"expert": 2}), r"parallel\.expert 2 .*; the model has none"),
        (
            lambda data: data.update(model={**GOOD["model"], "num_experts": 4}, parallel={"expert": 2}),
            r"parallel\.data x parallel\.context is 1, expected a multiple of parallel\.expert 2",
        ),
        (put("train", "adam_beta2", 1.0), r"train\.adam_beta2: expected a number below 1, found 1\.0"),
        (put("train", "clip_grad", -1), r"train\.clip_grad: expected a number of at least 0, found -1"),
        (put("model", "num_query_groups", 3), "num_attention_heads 4 is not a multiple of num_query_groups 3"),
    ],
)
def test_each_mistake_is_named(load, change, message):
    with pytest.raises(ConfigError, match=message):
        load(change)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["domains.0.min_share=0.6", "domains.0.max_share=0.5"], "domain 'code': min_share 0.6 is above max_share 0.5"),
        (["domains.0.min_share=0.6", "domains.1.min_share=0.5"], "least shares .* sum to 1.1, above 1: code 0.6, math 0.5"),
        (["domains.0.max_share=0.4", "domains.1.max_share=0.5"], "largest shares .* sum to 0.9, below 1: code 0.4, math 0.5"),
        (["search.groups={g: {domains: [code], lowest: 0.6, highest: 0.5}}"], "lowest 0.6 is above highest 0.5"),
        (["domains.0.min_share=0.6", "search.groups={g: {domains: [code], highest: 0.5}}"], "sum to 0.6, above highest 0.5"),
        (["domains.0.max_share=0.6", "search.groups={g: {domains: [code], lowest: 0.7}}"], "sum to 0.6, below lowest 0.7"),
        (
            ["search.groups={g: {domains: [code]}, h: {domains: [math, code]}}"],
            r"search\.groups: 'code' is in 'g' and in 'h'; expected once",
        ),
        (["search.groups={g: {domains: [code, math], highest: 0.9}}"], "sum to 0.9, below 1: group g 0.9"),
        (
            ["merge.rules=[{weights: {cod: 1.0}}]"],
            r"merge\.rules\.0\.weights: 'cod' is not one of code, math; did you mean 'code'\?",
        ),
        (["model.num_experts=4", "model.moe_router_topk=1"], "moe_router_topk 1 needs moe_router_pre_softmax: true"),
    ],
)
def test_bounds_and_rules_that_no_data_could_meet(load, overrides, message):
    with pytest.raises(ConfigError, match=message):
        load(overrides=overrides)


def test_bounds_and_rules_that_can_be_met(load):
    near = ["domains.0.min_share=0.6", "domains.0.max_share=0.7", "search.groups={g: {domains: [math], lowest: 0.3}}"]
    assert load(overrides=near).domains[0].min_share == 0.6
    load(overrides=["component.mixed=pairs", "merge.rules=[{tensors: 'embedding.*', weights: {code+math: 1}}]"])


def test_a_tokenizer_cannot_be_trained_on_what_is_tokenized(load):
    given = ["domains.0={name: code, prefixes: {train: [x], valid: [x], test: [x]}}", "tokenizer={type: bpe}"]
    load(overrides=given)
    with pytest.raises(ConfigError, match="type 'bpe' is trained on the domains' text, and all of them are tokenized already"):
        load(overrides=[*given, given[0].replace("domains.0={name: code", "domains.1={name: math")])


def test_a_budget_below_one_step_is_refused(load):
    for place in ("base.tokens", "component.tokens", "final.tokens"):
        with pytest.raises(ConfigError, match=rf"{place} is 1,000, less than one step: .* is 1,024 tokens"):
            load(overrides=[f"{place}=1000"])
        load(overrides=[f"{place}=1024"])
    trained = ["search.proxies=trained", "component.tokens=6139"]
    with pytest.raises(ConfigError, match=r"search\.proxy_tokens is 1,023 \(by default, what the components would cost\)"):
        load(overrides=trained)  # 1,023.17
    load(overrides=[*trained, "search.proxy_tokens=2k"])


def test_a_learning_rate_that_decays_upwards_is_refused(load):
    with pytest.raises(
        ConfigError, match=r"component: min_lr 0\.001 is above lr 0\.0001; set component\.min_lr, or train\.min_lr"
    ):
        load(overrides=["train.lr=0.01", "train.min_lr=1e-3", "component.lr=1e-4"])
    load(overrides=["train.lr=0.01", "train.min_lr=1e-3", "component.lr=1e-4", "component.lr_decay_style=constant"])


def test_a_mixture_that_does_not_sum_to_one(load):
    with pytest.raises(MixtureError, match=r"study 'tiny': component\.anchor\.mixture: weights sum to 0\.75, expected 1"):
        load(put("component", "anchor", "mixture", {"math": 0.75}))


def test_all_mistakes_are_named_at_once(load):
    def two(data):
        put("train", "lr", "fast")(data)
        put("final", "tokens", 0)(data)

    with pytest.raises(ConfigError, match=r"(?s)train\.lr: .*\n  final\.tokens: "):
        load(two)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "expected a mapping .*; found NoneType"),
        (b"- a\n", "found list"),
        (b"a: [", "cannot be read"),
        (b"name: 2024-13-01\n", "cannot be read: month must be in 1..12"),
        (b"a: 1\nb: {c: 1, d: 2,\n  c: 3}\n", r"(?s)the key 'c' is given twice, first in line 2; keep one of them.*line 3"),
        (b"\xff\xfe\x00", "cannot be read"),
    ],
)
def test_files_that_are_no_study(tmp_path, content, message):
    (tmp_path / "study.yaml").write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        load_study(tmp_path / "study.yaml")


def test_a_study_that_is_not_there(tmp_path):
    with pytest.raises(ConfigError, match=r"nowhere\.yaml: cannot be read"):
        load_study(tmp_path / "nowhere.yaml")


values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.sampled_from(["4M", "code", "natural", "", "x" * 50])
    | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


places = st.sampled_from(
    [[k] for k in Study.model_fields] + [["train", "lr"], ["base", "mixture"], ["domains", 0], ["search", "objective"]]
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=100)
@given(place=places, value=values)
def test_whatever_stands_in_a_study_it_is_read_or_refused(load, place, value):
    def change(data):
        put(*place, value)(data)

    said = ""
    try:
        load(change)
    except DemixError as e:
        said = str(e)
    assert not re.search(r"Input should|Field required|instance of|after validation", said)
