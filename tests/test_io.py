"""Weights enter and leave through one door that executes nothing."""

import io
import os
import pickle
import tarfile
import zipfile
from collections import OrderedDict

import numpy as np
import pytest
import torch
from torch import nn

from tests.helpers import assert_same_bits
from torchlethe.checkpoint_io import AtomicCheckpointIO
from torchlethe.io import atomic_write, file_hash, load_weights, read_state_dict, save_weights
from torchlethe.models import SmallCNN


def network():
    return SmallCNN(in_channels=1, image_size=8, num_classes=10)


class Touch:
    """Unpickling it creates a file: the proof that something was executed."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return (os.mkdir, (self.path,))


class Evaluates(Touch):
    def __reduce__(self):
        return (eval, (f"__import__('os').mkdir({self.path!r})",))


class Executes(Touch):
    def __reduce__(self):
        return (exec, (f"import os; os.mkdir({self.path!r})",))


def crafted(kind, marker, path):
    """Write a file that would create the folder ``marker`` if anything in it were executed."""
    state = network().state_dict()
    match kind:
        case "object beside the weights":
            torch.save({"state_dict": state, "extra": Touch(marker)}, path)
        case "object among the weights":
            torch.save({**state, "conv1.weight": Touch(marker)}, path)
        case "eval":
            torch.save({"state_dict": state, "hyper_parameters": Evaluates(marker)}, path)
        case "exec":
            torch.save({"state_dict": state, "hyper_parameters": Executes(marker)}, path)
        case "object as key":
            torch.save({"state_dict": state, (1, Touch(marker)): 0}, path)
        case "legacy format":
            torch.save({"state_dict": state, "extra": Touch(marker)}, path, _use_new_zipfile_serialization=False)
        case "bare pickle":
            path.write_bytes(pickle.dumps({"state_dict": {}, "extra": Touch(marker)}))
        case "pickled whole module":
            module = nn.Sequential(nn.Linear(2, 2))
            module.surprise = Touch(marker)
            torch.save(module, path)
        case "swapped pickle in a zip":
            clean = io.BytesIO()
            torch.save({"state_dict": state}, clean)
            with zipfile.ZipFile(clean) as source, zipfile.ZipFile(path, "w") as target:
                for name in source.namelist():
                    is_pickle = name.endswith("data.pkl")
                    target.writestr(name, pickle.dumps(Touch(marker), 2) if is_pickle else source.read(name))
        case "pickle in a tar":
            with tarfile.open(path, "w") as archive:
                for name in ("sys_info", "pickle", "storages", "tensors"):
                    content = pickle.dumps(Touch(marker), 2)
                    info = tarfile.TarInfo(name)
                    info.size = len(content)
                    archive.addfile(info, io.BytesIO(content))
        case "numpy object array":
            torch.save({"state_dict": state, "extra": np.array([Touch(marker)], dtype=object)}, path)
        case "partial over getattr":
            payload = b"cbuiltins\ngetattr\n(cos\nmkdir\nS'__call__'\ntR(S'" + str(marker).encode() + b"'\ntR."
            path.write_bytes(payload)


KINDS = [
    "object beside the weights", "object among the weights", "eval", "exec", "object as key", "legacy format",
    "bare pickle", "pickled whole module", "swapped pickle in a zip", "pickle in a tar", "numpy object array",
    "partial over getattr",
]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_a_crafted_file_is_refused_in_a_sentence_and_executes_nothing(kind, tmp_path):
    marker, path = tmp_path / "executed", tmp_path / "crafted.ckpt"
    crafted(kind, marker, path)
    with pytest.raises(ValueError, match=r"crafted.ckpt' were refused: .*\.$") as caught:
        load_weights(network(), path)
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match=r"crafted.ckpt' was refused: .*\.$"):
        AtomicCheckpointIO().load_checkpoint(path)
    assert not marker.exists()


def test_the_crafted_files_are_dangerous_when_trusted(tmp_path):
    marker, path = tmp_path / "executed", tmp_path / "crafted.ckpt"
    crafted("object beside the weights", marker, path)
    torch.load(path, weights_only=False)
    assert marker.exists()


@pytest.mark.parametrize("prefix", ["", "module.", "network.", "model.network.", "_orig_mod.", "module._orig_mod."])
@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".ckpt"])
def test_wrappers_leave_their_prefix_outside(prefix, suffix, tmp_path):
    source, target = network(), network()
    state = {prefix + name: value for name, value in source.state_dict().items()}
    path = tmp_path / f"weights{suffix}"
    if suffix == ".safetensors":
        save_weights(state, path)
    else:
        torch.save({"state_dict": state, "epoch": 3} if suffix == ".ckpt" else OrderedDict(state), path)
    load_weights(target, path)
    assert_same_bits(source, target)


def test_a_checkpoint_may_hold_more_than_the_network(tmp_path):
    source, target = network(), network()
    state = {f"network.{name}": value for name, value in source.state_dict().items()}
    torch.save(
        {"state_dict": state | {"teacher.weight": torch.ones(3), "val_loss.mean": torch.zeros(())}}, tmp_path / "a.pt"
    )
    load_weights(target, tmp_path / "a.pt")
    assert_same_bits(source, target)


def test_a_mismatch_names_every_kind_of_key(tmp_path):
    state = network().state_dict()
    names = list(state)
    state["surplus"] = torch.zeros(2)
    head = next(name for name in reversed(names) if name.endswith("weight"))
    state[head] = torch.zeros(7, *state[head].shape[1:])
    del state[names[0]]
    save_weights(state, tmp_path / "bad.safetensors")
    before = network()
    target = network()
    target.load_state_dict(before.state_dict())
    with pytest.raises(ValueError) as caught:
        load_weights(target, tmp_path / "bad.safetensors")
    message = str(caught.value)
    assert f"missing: {names[0]}" in message
    assert "unexpected: surplus" in message
    assert f"wrong shape: {head} (file (7, " in message
    assert_same_bits(before, target)
    load_weights(target, tmp_path / "bad.safetensors", strict=False)
    assert torch.equal(target.state_dict()[names[1]], state[names[1]])


@pytest.mark.parametrize(
    ("name", "content", "error", "sentence"),
    [
        ("absent.pt", None, FileNotFoundError, "do not exist"),
        ("weights.h5", b"", ValueError, "have the suffix '.h5', allowed are .safetensors"),
        ("empty.pt", b"", ValueError, "were refused"),
        ("cut.safetensors", b"\x10\x00", ValueError, "are no safetensors file"),
        ("plain.pt", {"accuracy": 0.9}, ValueError, "hold no state dict"),
    ],
)
def test_unusable_files_are_named(name, content, error, sentence, tmp_path):
    path = tmp_path / name
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    with pytest.raises(error, match=sentence):
        read_state_dict(path)


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "state.ckpt"
    AtomicCheckpointIO().save_checkpoint({"epoch": 1}, path)
    before = file_hash(path)
    with pytest.raises(Exception, match=r"(?i)pickle"):
        AtomicCheckpointIO().save_checkpoint({"epoch": 2, "bad": lambda: None}, path)
    assert file_hash(path) == before
    with pytest.raises(FileNotFoundError), atomic_write(path) as temporary:  # noqa: PT012
        temporary.write_text("half")
        (tmp_path / "absent").read_text()
    assert file_hash(path) == before
    assert [file.name for file in tmp_path.iterdir()] == ["state.ckpt"]
    assert AtomicCheckpointIO().load_checkpoint(path) == {"epoch": 1}
