"""Live models with random parameters, small enough to be asked for every token one by one."""

import pytest

from megatron_demix.study.training import ModelSpec, ParallelSpec, TrainSpec
from megatron_demix.train.compat import cpu_compat

MAX_TOKENS, VOCABULARY = 160, 257  # bytes and end-of-document
KINDS = {
    "rope": {"num_query_groups": 2, "qk_layernorm": True},
    "learned": {
        "position_embedding_type": "learned_absolute",
        "normalization": "LayerNorm",
        "swiglu": False,
        "hidden_dropout": 0.5,
        "attention_dropout": 0.5,
    },
    "experts": {"num_experts": 4, "untie_embeddings_and_output_weights": True},
}


@pytest.fixture(scope="module", params=KINDS)
def live(request):
    """A model whose probabilities are far from uniform, with ids that only fill up the vocabulary."""
    with cpu_compat():
        from megatron_demix.evaluate.live import LiveModel
        from megatron_demix.train.model import build_model, destroy_parallel, initialize_parallel

        initialize_parallel(ParallelSpec(), seed=3, timeout_s=60)
        spec = ModelSpec(num_layers=2, hidden_size=32, num_attention_heads=4, init_method_std=0.2, **KINDS[request.param])
        train = TrainSpec(seq_length=MAX_TOKENS, global_batch_size=1, precision="fp32")
        model = build_model(spec, train, ParallelSpec(), VOCABULARY, cached=True)
        yield LiveModel(model, vocab_size=VOCABULARY, max_tokens=MAX_TOKENS)
        destroy_parallel()
