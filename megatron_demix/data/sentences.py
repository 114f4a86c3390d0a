"""Splitting text into sentences with nltk's Punkt, offline: its rules with a list of abbreviations, no downloaded model."""

from __future__ import annotations

import itertools
import re

from megatron_demix.data.encode_blocks import SentenceSplitter
from megatron_demix.errors import ConfigError

# Without these, untrained Punkt ends a sentence after each; trained models add little beyond them.
_ABBREVIATIONS = """
mr mrs ms dr prof st jr sr rev hon gen col capt lt sgt gov sen rep vs etc e.g i.e cf al ca approx dept est fig figs eq eqs no
nos vol vols pp ed eds inc ltd co corp jan feb mar apr jun jul aug sep sept oct nov dec mon tue wed thu fri sat sun u.s u.k a.m
p.m ph.d b.a m.a sec ch art resp viz
"""


def punkt(*, keep_newlines: bool = False) -> SentenceSplitter:
    """A splitter for English. Blank lines always end a sentence; keep_newlines: the blanks after a sentence stay with it.

    Raises ConfigError where nltk is not installed.
    """
    try:
        from nltk.tokenize.punkt import PunktParameters, PunktSentenceTokenizer
    except ImportError as e:
        raise ConfigError("nltk is not installed: pip install 'megatron-demix[data]'.") from e
    parameters = PunktParameters()
    parameters.abbrev_types = set(_ABBREVIATIONS.split())
    tokenizer = PunktSentenceTokenizer(parameters)

    def split(text: str) -> list[str]:
        sentences: list[str] = []
        # Paragraph by paragraph: nltk stops a scan that takes too long.
        for paragraph in re.findall(r"(?:[^\n]|\n(?!\s*\n))+(?:\n\s*)?|\n\s*", text):
            spans = list(tokenizer.span_tokenize(paragraph))
            if keep_newlines:
                starts = [0, *(start for start, _ in spans[1:]), len(paragraph)]
                sentences += [paragraph[a:b] for a, b in itertools.pairwise(starts) if b > a]
            else:
                sentences += [paragraph[a:b] for a, b in spans]
        return sentences

    split.keep_newlines = keep_newlines  # type: ignore[attr-defined]  # Recipe.describe: it decides the bytes
    return split
