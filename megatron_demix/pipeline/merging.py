"""The merge method of a study, for its proxies in memory and on disk alike."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from megatron_demix.errors import ConfigError
from megatron_demix.merge.second_order import SecondOrder
from megatron_demix.study.merging import MergeSpec
from megatron_demix.study.study import Study

if TYPE_CHECKING:
    from megatron_demix.merge.methods import Method
    from megatron_demix.merge.rules import Rule


def merge_settings(study: Study) -> dict[str, Any]:
    """What decides how components become a proxy, for the keys of stages; how many threads it takes does not."""
    settings = {"method": study.merge.method, **study.merge.model_dump(exclude={"method", "threads"}, exclude_none=True)}
    return settings | ({"seed": study.seed} if study.merge.is_random else {})


def method_of(spec: MergeSpec, base: Path | None, seed: int) -> Method:
    """base: the checkpoint that the components were trained from, where spec.needs_base. seed: of random drops."""
    from megatron_demix.merge.methods_by_name import make_method

    options = dict(spec.options)
    if spec.rules:
        options["rules"] = rules_of(spec)
    if spec.is_random:
        options["seed"] = seed
    return make_method(spec.method, base if spec.needs_base else None, **options)


def rules_of(spec: MergeSpec) -> tuple[Rule, ...]:
    """Raises ConfigError for rules that are none."""
    from megatron_demix.merge.rules import parse_rules

    given = [rule.model_dump(exclude_none=True) for rule in spec.rules or ()]
    return parse_rules(given, "merge.rules of the study")


def check_rules(study: Study) -> None:
    """Raises ConfigError for rules that are none, or of layers that the model has not."""
    for n, rule in enumerate(rules_of(study.merge)):
        if rule.layers and rule.layers[1] >= study.model.num_layers:
            raise ConfigError(
                f"merge.rules.{n}: layers {rule.layers[0]}-{rule.layers[1]}, but model.num_layers is {study.model.num_layers}, "
                f"counted from 0: the last is {study.model.num_layers - 1}."
            )


def second_order(study: Study) -> SecondOrder:
    """How merge weights become coefficients of all components, mixed ones included; without these they are the weights."""
    try:
        return SecondOrder(study.domain_names, study.component.mixed_weights(study.domain_names))
    except ConfigError as e:
        raise ConfigError(f"component.mixed: {e}") from e


def normalization(study: Study) -> Literal["error", "affine"]:
    """What coefficients are checked for: all sum to 1, and those of mixed components may be negative."""
    return "affine" if study.component.mixed else "error"
