"""lm-evaluation-harness over a live model: one process scores any number of proxies, merged in place, nothing on disk.

```python
model = HarnessModel(LiveModel(stage, vocab_size=..., max_tokens=...), tokenizer, prefix_token_id=bos_token_id(folder))
for name, weights in mixtures.items():
    merger.merge(weights)  # megatron_demix.merge.proxies.ProxyMerger on live_tensors(stage)
    results[name] = lm_eval.simple_evaluate(model, tasks=["arc_easy"], bootstrap_iters=0)
```

Every rank of a model-parallel group makes the same calls and gets the same results. Needs the extra [eval].
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_demix.artifact import read_json
from megatron_demix.errors import ConfigError
from megatron_demix.evaluate.generate import generate
from megatron_demix.evaluate.likelihood import Request, likelihoods
from megatron_demix.evaluate.suite import TextCodec, encode

try:
    from lm_eval.api.model import TemplateLM
    from lm_eval.models.utils import normalize_gen_kwargs
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ImportError as e:
    raise ConfigError(f"lm-evaluation-harness cannot be imported ({e}): pip install 'megatron-demix[eval]'.") from e

if TYPE_CHECKING:
    from megatron_demix.evaluate.live import LiveModel


def bos_token_id(folder: Path) -> int | None:
    """The id of the bos_token in the tokenizer_config.json of a Hugging Face folder, None where it names none.

    Raises ConfigError where its tokenizer.json has no such token.
    """
    path = folder / "tokenizer_config.json"
    named = read_json(path).get("bos_token") if path.is_file() else None
    token = named.get("content") if isinstance(named, dict) else named
    if token is None:
        return None
    from tokenizers import Tokenizer

    found = Tokenizer.from_file(str(folder / "tokenizer.json")).token_to_id(token)
    if found is None:
        raise ConfigError(f"{path}: names the bos_token {token!r}, which the vocabulary of {folder / 'tokenizer.json'} lacks.")
    return found


class HarnessModel(TemplateLM):
    """An `lm_eval` model. As in the harness's Hugging Face backend with add_bos_token=False are: how pairs are encoded and cut,
    which windows a rolling likelihood has, how answers end. Generation is greedy."""

    def __init__(
        self, live: LiveModel, codec: TextCodec, *, prefix_token_id: int | None = None, batch_tokens: int = 16384
    ) -> None:
        """prefix_token_id: what stands before a text that has no context. Default: end-of-document. The harness's Hugging Face
        backend takes the tokenizer's BOS where it has one: bos_token_id. batch_tokens: how many tokens run at once, about."""
        super().__init__()
        self._live, self._codec, self._batch_tokens = live, codec, batch_tokens
        self._prefix_token_id = codec.eod_id if prefix_token_id is None else prefix_token_id

    @property
    def eot_token_id(self) -> int:
        return self._codec.eod_id

    @property
    def prefix_token_id(self) -> int:
        return self._prefix_token_id

    @property
    def max_length(self) -> int:
        return self._live.max_tokens

    @property
    def tokenizer_name(self) -> str:
        """Under which the harness would cache requests: not known here, so none of another tokenizer can be taken."""
        return ""

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        return encode(self._codec, [string])[0].tolist()

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        cut = [Request.cut(context, continuation, self.max_length) for _, context, continuation in requests]
        return [(-found.nats, found.greedy) for found in likelihoods(self._live, cut, batch_tokens=self._batch_tokens)]

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        windows = [
            (text, make_disjoint_window(window))
            for text, request in enumerate(requests)
            for window in get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
        ]
        totals = [0.0] * len(requests)
        found = self._loglikelihood_tokens([(None, *window) for _, window in windows])
        for (text, _), (log_probability, _) in zip(windows, found, strict=True):
            totals[text] += log_probability
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Raises ConfigError where a task asks for sampling, or for more tokens than the model reads."""
        answers: list[str] = [""] * len(requests)
        groups: dict[tuple[tuple[str, ...], int], list[int]] = {}
        for i, request in enumerate(requests):
            groups.setdefault(self._settings(dict(request.args[1])), []).append(i)
        for (stops, limit), group in groups.items():
            encoded = [self.tok_encode(requests[i].args[0])[-(self.max_length - limit) :] for i in group]
            found = generate(
                self._live,
                [tuple(ids) or (self.prefix_token_id,) for ids in encoded],
                pieces=self._codec.pieces,
                eod_id=self._codec.eod_id,
                stops=stops,
                max_new_tokens=limit,
                batch_tokens=self._batch_tokens,
            )
            for i, answer in zip(group, found, strict=True):
                answers[i] = answer.text
        return answers

    def _settings(self, wanted: dict[str, Any]) -> tuple[tuple[str, ...], int]:
        """(stop texts, most new tokens) of a request."""
        settings = normalize_gen_kwargs(wanted)
        if settings.get("do_sample"):
            raise ConfigError(
                f"a task asks for sampling ({wanted}); answers are generated greedily here. Set do_sample: false and "
                "temperature: 0 in its generation_kwargs."
            )
        limit = settings["max_gen_toks"]
        if limit >= self.max_length:
            raise ConfigError(
                f"a task asks for {limit} new tokens, but the model reads {self.max_length} with the question. Set "
                "max_gen_toks in its generation_kwargs."
            )
        return tuple(stop for stop in settings["until"] if stop), limit
