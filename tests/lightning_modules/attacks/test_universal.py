"""Universal attacks as users meet them: they fool, stay in their ball, leave the network alone, resume and export."""

import io
import json
import math
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from lightning.pytorch import Callback, LightningDataModule
from lightning.pytorch.callbacks import ModelCheckpoint
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Subset, TensorDataset

from tests.helpers import assert_same_bits, quiet_trainer
from tests.lightning_modules.attacks.attack_runs import digits, fit, scores_of, trained
from torchlethe import lightning_modules as methods
from torchlethe.callbacks import CompileNetwork, ExportPerturbation
from torchlethe.components.perturbation_file import load_perturbation
from torchlethe.data import Augmentation
from torchlethe.datamodules import ProxyImages
from torchlethe.io import load_weights
from torchlethe.lightning_modules import FeatureGatheringUAP, RandomPerturbation
from torchlethe.models import CifarResNet, normalized

XI = 0.25


def module(method=FeatureGatheringUAP, /, **options):
    return method(trained(), 10, **({"xi": XI} | options))


class Watch(Callback):
    """Looks at v, the network's mode and its gradients in every step."""

    def __init__(self):
        self.norms, self.modes, self.steps = [], [], 0

    def on_train_batch_start(self, trainer, pl_module, *_):
        pl_module.network.train(False)
        self.modes.append(any(part.training for part in pl_module.network.modules()))

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.norms.append(float(torch.linalg.vector_norm(pl_module.noise.v.detach().double(), pl_module.p)))
        self.modes.append(any(part.training for part in pl_module.network.modules()))
        self.steps += all(p.grad is None for p in pl_module.network.parameters())


@pytest.mark.parametrize(("p", "xi"), [(math.inf, 10 / 255), (2.0, 1.0)])
def test_v_stays_in_its_ball_and_the_network_as_it_was(p, xi, tmp_path):
    attack = module(p=p, xi=xi)
    before = {name: value.clone() for name, value in attack.network.state_dict().items()}
    required = [parameter.requires_grad for parameter in attack.network.parameters()]
    watch = Watch()
    fit(attack, epochs=2, callbacks=[watch])
    assert len(watch.norms) == watch.steps == 20
    assert max(watch.norms) <= xi
    assert max(watch.norms) > 0.9 * xi
    assert not any(watch.modes)
    assert_same_bits(before, attack.network.state_dict())
    assert required == [parameter.requires_grad for parameter in attack.network.parameters()]
    with np.load(attack.export(tmp_path / "v.npz")) as arrays:
        assert np.linalg.norm(arrays["v"].astype(np.float64).ravel(), p) <= xi
        assert arrays["v"].shape == (1, 1, 8, 8)
        assert json.loads(str(arrays["metadata"]))["method"] == "FeatureGatheringUAP"


def test_fg_beats_random_signs_and_a_target_is_reached():
    random = scores_of(module(RandomPerturbation, xi=0.15))["test_fooling_ratio"]
    attack = module(xi=0.15)
    fit(attack, epochs=6)
    scores = scores_of(attack)
    assert scores["test_fooling_ratio"] > 2 * random
    assert scores["test_clean_accuracy"] > 0.9 > scores["test_accuracy"]
    assert scores["test_cosine_to_uap"] > scores["test_cosine_to_clean"] - 0.3
    with torch.no_grad():
        attack.noise.v.zero_()  # the last v; the chosen one counts once the fit is over
    image = torch.rand(2, 1, 8, 8)
    assert torch.equal(attack.perturb(image), (image + attack.noise.best).clamp(0, 1))
    targeted = module(target=8)
    fit(targeted, epochs=6)
    scores = scores_of(targeted)
    share = 1.2 * 0.1
    assert scores["test_target_success"] > share
    assert scores["test_target_success_others"] > share


def test_labels_play_no_part_in_an_untargeted_attack():
    def craft(permute):
        attack, data = module(fold_batch_norm=False), digits()
        data.setup()
        if permute:
            labels = data.train_set.labels
            data.train_set = data.train_set.with_labels(labels[torch.randperm(len(labels))])
        fit(attack, epochs=1, data=data)
        return attack.noise.v.detach()

    assert torch.equal(craft(False), craft(True))


def test_no_perturbation_fools_nothing_and_its_class_is_a_direct_forward():
    attack = module(RandomPerturbation, init="zero")
    scores = scores_of(attack)
    assert scores["test_fooling_ratio"] == 0
    assert scores["test_accuracy"] == scores["test_clean_accuracy"]
    attack.network.eval()
    assert scores["test_uap_class"] == int(attack.network(torch.full((1, 1, 8, 8), 0.5)).argmax())
    constant = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    nn.init.zeros_(constant[1].weight)
    assert scores_of(RandomPerturbation(constant, 10, xi=XI))["test_fooling_ratio"] == 0


