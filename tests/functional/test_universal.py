"""The maths around universal perturbations that no golden array covers."""

import math

import pytest
import torch

from torchlethe.components.clean_cache import BatchCache, fingerprint
from torchlethe.functional.universal import (
    bounded_cross_entropy,
    gaussian_images,
    jigsaw_images,
    kept_probability,
    least_likely_entropy,
    margin_loss,
    perturbed,
    project,
)
from torchlethe.updates.attacks.generative import of_joined_mean


@pytest.mark.parametrize("xi", [8 / 255, 10 / 255, 0.1, 0.25])
def test_the_projection_never_exceeds_the_bound_in_any_precision(xi):
    for dtype in (torch.float32, torch.float64):
        v = torch.randn(1, 3, 9, 9, dtype=dtype)
        assert float(project(v, xi).double().abs().max()) <= xi
        assert float(project(v, xi, 2.0).double().norm()) <= xi
        inside = v * (xi / 2 / v.norm())
        assert torch.equal(project(inside, xi), inside)
        assert torch.equal(project(inside, xi, 2.0), inside)


def test_images_are_added_to_in_full_precision():
    image, v = torch.full((1, 1, 2, 2), 0.75, dtype=torch.bfloat16), torch.full((1, 1, 2, 2), 0.001)
    assert perturbed(image, v).dtype is torch.float32
    assert float(perturbed(image, v)[0, 0, 0, 0]) == pytest.approx(0.751)
    assert float(perturbed(torch.ones(1, 1, 1, 1), v[..., :1, :1], clamp=False).max()) > 1
    assert float(perturbed(torch.ones(1, 1, 1, 1), v[..., :1, :1]).max()) == 1


def test_losses_by_hand():
    logits = torch.tensor([[2.0, 0.0, -1.0], [0.0, 3.0, 0.0]])
    each = -logits.log_softmax(1)
    labels = torch.tensor([0, 0])
    assert float(bounded_cross_entropy(logits, labels, 1.0)) == pytest.approx((float(each[0, 0]) + 1.0) / 2)
    assert float(least_likely_entropy(logits, logits)) == pytest.approx(float(each[0, 2] + each[1, 0]) / 2)
    assert float(least_likely_entropy(logits, logits, 1)) == pytest.approx(float(each[0, 1] + each[1, 1]) / 2)
    q = logits.softmax(1)
    assert float(kept_probability(logits, torch.tensor([0, 1]))) == pytest.approx(float(q[0, 0] + q[1, 1]) / 2)
    mean = torch.tensor(0.25, requires_grad=True)
    joined = of_joined_mean(mean, torch.log)
    joined.backward()
    assert float(joined.detach()) == pytest.approx(math.log(0.25))
    assert float(mean.grad) == pytest.approx(4.0)
    assert float(margin_loss(logits, labels, 1.0)) == pytest.approx((2.0 - 1.0) / 2)
    with pytest.raises(ValueError, match="kind is 'other'"):
        margin_loss(logits, labels, 1.0, "other")


def test_proxy_images_are_seeded_images_of_the_right_kind():
    def generator():
        return torch.Generator().manual_seed(3)

    squares = jigsaw_images(6, (3, 16, 16), generator())
    assert squares.shape == (6, 3, 16, 16)
    assert torch.equal(squares, jigsaw_images(6, (3, 16, 16), generator()))
    colours = [len(image.flatten(1).T.unique(dim=0)) for image in squares]
    assert all(round(count**0.5) ** 2 == count and 4 <= count <= 64 for count in colours)
    grey = gaussian_images(50, (1, 8, 8), generator())
    assert 0 <= float(grey.min()) <= float(grey.max()) <= 1
    assert float(grey.mean()) == pytest.approx(0.5, abs=0.01)


def test_a_changed_batch_is_asked_anew():
    cache, calls = BatchCache(), []

    def ask(image):
        return cache.get(0, image, lambda: calls.append(1) or {"sum": image.sum((1, 2, 3))})["sum"]

    image = torch.rand(3, 1, 4, 4)
    first = ask(image)
    assert torch.equal(first, ask(image.clone()))
    image[1, 0, 2, 3] += 1e-6
    assert torch.equal(ask(image), image.sum((1, 2, 3)))
    assert len(calls) == 2
    assert fingerprint(image).shape == (3,)
    assert not torch.equal(fingerprint(image), fingerprint(image.flip(-1)))
