"""What each rank runs for test_harness_layouts.py: questions of lm-evaluation-harness to one checkpoint."""

import json
import sys
from pathlib import Path

from megatron_demix.data.tokenizer import load_tokenizer
from megatron_demix.study.data import TokenizerSpec
from megatron_demix.study.training import ParallelSpec
from megatron_demix.train.compat import cpu_compat
from megatron_demix.train.job import TrainJob

TEXTS = ["The first line of it,\nand a second one.", "x" * 40, "def f(x):\n    return x"]


class Question:
    """As much of lm-eval's Instance as a model looks at."""

    def __init__(self, *args) -> None:
        self.args = args


def answers(job: TrainJob, parallel: ParallelSpec) -> dict:
    """Of the job's finished checkpoint, at any layout."""
    with cpu_compat():
        from megatron_demix.evaluate.harness import HarnessModel
        from megatron_demix.evaluate.live import LiveModel
        from megatron_demix.train.model import build_model, destroy_parallel, initialize_parallel
        from megatron_demix.train.weights import load_weights

        initialize_parallel(parallel, seed=1, timeout_s=60)
        stage = build_model(job.model, job.train, parallel, job.vocab_size, cached=True)
        load_weights(stage, job.work, vocab_size=job.vocab_size)
        live = LiveModel(stage, vocab_size=job.vocab_size, max_tokens=job.train.seq_length)
        model = HarnessModel(live, load_tokenizer(TokenizerSpec(type="byte")), batch_tokens=100)
        settings = {"until": ["\n"], "max_gen_toks": 6}
        found = {
            "pairs": model.loglikelihood([Question(text[:9], text[9:]) for text in TEXTS]),
            "rolling": model.loglikelihood_rolling([Question(text) for text in TEXTS]),
            "generated": model.generate_until([Question(text, settings) for text in TEXTS]),
        }
        destroy_parallel()
    return found


if __name__ == "__main__":
    import os

    found = answers(TrainJob.read(Path(sys.argv[1])), ParallelSpec(**json.loads(sys.argv[3])))
    Path(sys.argv[2]).with_suffix(f".{os.environ['RANK']}.json").write_text(json.dumps(found))
