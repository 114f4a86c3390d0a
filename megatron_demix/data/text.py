"""A batch of documents as one UTF-8 buffer: what moves between reading, splitting and encoding, with no object per document."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class TextBatch:
    """Document i is content[offsets[i]:offsets[i + 1]]: valid UTF-8. content: uint8 [N]; offsets: int64 [D + 1]."""

    content: np.ndarray
    offsets: np.ndarray

    @classmethod
    def of(cls, texts: Iterable[str | bytes]) -> TextBatch:
        """From strings, or bytes that are known to be UTF-8."""
        encoded = [t.encode() if isinstance(t, str) else t for t in texts]
        offsets = np.zeros(len(encoded) + 1, np.int64)
        np.cumsum([len(e) for e in encoded], out=offsets[1:])
        return cls(np.frombuffer(b"".join(encoded), np.uint8), offsets)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def lengths(self) -> np.ndarray:
        """int64 [D]: bytes of each document."""
        return np.diff(self.offsets)

    def raw(self) -> list[bytes]:
        content, offsets = self.content.tobytes(), self.offsets.tolist()
        return [content[a:b] for a, b in itertools.pairwise(offsets)]

    def strings(self) -> list[str]:
        return [document.decode() for document in self.raw()]

    def awkward(self):
        """The same buffers as an awkward array of strings, without a copy."""
        import awkward as ak

        content = ak.contents.NumpyArray(self.content, parameters={"__array__": "char"})
        offsets = ak.index.Index64(self.offsets)
        return ak.Array(ak.contents.ListOffsetArray(offsets, content, parameters={"__array__": "string"}))
