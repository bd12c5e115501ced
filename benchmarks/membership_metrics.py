"""Membership attacks: exact against merged support vectors, and Newton against scikit-learn's logistic regression.

Run ``python benchmarks/membership_metrics.py [--points 10000]``. Both ways of each pair take turns in one process, on
simulated outputs of a trained classifier: members' confidences crowd near 1, non-members' less so.
"""

import argparse
import time
from collections.abc import Callable
from statistics import median

import torch
from sklearn.linear_model import LogisticRegression

from torchlethe.functional.membership import logistic_membership
from torchlethe.metrics.support_vectors import svc_membership


def simulate(points: int, targets: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Confidences of members, non-members and a forget set that lies between."""
    generator = torch.Generator().manual_seed(0)
    margins = [
        torch.randn(n, dtype=torch.float64, generator=generator) * spread + centre
        for n, centre, spread in ((points, 6.0, 2.0), (points, 4.5, 2.5), (targets, 5.0, 2.4))
    ]
    members, non_members, forget = (torch.sigmoid(margin) for margin in margins)
    return members, non_members, forget


def seconds(function: Callable[[], float], repeats: int) -> tuple[float, float]:
    """Median wall time and the result."""
    times, value = [], 0.0
    for _ in range(repeats):
        start = time.perf_counter()
        value = function()
        times.append(time.perf_counter() - start)
    return median(times), value


def scikit_learn_logistic(sets: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> float:
    """The same model by lbfgs."""
    members, non_members, forget = sets
    scores = torch.cat([members, non_members])[:, None].numpy()
    labels = (torch.arange(len(scores)) < len(members)).numpy()
    model = LogisticRegression(C=2.0, class_weight="balanced").fit(scores, labels)
    return float(model.predict(forget[:, None].numpy()).mean())


def main() -> None:
    """Print times, ratios and results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--points", type=int, default=10_000, help="members, and as many non-members")
    parser.add_argument("--targets", type=int, default=5_000)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    sets = simulate(arguments.points, arguments.targets)
    svc_membership(*(part[:100] for part in sets))  # imports
    pairs = [
        ("support vectors", "exact", lambda: svc_membership(*sets, mode="exact"), 1),
        ("support vectors", "merged", lambda: svc_membership(*sets, mode="fast"), 1),
        ("logistic", "scikit-learn", lambda: scikit_learn_logistic(sets), 5),
        ("logistic", "Newton", lambda: logistic_membership(*sets), 5),
    ]
    print(f"2 × {arguments.points} points, {arguments.targets} targets, one thread")
    slow = 1.0
    for attack, way, function, repeats in pairs:
        spent, value = seconds(function, repeats)
        ratio = "" if way in ("exact", "scikit-learn") else f"  {slow / spent:.0f}× faster"
        print(f"{attack:16s} {way:13s} {spent:9.4f} s  fraction predicted member {value:.4f}{ratio}")
        slow = spent


if __name__ == "__main__":
    main()
