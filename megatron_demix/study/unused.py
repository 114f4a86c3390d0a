"""Settings that are given, and change nothing beside the others: whoever gave them thinks that they do."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from pydantic import BaseModel

from megatron_demix.study.study import Study
from megatron_demix.study.training import OVERRIDES, PhaseName

_CPUS = ("--exclusive", "--cpus-per-")
"""How options of sbatch begin that say it, too."""


class _Unused(NamedTuple):
    place: str
    section: BaseModel
    key: str
    why: str

    @property
    def default(self) -> Any:
        return type(self.section).model_fields[self.key].get_default(call_default_factory=True)


def without_unused(study: Study) -> Study:
    """The study with the defaults of such settings in their places, so that they change no key of what is made."""
    settled = study.model_copy(deep=True)
    for one in list(_unused(settled)):
        object.__setattr__(one.section, one.key, one.default)  # sections are frozen, and this copy is nobody's yet
    return settled


def warnings_of(study: Study) -> list[str]:
    """One line for each such setting, with why; and for what is probably not what was meant."""
    found = [f"{one.place}.{one.key} has no effect: {one.why}" for one in _unused(study)]
    if study.evaluate.losses and study.evaluate.tokens_per_domain < study.train.seq_length:
        found.append(
            f"evaluate.tokens_per_domain is {study.evaluate.tokens_per_domain}, but one window holds train.seq_length = "
            f"{study.train.seq_length}: each domain is scored on one"
        )
    search = study.search
    if search.top >= search.candidates:
        found.append(
            f"search.top is {search.top} of {search.candidates} candidates: the found mixture is the mean of all of them"
        )
    return [*found, *_without_cpus(study)]


def _without_cpus(study: Study) -> Iterator[str]:
    slurm = study.launch.slurm
    if study.launch.backend != "slurm" or slurm.cpus_per_task is not None:
        return
    for place, asked in {"": slurm, **{f"kinds.{kind}.": given for kind, given in slurm.kinds.items()}}.items():
        said = asked.cpus_per_task is not None or any(option.startswith(_CPUS) for option in asked.sbatch)
        if asked.gpus_per_node and not said:
            yield (
                f"launch.slurm.{place}gpus_per_node is {asked.gpus_per_node}, and cpus_per_task is not set: where nodes are "
                "shared and GPUs bring no CPUs along (DefCpuPerGPU), all ranks of a node have one CPU"
            )


def _unused(study: Study) -> Iterator[_Unused]:
    """What is its default counts as not given."""
    yield from _of_text(study)
    yield from _of_models(study)
    yield from _of_training(study)
    yield from _of_search(study)
    launch = study.launch
    if launch.backend == "slurm":
        yield from _given("launch", launch, ("jobs",), "launch.backend is slurm, which starts all that it has room for")
        if launch.slurm.container is None:
            yield from _given("launch.slurm", launch.slurm, ("mounts",), "there is no launch.slurm.container")


def _of_text(study: Study) -> Iterator[_Unused]:
    if study.tokenizer.type != "bpe":
        why = f"a tokenizer of type {study.tokenizer.type} is not trained"
        yield from _given("tokenizer", study.tokenizer, ("train_vocab_size", "train_bytes"), why)
    for i, domain in enumerate(study.domains):
        if domain.prefixes is not None:
            yield from _given(f"domains.{i}", domain, ("json_key",), "the domain is tokenized already (prefixes)")
    if all(domain.prefixes is not None for domain in study.domains):
        why = "all domains are tokenized already (prefixes)"
        yield from _given("prepare", study.prepare, ("clean", "split", "on_bad_document"), why)


def _of_models(study: Study) -> Iterator[_Unused]:
    model = study.model
    if model.position_embedding_type != "rope":
        why = f"model.position_embedding_type is {model.position_embedding_type}"
        yield from _given("model", model, ("rotary_base", "use_rope_scaling", "rope_scaling_factor"), why)
    elif not model.use_rope_scaling:
        yield from _given("model", model, ("rope_scaling_factor",), "model.use_rope_scaling is false")
    if model.num_experts is None:
        keys = ("moe_router_topk", "moe_router_pre_softmax", "moe_ffn_hidden_size", "moe_aux_loss_coeff")
        yield from _given("model", model, keys, "model.num_experts is not set")
    if study.parallel.tensor == 1:
        yield from _given("parallel", study.parallel, ("sequence_parallel",), "parallel.tensor is 1")


def _of_training(study: Study) -> Iterator[_Unused]:
    if study.trainer.backend == "megatron_core":
        yield from _given("trainer", study.trainer, ("checkout", "script", "args"), "trainer.backend is megatron_core")
    if study.base.tokens is None:
        yield from _given("base", study.base, ("mixture", *OVERRIDES), "the base is given, and not trained")
    trained: list[PhaseName] = [*(["base"] if study.base.tokens else []), "component", "final"]  # type: ignore[list-item]
    constant = [name for name in trained if study.phase(name).lr_decay_style == "constant"]
    for name in constant:
        yield from _given(name, getattr(study, name), ("min_lr",), "the learning rate stays constant")
    if constant == trained:
        yield from _given("train", study.train, ("min_lr",), "the learning rate stays constant")


def _of_search(study: Study) -> Iterator[_Unused]:
    search, component = study.search, study.component
    if search.proxies == "trained":
        why = "search.proxies is trained, so that there are no components, and nothing is merged"
        yield from _given("component", component, ("anchor", "average", "maturity_seeds"), why)
        yield from _given("merge", study.merge, tuple(type(study.merge).model_fields), why)
    if search.proxies == "merged" and not component.anchor.share:
        yield from _given("component.anchor", component.anchor, ("mixture",), "component.anchor.share is 0")
    if len(search.rounds) == 1 and not search.earlier:
        yield from _given("search", search, ("stop",), "there is one round")
    if not any(task.generates for task in study.evaluate.tasks):
        yield from _given("evaluate", study.evaluate, ("generate_batch_size",), "no task has answers generated")
    if not study.evaluate.losses:
        yield from _given("evaluate", study.evaluate, ("tokens_per_domain",), "evaluate.losses is empty")
    for i, task in enumerate(study.evaluate.tasks):
        if not task.generates:
            yield from _given(
                f"evaluate.tasks.{i}", task, ("max_new_tokens", "timeout"), "no score of it needs written answers"
            )


def _given(place: str, section: BaseModel, keys: tuple[str, ...], why: str) -> Iterator[_Unused]:
    for key in keys:
        one = _Unused(place, section, key, why)
        if getattr(section, key) != one.default:
            yield one
