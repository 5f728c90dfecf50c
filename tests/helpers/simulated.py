"""Answers drawn at random for tests of statistics, and what a coverage may be."""

import math

import numpy as np
from storing import frame
from visibench.results.statistics.metrics import MEAN, Measured, measure


def of_scores(scores) -> Measured:
    """A mean over questions; ``scores`` (images, questions an image)."""
    images, each = scores.shape
    return measure("exact_match", [frame(np.repeat(np.arange(images), each), scores.ravel())])


def quick(scores) -> Measured:
    """The same without a detour over data frames, for simulations."""
    images, each = scores.shape
    sums = np.stack([scores.sum(1), np.full(images, each)], axis=1)[None].astype(float)
    return Measured(MEAN, sums, scores.reshape(1, -1), np.full(images, float(each)), 1.0)


def clustered(rng, images, each, share, correlation):
    """0/1 scores whose questions about one image are correlated (beta-binomial)."""
    size = 1 / correlation - 1
    chance = rng.beta(share * size, (1 - share) * size, images)
    return (rng.random((images, each)) < chance[:, None]).astype(float)


def assert_covers(hits, runs, most=0.97):
    """Coverage of 95 % intervals between 93 and 97 %, give or take one Monte-Carlo standard error."""
    margin = math.sqrt(0.95 * 0.05 / runs)
    assert 0.93 - margin <= hits / runs <= most + margin
