"""Scores of probability ensembles from the tokens that components have left, against the definition."""

import math
from pathlib import Path

import numpy as np
import pytest

from megatron_demix.artifact import temporary_beside
from megatron_demix.errors import CorruptInput
from megatron_demix.evaluate import ensemble
from megatron_demix.evaluate.ensemble import DomainText, Ensemble, TaskText, Texts, keep, remove_unfinished
from megatron_demix.evaluate.tasks.choices import Choices

# Two questions: three options, the last one right; two, of which equals the first one counts.
CHOICES = Choices(np.array([3, 2]), np.array([2, 0]), np.array([4, 1, 2, 3, 3]), gold_bytes=5)
TOKENS_R = np.array([2, 1, 3, 1, 1])
TEXTS = Texts(
    {"code": DomainText(3, 4, 30), "math": DomainText(2, 5, 11)},
    {"quiz": TaskText(TOKENS_R, CHOICES, {"acc": "quiz/acc", "bits_per_byte": "quiz/bits_per_byte"})},
)
NUM_TOKENS = 3 * 4 + 2 * 5 + 8
WEIGHTS_MK = np.array([[1.0, 0.0, 0.0], [0.5, 0.5, 0.0], [0.2, 0.3, 0.5]])


@pytest.fixture
def kept(tmp_path: Path) -> tuple[Path, np.ndarray]:
    """The folder, and what is in it: [K, tokens]."""
    nats_KT = np.random.default_rng(1).gamma(2.0, 1.5, (3, NUM_TOKENS)).astype(np.float32)
    for name, nats_T in zip("abc", nats_KT, strict=True):
        keep(tmp_path / "tokens", name, TEXTS, [nats_T[:12], nats_T[12:22], nats_T[22:]])
    return tmp_path / "tokens", nats_KT


@pytest.mark.parametrize("at_once", [1, 20, 1 << 22])
def test_every_token_s_probability_is_the_weighted_mean(kept, monkeypatch, at_once):
    monkeypatch.setattr(ensemble, "_AT_ONCE", at_once)
    folder, nats_KT = kept
    found = Ensemble(folder, "abc").scores(WEIGHTS_MK)
    mixed_MT = -np.log(WEIGHTS_MK @ np.exp(-nats_KT.astype(np.float64)))
    assert found["code"] == pytest.approx(mixed_MT[:, :12].sum(axis=1) / math.log(2) / 30)
    assert found["math"] == pytest.approx(mixed_MT[:, 12:22].sum(axis=1) / math.log(2) / 11)
    answers_MR = np.add.reduceat(mixed_MT[:, 22:], np.cumsum(TOKENS_R) - TOKENS_R, axis=1)
    gold_bits_M = (answers_MR[:, 2] + answers_MR[:, 3]) / math.log(2) / 5
    assert found["quiz/bits_per_byte"] == pytest.approx(gold_bits_M)
    assert found["quiz/acc"] == pytest.approx(
        [(int(row[:3].argmin() == 2) + int(row[3:].argmin() == 0)) / 2 for row in answers_MR]
    )
    assert set(found) == {"code", "math", "quiz/acc", "quiz/bits_per_byte"}
    # One component alone is itself; a mixture is never worse than the weighted mean of losses (Jensen).
    assert found["code"][0] == pytest.approx(nats_KT[0, :12].sum(dtype=np.float64) / math.log(2) / 30)
    alone_K = nats_KT[:, :12].sum(axis=1, dtype=np.float64) / math.log(2) / 30
    assert (found["code"] <= WEIGHTS_MK @ alone_K + 1e-12).all()


def test_probabilities_that_are_nothing_beside_others_count_as_nothing(tmp_path):
    texts = Texts({"code": DomainText(1, 1, 1)}, {})
    for name, nats in (("a", 2000.0), ("b", 1.0)):
        keep(tmp_path, name, texts, [np.array([nats], np.float32)])
    found = Ensemble(tmp_path, "ab").scores(np.array([[0.5, 0.5]]))
    assert found["code"] == pytest.approx([(1 + math.log(2)) / math.log(2)])


def test_what_a_killed_writer_left_is_removed_and_nothing_else(kept):
    folder, _ = kept
    whole = {path.name for path in folder.iterdir()}
    temporary_beside(folder / "d.npy").write_bytes(b"half")
    (folder / ".nfs0001").write_bytes(b"")  # as a network file system keeps what is still open
    remove_unfinished(folder)
    assert {path.name for path in folder.iterdir()} == whole | {".nfs0001"}


def test_of_equal_answers_the_first_is_chosen():
    scores = CHOICES.scores(np.array([3.0, 1.0, 1.0, 2.0, 2.0]))
    assert scores["acc"] == 0.5  # the second option of the first question comes before the right one
    assert scores["acc_norm"] == 1.0  # for each character the right one costs least
    assert scores["bits_per_byte"] == pytest.approx((1 + 2) / math.log(2) / 5)


def test_the_texts_are_read_as_they_were_written(kept):
    folder, _ = kept
    read = Texts.read(folder / "texts.json")
    assert read.domains == TEXTS.domains
    assert read.tasks["quiz"].tokens_R.tolist() == TOKENS_R.tolist()
    (folder / "texts.json").write_text('{"domains": {"code": {}}}')
    with pytest.raises(CorruptInput, match="does not say which texts were scored"):
        Texts.read(folder / "texts.json")


def test_files_that_are_absent_or_of_other_texts(kept):
    folder, _ = kept
    with pytest.raises(CorruptInput, match=r"d\.npy: cannot be read"):
        Ensemble(folder, "abd")
    np.save(folder / "b.npy", np.zeros(3, np.float32))
    with pytest.raises(CorruptInput, match=r"b\.npy: float32 \[3\], expected float32 \[30\]"):
        Ensemble(folder, "abc")