def test_an_attack_that_finds_nothing_says_so():
    constant = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    nn.init.zeros_(constant[1].weight)
    with pytest.warns(UserWarning, match="DFUAP found nothing: v changed no prediction"):
        fit(methods.DFUAP(constant, 10, xi=XI), epochs=1)


@pytest.mark.shared
def test_a_published_network_on_real_photographs(shared_dir):
    """ResNet-20 of akamaster/pytorch_resnet_cifar10; on JPEG-compressed images random signs fool it often too."""
    network = load_weights(normalized(CifarResNet(20), "imagenet"), shared_dir / "weights/resnet20_cifar10.safetensors")
    (file,) = (shared_dir / "data/cifar10").rglob("test*.parquet")
    rows = next(pq.ParquetFile(file).iter_batches(448)).to_pydict()
    pixels = np.stack([np.array(Image.open(io.BytesIO(image["bytes"]))) for image in rows["img"]])
    pairs = TensorDataset(torch.from_numpy(pixels).permute(0, 3, 1, 2), torch.tensor(rows["label"]))
    attack = FeatureGatheringUAP(network, 10)
    held_out, judged = (DataLoader(Subset(pairs, range(*part)), batch_size=128) for part in ((0, 64), (192, 448)))
    trainer = quiet_trainer(max_epochs=4, num_sanity_val_steps=0)
    trainer.fit(attack, DataLoader(Subset(pairs, range(64, 192)), batch_size=16), held_out)
    (found,) = quiet_trainer().test(attack, judged, verbose=False)
    (noise,) = quiet_trainer().test(RandomPerturbation(network, 10), judged, verbose=False)
    assert found["test_fooling_ratio"] > 0.6
    assert found["test_fooling_ratio"] > 1.5 * noise["test_fooling_ratio"]
    assert found["test_clean_accuracy"] > 0.7


def test_the_zero_start_is_a_stationary_point_and_says_so():
    attack = FeatureGatheringUAP(trained().double(), 10, xi=XI, init="zero", clamp=False)
    with pytest.warns(UserWarning, match="starts at zero"):
        attack.build([1, 8, 8])
    attack.noise.double()
    attack.network.eval().requires_grad_(False)
    image = torch.rand(8, 1, 8, 8, dtype=torch.float64)
    from torchlethe.components import SplitNetwork
    from torchlethe.updates.attacks import clean_outputs

    split = SplitNetwork(attack.network, "linear")
    loss, _ = attack.attack.loss(split, attack.noise, {"image": image} | clean_outputs(split, image), 0)
    (gradient,) = torch.autograd.grad(loss, attack.noise.v)
    assert abs(float(loss.detach()) - 1) < 1e-12
    assert float(gradient.abs().max()) < 1e-12


def test_gradient_accumulation_is_a_larger_batch():
    whole, parts = (module(fold_batch_norm=False) for _ in range(2))
    fit(whole, epochs=1, data=digits(batch_size=100))
    fit(parts, epochs=1, data=digits(batch_size=50), accumulate_grad_batches=2)
    torch.testing.assert_close(parts.noise.v, whole.noise.v, rtol=0, atol=1e-5)


def test_cached_clean_features_give_the_same_perturbation():
    cached, anew = module(cache_clean="auto"), module(cache_clean="never")
    seen = []

    class Look(Callback):
        def on_train_end(self, trainer, pl_module):
            seen.append(pl_module._training_cache is not None)

    for attack in (cached, anew):
        fit(attack, callbacks=[Look()])
    assert seen == [True, False]
    torch.testing.assert_close(cached.noise.v, anew.noise.v, rtol=0, atol=1e-5)


def test_a_cache_that_does_not_fit_is_noticed():
    data = digits(augmentation=Augmentation(crop=1))
    fit(module(), epochs=2, data=data)  # auto: does not cache what is augmented
    with pytest.raises(ValueError, match=r"cache_clean is on, but .* images were not the ones"):
        fit(module(cache_clean="always"), epochs=2, data=data)
    loader = DataLoader(TensorDataset(torch.rand(20, 1, 8, 8), torch.zeros(20).long()), batch_size=10)
    with pytest.raises(ValueError, match="batches have no index"):
        quiet_trainer(max_epochs=2).fit(module(cache_clean="always"), loader)


