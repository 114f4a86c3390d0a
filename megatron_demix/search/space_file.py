"""The search space as a YAML file of its own, for those who use the search without a study.

domains: {code: {tokens: 30B, max_epochs: 4}, general: {tokens: 2T, min_share: 0.2}}
target_tokens: 100B
anchor: {mixture: uniform, share: 0.5}
groups: {languages: {domains: [code, general], highest: 0.9}}
max_kl: 1.0
"""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from megatron_demix.mixture import Mixture
from megatron_demix.search.space import Group, SearchSpace, epoch_caps
from megatron_demix.study.load import checked
from megatron_demix.study.search import GroupSpec
from megatron_demix.study.section import Section, Tokens
from megatron_demix.study.training import AnchorSpec


class _Domain(Section):
    tokens: Tokens
    """Distinct tokens at hand."""
    max_epochs: float | None = Field(None, gt=0)
    """How often the final run may repeat them; no limit if absent."""
    min_share: float = Field(0.0, ge=0, le=1)
    max_share: float = Field(1.0, ge=0, le=1)


class _SpaceFile(Section):
    domains: dict[str, _Domain] = Field(min_length=2)
    target_tokens: Tokens
    """Tokens of the final run."""
    anchor: AnchorSpec = AnchorSpec(share=0.0)
    """What every component is trained on beside its own domain. Absent: components are pure, and weights are shares."""
    groups: dict[str, GroupSpec] = Field({})
    max_kl: float | None = Field(None, gt=0)


def load_space(path: Path) -> SearchSpace:
    """The space of a domains file. Raises ConfigError (unreadable, unknown key) and MixtureError (nothing feasible)."""
    from megatron_demix.yaml_file import read_yaml

    file = checked(_SpaceFile, read_yaml(Path(path), str(path)), f"{path}: not a domains file")
    tokens = {name: float(domain.tokens) for name, domain in file.domains.items()}
    epochs = {name: domain.max_epochs for name, domain in file.domains.items() if domain.max_epochs is not None}
    caps = epoch_caps(tokens, epochs, file.target_tokens)
    natural = Mixture.proportional(tokens)
    anchor = {"natural": natural, "uniform": Mixture.uniform(tokens)}
    chosen = file.anchor.mixture
    return SearchSpace(
        natural,
        anchor[chosen] if isinstance(chosen, str) else Mixture(chosen, label=f"{path}: anchor"),
        file.anchor.share,
        {name: domain.max_share for name, domain in file.domains.items() if domain.max_share < 1},
        {name: domain.min_share for name, domain in file.domains.items() if domain.min_share > 0},
        {name: Group(tuple(group.domains), group.lowest, group.highest) for name, group in file.groups.items()},
        file.max_kl,
        caps,
    )
