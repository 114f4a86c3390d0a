"""The Gaussian process's fast marginal likelihood against scikit-learn's own, and both laws' slopes against differences."""

import numpy as np
import pytest
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import ConstantKernel, Matern, WhiteKernel

from megatron_demix.search import gaussian_process
from megatron_demix.search.gaussian_process import GaussianProcess
from megatron_demix.search.laws import LogLinear, PowerLaw
from megatron_demix.search.matern import MaternRegressor

RNG = np.random.default_rng(0)


@pytest.mark.parametrize("num_domains", [2, 7])
def test_value_and_gradient_equal_scikit_learns(num_domains: int) -> None:
    inputs_MD, scores_M = RNG.normal(size=(30, num_domains)), RNG.normal(size=30)
    kernel = ConstantKernel(3.0) * Matern(np.linspace(0.5, 4, num_domains), nu=1.5) + WhiteKernel(0.05)
    ours, theirs = (
        make(kernel, alpha=1e-8, optimizer=None).fit(inputs_MD, scores_M)
        for make in (MaternRegressor, GaussianProcessRegressor)
    )
    singular = np.array([60.0, *[20.0] * num_domains, -60.0])  # all proxies are alike, and without noise
    for theta in (kernel.theta, kernel.theta + 0.7, singular):
        (value, gradient), (wanted, slope) = (m.log_marginal_likelihood(theta, True) for m in (ours, theirs))
        assert value == pytest.approx(wanted, rel=1e-9)
        np.testing.assert_allclose(gradient, slope, rtol=1e-6, atol=1e-8)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("polished", [100, 200])
def test_many_proxies_are_tuned_on_some_and_fitted_on_all(monkeypatch: pytest.MonkeyPatch, polished: int) -> None:
    monkeypatch.setattr(gaussian_process, "_TUNED", 40)
    monkeypatch.setattr(gaussian_process, "_POLISHED", polished)
    shares_MD = RNG.dirichlet(np.ones(3), size=120)
    scores_M = np.log(shares_MD[:, 0] + 0.05)
    model = GaussianProcess()
    model.fit(shares_MD, scores_M)
    assert len(model._model.X_train_) == 120
    np.testing.assert_allclose(model.mean(shares_MD), scores_M, atol=0.05)


@pytest.mark.parametrize("law", [PowerLaw(), LogLinear()])
def test_the_laws_slopes_are_right(law) -> None:
    shares_MD = RNG.dirichlet(np.full(4, 0.3), size=12)
    shares_MD[0] = [1, 0, 0, 0]
    parameters = law._start(shares_MD, RNG.normal(size=12)) + RNG.normal(0, 0.2, size=len(law._bounds(4)[0]))
    _, slopes_MP = law._curve(parameters, shares_MD)
    for p in range(len(parameters)):
        step = np.zeros(len(parameters))
        step[p] = 1e-6
        numeric_M = (law._curve(parameters + step, shares_MD)[0] - law._curve(parameters - step, shares_MD)[0]) / 2e-6
        np.testing.assert_allclose(slopes_MP[:, p], numeric_M, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_the_power_law_finds_its_own_curve_whichever_way_it_runs(sign: float) -> None:
    shares_MD = RNG.dirichlet(np.ones(3), size=60)
    scores_M = sign * (0.02 + shares_MD[:, 0] ** 0.7 + 0.2 * shares_MD[:, 1] ** 0.7) ** -0.4
    law = PowerLaw()
    law.fit(shares_MD[:40], scores_M[:40])
    np.testing.assert_allclose(law.mean(shares_MD[40:]), scores_M[40:], rtol=0.03)
