"""What each of 2 ranks of test_merge_layouts runs: real Megatron models, saved at TP2 and at PP2, merged, and loaded back.

torchrun run_merge_layouts.py FOLDER
"""

from __future__ import annotations

import json
import queue
import sys
import warnings
from pathlib import Path

from megatron_demix.process import die_with_parent
from megatron_demix.study import ModelSpec, ParallelSpec, TrainSpec
from megatron_demix.train.compat import cpu_compat

MODEL = ModelSpec(
    num_layers=2,
    hidden_size=32,
    num_attention_heads=4,
    num_query_groups=2,
    qk_layernorm=True,
    untie_embeddings_and_output_weights=True,
)
TRAIN = TrainSpec(seq_length=16, global_batch_size=2, precision="bf16")
LAYOUTS = {"tensor": ParallelSpec(tensor=2), "pipeline": ParallelSpec(pipeline=2)}
WEIGHTS = {"tensor": 0.375, "pipeline": 0.625}


def main() -> None:
    die_with_parent()
    warnings.simplefilter("ignore")
    root = Path(sys.argv[1])
    with cpu_compat():
        import torch
        from megatron.core import dist_checkpointing
        from megatron.core.dist_checkpointing.strategies import filesystem_async

        from megatron_demix.merge.engine import merge_checkpoints
        from megatron_demix.merge.named import make_method
        from megatron_demix.merge.parts import FusedLayout
        from megatron_demix.merge.proxies import ProxyMerger
        from megatron_demix.train.checkpointing import load_weights
        from megatron_demix.train.model import build_model, destroy_parallel, initialize_parallel, live_tensors

        parts = {name: root / name for name in LAYOUTS}
        for seed, (name, parallel) in enumerate(LAYOUTS.items()):
            initialize_parallel(parallel, seed=seed, timeout_s=60)
            model = build_model(MODEL, TRAIN, parallel, 250)
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.normal_()
            if torch.distributed.get_rank() == 0:
                parts[name].mkdir()
            torch.distributed.barrier()
            filesystem_async._results_queue = queue.Queue()
            dist_checkpointing.save({"model": model.sharded_state_dict()}, str(parts[name]))
            torch.distributed.barrier()
            if name != "pipeline":
                destroy_parallel()

        layout = FusedLayout(num_query_groups=2, kv_channels=8, swiglu=True)
        methods = {
            "karcher": make_method("karcher", layout=layout),
            "ties": make_method("ties", parts["tensor"], layout=layout, density=0.3),
            "della": make_method("della", parts["tensor"], layout=layout, density=0.5),
        }
        if torch.distributed.get_rank() == 0:
            one_hot = {name: {name: 1.0} for name in LAYOUTS}
            merge_checkpoints(parts, one_hot | {"mixed": WEIGHTS}, root / "out", progress=False, verify="full")
            for name, method in methods.items():
                merge_checkpoints(parts, {name: WEIGHTS}, root / "out", progress=False, verify="full", method=method)
        torch.distributed.barrier()

        # The stock loader puts the merged checkpoint into a pipeline-parallel model; the in-place merge must agree bit for bit.
        live = live_tensors(model)
        linear = ProxyMerger(parts, live, threads=1)
        mergers = {name: ProxyMerger(parts, live, threads=1, method=method) for name, method in methods.items()}
        agreed, runs = 0, {"mixed": (WEIGHTS, linear), "tensor": ({"tensor": 1.0}, linear)}
        runs |= {name: (WEIGHTS, merger) for name, merger in mergers.items()}
        for name, (weights, merger) in runs.items():
            load_weights(model, root / "out" / name)
            loaded = [t.tensor.data.clone() for t in live]
            for t in live:
                t.tensor.data.zero_()
            merger.merge(weights)
            agreed += sum(
                torch.equal(t.tensor.data.view(torch.int16), x.view(torch.int16)) for t, x in zip(live, loaded, strict=True)
            )
        (root / f"rank{torch.distributed.get_rank()}.json").write_text(
            json.dumps({"agreed": agreed, "of": len(runs) * len(live)})
        )
        destroy_parallel()


if __name__ == "__main__":
    main()
