"""Losses of windows in batches against the plain forward pass of each window."""

import numpy as np
import pytest
import torch

from megatron_demix.evaluate.windows import Windows
from megatron_demix.train.compat import cpu_compat


@pytest.mark.parametrize("micro_batch_size", [1, 2, 5, 9])
def test_every_target_is_scored_once_and_the_model_left_as_it_was(live, micro_batch_size):
    with cpu_compat():
        from megatron_demix.evaluate.loss import token_nats

    tokens = np.random.default_rng(0).integers(0, live.vocab_size, (5, 17))
    live.stage.eval()
    expected = []
    with torch.no_grad():
        for window in torch.from_numpy(tokens):
            logits = live.stage(window[None, :-1], torch.arange(16)[None], None)[0]
            expected += torch.nn.functional.cross_entropy(logits.float(), window[1:], reduction="none").tolist()
    for training in (True, False):
        live.stage.train(training)
        found = token_nats(live.stage, Windows("w", tokens, 1), micro_batch_size=micro_batch_size)
        assert found == pytest.approx(expected, rel=1e-4, abs=1e-5)
        assert live.stage.training == training
