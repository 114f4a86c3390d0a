"""Words and sentences for datatrove's steps, with no download."""

from __future__ import annotations

import re
from functools import cached_property

from megatron_demix.data.clean.trove import WordTokenizer
from megatron_demix.data.encode_blocks import SentenceSplitter
from megatron_demix.data.sentences import punkt

_UNSPACED = re.compile(
    "["
    "\u2e80-\u2fdf\u3005\u3007\u3021-\u3029\u3038-\u303b\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"  # Han
    "\u3040-\u30ff\u31f0-\u31ff\uff66-\uff9f\U0001b000-\U0001b16f"  # Kana
    "\u0e00-\u0eff"  # Thai, Lao
    "\u1780-\u17ff\u19e0-\u19ff"  # Khmer
    "\u1000-\u109f\ua9e0-\ua9ff\uaa60-\uaa7f"  # Myanmar
    "]"
)
"""Characters of scripts that put no blanks between words."""


class Words(WordTokenizer):
    """Words between blanks, sentences by Punkt's rules: for filters with limits of words. datatrove's own splitters need spaCy
    or a download."""

    @cached_property
    def _sentences(self) -> SentenceSplitter:
        return punkt()

    def word_tokenize(self, text: str) -> list[str]:
        return text.split()

    def sent_tokenize(self, text: str) -> list[str]:
        return [sentence.strip() for sentence in self._sentences(text) if sentence.strip()]

    def span_tokenize(self, text: str) -> list[tuple[int, int]]:
        spans, at = [], 0
        for sentence in self.sent_tokenize(text):
            begin = text.index(sentence, at)
            at = begin + len(sentence)
            spans.append((begin, at))
        return spans


class WordsAndCharacters(Words):
    """Each character of scripts without blanks is a word, too: for n-grams of many words, which depend on no finer cuts."""

    def word_tokenize(self, text: str) -> list[str]:
        return _UNSPACED.sub(r" \g<0> ", text).split()
