"""What a study chooses from by name. Without pydantic: the search itself, merging and a command's --help need no more
than this."""

from typing import Literal

SurrogateKind = Literal[
    "auto", "gaussian_process", "power_law", "log_linear", "quadratic", "scheffe_log", "ridge", "lightgbm", "stack"
]

Design = Literal["dirichlet", "sobol", "lattice", "optimal"]
"""How mixtures are sampled."""

Aim = Literal["mean", "worst", "percentile_rank"]
"""What is made of an objective's scores."""

Heuristic = Literal["gopher_repetition", "gopher_quality", "c4", "fineweb"]
"""Published rules for what is junk."""

MIN_PROXIES = 8
"""Fewer do not fix a surrogate."""

MergeMethod = Literal[
    "linear",
    "multislerp",
    "karcher",
    "ties",
    "dare_linear",
    "dare_ties",
    "della",
    "della_linear",
    "breadcrumbs",
    "breadcrumbs_ties",
]
MERGE_OPTIONS: dict[str, tuple[str, ...]] = {
    "linear": ("scale", "rules"),
    "multislerp": ("from_base",),
    "karcher": ("from_base",),
    "ties": ("scale", "density"),
    "dare_linear": ("scale", "density", "seed"),
    "dare_ties": ("scale", "density", "seed"),
    "della": ("scale", "density", "epsilon", "seed"),
    "della_linear": ("scale", "density", "epsilon", "seed"),
    "breadcrumbs": ("scale", "density", "gamma"),
    "breadcrumbs_ties": ("scale", "density", "gamma"),
}
"""The options of each method. seed: of random drops, in a study that of the study."""
EPSILON = 0.15
"""DELLA's option, where it is not given."""