def test_other_datamodules_may_look_like_ours():
    class Pairs(LightningDataModule):
        augmentation = None
        train_set = TensorDataset(torch.rand(20, 1, 8, 8), torch.zeros(20).long())

        def train_dataloader(self):
            return DataLoader(self.train_set, batch_size=10)

    attack = module()
    fit(attack, epochs=2, data=Pairs())  # no index in its batches: auto does not cache
    assert attack.noise.v.shape == (1, 1, 8, 8)


def test_checkpoints_hold_v_alone_and_resume_to_the_same_bits(tmp_path):
    saved = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1, every_n_epochs=1)
    whole = module()
    fit(whole, epochs=4, callbacks=[saved], enable_checkpointing=True)
    resumed = module()
    trainer = quiet_trainer(max_epochs=4, num_sanity_val_steps=0)
    trainer.fit(resumed, datamodule=digits(), ckpt_path=tmp_path / "epoch=1.ckpt", weights_only=True)
    assert torch.equal(whole.noise.v, resumed.noise.v)
    assert torch.equal(whole.noise.best, resumed.noise.best)
    content = torch.load(tmp_path / "epoch=1.ckpt", weights_only=True)
    assert not any(name.startswith("network.") for name in content["state_dict"])
    loaded = FeatureGatheringUAP.load_from_checkpoint(tmp_path / "epoch=3.ckpt", network=trained(), weights_only=True)
    assert torch.equal(loaded.noise.chosen, whole.noise.chosen)
    assert scores_of(loaded) == scores_of(whole)
    other = trained()
    nn.init.zeros_(other.linear.bias)
    with pytest.raises(ValueError, match="made for a network with other weights"):
        FeatureGatheringUAP.load_from_checkpoint(tmp_path / "epoch=3.ckpt", network=other, weights_only=True)
    for changed, sentence in (({"xi": 0.1}, "xi=0.25, but this run has xi=0.1"), ({"target": 3}, "target=None, but")):
        with pytest.raises(ValueError, match=f"the checkpoint was made with {sentence}"):
            trainer.fit(module(**changed), datamodule=digits(), ckpt_path=tmp_path / "epoch=1.ckpt", weights_only=True)


def test_a_checkpoint_is_as_small_as_v(tmp_path):
    network = nn.Sequential(nn.Flatten(), nn.Linear(3 * 96 * 96, 10), nn.Linear(10, 10))
    loader = DataLoader(TensorDataset(torch.rand(4, 3, 96, 96), torch.zeros(4).long()), batch_size=4)
    trainer = quiet_trainer(max_epochs=1)
    trainer.fit(FeatureGatheringUAP(network, 10), loader)
    trainer.save_checkpoint(tmp_path / "v.ckpt")
    numbers = 3 * 96 * 96
    assert (tmp_path / "v.ckpt").stat().st_size < 10 * numbers + 2 * 4 * numbers + 10_000


ALL = {
    "RandomPerturbation": {},
    "DeepFoolUAP": {"max_iterations": 10},
    "SGDUAP": {"step_size": 0.1},
    "DFUAP": {"optimizer": lambda parameters: torch.optim.Adam(parameters, lr=0.05)},
    "CosineUAP": {},
    "GDUAP": {},
    "TRMUAP": {},
    "GAPUAP": {"width": 4, "blocks": 1},
    "NAGUAP": {"width": 16},
}


@pytest.mark.parametrize("name", ALL)
def test_every_method_runs_in_the_same_interface(name, tmp_path):
    attack = module(getattr(methods, name), **ALL[name])
    data = digits(subset=300 if name == "DeepFoolUAP" else None)
    data = ProxyImages(data, count=200) if name == "TRMUAP" else data
    fit(attack, epochs=1 if name in ("DeepFoolUAP", "RandomPerturbation") else 3, data=data)
    scores = scores_of(attack)
    assert 0 <= scores["test_fooling_ratio"] <= 1
    assert float(attack.noise.chosen.abs().max()) <= XI
    if name in ("DFUAP", "SGDUAP", "CosineUAP", "DeepFoolUAP"):
        assert scores["test_fooling_ratio"] > 0.2
    fresh = module(getattr(methods, name), **ALL[name])
    fresh.build([1, 8, 8])
    assert torch.equal(fresh.noise.v, attack.noise.v) == (name == "RandomPerturbation")


