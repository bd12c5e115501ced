"""Neural-collapse statistics of features: how tight classes are, how symmetric their means, how they fit the head.

Definitions of Papyan, Han and Donoho (PNAS 2020). μ_c is the mean feature of class c, μ_G the mean of the class means,
Σ_W = mean_i (φ_i − μ_{c(i)})(·)ᵀ, Σ_B = mean_c (μ_c − μ_G)(·)ᵀ, K the number of classes, W the head's weights.
All from four sums over samples, so that any split into batches and ranks gives the same numbers.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

MINIMUM = 2
"""Classes with fewer samples are left out: they have no spread."""


def class_means(sums: Tensor, counts: Tensor) -> Tensor:
    """(K, d) means of classes from sums (K, d) and counts (K,); zero where a class is empty."""
    return sums / counts.clamp(min=1)[:, None]


def within_between(sums: Tensor, counts: Tensor, gram: Tensor) -> tuple[Tensor, Tensor]:
    """Σ_W (d, d) and the centred class means M (K′, d) of the classes with at least two samples.

    Args:
        sums: (K, d) float64, the sum of the features of each class.
        counts: (K,) how many samples each class has.
        gram: (d, d) float64, Σ_i φ_i φ_iᵀ over all samples.

    Returns:
        Σ_W and M.
    """
    kept = counts >= MINIMUM
    means, weights = class_means(sums, counts), counts.to(sums.dtype)
    # a class with a single sample takes away what it brought
    within = (gram - (means * weights[:, None]).T @ means) / weights[kept].sum().clamp(min=1)
    return within, means[kept] - means[kept].mean(0)


def within_class_variability(within: Tensor, centred: Tensor) -> Tensor:
    """NC1 = tr(Σ_W Σ_B⁺) / K, 0 where all features of a class agree.

    The pseudo-inverse comes from the eigenvectors of the K × K Gram matrix of the means, which is small.

    Args:
        within: Σ_W (d, d).
        centred: M (K, d).
    """
    classes = len(centred)
    values, vectors = torch.linalg.eigh(centred @ centred.T / classes)
    kept = values > values.max().clamp(min=0) * 1e-10
    # left singular vectors of Mᵀ/√K: directions in feature space in which the means differ
    directions = (centred.T @ vectors[:, kept]) / (classes * values[kept]).sqrt()
    return (((within @ directions) * directions).sum(0) / values[kept]).sum() / classes


def equinorm(centred: Tensor) -> Tensor:
    """NC2, norms: the coefficient of variation of ‖μ_c − μ_G‖; 0 where the means are equally long."""
    norms = torch.linalg.vector_norm(centred, dim=1)
    return norms.std(correction=0) / norms.mean()


def equiangularity(centred: Tensor) -> Tensor:
    """NC2, angles: mean over pairs of |cos(μ_c − μ_G, μ_c′ − μ_G) + 1/(K−1)|; 0 for a simplex."""
    classes = len(centred)
    unit = F.normalize(centred, dim=1)
    cosines = (unit @ unit.T)[~torch.eye(classes, dtype=torch.bool, device=centred.device)]
    return (cosines + 1 / (classes - 1)).abs().mean()


def self_duality(centred: Tensor, head: Tensor) -> Tensor:
    """NC3 = ‖W/‖W‖_F − M/‖M‖_F‖²_F, 0 where the head's rows are proportional to the centred means.

    Args:
        centred: M (K, d).
        head: W (K, d), the rows of the same classes.
    """
    return (head / head.norm() - centred / centred.norm()).square().sum()


def nearest_means(features: Tensor, means: Tensor, known: Tensor) -> Tensor:
    """The class with the nearest mean for each feature.

    Args:
        features: (B, d).
        means: (K, d).
        known: (K,) bool, the classes that have a mean.

    Returns:
        (B,) int64.
    """
    distance = means.square().sum(1) - 2 * features @ means.T
    return distance.masked_fill(~known, torch.inf).argmin(1)
