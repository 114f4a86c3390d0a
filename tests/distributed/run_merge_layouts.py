"""What each of 2 ranks of test_merge_layouts runs: real Megatron models, saved with two layouts each, merged, and loaded back.

torchrun run_merge_layouts.py FOLDER
"""

from __future__ import annotations

import json
import queue
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_demix.process import die_with_parent
from megatron_demix.study.training import ModelSpec, ParallelSpec, TrainSpec
from megatron_demix.train.compat import cpu_compat

if TYPE_CHECKING:
    import torch

SIZES = {"num_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "num_query_groups": 2, "qk_layernorm": True}
TRAIN = TrainSpec(seq_length=16, global_batch_size=2, precision="bf16")
# By name: the model, and the two layouts that it is saved with. Experts over ranks, and all of them on each.
FAMILIES = {
    "dense": (
        ModelSpec(**SIZES, untie_embeddings_and_output_weights=True),
        {"tensor": ParallelSpec(tensor=2), "pipeline": ParallelSpec(pipeline=2)},
    ),
    "experts": (
        ModelSpec(**SIZES, num_experts=4, moe_ffn_hidden_size=16),
        {"expert": ParallelSpec(data=2, expert=2), "pipeline": ParallelSpec(pipeline=2)},
    ),
}
SHARES = (0.375, 0.625)


def main() -> None:
    die_with_parent()
    warnings.simplefilter("ignore")
    with cpu_compat():
        for family in FAMILIES:
            result = merge_family(Path(sys.argv[1]) / family, *FAMILIES[family])
            rank = result.pop("rank")
            (Path(sys.argv[1]) / family / f"rank{rank}.json").write_text(json.dumps(result))


def merge_family(root: Path, spec: ModelSpec, layouts: dict[str, ParallelSpec]) -> dict[str, int]:
    """Save with each layout, merge on disk and in place: how many of this rank's tensors have the same bits after both."""
    import torch
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    from megatron_demix.merge.engine import merge_checkpoints
    from megatron_demix.merge.logical_tensors import FusedLayout
    from megatron_demix.merge.methods_by_name import make_method
    from megatron_demix.merge.proxies import ProxyMerger
    from megatron_demix.train.model import build_model, destroy_parallel, initialize_parallel, live_tensors
    from megatron_demix.train.weights import load_weights

    parts = {name: root / name for name in layouts}
    for seed, (name, parallel) in enumerate(layouts.items()):
        if seed:
            destroy_parallel()
        initialize_parallel(parallel, seed=seed, timeout_s=60)
        model = build_model(spec, TRAIN, parallel, 250)
        fill(model)
        if torch.distributed.get_rank() == 0:
            parts[name].mkdir(parents=True)
        torch.distributed.barrier()
        if hasattr(filesystem_async, "_results_queue"):
            filesystem_async._results_queue = queue.Queue()
        dist_checkpointing.save({"model": model.sharded_state_dict()}, str(parts[name]))
        torch.distributed.barrier()

    weights, base = dict(zip(layouts, SHARES, strict=True)), parts[next(iter(layouts))]
    layout = FusedLayout(num_query_groups=2, kv_channels=8, swiglu=True)
    methods = {
        "karcher": make_method("karcher", layout=layout),
        "ties": make_method("ties", base, layout=layout, density=0.3),
        "della": make_method("della", base, layout=layout, density=0.5),
    }
    if torch.distributed.get_rank() == 0:
        one_hot = {name: {name: 1.0} for name in layouts}
        merge_checkpoints(parts, one_hot | {"mixed": weights}, root / "out", progress=False, verify="full")
        for name, method in methods.items():
            merge_checkpoints(parts, {name: weights}, root / "out", progress=False, verify="full", method=method)
    torch.distributed.barrier()

    # The stock loader puts the merged checkpoint into a pipeline-parallel model; the in-place merge must agree bit for bit.
    live = live_tensors(model)
    linear = ProxyMerger(parts, live, threads=1)
    runs = {"mixed": (weights, linear)} | {name: ({name: 1.0}, linear) for name in layouts}
    runs |= {name: (weights, ProxyMerger(parts, live, threads=1, method=method)) for name, method in methods.items()}
    agreed = 0
    for name, (mixture, merger) in runs.items():
        load_weights(model, root / "out" / name)
        loaded = [t.tensor.data.clone() for t in live]
        for t in live:
            t.tensor.data.zero_()
        merger.merge(mixture)
        agreed += sum(
            torch.equal(t.tensor.data.view(torch.int16), x.view(torch.int16)) for t, x in zip(live, loaded, strict=True)
        )
    rank = torch.distributed.get_rank()
    destroy_parallel()
    return {"rank": rank, "agreed": agreed, "of": len(runs) * len(live)}


def fill(model: torch.nn.Module) -> None:
    """Random values: alike on ranks that hold the same parameter, others where they hold other parts or experts."""
    import torch

    own = torch.Generator().manual_seed(1000 + torch.distributed.get_rank())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            split = ".experts." in name or getattr(parameter, "tensor_model_parallel", False)
            parameter.normal_(generator=own if split else None)


if __name__ == "__main__":
    main()
