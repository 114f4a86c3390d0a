"""A training job from a command line that reads like Megatron-LM's own.

Most settings carry Megatron's argument names already; the tables hold the others.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails, PydanticUndefined

from megatron_demix.errors import ConfigError, MixtureError
from megatron_demix.study.reason import reason
from megatron_demix.study.training import ModelSpec, ParallelSpec, TrainSpec
from megatron_demix.train.job import TrainJob

_FLAGS = {
    "tensor": "tensor-model-parallel-size",
    "pipeline": "pipeline-model-parallel-size",
    "context": "context-parallel-size",
    "expert": "expert-model-parallel-size",
    "timeout": "distributed-timeout-seconds",
}
"""Flags that are not simply the setting's name with dashes."""
_SEED = 1234
_SECTIONS: dict[str, type[BaseModel]] = {"model": ModelSpec, "parallel": ParallelSpec, "train": TrainSpec}
_Spec = TypeVar("_Spec", bound=BaseModel)
_JOB_FLAGS: dict[str, tuple[str, type]] = {
    "train_iters": ("train-iters", int),
    "vocab_size": ("vocab-size", int),
    "eod_id": ("eod-id", int),
    "eval_interval": ("eval-interval", int),
    "eval_iters": ("eval-iters", int),
    "seed": ("seed", int),
    "name": ("name", str),
    "init_checkpoint": ("load", Path),
    "work": ("save", Path),
    "index_cache": ("data-cache-path", Path),
    "tensorboard": ("tensorboard-dir", Path),
    "heartbeat": ("heartbeat", Path),
    "threads_per_rank": ("threads-per-rank", int),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """A flag for every setting of a job. --load names weights to start from; a run resumes from what is in --save by itself."""
    for section, spec in _SECTIONS.items():
        group = parser.add_argument_group(section)
        for name, field in spec.model_fields.items():
            if name != "data":  # follows from the number of ranks
                _add(group, name, field)
    group = parser.add_argument_group("run")
    for name, (flag, kind) in _JOB_FLAGS.items():
        default = _SEED if name == "seed" else TrainJob.model_fields[name].default
        shown = None if default in (None, PydanticUndefined) else f"default: {default}"
        group.add_argument(f"--{flag}", dest=name, type=kind, default=argparse.SUPPRESS, help=shown)
    group.add_argument(
        "--override-opt-param-scheduler",
        action="store_true",
        help="go on with more iterations on their schedule, even if the learning rate jumps",
    )
    group.add_argument("--data-path", nargs="+", metavar="WORD", help="one prefix, or pairs of weight and prefix")
    group.add_argument("--data-args-path", type=Path, help="file that holds what --data-path takes")
    group.add_argument("--valid-data-path", nargs="+", metavar="NAME=PREFIX", default=[])


def _add(group: argparse._ArgumentGroup, name: str, field: FieldInfo) -> None:
    flag = f"--{_FLAGS.get(name, name.replace('_', '-'))}"
    shown = None if field.is_required() else f"default: {field.default}"
    if field.annotation is bool:
        group.add_argument(flag, dest=name, action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS, help=shown)
    else:  # pydantic parses and checks the text
        group.add_argument(flag, dest=name, metavar=name.upper(), default=argparse.SUPPRESS, help=shown)


def job_from_arguments(arguments: argparse.Namespace, *, world_size: int) -> TrainJob:
    """The job the flags describe. Raises ConfigError naming the flag, MixtureError for a malformed --data-path."""
    given = vars(arguments)
    data: dict[str, Any] = {
        section: {name: given[name] for name in spec.model_fields if name in given} for section, spec in _SECTIONS.items()
    }
    data |= {name: given[name] for name in (*_JOB_FLAGS, "override_opt_param_scheduler") if name in given}
    ranks = _checked(ParallelSpec, data["parallel"]).world_size
    if world_size % ranks:
        raise ConfigError(
            f"{world_size} ranks were started; tensor x pipeline x context parallelism needs a multiple of {ranks}."
        )
    data["parallel"]["data"] = world_size // ranks
    if "work" in data:
        data = {"name": data["work"].name, "index_cache": data["work"].with_name(f"{data['work'].name}.index")} | data
    data |= {"seed": data.get("seed", _SEED), "blend": _blend(arguments)}
    data["valid"] = dict(_named_prefix(text) for text in arguments.valid_data_path)
    job = _checked(TrainJob, data)
    return job.model_copy(update={"keep_at_end": job.train.keep_checkpoints})


def _checked(spec: type[_Spec], data: Any) -> _Spec:
    try:
        return spec.model_validate(data)
    except ValidationError as e:
        raise ConfigError("\n".join(_explain(d) for d in e.errors())) from e


def _explain(error: ErrorDetails) -> str:
    name = str(error["loc"][-1]) if error["loc"] else ""
    flag = _JOB_FLAGS[name][0] if name in _JOB_FLAGS else _FLAGS.get(name, name.replace("_", "-"))
    return f"--{flag}: {reason(error)}" if name else reason(error)


def _blend(arguments: argparse.Namespace) -> list[tuple[Path, float]]:
    words = list(arguments.data_path or [])
    if arguments.data_args_path is not None:
        if words:
            raise ConfigError("--data-path and --data-args-path were both given: leave one out.")
        try:
            words = arguments.data_args_path.read_text().split()
        except OSError as e:
            raise ConfigError(f"--data-args-path {arguments.data_args_path}: cannot be read ({e.strerror}).") from e
    if len(words) == 1:
        return [(Path(words[0]), 1.0)]
    if not words:
        raise ConfigError("no data: give --data-path or --data-args-path with the other flags, or --job alone.")
    if len(words) % 2:
        raise MixtureError(f"--data-path: {len(words)} words, expected pairs of a weight and a prefix, or a single prefix.")
    try:
        return [(Path(prefix), float(weight)) for weight, prefix in zip(words[::2], words[1::2], strict=True)]
    except ValueError as e:
        raise MixtureError(f"--data-path: {e}; expected pairs of a weight and a prefix, such as 0.7 code 0.3 text.") from e


def _named_prefix(text: str) -> tuple[str, Path]:
    name, equals, prefix = text.partition("=")
    if not equals or not name or not prefix:
        raise ConfigError(f"--valid-data-path {text!r}: expected NAME=PREFIX.")
    return name, Path(prefix)
