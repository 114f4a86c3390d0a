"""scikit-learn's Gaussian process with a marginal likelihood whose gradient needs no D x M x M array.

To be imported where it is used: the library takes seconds.
"""

from __future__ import annotations

import numpy as np
from scipy.linalg import LinAlgError, cho_factor, cho_solve
from sklearn.gaussian_process import GaussianProcessRegressor


class MaternRegressor(GaussianProcessRegressor):
    """For one kernel: variance * Matern 3/2 + noise.

    theta: log of the variance, of the D length scales and of the noise, as the kernel lays them out.
    """

    def mean(self, inputs_ND: np.ndarray) -> np.ndarray:
        """predict's, for many mixtures: inner products take a small part of the time that differences do."""
        variance, scales_D = np.exp(self.kernel_.theta[0]), np.exp(self.kernel_.theta[1:-1])
        distance_NM = _distances(inputs_ND / scales_D, self.X_train_ / scales_D)
        decay_NM = np.exp(-distance_NM)
        distance_NM += 1
        distance_NM *= decay_NM
        return variance * (distance_NM @ self.alpha_)

    def log_marginal_likelihood(self, theta=None, eval_gradient=False, clone_kernel=True):
        if not eval_gradient:
            return super().log_marginal_likelihood(theta, eval_gradient, clone_kernel)
        variance, noise = np.exp(theta[0]), np.exp(theta[-1])
        inputs_MD, scores_M = self.X_train_ / np.exp(theta[1:-1]), self.y_train_
        squares_M = np.square(inputs_MD).sum(axis=1)
        distance_MM = np.sqrt(np.maximum(3 * (squares_M[:, None] + squares_M - 2 * inputs_MD @ inputs_MD.T), 0))
        np.fill_diagonal(distance_MM, 0.0)
        decay_MM = np.exp(-distance_MM)
        signal_MM = variance * (1 + distance_MM) * decay_MM
        covariance_MM = signal_MM + (noise + self.alpha) * np.eye(len(scores_M))
        try:
            factor = cho_factor(covariance_MM, lower=True)
        except LinAlgError:
            return -np.inf, np.zeros_like(theta)
        dual_M = cho_solve(factor, scores_M)
        value = -0.5 * scores_M @ dual_M - np.log(np.diag(factor[0])).sum() - 0.5 * len(scores_M) * np.log(2 * np.pi)
        slope_MM = np.outer(dual_M, dual_M) - cho_solve(factor, np.eye(len(scores_M)))
        # d signal_ij / d log scale_d = 3 variance decay_ij (x_id - x_jd)^2, summed against the symmetric slope for all d
        # at once: sum_ij W_ij (x_i - x_j)^2 = 2 (sum_i W_i. x_i^2 - x' W x).
        weight_MM = 3 * variance * slope_MM * decay_MM
        by_scale_D = weight_MM.sum(axis=1) @ np.square(inputs_MD) - (inputs_MD * (weight_MM @ inputs_MD)).sum(axis=0)
        gradient = np.concatenate([[0.5 * (slope_MM * signal_MM).sum()], by_scale_D, [0.5 * noise * np.trace(slope_MM)]])
        return value, gradient


def _distances(left_ND: np.ndarray, right_MD: np.ndarray) -> np.ndarray:
    """sqrt(3) times the Euclidean distances_NM."""
    squares_NM = left_ND @ (-6 * right_MD.T)
    squares_NM += 3 * np.square(left_ND).sum(axis=1)[:, None]
    squares_NM += 3 * np.square(right_MD).sum(axis=1)
    return np.sqrt(np.maximum(squares_NM, 0, out=squares_NM), out=squares_NM)
