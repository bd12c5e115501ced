"""The loss-type baselines under Lightning: the plain rule, resumable, the same on two ranks."""

import pytest
import torch
from lightning.pytorch import Callback
from torch.utils.data import DataLoader, TensorDataset

from tests.helpers import assert_same_bits, forgetful_digits, norm_free_network, quiet_trainer, sgd, small_network
from tests.lightning_modules.loss_baseline_runs import KINDS, RANKS, joined
from tests.two_ranks import run_two_ranks
from torchlethe.data import Augmentation
from torchlethe.data.roles import feed_loader
from torchlethe.io import read_state_dict
from torchlethe.lightning_modules import CFk, FineTune, L1Sparse, NegGradPlus, RandomLabel, SalUn, SalUnSoft

READS = {
    "ct": {"remain"},
    "cfw": {"remain"},
    "gradient_ascent": {"forget"},
    "jit": {"forget"},
    "l1_sparse": {"remain"},
    "cf_k": {"remain"},
    "eu_k": {"remain"},
}


def augmented(**kwargs):
    return forgetful_digits(augmentation=Augmentation(crop=1), **kwargs)


@pytest.mark.parametrize("kind", KINDS)
def test_the_module_is_the_plain_rule_and_reads_what_it_declares(kind):
    data = augmented()
    asked, role_set = set(), data.role_set
    data.role_set = lambda role: asked.add(role) or role_set(role)
    module = KINDS[kind](small_network(), lr_scheduler=None)
    trainer = quiet_trainer(max_epochs=2)
    trainer.fit(module, datamodule=data)
    assert asked == module.reads == READS.get(kind, {"forget", "remain"})

    network, rule = small_network(), KINDS[kind](small_network()).update
    loader = feed_loader(rule.feed, role_set, 64, data.seed)
    rule.configure(network)
    rule.set_length(2 * len(loader), len(loader))
    rule.prepare(network, {role: [data.prepare_batch(b) for b in data.role_loader(role)] for role in rule.reads})
    network.train()
    k = 0
    for epoch in range(2):
        loader.sampler.set_epoch(epoch)
        for batch in loader:
            rule.step(network, data.prepare_batch(batch, augment=True), k)
            k += 1
    assert trainer.global_step == k
    assert_same_bits(module.network, network)
    assert all(p.requires_grad for p in module.network.parameters())


class Stop(Exception):
    """Ends a run in the middle of an epoch."""


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_cut_off_resumes_to_the_same_bits(kind, tmp_path):
    class StopAfter(Callback):
        def on_train_batch_end(self, trainer, *args):
            if trainer.global_step == 3:
                trainer.save_checkpoint(tmp_path / "cut.ckpt")
                raise Stop

    def fit(seed=0, callbacks=(), **kwargs):
        module = KINDS[kind](small_network(seed))
        quiet_trainer(max_epochs=2, callbacks=list(callbacks)).fit(module, datamodule=augmented(), **kwargs)
        return module

    with pytest.raises(Stop):
        fit(callbacks=[StopAfter()])
    # from another initialisation: all that the rule compares with comes from the checkpoint
    resumed = fit(seed=1, ckpt_path=tmp_path / "cut.ckpt")
    assert_same_bits(resumed.network, fit().network)


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two_ranks")
    run_two_ranks("tests.lightning_modules.loss_baseline_runs", folder)
    return folder


@pytest.mark.parametrize("kind", RANKS)
def test_two_ranks_compute_what_one_does(kind, two_ranks, tmp_path):
    joined(kind, 60, tmp_path)
    alone, together = (read_state_dict(folder / f"{kind}.safetensors") for folder in (tmp_path, two_ranks))
    start = norm_free_network().double().state_dict()
    assert any(not torch.equal(alone[name], start[name]) for name in alone)
    for name in alone:
        torch.testing.assert_close(together[name], alone[name], rtol=0, atol=1e-10)


@pytest.mark.parametrize("kind", KINDS)
def test_bf16_and_channels_last_work(kind):
    module = KINDS[kind](small_network().to(memory_format=torch.channels_last))
    quiet_trainer(max_epochs=1, precision="bf16-mixed").fit(module, datamodule=forgetful_digits())
    assert all(torch.isfinite(p).all() for p in module.network.parameters())
    start = small_network()
    assert any(not torch.equal(a, b) for a, b in zip(module.network.parameters(), start.parameters(), strict=True))


def test_masks_hold_under_accumulation_and_clipping():
    module, start = SalUn(small_network(), 10, optimizer=sgd(0.01)), small_network()
    trainer = quiet_trainer(max_epochs=1, accumulate_grad_batches=4, gradient_clip_val=1.0)
    trainer.fit(module, datamodule=forgetful_digits())
    assert trainer.global_step == 5
    for (name, p), before in zip(module.network.named_parameters(), start.parameters(), strict=True):
        held = module.update.mask.masks[name] == 0
        assert torch.equal(p[held], before[held]), name


def test_the_soft_mask_shrinks_once_an_optimizer_step():
    module = SalUnSoft(small_network(), 10, optimizer=sgd(0.01))
    seen, after = [], module.update.after_optimizer_step
    module.update.after_optimizer_step = lambda k: seen.append(k) or after(k)
    quiet_trainer(max_epochs=2, accumulate_grad_batches=4).fit(module, datamodule=forgetful_digits())
    assert seen == list(range(10))
    assert module.update.length == (10, 5)


def by_role(size=8):
    def loader(count):
        return DataLoader(TensorDataset(torch.rand(count, 1, 8, 8), torch.arange(count) % 10), batch_size=size)

    return {"forget": loader(16), "remain": loader(40)}


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "random_label_joined"])
def test_plain_loaders_need_no_datamodule(kind):
    module, loaders = KINDS[kind](small_network()), by_role()
    given = {role: loaders[role] for role in module.reads}
    trainer = quiet_trainer(max_epochs=1)
    trainer.fit(module, given if len(given) > 1 else next(iter(given.values())))
    assert trainer.global_step == max(len(loader) for loader in given.values())


def test_labels_drawn_once_need_samples_that_are_known_again():
    module = RandomLabel(small_network(), 10, redraw="once")
    with pytest.raises(ValueError, match="have no `index` to know a sample by"):
        quiet_trainer(max_epochs=1).fit(module, by_role())


def test_one_loader_for_two_roles_is_refused():
    with pytest.raises(ValueError, match="NegGradPlus reads forget, remain: pass an UnlearningDataModule"):
        quiet_trainer(max_epochs=1).fit(NegGradPlus(small_network(), 10), by_role()["forget"])


def test_a_run_without_end_is_refused_where_a_schedule_needs_its_length():
    with pytest.raises(RuntimeError, match="L1SparseUpdate needs to know how long the run is: give the Trainer max_ep"):
        quiet_trainer(max_epochs=-1).fit(L1Sparse(small_network(), 10), datamodule=forgetful_digits())


def test_blocks_that_do_not_exist_are_refused_before_training():
    with pytest.raises(ValueError, match="blocks is 7, but the network has 3 in front of its head"):
        quiet_trainer(max_epochs=1).fit(CFk(small_network(), 10, blocks=7), datamodule=forgetful_digits())


def test_fine_tuning_with_statistics_held():
    module, start = FineTune(small_network(), 10, bn_mode="eval"), small_network()
    quiet_trainer(max_epochs=1).fit(module, datamodule=forgetful_digits())
    assert torch.equal(module.network.bn1.running_mean, start.bn1.running_mean)
    assert not torch.equal(module.network.bn1.weight, start.bn1.weight)
