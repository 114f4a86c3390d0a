"""What a rank has of a batch."""

import torch

from megatron_demix.train.compat import cpu_compat

with cpu_compat():
    from megatron_demix.train.data import part_of_sequences


def test_context_parallel_ranks_have_a_part_from_the_front_and_one_from_the_back():
    tokens = torch.arange(24).view(2, 12)
    batch = {"tokens": tokens, "loss_mask": tokens.float()}
    parts = [part_of_sequences(batch, rank, 3) for rank in range(3)]
    assert [part["tokens"][0].tolist() for part in parts] == [[0, 1, 10, 11], [2, 3, 8, 9], [4, 5, 6, 7]]
    assert all(torch.equal(part["loss_mask"].long(), part["tokens"]) for part in parts)
    assert torch.equal(torch.cat([part["tokens"] for part in parts], dim=1).sort(dim=1).values, tokens)
