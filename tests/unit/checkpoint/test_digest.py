"""The digest by which stages and resumed runs know a checkpoint's weights again."""

import torch
from dist_checkpoints import parallel_cuts, small_model, write_checkpoint

from megatron_demix.checkpoint.digest import weights_digest
from megatron_demix.checkpoint.reader import Checkpoint


def test_every_element_counts_and_no_place(tmp_path):
    def digest(name, tensors, **how):
        folder = write_checkpoint(tmp_path / name, tensors, parallel_cuts(2), **how)
        return weights_digest(Checkpoint(folder, read_ahead=False))

    model = small_model(0)
    optimizer = {f"optimizer.state.exp_avg.{key}": torch.rand(3) for key in model}
    found = digest("a", model)
    assert digest("b", dict(reversed(model.items())) | optimizer, num_files=3, odd=True) == found
    others = {}
    for key, tensor in model.items():
        for place, at in (("first", 0), ("last", -1)):
            changed = tensor.clone()
            changed.view(-1)[at] += 1
            others[f"{place} of {key}"] = digest(f"{place} {key}", model | {key: changed})
        renamed = {f"{k}s" if k == key else k: t for k, t in model.items()}
        others[f"name of {key}"] = digest(f"name {key}", renamed)
        wider = {k: t.float() if k == key else t for k, t in model.items()}
        others[f"type of {key}"] = digest(f"type {key}", wider)
    assert len({found, *others.values()}) == 1 + len(others)
