import joblib
import numpy as np
import pytest

from megatron_demix.errors import IncompatibleInputs
from megatron_demix.search import fits, processes
from megatron_demix.search.fits import fit_scores
from megatron_demix.search.surrogate import fit_surrogate

RNG = np.random.default_rng(0)
SHARES_MD = RNG.dirichlet(np.ones(4), 30)
SCORES = {f"s{i}": 2 - SHARES_MD[:, i % 4] ** 0.5 + 0.1 * RNG.standard_normal(30) for i in range(5)}
SCORES["s3"][:4] = np.nan


def test_numbers_do_not_depend_on_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    alone = dict(fit_scores(SHARES_MD, SCORES, seed=3))
    monkeypatch.setattr(processes, "_PAYS", 0.0)
    monkeypatch.setattr(joblib, "cpu_count", lambda: 2)
    started, in_processes = [], processes._in_processes
    monkeypatch.setattr(processes, "_in_processes", lambda *args: started.append(args) or in_processes(*args))
    shared = dict(fit_scores(SHARES_MD, SCORES, seed=3))
    assert len(started) == 1
    assert list(shared) == list(SCORES)
    for name, surrogate in shared.items():
        assert surrogate.cross_validation["kinds"] == alone[name].cross_validation["kinds"]
        for ours, theirs in zip(surrogate.predict(SHARES_MD), alone[name].predict(SHARES_MD), strict=True):
            np.testing.assert_array_equal(ours, theirs)


def test_each_is_fitted_as_if_alone_on_the_proxies_that_have_it() -> None:
    fitted = dict(fit_scores(SHARES_MD, SCORES, "quadratic"))
    for name, scores_M in SCORES.items():
        alone = fit_surrogate(SHARES_MD, scores_M, "quadratic", measured_M=np.isfinite(scores_M))
        np.testing.assert_allclose(fitted[name].mean(SHARES_MD), alone.mean(SHARES_MD), rtol=1e-12)


def test_a_score_that_cannot_be_fitted_is_refused_before_others_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fits, "fit_surrogate", lambda *_, **__: pytest.fail("a fit was begun"))
    with pytest.raises(IncompatibleInputs, match="last: all 30 scores are 1: nothing to learn"):
        next(fit_scores(SHARES_MD, SCORES | {"last": np.ones(30)}))


def test_scores_that_are_not_of_these_mixtures_are_refused() -> None:
    with pytest.raises(IncompatibleInputs, match=r"short: \(30, 4\) shares do not go with \(29,\) scores"):
        next(fit_scores(SHARES_MD, {"short": SCORES["s0"][1:]}))
    with pytest.raises(IncompatibleInputs, match=r"s0: \(30,\) shares do not go with \(30,\) scores"):
        next(fit_scores(SHARES_MD[:, 0], SCORES))


def test_what_killed_processes_leave_is_fitted_here(monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(job):
        import os
        import signal

        os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(processes, "_PAYS", 0.0)
    monkeypatch.setattr(joblib, "cpu_count", lambda: 2)
    monkeypatch.setattr(processes, "_apart", killed)
    assert list(dict(fit_scores(SHARES_MD, SCORES, "ridge"))) == list(SCORES)