def test_predictions_are_whole_pixel_steps_within_the_bound(tmp_path):
    attack = module(xi=10 / 255, init="sign")
    attack.build([1, 8, 8])
    trainer = quiet_trainer(default_root_dir=tmp_path, callbacks=[ExportPerturbation()])
    parts = trainer.predict(attack, datamodule=digits())
    data = digits()
    data.setup()
    clean = data.test_set[range(len(data.test_set))]
    images = torch.cat([part["image"] for part in parts])
    assert images.dtype is torch.uint8
    assert int((images.int() - clean["image"].int()).abs().max()) == 10
    assert torch.equal(torch.cat([part["index"] for part in parts]), clean["index"])
    attack.network.eval()
    logits = torch.cat([part["logits"] for part in parts])
    torch.testing.assert_close(logits, attack.network(images / 255), rtol=1e-4, atol=1e-4)
    assert torch.equal(load_perturbation(tmp_path / "perturbation.npz"), attack.noise.chosen)
    assert Image.open(tmp_path / "perturbation.png").size == (256, 256)


def test_files_of_a_run(tmp_path):
    attack = module(neural_collapse=True)
    fit(attack, epochs=1, callbacks=[ExportPerturbation()], default_root_dir=tmp_path)
    trainer = quiet_trainer(callbacks=[ExportPerturbation()], default_root_dir=tmp_path)
    trainer.test(attack, datamodule=digits(), verbose=False)
    found = json.loads((tmp_path / "evaluation.json").read_text())
    assert found["meta"]["network"] == "SmallCNN"
    assert found["test_nc1_clean"] > 0
    assert found["test_nc3_attacked_true"] > 0
    again = module(perturbation=tmp_path / "perturbation.npz", neural_collapse=True)
    assert scores_of(again)["test_fooling_ratio"] == found["test_fooling_ratio"]


def test_plain_loaders_networks_of_others_and_mixed_precision():
    head = nn.Linear(144, 12), nn.ReLU(), nn.Linear(12, 3)
    network = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), *head)
    pairs = TensorDataset(torch.rand(40, 1, 8, 8), torch.randint(3, (40,)))
    attack = FeatureGatheringUAP(network, 3, xi=0.1, mean_image=[0.3])
    trainer = quiet_trainer(max_epochs=1, precision="bf16-mixed")
    trainer.fit(attack, DataLoader(pairs, batch_size=10), DataLoader(pairs, batch_size=20))
    assert attack.noise.v.dtype is torch.float32
    assert attack(torch.rand(2, 1, 8, 8)).shape == (2, 3)
    named = FeatureGatheringUAP(network, 3, xi=0.1, feature_layer="3")
    quiet_trainer(max_epochs=1).fit(named, DataLoader(pairs, batch_size=10))
    assert float(named.noise.v.detach().abs().max()) <= 0.1


