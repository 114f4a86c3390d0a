"""Scores of documents: perplexity under a KenLM model, and a label's probability from fastText. Models are local files."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Collection, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from megatron_demix.data.clean.documents import Source
from megatron_demix.data.clean.trove import Document, KenlmModel, PipelineStep
from megatron_demix.errors import ConfigError, CorruptInput
from megatron_demix.study.data import PerplexitySpec, QualitySpec
from megatron_demix.terminal import silent


class ForDomains(PipelineStep):
    """A step for the documents of some domains; those of the others pass by it."""

    type = "🔀"

    def __init__(self, step: PipelineStep, sources: list[Source], domains: Collection[str]) -> None:
        super().__init__()
        self.step, self.name = step, f"{step.name}, for {', '.join(sorted(domains))}"
        self.chosen = [source.domain in domains for source in sources]

    def run(self, data: Any, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        yield from self.step.run(data, rank, world_size) if self.chosen[rank] else data


class Score(PipelineStep):
    """Notes a score in each document's metadata, and all scores of a task, in order, in scores/<name>/<task>.npy."""

    type = "🔢 - SCORE"

    def __init__(self, work: Path, name: str) -> None:
        super().__init__()
        self.name, self.folder = name, work / "scores" / name

    @abstractmethod
    def score(self, text: str) -> float: ...

    def run(self, data: Any, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        scores = []
        for document in data:
            with self.track_time():
                scores.append(self.score(document.text))
            document.metadata[self.name] = scores[-1]
            yield document
        self.folder.mkdir(parents=True, exist_ok=True)
        np.save(self.folder / f"{rank:05d}.npy", np.array(scores, np.float64))


class Perplexity(Score):
    """Under a KenLM model, per token. With a SentencePiece model, text is normalised and cut as CCNet's models expect; without
    one, it is scored line by line, its words being what lies between blanks."""

    def __init__(self, work: Path, spec: PerplexitySpec) -> None:
        super().__init__(work, "perplexity")
        self.spec = spec

    def score(self, text: str) -> float:
        model = _perplexity_model(self.spec.model, self.spec.sentencepiece)
        return float(model.get_perplexity(text, normalize_cc_net=self.spec.sentencepiece is not None))

    def check(self) -> None:
        """Raises ConfigError or CorruptInput if the models cannot be used."""
        LocalKenlm(self.spec.model, self.spec.sentencepiece)


class LocalKenlm(KenlmModel):
    """datatrove's, from files that are here instead of from a download."""

    def __init__(self, model: Path, sentencepiece: Path | None) -> None:
        super().__init__("", "")
        self._model, self._tokenizer = _kenlm(model), Pieces(sentencepiece)

    @property
    def model(self) -> Any:
        return self._model

    @property
    def tokenizer(self) -> Pieces:
        return self._tokenizer


class Pieces:
    """Text as SentencePiece's pieces between blanks; without a model, as it is."""

    def __init__(self, model: Path | None) -> None:
        self.model = None
        if model is not None:
            from sentencepiece import SentencePieceProcessor

            try:
                self.model = SentencePieceProcessor(model_file=str(model))
            except (OSError, RuntimeError) as e:
                raise CorruptInput(f"{model}: not a SentencePiece model ({e}).") from e

    def tokenize(self, text: str) -> str:
        return text if self.model is None else " ".join(self.model.encode(text, out_type=str))


def _kenlm(path: Path) -> Any:
    try:
        import kenlm
    except ImportError as e:
        raise ConfigError("kenlm is not installed: pip install 'megatron-demix[data]'.") from e
    _exists(path, "perplexity")
    try:
        with silent():
            return kenlm.Model(str(path))
    except (OSError, RuntimeError) as e:
        raise CorruptInput(f"{path}: not a model that KenLM reads, expected .arpa or KenLM's binary form ({e}).") from e


class Quality(Score):
    """Probability that a fastText classifier gives to one label."""

    def __init__(self, work: Path, spec: QualitySpec) -> None:
        super().__init__(work, "quality")
        self.spec = spec

    def score(self, text: str) -> float:
        # Not datatrove's filter: it keeps a copy of a model by path, and would go on using it after the file has changed.
        labels, probabilities = _quality_model(self.spec.model).predict(text.replace("\n", " "), k=-1)
        return float(dict(zip(labels, probabilities, strict=True)).get(f"__label__{self.spec.label}", 0.0))

    def check(self) -> None:
        """Raises ConfigError or CorruptInput if the model cannot be used."""
        labels = [label.removeprefix("__label__") for label in load_fasttext(self.spec.model).labels]
        if self.spec.label not in labels:
            raise ConfigError(f"quality: {self.spec.model} knows no label {self.spec.label!r}; it has {', '.join(labels)}.")


def load_fasttext(path: Path) -> Any:
    try:
        from fasttext.FastText import _FastText
    except ImportError as e:
        raise ConfigError("fasttext is not installed: pip install 'megatron-demix[data]'.") from e
    _exists(path, "quality")
    try:
        return _FastText(str(path))
    except (ValueError, RuntimeError, MemoryError) as e:
        raise CorruptInput(f"{path}: not a fastText model ({e}).") from e


def _exists(path: Path, what: str) -> None:
    if not path.is_file():
        raise ConfigError(f"{what}: the model {path} does not exist. Correct the path; nothing is downloaded.")


# A worker has many tasks, one a file of the input, and each has a copy of the steps: kept in a step, a model would be read anew
# for every file.
_perplexity_model = lru_cache(maxsize=1)(LocalKenlm)
_quality_model = lru_cache(maxsize=1)(load_fasttext)


def forget_models() -> None:
    """Read them again when they are next needed: the files may be others by then."""
    _perplexity_model.cache_clear()
    _quality_model.cache_clear()
