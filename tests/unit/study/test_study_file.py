"""The study file: what it means."""

from pathlib import Path

import pytest
import yaml
from sound_study import put

from megatron_demix.artifact import write_json
from megatron_demix.study.load import load_study
from megatron_demix.study.study import Study
from megatron_demix.study.unused import warnings_of
from megatron_demix.yaml_file import load_yaml

QUIZ = "evaluate.tasks=[{name: quiz, format: arc, path: quiz.jsonl}]"


def test_a_study_is_read_with_its_defaults(load):
    study = load()
    assert study.domain_names == ["code", "math"]
    assert (study.base.tokens, study.component.tokens, study.final.tokens) == (4_000_000, 2_000_000, 10_000_000)
    assert study.phase("component").lr == 3e-4
    assert study.phase("final").lr == study.train.lr == 1e-3
    assert study.parallel.world_size == 1
    assert study.final.baselines == ["uniform", "natural"]
    assert Study.model_validate(study.model_dump(mode="json")) == study


def test_a_study_that_is_handed_on_as_json_is_the_same_whatever_characters_it_has(load, tmp_path):
    study = load(lambda data: data["domains"][0].update(inputs=["data/\U0001f600/\u4f8b/\u2028.jsonl"]))
    write_json(tmp_path / "study.json", study.model_dump(mode="json"))
    assert load_study(tmp_path / "study.json") == study


def test_a_study_cannot_be_changed_after_it_was_read(load):
    with pytest.raises(ValueError, match="frozen"):
        load().train.lr = 1.0


