"""Weights enter and leave through one door that executes nothing."""

import io
import os
import pickle
import tarfile
import time
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


def doubled(one, other, first="student.", second="teacher."):
    return {f"{first}{n}": v for n, v in one.state_dict().items()} | {
        f"{second}{n}": v for n, v in other.state_dict().items()
    }


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize(
    ("first", "second"), [("student.", "teacher."), ("", "ema."), ("network.", "module.average.inner.")]
)
def test_two_networks_in_a_file_are_told_apart_by_the_reader(first, second, strict, tmp_path):
    one, other, target = network(), network(), network()
    path = save_weights(doubled(one, other, first, second), tmp_path / "both.safetensors")
    shown = " and ".join(sorted(f"'{prefix.removeprefix('module.')}'" for prefix in (first, second)))
    with pytest.raises(ValueError, match=f"both.safetensors' hold several networks .* the prefixes {shown}; choose"):
        load_weights(target, path, strict=strict)
    assert_same_bits(load_weights(target, path, strict=strict, prefix=second), other)
    assert_same_bits(load_weights(target, path, prefix=second.rstrip(".")), other)
    assert_same_bits(load_weights(target, path, strict=False, prefix=first), one)


def test_three_networks_are_not_taken_for_none(tmp_path):
    state = doubled(network(), network()) | {f"ema.{n}": v for n, v in network().state_dict().items()}
    path = save_weights(state, tmp_path / "three.safetensors")
    with pytest.raises(ValueError, match=r"prefixes 'ema\.' and 'student\.' and 'teacher\.'"):
        load_weights(network(), path)


def test_equal_copies_need_no_choice(tmp_path):
    source = network()
    path = save_weights(doubled(source, source), tmp_path / "both.safetensors")
    assert_same_bits(load_weights(network(), path), source)


def test_an_unknown_prefix_names_those_of_the_file(tmp_path):
    path = save_weights(doubled(network(), network()), tmp_path / "both.safetensors")
    with pytest.raises(ValueError, match=r"prefix 'studnet' is not in .*, whose parts are student\., teacher\.\.$"):
        load_weights(network(), path, prefix="studnet")


def test_a_file_without_any_fitting_tensor_is_refused_also_when_not_strict(tmp_path):
    path = save_weights(nn.Linear(3, 5), tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"do not fit SmallCNN: no tensor has a fitting name and shape\.$"):
        load_weights(network(), path, strict=False)


def test_wrappers_are_left_out_at_any_depth(tmp_path):
    source = nn.Sequential(network(), nn.Linear(10, 2))
    state = {name.replace("0.", "model.0._orig_mod.module.", 1): v for name, v in source[:1].state_dict().items()}
    state |= {f"model.1.module.{name}": value for name, value in source[1].state_dict().items()}
    path = save_weights(state, tmp_path / "wrapped.safetensors")
    target = nn.Sequential(network(), nn.Linear(10, 2))
    assert_same_bits(load_weights(target, path), source)
    into = nn.DataParallel(nn.Sequential(network(), nn.Linear(10, 2)))
    assert_same_bits(load_weights(into, path).module, source)


def test_a_part_that_is_really_called_module_keeps_its_name(tmp_path):
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.module = nn.Parameter(torch.rand(2)), nn.Module()
            self.module.weight = nn.Parameter(torch.rand(2))

    source = Twice()
    path = save_weights(source, tmp_path / "twice.safetensors")
    assert_same_bits(load_weights(Twice(), path), source)


def test_the_old_double_suffix_is_read(tmp_path):
    source = network()
    torch.save({"state_dict": source.state_dict()}, tmp_path / "model_best.pth.tar")
    assert_same_bits(load_weights(network(), tmp_path / "model_best.pth.tar"), source)


def test_a_checkpoint_path_may_be_a_url(tmp_path):
    url = (tmp_path / "a" / "last.ckpt").as_uri()
    AtomicCheckpointIO().save_checkpoint({"epoch": 1}, url)
    assert (tmp_path / "a" / "last.ckpt").is_file()
    assert AtomicCheckpointIO().load_checkpoint(url) == {"epoch": 1}


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root reads everything")
def test_a_file_without_permission_is_no_dangerous_file(tmp_path):
    path = tmp_path / "last.ckpt"
    AtomicCheckpointIO().save_checkpoint({"epoch": 1}, path)
    path.chmod(0)
    for read in (AtomicCheckpointIO().load_checkpoint, read_state_dict):
        with pytest.raises(OSError, match=r"last.ckpt' cannot be read: Permission denied\.$"):
            read(path)


def test_an_error_of_the_disk_is_no_dangerous_file(tmp_path):
    path = tmp_path / "last.ckpt"
    path.symlink_to("/proc/self/mem")  # opens, and cannot be read at its start
    if not path.is_file():
        pytest.skip("needs /proc")
    for read in (AtomicCheckpointIO().load_checkpoint, read_state_dict):
        with pytest.raises(OSError, match=r"last.ckpt' cannot be read: .*\.$"):
            read(path)


def test_a_folder_in_the_place_of_a_file_is_named(tmp_path):
    path = tmp_path / "last.ckpt"
    path.mkdir()
    with pytest.raises(IsADirectoryError, match=r"^'.*last.ckpt' is a folder, no file can be written in its place\.$"):
        AtomicCheckpointIO().save_checkpoint({"epoch": 1}, path)
    with pytest.raises(IsADirectoryError, match=r"last.ckpt' is a folder, a file is needed\.$"):
        AtomicCheckpointIO().load_checkpoint(path)
    assert [file.name for file in tmp_path.iterdir()] == ["last.ckpt"]


def test_what_a_killed_process_left_is_removed_after_an_hour(tmp_path):
    names = {"old": ".a.abcd_123.tmp", "young": ".a.efgh5678.tmp", "other": ".a.b.ijkl9012.tmp", "foreign": ".a.tmp"}
    for age, name in names.items():
        (tmp_path / name).write_text("half")
        if age != "young":
            os.utime(tmp_path / name, (time.time() - 4000,) * 2)
    with atomic_write(tmp_path / "a") as temporary:
        temporary.write_text("whole")
    assert {file.name for file in tmp_path.iterdir()} == {"a", *names.values()} - {names["old"]}
