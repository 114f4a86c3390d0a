"""The linear families against scikit-learn's BayesianRidge on a table of their features."""

import numpy as np
import pytest

from megatron_demix.search.linear import Features, Linear

FAMILIES = {
    "ridge": Features(logs=True),
    "quadratic": Features(pairs=True),
    "scheffe_log": Features(pairs=True, logs=True),
}


def proxies(num: int, domains: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """shares_MD, standardised scores_M and shares_ND of other mixtures."""
    rng = np.random.default_rng(0)
    shares_MD, others_ND = rng.dirichlet(np.full(domains, 0.5), num), rng.dirichlet(np.ones(domains), 9000)
    scores_M = shares_MD[:, 0] * shares_MD[:, 1] * 30 + np.log(shares_MD[:, 2] + 0.01) + rng.standard_normal(num)
    return shares_MD, (scores_M - scores_M.mean()) / scores_M.std(), others_ND


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("num", "domains"), [(8, 3), (60, 8), (60, 20), (40, 50)])
def test_predictions_are_the_posterior_on_all_features(family, num, domains) -> None:
    from sklearn.linear_model import BayesianRidge

    features, (shares_MD, scores_M, others_ND) = FAMILIES[family], proxies(num, domains)
    # Of more features than proxies, scikit-learn sees the directions that these span: it stops by the coefficients' change,
    # which depends on the axes.
    features_MP, features_NP = (features(rows) - features(shares_MD).mean(axis=0) for rows in (shares_MD, others_ND))
    axes_PR = np.eye(features_MP.shape[1])
    if features_MP.shape[1] > num:
        axes_PR = np.linalg.svd(features_MP, full_matrices=False)[2].T
    expected = BayesianRidge().fit(features_MP @ axes_PR, scores_M)
    # The covariance is made here: older versions leave out what no proxy varies in.
    precision_PP = expected.alpha_ * features_MP.T @ features_MP + expected.lambda_ * np.eye(features_MP.shape[1])
    variance_N = (features_NP * np.linalg.solve(precision_PP, features_NP.T).T).sum(axis=1)
    fitted = Linear(features)
    fitted.fit(shares_MD, scores_M)
    mean_N, std_N = fitted.predict(others_ND)
    np.testing.assert_allclose(mean_N, expected.predict(features_NP @ axes_PR), rtol=0, atol=1e-10)
    np.testing.assert_allclose(std_N, np.sqrt(1 / expected.alpha_ + variance_N), rtol=1e-8)
    np.testing.assert_array_equal(fitted.mean(others_ND), mean_N)


@pytest.mark.parametrize("family", FAMILIES)
def test_repeated_proxies_and_a_domain_that_none_has_leave_predictions_finite(family) -> None:
    shares_MD, scores_M, others_ND = proxies(30, 10)
    shares_MD = np.repeat(shares_MD[:10], 3, axis=0) * (np.arange(10) > 0)
    shares_MD /= shares_MD.sum(axis=1, keepdims=True)
    fitted = Linear(FAMILIES[family])
    fitted.fit(shares_MD, scores_M)
    mean_N, std_N = fitted.predict(others_ND)
    _, seen_std_M = fitted.predict(shares_MD)
    assert np.isfinite(mean_N).all()
    assert np.median(std_N) > np.median(seen_std_M), "nobody has seen mixtures with the first domain"


def test_a_fit_does_not_depend_on_those_before_it() -> None:
    shares_MD, scores_M, others_ND = proxies(30, 8)
    fits = [Linear(FAMILIES["quadratic"]) for _ in range(3)]
    for fitted, rows, sign in zip(fits, (slice(None), slice(20), slice(None)), (1, 1, -1), strict=True):
        fitted.fit(shares_MD[rows], sign * scores_M[rows])
    np.testing.assert_array_equal(fits[0].mean(others_ND), -fits[2].mean(others_ND))
    assert not np.allclose(fits[0].mean(others_ND), fits[1].mean(others_ND))
