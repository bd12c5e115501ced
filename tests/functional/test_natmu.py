"""Masks, blending and the draw of partners."""

from collections import Counter

import pytest
import torch

from torchlethe.functional.hybrids import blend, cosine_factor, hybrid_masks
from torchlethe.functional.pairing import deal_partners, rejection_partners, walk_demand, wrong_classes


def shuffle_with(seed):
    generator = torch.Generator().manual_seed(seed)
    return lambda cards: cards[torch.randperm(len(cards), generator=generator)]


@pytest.mark.parametrize("size", [2, 8, 32, 33])
def test_tents_have_the_stated_mean_and_end_in_ones_and_zeros(size):
    half = size // 2
    if size % 2 == 0:
        means = hybrid_masks(0.0, size).mean((1, 2))
        torch.testing.assert_close(means, torch.full((4,), (half - 1) / (2 * half)))
    masks = hybrid_masks(0.0, size)
    assert torch.equal(masks, masks.flip(1, 2))
    assert torch.equal(masks[0], masks[1].T)
    assert hybrid_masks(2.0, size).min() == 1
    assert hybrid_masks(-1.0, size).max() == 0


@pytest.mark.parametrize("kind", ["tent", "linear", "constant", "cutmix"])
def test_a_larger_delta_never_takes_from_the_forget_image(kind):
    masks = torch.stack([hybrid_masks(delta, 6, 8, kind) for delta in (-0.4, -0.1, 0.0, 0.2)])
    assert masks.shape == (4, 4, 6, 8)
    assert (masks.diff(dim=0) >= 0).all()
    assert ((masks >= 0) & (masks <= 1)).all()
    assert 0.3 < masks[2].mean() < 0.7


def test_blending_a_batch_is_blending_image_by_image():
    generator = torch.Generator().manual_seed(0)
    remain, forget = (torch.randint(256, (6, 3, 8, 8), generator=generator).byte() for _ in range(2))
    masks = hybrid_masks(-0.1, 8)[torch.arange(6) % 4]
    batch = blend(remain, forget, masks)
    for row in range(6):
        exact = remain[row].double() * (1 - masks[row].double()) + forget[row].double() * masks[row].double()
        assert (batch[row].double() - exact.floor()).abs().max() <= 1
    assert torch.equal(blend(remain, forget, torch.zeros(6, 8, 8)), remain)
    assert torch.equal(blend(remain, forget, torch.ones(6, 8, 8)), forget)
    real = blend(remain.float() - 300, forget.float() - 300, masks)
    torch.testing.assert_close(real, (batch.float() - 300), rtol=0, atol=1.001)


def test_the_schedule_shifts():
    shifted = [cosine_factor(k, 7, end_at_zero=False) for k in range(7)]
    assert shifted[0] == 1
    assert shifted[-1] > 0
    assert shifted[1:] == [cosine_factor(k, 7) for k in range(6)]


def test_own_and_absent_classes_are_never_demanded():
    labels = torch.arange(5).repeat(4)
    scores = torch.full((20, 5), -1000.0).scatter_(1, labels[:, None], 1000.0)  # a saturated softmax
    present = torch.tensor([True, True, False, True, True])
    top = wrong_classes(scores, labels, present, 3)
    assert not (top == labels[:, None]).any()
    assert not (top == 2).any()
    assert all(len(set(row)) == 3 for row in top.tolist())


def test_few_classes_come_round_again_and_none_is_refused():
    scores = torch.tensor([[3.0, 2.0, 1.0], [3.0, 2.0, 1.0]])
    top = wrong_classes(scores, torch.tensor([0, 2]), torch.tensor([True, True, False]), 4)
    assert top.tolist() == [[1, 1, 1, 1], [0, 1, 0, 1]]
    with pytest.raises(ValueError, match="no class beside 1"):
        wrong_classes(scores, torch.tensor([0, 1]), torch.tensor([False, True, False]), 4)


@pytest.mark.parametrize("draw", [deal_partners, rejection_partners])
def test_partners_have_the_demanded_class_and_are_distinct(draw):
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(7, (400,), generator=generator)
    demand = torch.randint(7, (150,), generator=generator)
    partners = draw(demand, labels, shuffle_with(1))
    assert torch.equal(labels[partners], demand)
    assert len(partners.unique()) == 150
    assert torch.equal(partners, draw(demand, labels, shuffle_with(1)))
    assert not torch.equal(partners, draw(demand, labels, shuffle_with(2)))


@pytest.mark.parametrize("draw", [deal_partners, rejection_partners])
def test_every_outcome_is_equally_likely(draw):
    labels, demand = torch.tensor([0, 1, 0, 1, 1]), torch.tensor([1, 0, 1])
    shuffle = shuffle_with(0)
    counts = Counter(tuple(draw(demand, labels, shuffle).tolist()) for _ in range(1200))
    assert len(counts) == 12
    assert max(abs(count - 100) for count in counts.values()) < 45  # 4.7 standard deviations


def test_a_class_that_runs_out_is_shuffled_anew():
    labels = torch.tensor([2, 0, 2, 2, 1, 0])
    demand = torch.tensor([2] * 8 + [0, 0, 0])
    partners = deal_partners(demand, labels, shuffle_with(0))
    assert torch.equal(labels[partners], demand)
    for first in (0, 3):
        assert sorted(partners[first : first + 3].tolist()) == [0, 2, 3]
    assert len(set(partners[6:8].tolist())) == 2
    assert sorted(partners[8:10].tolist()) == [1, 5]
    with pytest.raises(ValueError, match="class 0 is demanded 3 times, but has 2"):
        rejection_partners(demand, labels, shuffle_with(0))
    with pytest.raises(ValueError, match="class 3 is demanded, but no remaining image has it"):
        deal_partners(torch.tensor([3]), labels, shuffle_with(0))


def test_the_walk_is_the_loop_over_images():
    generator = torch.Generator().manual_seed(0)
    ranking = torch.rand(2500, 9, generator=generator).argsort(1)
    supply = torch.tensor([900, 40, 2000, 0, 5, 700, 333, 1, 2600])
    used, expected = [0] * 9, []
    for row in ranking.tolist():
        line = [number for number in row if used[number] < supply[number]][:3]
        for number in line:
            used[number] += 1
        expected.append(line + [-1] * (3 - len(line)))
    assert walk_demand(ranking, supply, 3).tolist() == expected
    assert any(-1 in line for line in expected)
