"""Every perturbation on every network: counts, files and refusals."""

import csv
import json
from itertools import pairwise

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from tests.helpers import quiet_trainer
from tests.lightning_modules.attacks.attack_runs import digits, trained
from torchlethe.callbacks import ExportPerturbation, TransferMatrix
from torchlethe.callbacks.transfer_matrix import draw_transfer
from torchlethe.io import save_weights
from torchlethe.lightning_modules import Classifier, RandomPerturbation


def judge(callback, folder, module=None):
    trainer = quiet_trainer(callbacks=[callback], default_root_dir=folder)
    trainer.test(module or Classifier(trained(), 10), datamodule=digits(), verbose=False)
    return callback.matrix


def perturbation(folder, name, xi=0.25, seed=0, scale=1.0):
    attack = RandomPerturbation(trained(), 10, xi=xi, seed=seed)
    attack.build([1, 8, 8])
    with torch.no_grad():
        attack.noise.v.mul_(scale)
    return str(attack.export(folder / f"{name}.npz"))


def test_the_matrix_is_that_of_single_tests(tmp_path):
    first, second = trained(), trained(norm_free=True)
    save_weights(second, tmp_path / "second.safetensors")
    blank = trained(norm_free=True)
    nn.init.zeros_(blank[-1].weight)
    files = {"noise": perturbation(tmp_path, "noise"), "nothing": perturbation(tmp_path, "nothing", scale=0.0)}
    callback = TransferMatrix(files, {"cnn": first, "plain": blank}, {"plain": str(tmp_path / "second.safetensors")})
    matrix = judge(callback, tmp_path)
    assert matrix.shape == (2, 2)
    assert (matrix[1] == 0).all()
    for column, network in enumerate((first, second)):
        attack = RandomPerturbation(network, 10, xi=0.25, perturbation=files["noise"], fold_batch_norm=False)
        (scores,) = quiet_trainer().test(attack, datamodule=digits(), verbose=False)
        assert matrix[0, column] == pytest.approx(100 * scores["test_fooling_ratio"], abs=1e-9)
    rows = list(csv.reader((tmp_path / "transfer.csv").open()))
    assert rows[0] == ["crafted on", "cnn", "plain"]
    assert float(rows[1][2]) == pytest.approx(matrix[0, 1], abs=0.01)
    assert json.loads((tmp_path / "transfer.json").read_text())["fooling_ratio_percent"]["nothing"]["cnn"] == 0
    with Image.open(tmp_path / "transfer.png") as picture:
        assert min(picture.size) > 300


@pytest.mark.parametrize("name", ["ResNet-20", "a network with a long name"])
def test_names_of_columns_do_not_overlap(name):
    figure = draw_transfer(np.array([[10.0, 90.0, 50.0]]), [name], [name, f"{name}, wider", "c"])
    figure.draw_without_rendering()
    boxes = [label.get_window_extent() for label in figure.axes[0].get_xticklabels()]
    slanted = figure.axes[0].get_xticklabels()[0].get_rotation() != 0
    assert slanted or not any(a.overlaps(b) for a, b in pairwise(boxes))
    assert all(box.y1 < figure.bbox.height for box in boxes)


def test_refusals(tmp_path):
    file = perturbation(tmp_path, "noise")
    with pytest.raises(ValueError, match="at least one"):
        TransferMatrix({}, {"cnn": trained()})
    with pytest.raises(ValueError, match="'other', which is none of the networks cnn"):
        TransferMatrix({"a": file}, {"cnn": trained()}, {"other": "x.safetensors"})
    with pytest.raises(FileNotFoundError, match="does not exist"):
        TransferMatrix({"a": str(tmp_path / "none.npz")}, {"cnn": trained()})
    np.savez(tmp_path / "small.npz", v=np.zeros((1, 1, 4, 4), np.float32))
    with pytest.raises(ValueError, match="'small' is"):
        judge(TransferMatrix({"small": str(tmp_path / "small.npz")}, {"cnn": trained()}), tmp_path)
    np.savez(tmp_path / "other.npz", a=np.zeros(3), b=np.zeros(3))
    with pytest.raises(ValueError, match="holds no array 'v'"):
        TransferMatrix({"a": str(tmp_path / "other.npz")}, {"cnn": trained()})
    with pytest.raises(ValueError, match="Classifier has no export"):
        judge(ExportPerturbation(), tmp_path)
    with pytest.raises(ValueError, match="filename is"):
        ExportPerturbation("v.npz")
