"""Proxies merged in place, against lm-evaluation-harness's own Hugging Face backend on the same proxies, exported."""

import json
import os
import shutil

import pytest
import torch

from megatron_demix.data import vocabularies
from megatron_demix.data.tokenizer import load_tokenizer
from megatron_demix.errors import ConfigError
from megatron_demix.huggingface.exporting import export_checkpoint
from megatron_demix.huggingface.importing import Layout, import_folder
from megatron_demix.merge.engine import merge_checkpoints
from megatron_demix.merge.proxies import ProxyMerger
from megatron_demix.study.data import TokenizerSpec
from megatron_demix.study.training import ModelSpec, ParallelSpec, TrainSpec
from megatron_demix.train.compat import cpu_compat

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when the next lines import huggingface_hub
lm_eval = pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed: the extra [eval]")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")
pytestmark = pytest.mark.filterwarnings("ignore")

VOCABULARY, LENGTH = 300, 64
MIXTURES = {"even": {"a": 0.5, "b": 0.5}, "skewed": {"a": 0.9, "b": 0.1}}
TASKS = {
    "own_choice": """
output_type: multiple_choice
doc_to_text: "Question: {{question}}\\nAnswer:"
doc_to_choice: choices
doc_to_target: gold
num_fewshot: 1
fewshot_config: {sampler: first_n}
metric_list: [{metric: acc}, {metric: acc_norm}]
""",
    "own_text": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: text
metric_list: [{metric: bits_per_byte}]
""",
    "own_answer": """
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{choices[0]}}"
generation_kwargs: {until: ["e", "question"], max_gen_toks: 9, do_sample: false}
metric_list: [{metric: exact_match}]
""",
}
DOCUMENTS = [
    {"question": "Which of these is wet?", "choices": ["sand", "the rain", "dust"], "gold": 1},
    {"question": "What falls when it is let go?", "choices": ["smoke", "a stone"], "gold": 1},
    {"question": "What is cold ", "choices": ["ice", "fire", "steam", "lava and ashes"], "gold": 0},
    {"question": "And what sees?", "choices": ["an eye", "a nail"], "gold": 0},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two components with a tokenizer, imported from Hugging Face folders; their proxies on disk, exported; tasks."""
    folder = tmp_path_factory.mktemp("harness")
    text = " ".join(str(d) for d in DOCUMENTS)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=LENGTH,
    )
    for seed, name in enumerate("ab"):
        torch.manual_seed(seed)
        model = transformers.LlamaForCausalLM(config)
        for parameter in model.parameters():
            parameter.data += torch.randn_like(parameter) * 0.2
        model.save_pretrained(folder / "hf" / name)
        (folder / "hf" / name / "tokenizer.json").write_text(vocabularies.train_bpe(text.encode(), VOCABULARY))
        described = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": vocabularies.EOD}
        (folder / "hf" / name / "tokenizer_config.json").write_text(json.dumps(described))
        layout = Layout(make_vocab_size_divisible_by=64)
        arguments = import_folder(folder / "hf" / name, folder / name, layout=layout, transformer_impl="local", progress=False)
    (folder / "model.json").write_text(json.dumps(arguments.study()))
    merge_checkpoints({n: folder / n for n in "ab"}, MIXTURES, folder / "proxies", progress=False)
    for name in MIXTURES:
        export_checkpoint(folder / "proxies" / name, folder / "exported" / name, reference=folder / "hf" / "a", progress=False)
    (folder / "documents.jsonl").write_text("".join(json.dumps({**d, "text": str(d) * 2}) + "\n" for d in DOCUMENTS))
    data = {"data_files": {"validation": str(folder / "documents.jsonl")}, "cache_dir": str(folder / "cache")}
    (folder / "tasks").mkdir()
    for name, task in TASKS.items():
        files = f"dataset_path: json\nvalidation_split: validation\ndataset_kwargs: {json.dumps(data)}\n"
        (folder / "tasks" / f"{name}.yaml").write_text(f"task: {name}\n{files}{task}")
    return folder


@pytest.fixture(scope="module")
def harness(folder):
    """(the model that lm-eval is given, what merges a mixture into it)"""
    spec = ModelSpec(**json.loads((folder / "model.json").read_text()), make_vocab_size_divisible_by=64)
    train = TrainSpec(seq_length=LENGTH, global_batch_size=1, precision="fp32")
    with cpu_compat():
        from megatron_demix.evaluate.harness import HarnessModel
        from megatron_demix.evaluate.live import LiveModel
        from megatron_demix.train.model import build_model, destroy_parallel, initialize_parallel, live_tensors

        initialize_parallel(ParallelSpec(), seed=3, timeout_s=60)
        stage = build_model(spec, train, ParallelSpec(), VOCABULARY, cached=True)
        merger = ProxyMerger({n: folder / n for n in "ab"}, live_tensors(stage))
        codec = load_tokenizer(TokenizerSpec(type="huggingface", model=folder / "hf" / "a"))
        yield HarnessModel(LiveModel(stage, vocab_size=VOCABULARY, max_tokens=LENGTH), codec, batch_tokens=300), merger
        destroy_parallel()


