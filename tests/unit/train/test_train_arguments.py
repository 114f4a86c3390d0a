"""Jobs from Megatron-named flags."""

import argparse
from pathlib import Path

import pytest

from megatron_demix.errors import ConfigError, MixtureError
from megatron_demix.train.arguments import add_arguments, job_from_arguments

NEEDED = (
    "--num-layers 2 --hidden-size 32 --num-attention-heads 4 --seq-length 32 --global-batch-size 8 --train-iters 10 "
    "--vocab-size 257 --eod-id 256 --save runs/tiny"
)


def job(flags: str, world_size: int = 1):
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return job_from_arguments(parser.parse_args(flags.split()), world_size=world_size)


def test_flags_become_a_job():
    made = job(
        NEEDED
        + " --tensor-model-parallel-size 2 --num-query-groups 2 --no-swiglu --qk-layernorm --lr 1e-3 --lr-decay-style WSD "
        "--precision fp32 --load base --seed 3 --data-path 0.7 code 0.3 text --valid-data-path code=code_valid text=text_valid "
        "--distributed-timeout-seconds 90 --keep-checkpoints 7 --eval-interval 5 --override-opt-param-scheduler",
        world_size=4,
    )
    assert (made.name, made.seed, made.train_iters, made.train.timeout) == ("tiny", 3, 10, 90)
    assert (made.train.keep_checkpoints, made.keep_at_end, made.eval_interval, made.eval_iters) == (7, 7, 5, 4)
    assert made.override_opt_param_scheduler
    assert (made.parallel.tensor, made.parallel.data) == (2, 2)
    assert (made.model.swiglu, made.model.qk_layernorm, made.model.num_query_groups) == (False, True, 2)
    assert (made.train.lr, made.train.lr_decay_style, made.train.precision) == (1e-3, "WSD", "fp32")
    assert made.blend == [(Path("code"), 0.7), (Path("text"), 0.3)]
    assert made.valid == {"code": Path("code_valid"), "text": Path("text_valid")}
    assert (made.init_checkpoint, made.work, made.index_cache) == (Path("base"), Path("runs/tiny"), Path("runs/tiny.index"))


def test_blends_come_from_a_file_too(tmp_path):
    path = tmp_path / "blend.txt"
    path.write_text("0.25 code\n0.75 text\n")
    assert job(f"{NEEDED} --data-args-path {path}").blend == [(Path("code"), 0.25), (Path("text"), 0.75)]
    assert job(f"{NEEDED} --data-path code").blend == [(Path("code"), 1.0)]
    with pytest.raises(ConfigError, match=r"--data-args-path .*absent: cannot be read \(No such file"):
        job(f"{NEEDED} --data-args-path {tmp_path / 'absent'}")
    with pytest.raises(ConfigError, match=r"--data-path and --data-args-path were both given"):
        job(f"{NEEDED} --data-path code --data-args-path {path}")


@pytest.mark.parametrize(
    ("flags", "error", "said"),
    [
        ("--data-path 0.5 a 0.5", MixtureError, "3 words, expected pairs of a weight and a prefix"),
        ("--data-path a 0.5 b 0.5", MixtureError, "could not convert string to float: 'a'; expected pairs"),
        ("", ConfigError, "no data: give --data-path or --data-args-path"),
        ("--data-path a --lr high", ConfigError, "--lr: expected a number, found 'high'"),
        ("--data-path a --valid-data-path b", ConfigError, "--valid-data-path 'b': expected NAME=PREFIX"),
        (
            "--data-path a --tensor-model-parallel-size 3",
            ConfigError,
            "2 ranks were started; tensor x .* needs a multiple of 3",
        ),
        (
            "--data-path a --tensor-model-parallel-size two",
            ConfigError,
            "^--tensor-model-parallel-size: expected a whole number",
        ),
        (
            "--data-path a --micro-batch-size 3",
            ConfigError,
            "^train.global_batch_size 8 is not a multiple of micro_batch_size x",
        ),
        (
            "--data-path a --num-layers 3 --pipeline-model-parallel-size 2",
            ConfigError,
            "^model.num_layers 3 is not a multiple of parallel.pipeline 2$",
        ),
        (
            "--data-path a --tensor-model-parallel-size 2 --num-attention-heads 1 --kv-channels 8",
            ConfigError,
            "^model.num_attention_heads 1 is not a multiple of parallel.tensor 2$",
        ),
        (
            "--data-path a --tensor-model-parallel-size 2 --hidden-size 48 --num-attention-heads 12 --num-query-groups 3",
            ConfigError,
            "^model.num_query_groups 3 is neither a multiple nor a divisor of parallel.tensor 2$",
        ),
        (
            "--data-path a --tensor-model-parallel-size 2 --num-experts 4",
            ConfigError,
            "^parallel.tensor is 2 and the model has experts",
        ),
        ("--data-path a --num-experts 3 --expert-model-parallel-size 2", ConfigError, "^parallel.expert 2 shares experts out"),
        ("--data-path a --context-parallel-size 0", ConfigError, "^--context-parallel-size: expected a number of at least 1"),
    ],
)
def test_what_is_wrong_is_named_by_its_flag(flags, error, said):
    with pytest.raises(error, match=said):
        job(f"{NEEDED} {flags}", world_size=2)


def test_missing_flags_are_named():
    with pytest.raises(ConfigError, match=r"--hidden-size: missing\n(.*\n)*--save: missing"):
        job("--num-layers 2 --data-path a")
