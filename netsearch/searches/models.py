"""Regressions of a network's error on what is known of its genome, with a standard deviation.

Two to four hundred examples and some dozens of features: scikit-learn's models do, in milliseconds.
It takes seconds to import, and is imported when a model is fitted.
"""

import warnings
from collections.abc import Callable

import numpy as np

from netsearch.space.genome import Floats

Predict = Callable[[Floats], tuple[Floats, Floats]]  # features (N, D) -> mean and std, (N,) each

TREES = 100
MIN_STD = 1e-6


def gaussian_process(features: Floats, values: Floats) -> Predict:
    """Fit a Gaussian process with one Matern-5/2 length scale; its std holds the noise as well.

    Args:
        features: (N, D), of about equal scale.
        values: (N,).
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.gaussian_process import GaussianProcessRegressor
    from sklearn.gaussian_process.kernels import ConstantKernel, Matern, WhiteKernel

    # Shorter scales, and no noise at all, fit twenty examples well and predict nothing.
    kernel = ConstantKernel(1.0, (1e-2, 1e3)) * Matern(3.0, (2.0, 50.0), nu=2.5)
    model = GaussianProcessRegressor(kernel + WhiteKernel(1e-2, (3e-3, 1.0)), normalize_y=True)
    with warnings.catch_warnings():
        # A length scale at its bound says that the errors vary no faster than that: no fault.
        warnings.simplefilter("ignore", ConvergenceWarning)
        model.fit(features, values)

    def predict(asked: Floats) -> tuple[Floats, Floats]:
        mean, std = model.predict(asked, return_std=True)
        return mean, np.maximum(std, MIN_STD)

    return predict


def ensemble(features: Floats, values: Floats) -> Predict:
    """Fit a Gaussian process and randomised trees; their mean, and a std that holds their quarrel.

    Args:
        features: (N, D).
        values: (N,).
    """
    from sklearn.ensemble import ExtraTreesRegressor

    process = gaussian_process(features, values)
    trees = ExtraTreesRegressor(TREES, bootstrap=True, random_state=0).fit(features, values)

    def predict(asked: Floats) -> tuple[Floats, Floats]:
        of_trees = np.array([tree.predict(asked) for tree in trees.estimators_])
        means, stds = zip(
            process(asked), (of_trees.mean(axis=0), of_trees.std(axis=0)), strict=True
        )
        variance = np.mean(np.square(stds), axis=0) + np.var(means, axis=0)
        return np.mean(means, axis=0), np.maximum(np.sqrt(variance), MIN_STD)

    return predict


MODELS: dict[str, Callable[[Floats, Floats], Predict]] = {
    "gaussian_process": gaussian_process,
    "ensemble": ensemble,
}
