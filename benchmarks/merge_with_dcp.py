"""What benchmarks/merge.py compares with: components loaded with torch's distributed checkpointing, summed in torch, saved."""

import sys
import warnings

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import TensorStorageMetadata


def main() -> None:
    warnings.simplefilter("ignore")
    output, *inputs = sys.argv[1:]
    total: dict[str, torch.Tensor] = {}
    dtypes = {}
    for text in inputs:
        path, _, weight = text.rpartition(":")
        described = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
        state = {
            key: torch.empty(entry.size, dtype=entry.properties.dtype)
            for key, entry in described.items()
            if isinstance(entry, TensorStorageMetadata)
        }
        dcp.load(state, checkpoint_id=path, no_dist=True)
        for key, tensor in state.items():
            dtypes[key] = tensor.dtype
            if key in total:
                total[key].add_(tensor.float(), alpha=float(weight))
            else:
                total[key] = tensor.float().mul_(float(weight))
    dcp.save({key: tensor.to(dtypes[key]) for key, tensor in total.items()}, checkpoint_id=output, no_dist=True)


if __name__ == "__main__":
    main()
