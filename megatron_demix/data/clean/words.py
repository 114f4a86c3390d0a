"""Words and sentences for datatrove's steps, with no download."""

from __future__ import annotations

from functools import cached_property

from megatron_demix.data.clean.trove import WordTokenizer
from megatron_demix.data.encode_blocks import SentenceSplitter
from megatron_demix.data.sentences import punkt


class BlankSeparated(WordTokenizer):
    """Words between blanks, sentences by Punkt's rules: datatrove's own splitters need spaCy or a download, and n-grams of many
    words do not depend on finer cuts."""

    @cached_property
    def _sentences(self) -> SentenceSplitter:
        return punkt()

    def word_tokenize(self, text: str) -> list[str]:
        return text.split()

    def sent_tokenize(self, text: str) -> list[str]:
        return [sentence.strip() for sentence in self._sentences(text) if sentence.strip()]

    def span_tokenize(self, text: str) -> list[tuple[int, int]]:
        raise NotImplementedError("no step used here asks for spans")