@pytest.mark.parametrize("source", ["torchvision", "timm", "transformers", "own"])
def test_transformers_of_every_origin_have_a_feature_layer(source):
    from torchlethe.models import TransformersClassifier, timm_network, torchvision_network, vit_tiny

    if source == "torchvision":
        options = {"patch_size": 16, "num_layers": 1, "num_heads": 2, "hidden_dim": 16, "mlp_dim": 16}
        from torchvision.models import VisionTransformer

        network, layer = VisionTransformer(32, num_classes=4, **options), "heads.head"
        assert callable(torchvision_network)
    elif source == "timm":
        options = {"img_size": 32, "patch_size": 16, "embed_dim": 16, "depth": 1, "num_heads": 2}
        network, layer = timm_network("vit_tiny_patch16_224", 4, options=options), "head"
    elif source == "transformers":
        config = {"image_size": 32, "patch_size": 16, "hidden_size": 16, "num_hidden_layers": 1}
        config |= {"num_attention_heads": 2, "intermediate_size": 16}
        network, layer = TransformersClassifier(4, model_type="vit", config=config), "model.classifier"
    else:
        network, layer = vit_tiny(num_classes=4), "linear"
    pairs = TensorDataset(torch.rand(4, 3, 32, 32), torch.randint(4, (4,)))
    attack = FeatureGatheringUAP(network, 4, xi=0.1)
    found = []

    class Look(Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            found.append(pl_module.split.feature_layer)

    start = attack.seed
    quiet_trainer(max_epochs=1, callbacks=[Look()]).fit(attack, DataLoader(pairs, batch_size=2))
    assert found == [layer, layer]
    assert start == 0


REFUSED = [
    ({"xi": 0.0}, "xi is 0.0"),
    ({"xi": 10.0}, r"xi is 10.0, .* \(0, 1\]"),
    ({"p": 0.5}, "p is 0.5"),
    ({"target": 10}, "target is 10, .* 0…9"),
    ({"lam": -1.0}, "lam is -1.0"),
    ({"init": "ones"}, "init is 'ones'"),
    ({"select_on": "test"}, "select_on is 'test'"),
    ({"cache_clean": "yes"}, "cache_clean is 'yes'"),
    ({"image_shape": [8, 8]}, "image_shape is"),
    ({"perturbation": "missing.npz"}, "does not exist"),
]


@pytest.mark.parametrize(("options", "message"), REFUSED)
def test_wrong_arguments_get_one_sentence(options, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        module(**options)


def test_wrong_combinations_get_one_sentence(tmp_path):
    with pytest.raises(ValueError, match=r"feature_layer is 'linaer', .* did you mean 'linear'"):
        fit(module(feature_layer="linaer"), epochs=1)
    network = nn.Sequential(nn.Conv2d(1, 10, 8), nn.Flatten())
    with pytest.raises(ValueError, match="no Linear layer is reached"):
        fit(FeatureGatheringUAP(network, 10, xi=XI), epochs=1)
    with pytest.raises(ValueError, match=r"logits of shape \(1, 12\) for one image, expected \(1, 10\)"):
        fit(FeatureGatheringUAP(nn.Sequential(nn.Flatten(), nn.Linear(64, 12)), 10, xi=XI), epochs=1)
    with pytest.raises(ValueError, match=r"Sequential does not take images of shape \(1, 8, 8\)"):
        fit(FeatureGatheringUAP(nn.Sequential(nn.Flatten(), nn.Linear(63, 10)), 10, xi=XI), epochs=1)
    np.savez(tmp_path / "v.npz", v=np.zeros((1, 3, 4, 4), np.float32))
    np.savez(tmp_path / "w.npz", v=np.ones((1, 1, 8, 8), np.float32))
    with pytest.raises(ValueError, match="perturbation is 3×4×4, but the images are 1×8×8"):
        fit(module(perturbation=tmp_path / "v.npz"), epochs=1)
    with pytest.raises(ValueError, match="exceeds xi"):
        fit(module(perturbation=tmp_path / "w.npz"), epochs=1)
    with pytest.raises(ValueError, match="gradient_clip_val is 1"):
        fit(module(), epochs=1, gradient_clip_val=1.0)
    with pytest.raises(ValueError, match="bf16-true"):
        fit(module(), epochs=1, precision="bf16-true")
    with pytest.raises(ValueError, match="cannot be compiled"):
        fit(module(), epochs=1, callbacks=[CompileNetwork()])
    with pytest.raises(ValueError, match="kind is 'bounded_neg'"):
        module(methods.DFUAP, target=1, kind="bounded_neg")
    with pytest.raises(ValueError, match="at least 8×8"):
        methods.GAPUAP(nn.Flatten(), 10, image_shape=[1, 4, 4]).build([1, 4, 4])
    normalised = DataLoader(TensorDataset(torch.randn(20, 1, 8, 8), torch.zeros(20).long()), batch_size=10)
    for run in (quiet_trainer(max_epochs=1).fit, quiet_trainer().test):
        with pytest.raises(ValueError, match=r"images range from -.* they must lie in \[0, 1\]"):
            run(module(), normalised)
    attack = module()
    attack.build([1, 8, 8])
    with torch.no_grad():
        attack.noise.v.fill_(1.0)
    with pytest.raises(ValueError, match="it was not written"):
        attack.export(tmp_path / "bad.npz")
    assert not Path(tmp_path / "bad.npz").exists()
    with pytest.raises(ValueError, match="images are 3×8×8"):
        attack(torch.rand(1, 3, 8, 8))


@pytest.mark.parametrize("form", ["tensor", "one item", "mapping"])
def test_labels_that_nobody_reads_need_not_be_there(form):
    data = digits()
    data.setup()
    images = data.prepare_batch(data.train_set[range(200)])["image"]
    collate = {
        "tensor": torch.stack,
        "one item": lambda rows: [torch.stack(rows)],
        "mapping": lambda rows: {"pixel_values": torch.stack(rows), "label": None},
    }[form]
    loader = DataLoader(images, batch_size=50, collate_fn=collate)
    found = module(select_on="none")
    quiet_trainer(max_epochs=2).fit(found, loader)
    plain = module(select_on="none")
    pairs = DataLoader(TensorDataset(images, torch.zeros(200, dtype=torch.int64)), batch_size=50)
    quiet_trainer(max_epochs=2).fit(plain, pairs)
    assert torch.equal(found.noise.v, plain.noise.v)
    assert set(quiet_trainer().predict(found, loader)[0]) == {"index", "image", "logits"}
    with pytest.raises(ValueError, match=r"a dict with `image` and `label`|label is a NoneType"):
        quiet_trainer(max_epochs=1).fit(methods.DFUAP(trained(), 10, labels="given", select_on="none"), loader)
