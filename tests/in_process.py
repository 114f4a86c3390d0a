"""Stages made in the process of the test: what has one rank needs no torchrun."""

from megatron_demix.artifact import read_json
from megatron_demix.data.tokenizer import load_tokenizer
from megatron_demix.evaluate.job import EvaluateJob, evaluate
from megatron_demix.merge.proxies import ProxyMerger
from megatron_demix.pipeline.merging import method_of
from megatron_demix.pipeline.stage import Stage
from megatron_demix.train.job import TrainJob
from megatron_demix.train.trainer import train


def make(stage: Stage) -> None:
    if stage.ranks and stage.begin():
        if read_json(stage.job)["kind"] == "train":
            train(TrainJob.read(stage.job))
        else:
            job = EvaluateJob.model_validate(read_json(stage.job))
            method = method_of(job.merge, job.base, job.seed)
            evaluate(job, lambda parts, live: ProxyMerger(parts, live, method=method), load_tokenizer)
    stage.finish()
