"""What a study chooses from by name. Without pydantic: the search itself and a command's --help need no more than this."""

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
