"""The sections about text: tokenizer, domains, preparing and cleaning."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Literal, get_args

from pydantic import BaseModel, Field, model_validator

from megatron_demix.study.choices import Heuristic
from megatron_demix.study.section import Bytes, CutOff, ExpandedPath, ExpandedPattern, Name, Section
from megatron_demix.units import Cut

Split = Literal["train", "valid", "test"]
SPLITS: tuple[Split, ...] = get_args(Split)


class TokenizerSpec(Section):
    type: Literal["byte", "bpe", "huggingface", "gpt2", "sentencepiece", "tiktoken"] = "bpe"
    """byte: 256 bytes and EOD, no training. bpe: a byte-level BPE trained on the study's text. The rest load `model`; gpt2 the
    vocab.json and merges.txt of Megatron's GPT2BPETokenizer."""
    model: ExpandedPath | None = None
    """The tokenizer's file or folder, for the types that load one."""
    train_vocab_size: int = Field(4096, ge=300)
    """bpe: number of ids, EOD included."""
    train_bytes: Bytes = 8_000_000
    """bpe: text it is trained on, spread evenly over the domains."""
    domains: list[str] | None = Field(None, min_length=1)
    """bpe: domains it is trained on; null: all. Named ones keep it, and what depends on it, valid when others come and go."""

    @model_validator(mode="after")
    def _model_given(self) -> TokenizerSpec:
        if (self.model is None) != (self.type in ("byte", "bpe")):
            raise ValueError(f"type {self.type!r} {'needs' if self.model is None else 'takes no'} `model`")
        if self.domains and self.type != "bpe":
            raise ValueError(f"type {self.type!r} is not trained, so it takes no `domains`")
        return self

    def under(self, root: Path) -> TokenizerSpec:
        """With a relative model below `root`."""
        return self.model_copy(update={"model": root / self.model}) if self.model else self


class DomainSpec(Section):
    name: Name
    inputs: list[ExpandedPattern] = []
    """Files or globs: .jsonl, .txt, ... relative to the study file."""
    prefixes: dict[Split, list[ExpandedPath]] | None = None
    """Already tokenized data instead of `inputs`: Megatron path prefixes (without .bin/.idx), by split."""
    json_key: str = "text"
    max_epochs: float = Field(4.0, gt=0)
    """The search and the blend never repeat this domain more often than this in the final run."""
    min_share: float = Field(0.0, ge=0, le=1)
    """Least actual share of the final data. The same number as max_share fixes the domain."""
    max_share: float = Field(1.0, ge=0, le=1)

    @model_validator(mode="after")
    def _one_source(self) -> DomainSpec:
        if bool(self.inputs) == bool(self.prefixes):
            raise ValueError(f"domain {self.name!r} needs either `inputs` (text) or `prefixes` (.bin/.idx)")
        if self.min_share > self.max_share:
            raise ValueError(f"domain {self.name!r}: min_share {self.min_share:g} is above max_share {self.max_share:g}")
        return self


class HeuristicsSpec(Section):
    use: list[Heuristic] = Field(min_length=1)
    """Published rules, in this order. c4 also takes lines out of the documents that it keeps."""
    domains: list[Name] | None = None
    """Domains they are for; null: all."""


class NearDuplicatesSpec(Section):
    """MinHash over n-grams of words; the defaults are the paper's and find documents that are about 90 % alike."""

    ngram: int = Field(24, ge=1)
    """Words in an n-gram. Documents with fewer have no n-gram and are near duplicates of nothing."""
    bands: int = Field(20, ge=1)
    hashes: int = Field(13, ge=1)
    """MinHashes in a band; documents that agree on all of one band are duplicates."""


class ContaminationSpec(Section):
    tasks: dict[Name, list[ExpandedPattern]] = Field(min_length=1)
    """By task: files or globs with one item a line. A document that contains an n-gram of an item is removed."""
    ngram: int = Field(13, ge=1)
    """Words in an n-gram."""
    keys: list[str] = []
    """Fields of an item that count; none: all."""


class PerplexitySpec(Section):
    model: ExpandedPath
    """KenLM's .arpa or binary file."""
    sentencepiece: ExpandedPath | None = None
    """SentencePiece model that the KenLM model's tokens come from (as CCNet's do); null: words between blanks."""
    drop: CutOff = Cut(0.02, True)
    """The worst of each domain: 2% of the documents, or those above a perplexity. The paper: about 2 %."""
    domains: list[Name] | None = None


class QualitySpec(Section):
    model: ExpandedPath
    """fastText's .bin file."""
    label: str = "high"
    """The label whose probability is the score."""
    drop: CutOff = Cut(0.03, True)
    """The worst of each domain: 3% of the documents, or those below a probability. The paper: about 3 %."""
    domains: list[Name] | None = None


class CleanSpec(Section):
    """What is removed from text before it is tokenized, in this order. Needs the extra [data]."""

    heuristics: HeuristicsSpec | None = None
    exact_duplicates: bool = True
    contamination: ContaminationSpec | None = None
    near_duplicates: NearDuplicatesSpec | None = NearDuplicatesSpec()
    perplexity: PerplexitySpec | None = None
    quality: QualitySpec | None = None

    def models(self) -> list[tuple[str, Path]]:
        """(place, file) of every model that scores documents."""
        found = [("perplexity.model", self.perplexity.model)] if self.perplexity else []
        if self.perplexity and self.perplexity.sentencepiece:
            found.append(("perplexity.sentencepiece", self.perplexity.sentencepiece))
        return [*found, ("quality.model", self.quality.model)] if self.quality else found

    def under(self, root: Path) -> CleanSpec:
        """The same with the models' paths starting at `root`."""
        sections: dict[str, BaseModel] = {}
        for place, path in self.models():
            section, key = place.split(".")
            sections[section] = sections.get(section, getattr(self, section)).model_copy(update={key: root / path})
        return self.model_copy(update=sections)

    def unknown_domain(self, known: Collection[str]) -> tuple[str, str] | None:
        """(place, name) of a domain that is named here and is not one of `known`."""
        for place in ("heuristics", "perplexity", "quality"):
            for name in getattr(getattr(self, place), "domains", None) or ():
                if name not in known:
                    return f"{place}.domains", name
        return None


class PrepareSpec(Section):
    clean: CleanSpec | None = None
    """Clean the text first; null: it is used as it is."""
    split: tuple[float, float, float] = (0.94, 0.03, 0.03)
    """Shares of the documents for train, valid (scores the search) and test (scores the final run only)."""
    on_bad_document: Literal["error", "reject"] = "error"
    """A line that is not UTF-8, not JSON or without text: stop, or leave it out and list it."""
    workers: int = Field(2, ge=1)

    @model_validator(mode="after")
    def _whole(self) -> PrepareSpec:
        if min(self.split) <= 0 or abs(sum(self.split) - 1) > 1e-6:
            raise ValueError(f"split {list(self.split)}: expected three shares above 0 that sum to 1 (train, valid, test)")
        return self
