"""Parameters, checkpoints and FLOPs of a model, against megatron.core's own and a count of the weights by hand."""

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_demix.study.training import ModelSpec, ParallelSpec, TrainSpec
from megatron_demix.train.compat import cpu_compat
from megatron_demix.train.derived import checkpoint_bytes, flops_per_token, model_arguments, num_parameters, padded_vocab_size

with cpu_compat():
    from megatron_demix.train.model import build_model, parallel_groups
    from megatron_demix.train.trainer import train

TRAIN = TrainSpec(seq_length=8, global_batch_size=1, precision="fp32")
MODELS = st.fixed_dictionaries(
    {
        "num_layers": st.integers(1, 2),
        "num_query_groups": st.sampled_from([None, 1, 2]),
        "ffn_hidden_size": st.sampled_from([None, 24]),
        "kv_channels": st.sampled_from([None, 8]),
        "position_embedding_type": st.sampled_from(["rope", "learned_absolute", "none"]),
        "normalization": st.sampled_from(["RMSNorm", "LayerNorm"]),
        "swiglu": st.booleans(),
        "qk_layernorm": st.booleans(),
        "add_bias_linear": st.booleans(),
        "add_qkv_bias": st.booleans(),
        "untie_embeddings_and_output_weights": st.booleans(),
    }
)


def parameters_built(spec: ModelSpec) -> int:
    with cpu_compat(), parallel_groups(ParallelSpec(), seed=1, timeout_s=60):
        return sum(p.numel() for p in build_model(spec, TRAIN, ParallelSpec(), 100).parameters())


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(MODELS)
def test_parameters_are_those_of_the_model(fields):
    spec = ModelSpec(hidden_size=16, num_attention_heads=4, **fields)
    assert num_parameters(spec, 8, 128) == parameters_built(spec)


def test_parameters_with_experts():
    spec = ModelSpec(num_layers=2, hidden_size=16, num_attention_heads=4, num_experts=4, moe_ffn_hidden_size=24)
    assert num_parameters(spec, 8, 128) == parameters_built(spec)


def test_sizes_that_a_study_leaves_out():
    """The stages' keys do not hold them: others would be another model under the same key."""
    spec = ModelSpec(num_layers=2, hidden_size=1000, num_attention_heads=10)
    sizes = model_arguments(spec, TRAIN)
    assert (sizes["ffn_hidden_size"], sizes["kv_channels"], sizes["num_query_groups"]) == (2688, 100, 10)
    assert sizes["max_position_embeddings"] == TRAIN.seq_length
    assert model_arguments(spec.model_copy(update={"swiglu": False}), TRAIN)["ffn_hidden_size"] == 4000
    assert padded_vocab_size(spec, ParallelSpec(), 257) == 384


def test_flops_of_dense_and_expert_models():
    """6 FLOPs for each weight a token meets (2 forward, 4 backward), plus attention over half the sequence."""
    dense = ModelSpec(num_layers=2, hidden_size=8, num_attention_heads=4, num_query_groups=2, ffn_hidden_size=16)
    weights = 2 * (8 * 8 + 2 * 8 * 4 + 8 * 8 + 3 * 8 * 16) + 8 * 128
    scores = 2 * 2 * 8 * (10 / 2)  # two products a layer, 8 channels, 5 of 10 positions
    assert flops_per_token(dense, 10, 128) == 6 * (weights + scores)
    experts = dense.model_copy(update={"num_experts": 4, "moe_router_topk": 2, "moe_ffn_hidden_size": 16})
    assert flops_per_token(experts, 10, 128) - flops_per_token(dense, 10, 128) == 6 * 2 * (3 * 8 * 16 + 8 * 4)
    gelu = dense.model_copy(update={"swiglu": False, "ffn_hidden_size": None})
    assert flops_per_token(gelu, 10, 128) - flops_per_token(dense, 10, 128) == 6 * 2 * 8 * (2 * 32 - 3 * 16)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_bytes_of_a_checkpoint(tmp_path, make_train_job, precision):
    job = make_train_job(tmp_path, model={"hidden_size": 128}, train={"precision": precision}, train_iters=1)
    train(job)
    saved = sum(file.stat().st_size for file in (job.work / "iter_0000001").glob("*.distcp"))
    assert 1 <= saved / checkpoint_bytes(job.model, job.train, 384) < 1.05
