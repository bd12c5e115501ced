import pytest
import torch

from torchlethe.data import (
    InMemoryImages,
    Interleaved,
    Joined,
    Paired,
    RoleLoader,
    Sequential,
    Single,
    feed_loader,
)

DATA = InMemoryImages(torch.zeros(30, 1, 1, 1, dtype=torch.uint8), torch.arange(30) % 3)
SETS = {"forget": DATA.subset(range(7)), "remain": DATA.subset(range(7, 30)), "train": DATA}


def steps(feed, epoch=0, batch_size=4, **kwargs):
    loader = RoleLoader(SETS, feed, batch_size, **kwargs)
    loader.sampler.set_epoch(epoch)
    return [{role: batch["index"].tolist() for role, batch in step.items()} for step in loader]


def test_interleaved_reads_forget_every_fifth_step():
    read = steps(Interleaved(every=5, steps=12))
    assert len(read) == 12
    assert ["forget" in step for step in read] == [k % 5 == 0 for k in range(12)]
    assert all("remain" in step for step in read)


def test_roles_cycle_through_whole_passes_in_new_orders_also_across_epochs():
    feed = Interleaved(every=1, steps=5)
    read = steps(feed) + steps(feed, epoch=1)
    forget, remain = ([step[role] for step in read] for role in ("forget", "remain"))
    # 7 samples in batches of 4: passes of 4 + 3, never a batch over two passes
    assert [len(batch) for batch in forget] == [4, 3] * 5
    passes = [forget[k] + forget[k + 1] for k in range(0, 10, 2)]
    assert all(sorted(one) == list(range(7)) for one in passes)
    assert len({tuple(one) for one in passes}) > 1
    assert [len(batch) for batch in remain] == [4, 4, 4, 4, 4, 3, 4, 4, 4, 4]
    assert sorted(index for batch in remain[:6] for index in batch) == list(range(7, 30))


def test_epoch_of_a_batch_counts_the_passes_of_its_role():
    loader = RoleLoader(SETS, Interleaved(every=1, steps=6), 4)
    read = list(loader)
    assert [int(step["forget"]["epoch"][0]) for step in read] == [0, 0, 1, 1, 2, 2]
    assert [int(step["remain"]["epoch"][0]) for step in read] == [0] * 6


def test_paired_is_as_long_as_the_longer_and_sequential_reads_one_role_a_step():
    assert [set(step) for step in steps(Paired())] == [{"forget", "remain"}] * 6
    read = steps(Sequential(), epoch=2)
    assert [list(step) for step in read] == [["forget"]] * 2 + [["remain"]] * 6
    assert sorted(index for step in read for batch in step.values() for index in batch) == list(range(30))


def test_joined_mixes_both_and_says_which_is_which():
    batches = list(feed_loader(Joined(), SETS.__getitem__, 4))
    assert sorted(torch.cat([batch["index"] for batch in batches]).tolist()) == list(range(30))
    for batch in batches:
        assert torch.equal(batch["is_forget"], batch["index"] < 7)
        assert torch.equal(batch["label"], batch["index"] % 3)


def test_single_gives_plain_batches():
    batches = list(feed_loader(Single("forget"), SETS.__getitem__, 4))
    assert sorted(torch.cat([batch["index"] for batch in batches]).tolist()) == list(range(7))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("feed", [Interleaved(every=3, steps=10), Sequential()])
def test_a_role_loader_resumes_at_the_next_step(feed, workers):
    whole = steps(feed, epoch=1)
    loader = RoleLoader(SETS, feed, 4, num_workers=workers)
    loader.load_state_dict({"epoch": 1, "batches": 4})
    rest = [{role: batch["index"].tolist() for role, batch in step.items()} for step in loader]
    assert rest == whole[4:]


@pytest.mark.parametrize("feed", [Interleaved(every=2, steps=9), Paired(), Sequential()])
def test_two_ranks_read_what_one_reads(feed):
    one = steps(feed, batch_size=4)
    ranks = [steps(feed, batch_size=2, num_replicas=2, rank=rank) for rank in range(2)]
    for together, *parts in zip(one, *ranks, strict=True):
        assert set(parts[0]) == set(parts[1]) == set(together)
        for role, batch in together.items():
            joined = [index for pair in zip(parts[0][role], parts[1][role], strict=True) for index in pair]
            assert joined[: len(batch)] == batch
            assert len(joined) - len(batch) < 2


def test_the_plan_of_an_epoch_goes_on_where_the_last_one_ended():
    batches = {"forget": 2, "remain": 6}
    for feed in (Interleaved(every=2, steps=5), Paired(), Sequential()):
        draws = [draw for epoch in range(3) for draw in feed.plan(batches, epoch)]
        assert len(draws) == 3 * feed.length(batches)
        for role in batches:
            assert [draw[role] for draw in draws if role in draw] == list(range(sum(role in draw for draw in draws)))


def test_data_of_other_roles_is_never_asked_for():
    asked = []

    def role_set(role):
        asked.append(role)
        return SETS[role]

    feed_loader(Single("forget"), role_set, 4)
    assert asked == ["forget"]


def test_wrong_feeds_are_one_sentence():
    with pytest.raises(ValueError, match="role is 'forgotten'"):
        Single("forgotten")
    with pytest.raises(ValueError, match="every is 0"):
        Interleaved(every=0)
    with pytest.raises(ValueError, match="no samples for the role 'remain'"):
        RoleLoader({"forget": DATA}, Paired(), 4)