def evaluated(model, folder) -> dict:
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(folder / "tasks"), include_defaults=False)
    return lm_eval.simple_evaluate(model, tasks=list(TASKS), task_manager=manager, bootstrap_iters=0, log_samples=True)


def test_proxies_in_place_agree_with_the_hugging_face_backend(folder, harness):
    from lm_eval.models.huggingface import HFLM

    model, merger = harness
    seen = []
    for name, weights in MIXTURES.items():
        merger.merge(weights)
        ours = evaluated(model, folder)
        theirs = evaluated(HFLM(str(folder / "exported" / name), device="cpu", batch_size=2, dtype="float32"), folder)
        for task in TASKS:
            numbers = {k: v for k, v in ours["results"][task].items() if isinstance(v, float)}
            assert numbers == pytest.approx({k: theirs["results"][task][k] for k in numbers}, rel=1e-5), task
            for mine, other in zip(ours["samples"][task], theirs["samples"][task], strict=True):
                if task == "own_answer":
                    assert mine["resps"] == other["resps"]
                else:
                    assert flat(mine["resps"]) == pytest.approx(flat(other["resps"]), rel=1e-5)
        seen.append(ours["samples"])
    assert flat(seen[0]["own_text"][0]["resps"]) != flat(seen[1]["own_text"][0]["resps"]), "the mixtures differ"


def test_texts_without_context_begin_with_the_tokenizer_s_bos(folder, harness, tmp_path):
    """As in the Hugging Face backend. The token is a byte that no text has."""
    from lm_eval.models.huggingface import HFLM

    from megatron_demix.evaluate.harness import HarnessModel, bos_token_id

    model, merger = harness
    exported = shutil.copytree(folder / "exported" / "even", tmp_path / "even")
    assert bos_token_id(exported) is None
    described = json.loads((exported / "tokenizer_config.json").read_text())
    (exported / "tokenizer_config.json").write_text(json.dumps(described | {"bos_token": "\u0100"}))
    with_bos = HarnessModel(model._live, model._codec, prefix_token_id=bos_token_id(exported), batch_tokens=300)
    theirs = HFLM(str(exported), device="cpu", batch_size=2, dtype="float32", add_bos_token=False)
    assert with_bos.prefix_token_id == theirs.prefix_token_id != model.prefix_token_id
    merger.merge(MIXTURES["even"])
    found = [evaluated(m, folder)["samples"]["own_text"] for m in (with_bos, theirs, model)]
    ours, expected, without = ([flat(sample["resps"]) for sample in samples] for samples in found)
    assert flat(ours) == pytest.approx(flat(expected), rel=1e-5)
    assert flat(ours) != pytest.approx(flat(without), rel=1e-5)
    (exported / "tokenizer_config.json").write_text(json.dumps({"bos_token": {"content": "<none>"}}))
    with pytest.raises(ConfigError, match=r"names the bos_token '<none>', which the vocabulary of .* lacks"):
        bos_token_id(exported)


def flat(nested) -> list[float]:
    return [float(v) for n in nested for v in flat(n)] if isinstance(nested, list | tuple) else [float(nested)]


class Asked:
    """What the harness hands a model."""

    def __init__(self, *args) -> None:
        self.args = args


def test_what_cannot_be_generated_is_refused(harness):
    model, _ = harness
    with pytest.raises(ConfigError, match="a task asks for sampling"):
        model.generate_until([Asked("x", {"do_sample": True})])
    with pytest.raises(ConfigError, match="a task asks for sampling"):
        model.generate_until([Asked("x", {"temperature": 0.7})])
    with pytest.raises(ConfigError, match="a task asks for 256 new tokens, but the model reads 64"):
        model.generate_until([Asked("x", {})])


def test_settings_of_one_call_may_differ(harness):
    model, _ = harness
    long, short, empty = model.generate_until(
        [
            Asked("What", {"max_gen_toks": 20, "do_sample": False, "temperature": 0.7}),  # greedy, whatever the temperature
            Asked("What", {"max_new_tokens": 5}),
            Asked("", {"max_gen_toks": 3, "until": "e"}),
        ]
    )
    assert long.startswith(short)
    assert len(long) > len(short)
    assert "e" not in empty
