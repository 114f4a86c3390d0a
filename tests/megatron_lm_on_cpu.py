"""Stock Megatron-LM on a machine without CUDA, for tests: `python megatron_lm_on_cpu.py ARGUMENTS` runs the pretrain_gpt.py of
the checkout that is first in PYTHONPATH; `python megatron_lm_on_cpu.py --parse FILE` has it parse and validate arguments.

Megatron-LM asserts CUDA and addresses everything to it. Here all of that lands on the CPU, in this process alone; not a line of
the checkout changes. Kernels are torch's own, and ranks talk by gloo.
"""

from __future__ import annotations

import json
import os
import runpy
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch

from megatron_demix.train.compat import cpu_compat


class _Ordered:
    """A stream or an event where everything happens in order anyway."""

    def __init__(self, *_: Any, **__: Any) -> None: ...
    def __enter__(self) -> None: ...
    def __exit__(self, *_: Any) -> None: ...
    def record(self, *_: Any) -> None: ...
    def record_event(self, *_: Any) -> _Ordered:
        return self

    def synchronize(self) -> None: ...
    def wait_stream(self, *_: Any) -> None: ...
    def wait_event(self, *_: Any) -> None: ...


_STAND_INS: dict[str, Any] = {
    "is_available": lambda: True,
    "is_initialized": lambda: True,
    "device_count": lambda: 1,
    "get_device_properties": lambda *_: SimpleNamespace(
        major=9, minor=0, multi_processor_count=1, total_memory=2**33, name="cpu"
    ),
    "get_device_capability": lambda *_: (9, 0),
    "get_device_name": lambda *_: "cpu",
    "mem_get_info": lambda *_: (2**32, 2**33),
    **dict.fromkeys(("Event", "Stream", "stream", "current_stream", "default_stream"), _Ordered),
    "set_stream": lambda *_: None,
    "is_current_stream_capturing": lambda: False,
    "reset_peak_memory_stats": lambda *_: None,
    "memory_stats": lambda *_: Counter(),
    "device_memory_used": lambda *_: 0,
    **{f"{which}memory_{what}": lambda *_: 0 for which in ("", "max_") for what in ("allocated", "reserved")},
}


@contextmanager
def _cuda_is_the_cpu(checkout: Path) -> Iterator[None]:
    join = torch.distributed.init_process_group
    with cpu_compat(), ExitStack() as stack:
        for name, stand_in in _STAND_INS.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, stand_in))
        stack.enter_context(mock.patch.object(torch.Tensor, "pin_memory", lambda tensor, *_: tensor))
        check = "_accelerator_graph_capture_health_check"  # asks for a stream of the device
        stack.enter_context(mock.patch.object(torch.optim.Optimizer, check, return_value=None, create=True))
        if (checkout / "megatron" / "legacy" / "fused_kernels").is_dir():  # compiles for a GPU when it starts
            stack.enter_context(mock.patch("megatron.legacy.fused_kernels.load"))
        # gloo takes no device.
        join_without_device = lambda *a, device_id=None, **options: join(*a, **options)  # noqa: E731
        stack.enter_context(mock.patch.object(torch.distributed, "init_process_group", join_without_device))
        yield


def _parse(file: Path) -> None:
    """Every case of the file, [{"ranks", "arguments"}, ...], through Megatron-LM's own parser and checks; options it has."""
    import argparse

    from megatron.training import arguments

    from megatron_demix.data.extra_args import add_demix_args

    for case in json.loads(file.read_text()):
        os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": str(case["ranks"])}
        sys.argv = ["pretrain_gpt.py", *case["arguments"]]
        parsed = arguments.parse_args(extra_args_provider=add_demix_args)
        arguments.validate_args(parsed, {})
        assert parsed.train_data_path == case.get("train_data_path")
    parser = arguments.add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False))
    options = {o.removeprefix("--") for action in parser._actions for o in action.option_strings if o.startswith("--")}
    file.with_suffix(".options.json").write_text(json.dumps(sorted(options - {"help"})))


def main() -> None:
    checkout = Path(os.environ["PYTHONPATH"].split(os.pathsep)[0])
    with _cuda_is_the_cpu(checkout):
        if sys.argv[1] == "--parse":
            _parse(Path(sys.argv[2]))
            return
        sys.argv[0] = str(checkout / "pretrain_gpt.py")
        sys.argv += ["--distributed-backend", "gloo", "--num-workers", "0"]
        runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
