"""Components that are the mean of their last checkpoints: by hand-made checkpoints, whose mean is known."""

from pathlib import Path

import pytest
import torch
from dist_checkpoints import read_checkpoint, small_model, write_checkpoint

from megatron_demix.errors import ConfigError
from megatron_demix.pipeline.stage import Stage
from megatron_demix.pipeline.train_stages import averaged, checkpoint_of, kept_iterations, num_iterations, num_tokens
from megatron_demix.study.load import load_study

STUDY = """
name: s
domains: [{name: code, inputs: [code.jsonl]}, {name: english, inputs: [english.jsonl]}]
model: {num_layers: 2, hidden_size: 8, num_attention_heads: 2}
train: {seq_length: 16, global_batch_size: 4}
base: {tokens: 640}
component: {maturity_seeds: 0, tokens: 6400, average: [0.6, 0.65, 0.7, 0.75]}
search: {rounds: [8], objective: {code: 1}}
final: {tokens: 1k}
"""


@pytest.fixture
def study_path(tmp_path: Path) -> Path:
    (tmp_path / "study.yaml").write_text(STUDY)
    return tmp_path / "study.yaml"


def test_a_component_ends_with_the_last_checkpoint_that_is_used(study_path):
    study = load_study(study_path)
    assert kept_iterations(study) == [60, 65, 70, 75]
    assert (num_iterations(study, "component"), num_tokens(study, "component")) == (75, 75 * 64)
    alone = load_study(study_path, ["component.average=null"])
    assert kept_iterations(alone) == [100]


def test_the_mean_of_its_checkpoints_stands_for_it(study_path, tmp_path):
    study = load_study(study_path)
    trained = Stage("components/code", tmp_path, {}, (), lambda folder: None)
    assert averaged(load_study(study_path, ["component.average=null"]), tmp_path, trained) is trained
    models = [small_model(seed) for seed in range(4)]
    for iteration, model in zip(kept_iterations(study), models, strict=True):
        write_checkpoint(trained.folder / f"iter_{iteration:07d}", model)
    stage = averaged(study, tmp_path, trained)
    assert stage.name == "averages/components/code"
    stage.finish()
    found = read_checkpoint(checkpoint_of(stage) / "release")
    for key in models[0]:
        mean = torch.stack([m[key].double() for m in models]).mean(dim=0)
        assert torch.equal(found[key], mean.to(torch.bfloat16)) or torch.allclose(
            found[key].double(), mean, rtol=2**-8, atol=1e-6
        )


def test_parts_that_make_no_average(study_path):
    with pytest.raises(ConfigError, match=r"average: \[0\.7, 0\.6\] has to ascend"):
        load_study(study_path, ["component.average=[0.7, 0.6]"])
    with pytest.raises(ConfigError, match="expected 2 or more entries"):
        load_study(study_path, ["component.average=[0.7]"])
    with pytest.raises(ConfigError, match="expected a number of at most 1"):
        load_study(study_path, ["component.average=[0.7, 1.1]"])
    close = load_study(study_path, ["component.average=[0.7, 0.7001]"])
    with pytest.raises(ConfigError, match=r"component.average: \[0\.7, 0\.7001\] of 100 iterations are \[70, 70\]"):
        kept_iterations(close)
