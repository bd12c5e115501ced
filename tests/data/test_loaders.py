import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import DistributedSampler

from torchlethe.data import InMemoryImages, PositionedLoader, PositionedSampler


def images(count: int) -> InMemoryImages:
    pixels = torch.arange(count).to(torch.uint8).view(-1, 1, 1, 1)
    return InMemoryImages(pixels, torch.arange(count) % 3, classes=["a", "b", "c"])


def indices(loader) -> list[list[int]]:
    return [batch["index"].tolist() for batch in loader]


def flat(lists) -> list[int]:
    return [item for items in lists for item in items]


def loader(count=11, batch_size=2, epoch=0, **kwargs) -> PositionedLoader:
    made = PositionedLoader(images(count), batch_size, **{"shuffle": True, **kwargs})
    made.sampler.set_epoch(epoch)
    return made


def test_order_depends_on_seed_and_epoch_only():
    torch.manual_seed(0)
    first = indices(loader(epoch=3))
    torch.manual_seed(1)
    assert indices(loader(epoch=3)) == first
    assert indices(loader(epoch=4)) != first
    assert indices(loader(epoch=3, seed=1)) != first
    assert sorted(flat(first)) == list(range(11))


@pytest.mark.parametrize(("count", "ranks"), [(16, 2), (17, 2), (18, 4), (3, 4), (1, 3)])
@pytest.mark.parametrize("drop_last", [False, True])
def test_ranks_together_read_what_one_process_reads(count, ranks, drop_last):
    one = indices(loader(count, 2 * ranks, epoch=5, drop_last=drop_last))
    parts = [
        indices(loader(count, 2, epoch=5, num_replicas=ranks, rank=rank, drop_last=drop_last)) for rank in range(ranks)
    ]
    assert len({len(part) for part in parts}) == 1
    joined = [
        [index for group in zip(*batches, strict=True) for index in group] for batches in zip(*parts, strict=True)
    ]
    assert len(joined) == len(one)
    order = flat(one)
    padded = flat(joined)
    assert padded[: len(order)] == order
    assert padded[len(order) :] == (order * ranks)[: len(padded) - len(order)]


@pytest.mark.parametrize(("count", "repeated"), [(16, 0), (17, 3), (18, 2), (19, 1)])
def test_training_repeats_samples_only_where_ranks_do_not_divide_the_size(count, repeated):
    parts = [indices(loader(count, 2, num_replicas=4, rank=rank)) for rank in range(4)]
    assert len(flat(flat(parts))) - count == repeated
    assert len(set(flat(flat(batches[:-1] for batches in parts)))) == len(flat(flat(batches[:-1] for batches in parts)))


def test_evaluation_pads_with_samples_that_every_loss_and_metric_skips():
    parts = [list(loader(5, 2, shuffle=False, num_replicas=2, rank=rank)) for rank in range(2)]
    seen = sorted(index for part in parts for batch in part for index in batch["index"].tolist())
    assert seen == [-1, 0, 1, 2, 3, 4]
    logits = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    total = sum(
        F.cross_entropy(logits[batch["image"].flatten().long()], batch["label"], reduction="sum")
        for part in parts
        for batch in part
    )
    torch.testing.assert_close(total, F.cross_entropy(logits, images(5).labels, reduction="sum"))
    assert "epoch" not in parts[0][0]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_restored_position_continues_with_the_next_batch(workers):
    whole = indices(loader(epoch=2))
    started = loader(epoch=2, num_workers=workers)
    batches = iter(started)
    read = [next(batches)["index"].tolist() for _ in range(2)]
    state = started.state_dict()
    del batches
    restored = loader(num_workers=workers)
    restored.load_state_dict(state)
    assert restored.state_dict() == state == {"epoch": 2, "batches": 2}
    rest = list(restored)
    assert read + [batch["index"].tolist() for batch in rest] == whole
    assert all(batch["epoch"].eq(2).all() for batch in rest)
    assert indices(restored) == indices(loader(epoch=3))


def test_set_epoch_keeps_a_position_of_that_epoch_and_drops_another():
    made = loader()
    made.load_state_dict({"epoch": 1, "batches": 4})
    made.sampler.set_epoch(1)
    assert len(list(made)) == len(made) - 4
    made.load_state_dict({"epoch": 1, "batches": 4})
    made.sampler.set_epoch(2)
    assert indices(made) == indices(loader(epoch=2))


def test_a_finished_pass_resumes_with_the_next_one():
    made = loader()
    made.load_state_dict({"epoch": 1, "batches": len(made)})
    assert indices(made) == indices(loader(epoch=2))


def test_an_abandoned_pass_starts_again():
    made = loader()
    next(iter(made))
    assert indices(made) == indices(loader())


def test_plain_passes_move_on_by_themselves():
    made = loader()
    assert [indices(made), indices(made)] == [indices(loader(epoch=0)), indices(loader(epoch=1))]


def test_lightning_takes_the_sampler_for_a_distributed_one():
    sampler = PositionedSampler(range(4))
    assert isinstance(sampler, DistributedSampler)
    assert (sampler.num_replicas, sampler.rank) == (1, 0)


def test_empty_data_and_batches_are_refused():
    with pytest.raises(ValueError, match="dataset is empty"):
        loader(0)
    with pytest.raises(ValueError, match="batch_size is 0"):
        loader(3, 0)
