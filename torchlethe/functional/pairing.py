"""Which remaining image each forget image is mixed with in NatMU: classes to demand, partners to draw.

Source: see :mod:`torchlethe.functional.hybrids`. All demands are laid out image by image:
``[x0 rank 0, x0 rank 1, …, x1 rank 0, …]``.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Shuffle = Callable[[Tensor], Tensor]
"""Returns the entries of a 1-D tensor in random order."""


def wrong_classes(scores: Tensor, labels: Tensor, present: Tensor, count: int) -> Tensor:
    """For each image the classes with the highest scores, its own and those without remaining images left out.

    Args:
        scores: logits or probabilities, shape ``(N, K)``. Logits do not tie where a softmax saturates.
        labels: the images' own classes, shape ``(N,)``.
        present: whether a class has remaining images, bool, shape ``(K,)``.
        count: classes per image, at least 1; an image with fewer candidates is given them again, best first.

    Returns:
        Classes by falling score, shape ``(N, count)``, int64.

    Raises:
        ValueError: an image has no candidate.

    Example:
        >>> everywhere = torch.ones(3, dtype=torch.bool)
        >>> wrong_classes(torch.tensor([[0.1, 0.7, 0.2]]), torch.tensor([1]), everywhere, 3)
        tensor([[2, 0, 2]])
    """
    allowed = present.to(scores.device) & torch.ones_like(scores, dtype=torch.bool).scatter_(1, labels[:, None], False)
    candidates = allowed.sum(1)
    if len(labels) and not int(candidates.min()):
        label = int(labels[candidates.argmin()])
        raise ValueError(f"the remaining data has no class beside {label}, so a hybrid can have no other label.")
    ranked = scores.masked_fill(~allowed, -torch.inf).topk(min(count, scores.shape[1])).indices
    place = torch.arange(count, device=scores.device) % candidates[:, None].clamp(max=ranked.shape[1])
    return ranked.gather(1, place)


def deal_partners(demand: Tensor, labels: Tensor, shuffle: Shuffle) -> Tensor:
    """A random remaining image of each demanded class, without replacement: each class is a shuffled deck, dealt out.

    Where the demand can be met the result is distributed as the official draw (:func:`rejection_partners`), in
    O(N log N) in place of rejections that may never end. Where a class runs out its deck is shuffled anew.

    Args:
        demand: demanded classes, shape ``(L,)``, int64.
        labels: classes of the remaining images, shape ``(N,)``, int64.
        shuffle: brings the numbers of the cards, ``(M,)`` with M at least N, into random order; card i below N is
            remaining image i.

    Returns:
        Positions in ``labels``, shape ``(L,)``, int64.

    Raises:
        ValueError: a demanded class has no remaining image.

    Example:
        >>> in_order = lambda cards: cards
        >>> deal_partners(torch.tensor([1, 0, 1, 1]), torch.tensor([0, 1, 1]), in_order)
        tensor([1, 0, 2, 1])
    """
    classes = 1 + int(torch.cat([demand, labels]).max()) if len(labels) else 0
    wanted, supply = (torch.bincount(values, minlength=classes) for values in (demand, labels))
    if bool((wanted > 0).logical_and(supply == 0).any()):
        missing = int((wanted > 0).logical_and(supply == 0).nonzero()[0])
        raise ValueError(f"class {missing} is demanded, but no remaining image has it.")
    rounds = (wanted + supply - 1).div(supply.clamp_min(1), rounding_mode="floor").clamp_min(1)
    cards, key, most = torch.arange(len(labels)), labels, int(rounds.max())
    if most > 1:
        again = rounds[labels] - 1  # how many more decks each image is in
        repeated = cards.repeat_interleave(again)
        number = torch.arange(len(repeated)) - (again.cumsum(0) - again).repeat_interleave(again) + 1
        key = torch.cat([labels * most, labels[repeated] * most + number])
        cards = torch.cat([cards, repeated])
    order = shuffle(torch.arange(len(cards)))
    # one stable sort by class brings the demands for a class, in order, in front of its shuffled cards
    keys = torch.cat([demand * most, key[order]])
    together = (keys.short() if classes * most < 2**15 else keys).argsort(stable=True)  # short keys: radix sort
    place = (together < len(demand)).nonzero().flatten()
    asking = together[place]
    partners = torch.empty_like(demand)
    partners[asking] = cards[order[together[place + wanted[demand[asking]]] - len(demand)]]
    return partners


def rejection_partners(demand: Tensor, labels: Tensor, shuffle: Shuffle, limit: int = 10_000) -> Tensor:
    """The official draw: shuffle all remaining images, keep those that fall on a demand for their class, repeat.

    Args:
        demand: demanded classes, shape ``(L,)``, int64.
        labels: classes of the remaining images, shape ``(N,)``, int64.
        shuffle: as in :func:`deal_partners`; called with what is not yet placed.
        limit: rounds after which to give up.

    Returns:
        Distinct positions in ``labels``, shape ``(L,)``, int64.

    Raises:
        ValueError: a class is demanded more often than it has images, where the official loop never ends, or ``limit``
            is reached.
    """
    classes = 1 + int(torch.cat([demand, labels]).max())
    wanted, supply = (torch.bincount(values, minlength=classes) for values in (demand, labels))
    if short := (wanted > supply).nonzero().flatten().tolist():
        number = short[0]
        raise ValueError(
            f"class {number} is demanded {int(wanted[number])} times, but has {int(supply[number])} remaining images: "
            "drawing by rejection would not end; deal instead."
        )
    order = shuffle(torch.arange(len(labels)))
    for _ in range(limit):
        wrong = torch.ones(len(labels), dtype=torch.bool)
        wrong[: len(demand)] = labels[order[: len(demand)]] != demand
        if not wrong[: len(demand)].any():
            return order[: len(demand)]
        order[wrong] = shuffle(order[wrong])
    raise ValueError(f"drawing by rejection found no partners in {limit} rounds: deal instead.")


def walk_demand(ranking: Tensor, supply: Tensor, count: int) -> Tensor:
    """The published variant for hard samples: each image takes its most probable classes that are not yet used up.

    Image after image, each walks through its classes and demands one image of each class with any left, until it has
    ``count``. Computed in blocks between the points where a class runs out, not image by image.

    Args:
        ranking: all wrong classes of each image, most probable first, shape ``(N, K)``, int64; each class at most once.
        supply: remaining images of each class, shape ``(C,)``.
        count: demands per image.

    Returns:
        Demanded classes, shape ``(N, count)``, int64; -1 where an image found fewer.

    Example:
        >>> walk_demand(torch.tensor([[0, 1, 2], [0, 2, 1]]), torch.tensor([1, 5, 5]), 2)
        tensor([[0, 1],
                [2, 1]])
    """
    demand = ranking.new_full((len(ranking), count), -1)
    used = torch.zeros_like(supply)
    start = 0
    while start < len(ranking):
        block = ranking[start : start + 1024]
        left = (used < supply)[block]
        place = left.cumsum(1)
        chosen = left & (place <= count)
        taken = torch.zeros(len(block), len(supply), dtype=supply.dtype).scatter_(1, block, chosen.to(supply.dtype))
        total = used + taken.cumsum(0)
        over = (total > supply).any(1).nonzero()
        done = int(over[0]) if len(over) else len(block)  # from there on a class is used up
        row, column = chosen[:done].nonzero(as_tuple=True)
        demand[start + row, place[row, column] - 1] = block[row, column]
        used = total[done - 1]
        start += done
    return demand


def redistribute_demand(
    demand: Tensor, labels: Tensor, shuffle: Shuffle, classes: int, cap: float = 0.98, low: float = 0.4
) -> Tensor:
    """The official guard of sample-wise unlearning: demand beyond a class's supply goes to a class in low demand.

    Scanning the classes in order, one demanded less than ``low`` times the average supply is set aside; one demanded
    more than ``cap`` times the average gives its demands beyond that to one of those set aside, drawn at random. A
    hybrid may so be given its forget image's own class. Where no class was set aside the official code fails; here the
    demand stays.

    Args:
        demand: demanded classes, shape ``(L,)``, int64.
        labels: classes of the remaining images, shape ``(N,)``.
        shuffle: as in :func:`deal_partners`; the last of the shuffled classes is taken.
        classes: number of classes.
        cap: largest demand, as a share of the average supply.
        low: demand below which a class is set aside, as a share of the average supply.

    Returns:
        The new demand, shape ``(L,)``, int64.
    """
    demand, average = demand.clone(), len(labels) / classes
    most = int(cap * average)
    spare: list[int] = []
    for number, wanted in enumerate(torch.bincount(demand, minlength=classes).tolist()):
        if wanted < low * average:
            spare.append(number)
        if wanted > most and spare:
            spare = shuffle(torch.tensor(spare)).tolist()
            demand[(demand == number).nonzero().flatten()[most:]] = spare.pop()
    return demand