def test_paths_may_begin_with_the_home_folder(load, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    study = load(
        overrides=[
            "domains.0.inputs=[~/code/*.jsonl, math]",
            "domains.1={name: math, prefixes: {train: [~/train], valid: [valid]}}",
            "tokenizer={type: huggingface, model: ~/tokenizer}",
            "prepare.clean={quality: {model: ~/q.bin}, contamination: {tasks: {arc: [~/arc.jsonl]}}}",
            "base={checkpoint: ~/ckpt/base}",
            "trainer={checkout: ~/Megatron-LM}",
            "search.earlier=[{study: ~/study_v1.yaml}]",
            "evaluate.tasks=[{name: arc, format: arc, path: ~/arc}]",
        ]
    )
    assert study.domains[0].inputs == ["/home/me/code/*.jsonl", "math"]
    assert study.domains[1].prefixes == {"train": [Path("/home/me/train")], "valid": [Path("valid")]}
    assert study.prepare.clean.contamination.tasks == {"arc": ["/home/me/arc.jsonl"]}
    assert [
        str(path)
        for path in (
            study.tokenizer.model,
            study.prepare.clean.quality.model,
            study.base.checkpoint,
            study.trainer.checkout,
            study.search.earlier[0].study,
            study.evaluate.tasks[0].path,
        )
    ] == [f"/home/me/{name}" for name in ("tokenizer", "q.bin", "ckpt/base", "Megatron-LM", "study_v1.yaml", "arc")]
    assert load(overrides=["base={huggingface: ~nobody_here/x}"]).base.huggingface == Path("~nobody_here/x")


def test_mixtures_by_name_and_by_weight(load):
    study = load()
    natural = {"math": 10.0, "code": 30.0}
    assert study.mixture("natural", natural, "base") == {"code": 0.75, "math": 0.25}
    assert study.mixture("uniform", natural, "base") == {"code": 0.5, "math": 0.5}
    assert list(study.mixture({"math": 1.0}, natural, "base").items()) == [("code", 0.0), ("math", 1.0)]


@pytest.mark.parametrize(
    ("overrides", "look", "value"),
    [
        (["final.tokens=20M"], lambda s: s.final.tokens, 20_000_000),
        (["search.rounds=[12, 1]"], lambda s: s.search.rounds, [12, 1]),
        (["domains.1.max_epochs=7"], lambda s: s.domains[1].max_epochs, 7.0),
        (["merge.threads=3", "merge.threads=4"], lambda s: s.merge.threads, 4),
    ],
)
def test_overrides(load, overrides, look, value):
    assert look(load(overrides=overrides)) == value


@pytest.mark.parametrize(
    ("override", "warning"),
    [
        ("trainer={args: --x, checkout: a}", "trainer.args has no effect: trainer.backend is megatron_core"),
        ("tokenizer={type: byte, train_bytes: 5M}", "tokenizer.train_bytes has no effect: a tokenizer of type byte is not"),
        ("domains.0={name: code, prefixes: {train: [a]}, json_key: x}", "domains.0.json_key has no effect"),
        ("model.moe_ffn_hidden_size=64", "model.moe_ffn_hidden_size has no effect: model.num_experts is not set"),
        ("model.rope_scaling_factor=4", "model.rope_scaling_factor has no effect: model.use_rope_scaling is false"),
        ("evaluate.generate_batch_size=64", "evaluate.generate_batch_size has no effect: no task has answers generated"),
        ("parallel.sequence_parallel=true", "parallel.sequence_parallel has no effect: parallel.tensor is 1"),
        ("base={checkpoint: a, lr: 0.1, mixture: uniform}", "base.mixture has no effect: the base is given"),
        ("final={tokens: 1M, min_lr: 1e-5, lr_decay_style: constant}", "final.min_lr has no effect: the learning rate stays"),
        ("train={seq_length: 8, global_batch_size: 8, min_lr: 1e-5, lr_decay_style: constant}", "train.min_lr has no effect"),
        (
            "component.anchor={share: 0, mixture: natural}",
            "component.anchor.mixture has no effect: component.anchor.share is 0",
        ),
        ("search={proxies: trained, objective: {code: 1}}", "component.anchor has no effect: search.proxies is trained"),
        ("search={rounds: [8], objective: {code: 1}, stop: 0.1}", "search.stop has no effect: there is one round"),
        (
            "evaluate.tasks=[{name: q, format: gsm8k, path: q, scores: [bits_per_byte], max_new_tokens: 9}]",
            "evaluate.tasks.0.max_new_tokens has no effect: no score of it needs written answers",
        ),
        ("launch={backend: slurm, jobs: 2}", "launch.jobs has no effect: launch.backend is slurm"),
        ("launch={backend: slurm, slurm: {mounts: [/a]}}", "launch.slurm.mounts has no effect"),
        ("launch={backend: slurm, slurm: {gpus_per_node: 8}}", "launch.slurm.gpus_per_node is 8, and cpus_per_task is not set"),
        (
            "launch={backend: slurm, slurm: {kinds: {final: {gpus_per_node: 8}}}}",
            "launch.slurm.kinds.final.gpus_per_node is 8, and cpus_per_task is not set: where nodes are shared",
        ),
        (
            "search={candidates: 100, objective: {code: 1}}",
            "search.top is 128 of 100 candidates: the found mixture is the mean",
        ),
        ("evaluate.tokens_per_domain=100", "evaluate.tokens_per_domain is 100, but one window holds train.seq_length = 128"),
    ],
)
def test_what_has_no_effect_is_said(load, override, warning):
    assert warnings_of(load()) == []
    assert [line for line in warnings_of(load(overrides=[override])) if line.startswith(warning)]


@pytest.mark.parametrize("more", ["cpus_per_task: 64", 'sbatch: ["--cpus-per-gpu=8"]', "sbatch: [--exclusive]"])
def test_cpus_beside_gpus_may_be_asked_for_in_several_ways(load, more):
    assert warnings_of(load(overrides=[f"launch={{backend: slurm, slurm: {{gpus_per_node: 8, {more}}}}}"])) == []


def test_an_empty_section_can_be_set(load):
    assert load(put("prepare", None), overrides=["prepare.workers=3"]).prepare.workers == 3


def test_what_a_merge_key_brings_may_be_replaced():
    text = "a: &a {x: 1, y: 2}\nb: &b {<<: *a, x: 3}\nc: {<<: *b, y: 4}\n"
    assert load_yaml(text) == yaml.safe_load(text)


@pytest.mark.parametrize(
    ("overrides", "num"),
    [
        ([], 1),
        (["component.maturity_seeds=0"], 0),
        (["component.maturity_seeds=3"], 3),
        (["search.proxy_score=interpolated"], 1),
        (["search.proxy_score=ensemble"], 0),
        (["search.proxy_score=merged"], 0),
        (["search.extrapolate=[0.5]", "component.lr_decay_style=constant"], 0),
        (["search.proxy_score=merged", "component.maturity_seeds=2"], 2),
        (["search.proxies=trained"], 0),
        (["evaluate.losses=[]", "search.objective={quiz/acc: 1}", QUIZ], 1),
        (["component.mixed=centroid"], 0),
        (["component.mixed=centroid", "component.maturity_seeds=1"], 1),
    ],
)
def test_a_centroid_is_trained_where_interpolated_scores_go_through_it(load, overrides, num):
    assert load(overrides=overrides).maturity_seeds == num
