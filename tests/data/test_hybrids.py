"""The union of remaining images and hybrids: what is in it, and what a resume and several readers make of it."""

import pytest
import torch

from torchlethe.data import Augmentation, Hybrids, InMemoryImages
from torchlethe.datamodules import DigitsDataModule
from torchlethe.functional.hybrids import blend, hybrid_masks


@pytest.fixture
def sets():
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (40, 1, 8, 8), generator=generator).byte()
    data = InMemoryImages(images, torch.arange(40) % 5)
    return {"forget": data.subset(range(6)), "remain": data.subset(range(6, 40))}


def paired(sets, **arguments):
    plan = Hybrids(**arguments)
    demand = (sets["forget"].labels[:, None] + 1 + torch.arange(plan.count) % 4).flatten() % 5
    partners = torch.stack([(sets["remain"].labels == label).nonzero()[0, 0] for label in demand])
    plan.pair(demand, partners)
    return plan


def read(loader, epochs=1):
    return [batch for _ in range(epochs) for batch in loader]


def test_a_pass_holds_every_remaining_image_and_every_hybrid(sets):
    plan = paired(sets, delta=-0.1)
    loader = plan.loader(sets.get, batch_size=16, seed=3)
    assert len(loader.dataset) == 34 + 4 * 6
    batches = read(loader)
    rows = {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}
    plain, hybrid = ~rows["is_hybrid"], rows["is_hybrid"]
    assert torch.equal(rows["augment"], plain)
    assert sorted(rows["index"][plain].tolist()) == list(range(6, 40))
    assert sorted(rows["index"][hybrid].tolist()) == sorted(list(range(6)) * 4)
    source = {int(i): n for n, i in enumerate(sets["remain"].indices)}
    for image, label, index in zip(*(rows[n][plain] for n in ("image", "label", "index")), strict=True):
        stored = sets["remain"][source[int(index)]]
        assert torch.equal(image, stored["image"])
        assert label == stored["label"]
    masks = hybrid_masks(-0.1, 8)
    for image, label, index in zip(*(rows[n][hybrid] for n in ("image", "label", "index")), strict=True):
        number = int((plan.demand.view(6, 4)[index] == label).nonzero())
        partner = sets["remain"][int(plan.partners.view(6, 4)[index, number])]["image"]
        forget = sets["forget"][int(index)]
        assert label != forget["label"]
        assert torch.equal(image, blend(partner[None], forget["image"][None], masks[number][None])[0])


def test_hybrids_stay_as_they_are_while_remaining_images_are_augmented(sets):
    data = DigitsDataModule(augmentation=Augmentation(crop=2))
    loader = paired(sets).loader(sets.get, batch_size=64)
    first, second = (
        {
            (int(i), int(y), bool(h)): image
            for i, y, h, image in zip(b["index"], b["label"], b["is_hybrid"], b["image"], strict=True)
        }
        for b in (data.prepare_batch(batch, augment=True) for batch in read(loader, 2))
    )
    assert first.keys() == second.keys()
    changed = {key for key in first if not torch.equal(first[key], second[key])}
    assert not any(key[2] for key in changed)
    assert len(changed) > 20
    still = paired(sets, augment_remain=False).loader(sets.get, batch_size=64)
    batch = next(iter(still))
    assert torch.equal(data.prepare_batch(batch, augment=True)["image"], data.prepare_batch(batch)["image"])


def test_new_partners_and_other_remaining_images_each_epoch(sets):
    plan = paired(sets, resample=True, remain_fraction=0.5, seed=4)
    loader = plan.loader(sets.get, batch_size=64)
    assert len(loader.dataset) == 17 + 24
    first, second = read(loader, 2)
    seen = [set(batch["index"][~batch["is_hybrid"]].tolist()) for batch in (first, second)]
    assert len(seen[0]) == len(seen[1]) == 17
    assert seen[0] != seen[1]
    union = loader.dataset
    assert torch.equal(union.partners(0), plan.partners)
    assert not torch.equal(union.partners(1), union.partners(2))
    assert torch.equal(sets["remain"].labels[union.partners(2)], plan.demand)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_loader_continues_where_another_stopped(sets, workers):
    def loader(**arguments):
        plan = Hybrids(resample=True, seed=1)
        made = plan.loader(sets.get, batch_size=10, seed=2, **arguments)
        known = paired(sets, resample=True)  # paired after the loader was made, as in a fit
        plan.pair(known.demand, known.partners)
        return made

    whole = read(loader(), 2)
    other = loader(num_workers=workers, persistent_workers=workers > 0)
    other.load_state_dict({"epoch": 1, "batches": 2})
    rest = read(other)
    assert len(rest) == 4
    for expected, found in zip(whole[8:], rest, strict=True):
        assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_two_ranks_read_what_one_reads(sets):
    plan = paired(sets)
    whole = read(plan.loader(sets.get, batch_size=10, seed=2))
    halves = [read(plan.loader(sets.get, batch_size=5, seed=2, num_replicas=2, rank=rank)) for rank in (0, 1)]
    for expected, first, second in zip(whole, *halves, strict=True):
        joined = torch.stack([first["image"], second["image"]], 1).flatten(0, 1)
        assert torch.equal(joined, expected["image"])


def test_reading_before_pairing_and_bad_arguments_are_sentences(sets):
    with pytest.raises(RuntimeError, match="not paired yet"):
        next(iter(Hybrids().loader(sets.get, batch_size=4)))
    plan = paired(sets)
    plan.pair(plan.demand[:8], plan.partners[:8])
    with pytest.raises(ValueError, match="8 hybrids were paired"):
        next(iter(plan.loader(sets.get, batch_size=4)))
    for arguments, words in (
        ({"count": 0}, "n_hybrids is 0"),
        ({"delta": 1.5}, "delta is 1.5"),
        ({"remain_fraction": 0.0}, "remain_fraction is 0.0"),
        ({"mask": "ring"}, "mask is 'ring'"),
    ):
        with pytest.raises(ValueError, match=words):
            Hybrids(**arguments)
