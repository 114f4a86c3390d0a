"""The two models that score documents, trained from one's own samples: an n-gram language model and a fastText classifier.

Both are small, train on a processor, and are the same bytes for the same samples.
"""

from __future__ import annotations

import importlib.util
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from megatron_demix.data.clean.scores import LocalKenlm, Pieces, load_fasttext
from megatron_demix.data.clean.trove import KenlmModel
from megatron_demix.data.inputs import read_documents
from megatron_demix.errors import ConfigError, OutputExists, StageFailed, storage_errors
from megatron_demix.terminal import silent

HELD_OUT = 0.1


def train_perplexity(
    sample: Sequence[Path], output: Path, *, order: int = 3, vocab_size: int = 8000, json_key: str = "text"
) -> dict[str, Any]:
    """Write `output`/model.arpa and `output`/sentencepiece.model: Kneser-Ney n-grams over pieces of normalised text, as CCNet's
    models are. Returns {"documents", "perplexity": {"sample", "held_out"}}: medians, the second over documents not trained on.

    The n-gram counts are held in memory: for more than some 100 MB of text use KenLM's own trainer, lmplz, on the same pieces.
    Raises ConfigError, CorruptInput, OutputExists, StorageError.
    """
    try:
        from kaldingram.train import main as train_arpa
        from sentencepiece import SentencePieceTrainer
    except ImportError as e:
        raise ConfigError(f"{e.name} is not installed: pip install 'megatron-demix[data]'.") from e
    documents = _shuffled(sample, json_key)
    held_out, trained = _split(documents)
    with _folder(output) as work:
        arpa, sentencepiece = work / "model.arpa", work / "sentencepiece.model"
        normalize = KenlmModel("", "").normalize
        lines = [normalize(text) for text in trained]
        try:
            SentencePieceTrainer.train(
                sentence_iterator=iter(lines),
                model_prefix=str(work / "sentencepiece"),
                vocab_size=vocab_size,
                hard_vocab_limit=False,
                num_threads=1,
                max_sentence_length=1 << 20,
                minloglevel=2,
            )
        except RuntimeError as e:
            raise ConfigError(f"the sample is too small for {vocab_size} pieces ({e}). Give more text, or fewer pieces.") from e
        (work / "sentencepiece.vocab").unlink()
        pieces = Pieces(sentencepiece)
        text = work / "pieces.txt"
        # What was never seen is as likely as what was seen once. In a model without <unk> KenLM gives 1e-100 to it, and one
        # rare character makes a document the worst of all.
        text.write_text("".join(pieces.tokenize(line) + "\n" for line in lines) + "<unk>\n", encoding="utf-8")
        # On a terminal its bars say how far it is.
        with nullcontext() if sys.stderr.isatty() else silent():
            train_arpa(["--ngram-order", str(order), "--text", str(text), "--lm", str(arpa)])
        text.unlink()
        model = LocalKenlm(arpa, sentencepiece)
        medians = {
            name: _median([model.get_perplexity(text) for text in texts])
            for name, texts in (("sample", trained[: len(held_out)]), ("held_out", held_out))
        }
    return {"documents": len(documents), "perplexity": medians}


def train_quality(samples: Mapping[str, Sequence[Path]], output: Path, *, json_key: str = "text") -> dict[str, Any]:
    """Write `output`, a fastText classifier of words and pairs of words with one label for each entry of `samples`.

    Returns what it makes of a tenth of the documents that it was not trained on: {label: {"documents", "precision", "recall"}}.
    Raises ConfigError, CorruptInput, OutputExists, StorageError.
    """
    if importlib.util.find_spec("fasttext") is None:
        raise ConfigError("fasttext is not installed: pip install 'megatron-demix[data]'.")
    if len(samples) < 2:
        raise ConfigError("a classifier needs samples of two or more labels, such as high and low.")
    if spaced := [label for label in samples if label.split() != [label]]:
        raise ConfigError(f"label {spaced[0]!r} has a blank, at which fastText would end it. Write it without: very_good.")
    parts = {label: _split(_shuffled(files, json_key)) for label, files in samples.items()}
    lines = [f"__label__{label} {_one_line(text)}\n" for label, (_, trained) in parts.items() for text in trained]
    random.Random(0).shuffle(lines)
    if output.exists():
        raise OutputExists(f"{output} exists. Move it away or choose another output; nothing is overwritten.")
    with (
        storage_errors(f"writing {output}"),
        tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}.") as folder,
    ):
        text, file = Path(folder) / "train.txt", Path(folder) / "model.bin"
        text.write_text("".join(lines), encoding="utf-8")
        _train_fasttext(text, file)
        found = _confusion(load_fasttext(file), {label: held_out for label, (held_out, _) in parts.items()})
        shutil.move(file, output)
    return found


# One thread: with more, fastText's updates race and every training gives another model.
_TRAIN_FASTTEXT = """
import sys
import fasttext
settings = {"thread": 1, "seed": 0, "wordNgrams": 2, "bucket": 1 << 18, "dim": 32, "epoch": 25, "lr": 0.5, "verbose": 0}
fasttext.train_supervised(input=sys.argv[1], **settings).save_model(sys.argv[2])
"""


def _train_fasttext(text: Path, file: Path) -> None:
    """In a process of its own: with one thread fastText 0.9.2 initialises a tenth of its input matrix and leaves the rest as
    malloc gave it (DenseMatrix::uniform). Fresh from the system, which large blocks here are, it is zero; memory that
    was used before ends with NaN, or with another model."""
    fresh = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    command = [sys.executable, "-c", _TRAIN_FASTTEXT, str(text), str(file)]
    trained = subprocess.run(command, env=fresh, capture_output=True, text=True)
    if trained.returncode != 0:
        said = trained.stderr.strip().splitlines() or ["no message"]
        raise StageFailed(f"fastText could not be trained on {text.name}: {said[-1]}. Give larger samples, or try again.")


def _confusion(model: Any, held_out: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    guesses = {
        label: [model.predict(_one_line(t), k=1)[0][0].removeprefix("__label__") for t in texts]
        for label, texts in held_out.items()
    }
    report = {}
    for label, own in guesses.items():
        right, named = own.count(label), sum(g.count(label) for g in guesses.values())
        report[label] = {
            "documents": len(own),
            "precision": round(right / named, 4) if named else None,
            "recall": round(right / len(own), 4),
        }
    return report


def _one_line(text: str) -> str:
    return text.replace("\n", " ")


def _shuffled(files: Sequence[Path], json_key: str) -> list[str]:
    texts = [text for documents in read_documents(files, json_key=json_key) for text in documents.text.strings()]
    random.Random(0).shuffle(texts)
    return texts


def _split(texts: list[str]) -> tuple[list[str], list[str]]:
    """(held out, trained on)."""
    if len(texts) < 10:
        raise ConfigError(f"a sample has {len(texts)} documents, expected 10 or more: a tenth is held out to measure by.")
    cut = max(1, int(HELD_OUT * len(texts)))
    return texts[:cut], texts[cut:]


def _median(values: list[float]) -> float:
    return sorted(values)[len(values) // 2]


@contextmanager
def _folder(output: Path) -> Iterator[Path]:
    """A temporary folder that becomes `output` if nothing goes wrong."""
    if output.exists():
        raise OutputExists(f"{output} exists. Move it away or choose another output; nothing is overwritten.")
    with (
        storage_errors(f"writing {output}"),
        tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}.") as folder,
    ):
        work = Path(folder) / "models"
        work.mkdir()
        yield work
        work.rename(output)
