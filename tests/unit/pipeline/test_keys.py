"""Every setting of a study is part of the keys of what it decides, or says only how and where something runs."""

import types
import typing
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from dist_checkpoints import small_model, write_checkpoint
from indexed_data import make_indexed
from pydantic import BaseModel
from small_texts import SMALL_STUDY, write_texts

from megatron_demix.errors import DemixError
from megatron_demix.pipeline.dag import build_dag
from megatron_demix.study.load import load_study

STUDY = SMALL_STUDY.replace("tokens: 320", "tokens: 640")

HOW = {
    *("name", "prepare.workers", "model.transformer_impl", "merge.threads", "trainer.checkout"),
    *("train.micro_batch_size", "train.use_distributed_optimizer", "train.recompute_granularity", "train.timeout"),
    *("train.save_interval", "train.keep_checkpoints", "train.log_interval"),
    *("train.loss_spike_factor", "train.loss_spike_window", "train.loss_spike_patience"),
    *("evaluate.micro_batch_size", "evaluate.generate_batch_size", "evaluate.replicas", "evaluate.expert"),
}
"""What decides no result, as all of `parallel` and `launch`."""

BPE = "tokenizer={type: bpe, train_vocab_size: 300}"
MOE = "model.num_experts=4"
DELTAS = "merge={method: della, density: 0.5}"
STOCK = "trainer={backend: megatron_lm, checkout: .}"
TRAINED = "search={rounds: [8], objective: {code: 1}, proxies: trained, proxy_tokens: 640}"
TASK = "evaluate.tasks=[{name: t, format: arc, path: task.jsonl}]"
SETTINGS: dict[str, tuple[str, ...]] = {
    "name": ("name=other",),
    "tokenizer.model": ("tokenizer={type: huggingface, model: tok}", "tokenizer.model=tok2"),
    "tokenizer.train_vocab_size": (BPE, "tokenizer.train_vocab_size=400"),
    "tokenizer.train_bytes": (BPE, "tokenizer.train_bytes=1M"),
    "tokenizer.domains": (BPE, "tokenizer.domains=[english]"),
    "prepare.clean": ("prepare.clean={}",),
    "prepare.split": ("prepare.split=[0.9, 0.05, 0.05]",),
    "domains.0.name": ("search.objective={english: 1}", "domains.0.name=c"),
    "domains.0.inputs": ("domains.0.inputs=[code.jsonl, math.jsonl]",),
    "domains.0.prefixes": ("domains.0={name: code, prefixes: {train: [a], valid: [b], test: [c]}}",),
    "domains.0.json_key": ("domains.0.json_key=content",),
    "model.rope_scaling_factor": ("model.use_rope_scaling=true", "model.rope_scaling_factor=4"),
    "model.moe_router_topk": (MOE, "model.moe_router_topk=3"),
    "model.moe_router_pre_softmax": (MOE, "model.moe_router_pre_softmax=true"),
    "model.moe_ffn_hidden_size": (MOE, "model.moe_ffn_hidden_size=16"),
    "model.moe_aux_loss_coeff": (MOE, "model.moe_aux_loss_coeff=0.5"),
    "train.min_lr": ("train.min_lr=1e-5",),
    "base.tokens": ("base.tokens=1280",),
    "base.min_lr": ("base.min_lr=1e-5",),
    "component.tokens": ("component.tokens=1280",),
    "component.min_lr": ("component.min_lr=1e-5",),
    "final.tokens": ("final.tokens=1280",),
    "final.min_lr": ("final.min_lr=1e-5",),
    "trainer.backend": (STOCK,),
    "trainer.checkout": (STOCK, "trainer.checkout=tok"),
    "trainer.script": (STOCK, "trainer.script=pretrain_mamba.py"),
    "trainer.args": (STOCK, "trainer.args=--z-loss 1"),
    "base.checkpoint": ("base={checkpoint: given}",),
    "component.average": ("component.average=[0.5, 1]",),
    "merge.from_base": ("merge.method=multislerp", "merge.from_base=false"),
    "merge.density": (DELTAS, "merge.density=0.3"),
    "merge.epsilon": (DELTAS, "merge.epsilon=0.1"),
    "merge.gamma": ("merge={method: breadcrumbs, density: 0.5}", "merge.gamma=0.2"),
    "merge.rules": ("merge.rules=[{tensors: '*norm*', weights: {code: 1}}]",),
    "search.rounds": ("search.rounds=[8, 5]",),
    "search.proxies": ("search.proxies=trained", "search.proxy_tokens=640"),
    "search.proxy_tokens": (TRAINED, "search.proxy_tokens=1280"),
    "search.extrapolate": ("component.lr_decay_style=constant", "search.extrapolate=[0.5]"),
    "search.objective": ("search.objective={code: 1, english: 1}",),
    "search.candidates": ("search.candidates=1000",),
    "search.groups": ("search.groups={g: {domains: [code], highest: 0.6}}",),
    "evaluate.losses": ("evaluate.losses=[code]",),
    "evaluate.tasks": (TASK,),
    "final.baselines": ("final.baselines=[uniform]",),
}
"""Of each setting that has no other value by its type: what it has an effect beside, if anything, and then another value."""

ELSEWHERE = {"base.huggingface", "search.earlier"}
"""They need a folder of a model, and a study that is done: test_huggingface_base.py, test_earlier_studies.py."""


def leaves(model: BaseModel, before: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(key, type, value) of every setting."""
    for name, field in type(model).model_fields.items():
        value = getattr(model, name)
        if isinstance(value, list) and value and isinstance(value[0], BaseModel):
            name, value = f"{name}.0", value[0]
        if isinstance(value, BaseModel):
            yield from leaves(value, f"{before}{name}.")
        else:
            yield f"{before}{name}", field.annotation, value


def others(kind: Any, value: Any) -> list[str]:
    """Other values of a type, of which some may be refused."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType, typing.Annotated):
        return [text for part in (arguments[:1] if origin is typing.Annotated else arguments) for text in others(part, value)]
    if origin is typing.Literal:
        return [str(a) for a in arguments if a != value]
    if kind is bool:
        return [str(not value).lower()]
    return {int: ["2", "3", "4", "8"], float: ["0.5", "0.25", "0.9"]}.get(kind, [])


@pytest.fixture(scope="module")
def study_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("study")
    write_texts(folder, "code", "english", "math", "task")
    for name in ("tok", "tok2"):
        (folder / name).mkdir()
        (folder / name / "tokenizer.json").write_text(f'{{"{name}": 1}}')
    (folder / "pretrain_gpt.py").touch()
    (folder / "pretrain_mamba.py").touch()
    for name in "abc":
        make_indexed(folder / name, [5, 6, 7])
    write_checkpoint(folder / "given", small_model(0), {})
    (folder / "study.yaml").write_text(STUDY)
    return folder / "study.yaml"


def keys(study_path: Path, overrides: tuple[str, ...]) -> dict[str, str]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        study = load_study(study_path, list(overrides))
        dag = build_dag(study, study_path, study_path.parent / "run", absent_inputs="allowed")
    return {stage.name: stage.key for stage in dag.all}


def changed(study_path: Path, overrides: tuple[str, ...]) -> bool:
    """By the last one, beside those before it."""
    return keys(study_path, overrides[:-1]) != keys(study_path, overrides)


def possible(study_path: Path, key: str, kind: Any, value: Any) -> list[tuple[str, ...]]:
    found = []
    for text in others(kind, value):
        try:
            keys(study_path, (f"{key}={text}",))
        except DemixError:
            continue
        found.append((f"{key}={text}",))
    return found


def test_every_setting_decides_or_says_how(study_path):
    settings = {key: (kind, value) for key, kind, value in leaves(load_study(study_path, []))}
    assert set(settings) >= {*HOW, *SETTINGS, *ELSEWHERE}, "a setting that there is no longer"
    unseen, wrong = [], []
    for key, (kind, value) in settings.items():
        how = key in HOW or key.split(".")[0] in ("parallel", "launch")
        given = SETTINGS.get(key)
        tried = [given] if given else possible(study_path, key, kind, value)
        if not tried and not how and key not in ELSEWHERE:
            unseen.append(key)
        if any(changed(study_path, overrides) for overrides in tried) == how and tried:
            wrong.append(key)
    assert unseen == [], "settings of which nobody has said whether they decide"
    assert wrong == [], "settings that are in the keys and say only how, or decide and are not"
