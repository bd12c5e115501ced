"""Every shipped configuration: found, explained by its first lines, parsed and run."""

import hashlib
import io
import os
import pickle
import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from torchvision import datasets

from torchlethe._cli.catalog import configs_folder
from torchlethe.cli import main
from torchlethe.components.checkpoint_folder import Checkpoint, write_list
from torchlethe.io import file_hash, save_weights
from torchlethe.models import SmallCNN, normalized, resnet8, resnet18, resnet20, torchvision_network
from torchlethe.study import load_study, plan_jobs
from torchlethe.study.search import trial_job
from torchlethe.study.search_space import parse_search

CONFIGS = configs_folder()
FILES = sorted(CONFIGS.rglob("*.yaml"))
STUDIES = sorted({*CONFIGS.rglob("*study.yaml"), *CONFIGS.rglob("*search.yaml")})
STAND_IN = "shufflenet_v2_x0_5"  # Swin-T runs once; where weights are loaded, a smaller network takes its place
SHORTER = {  # what takes long beside everything else
    "unlearning/unsir.yaml": "--model.init_args.noise_batch=8",
    "influence_cg.yaml": "--model.init_args.iterations=2",
}
QUICK: dict[str, dict[str, object]] = {  # baseline protections whose preparation would take a while
    "em": {"rounds": 1, "steps": 1, "stop_error": 1.0},
    "em_class": {"rounds": 1, "stop_error": 1.0},
    "rem": {"train_steps": 1, "steps": 1, "attack_steps": 1},
    "deep_confuse": {"rounds": 1, "steps": 1},
    "hypocritical": {"steps": 1},
    "tensor_clog": {"steps": 1},
}
CPU = ["--trainer.fast_dev_run=true", "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false"]


def commands(path: Path) -> list[list[str]]:
    """The command lines in a file's first comment."""
    comment = [line[2:] for line in path.read_text().splitlines() if line.startswith("# ")]
    return [shlex.split(line)[1:] for line in comment if line.startswith("lethe ")]


LINES = sorted({tuple(words) for path in FILES for words in commands(path) if words[0] != "study"})


def picture(rng: np.random.Generator, size: int, kind: str) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (size, size, 3), dtype=np.uint8)).save(buffer, kind)
    return buffer.getvalue()


def write_cifar100(root: Path, rng: np.random.Generator, patch: pytest.MonkeyPatch) -> None:
    """Two dozen images in torchvision's format, and their checksums in torchvision's lists."""
    folder = root / "cifar-100-python"
    folder.mkdir()

    def write(name, content):
        data = pickle.dumps(content)
        (folder / name).write_bytes(data)
        return hashlib.md5(data).hexdigest()

    def images(count):
        pixels = rng.integers(0, 256, (count, 3072), dtype=np.uint8)
        return {"data": pixels, "fine_labels": list(range(count))}

    patch.setattr(datasets.CIFAR100, "train_list", [["train", write("train", images(24))]])
    patch.setattr(datasets.CIFAR100, "test_list", [["test", write("test", images(8))]])
    meta = {"filename": "meta", "key": "fine_label_names"}
    names = {"fine_label_names": [str(number) for number in range(100)]}
    patch.setattr(datasets.CIFAR100, "meta", meta | {"md5": write("meta", names)})


@pytest.fixture(scope="session")
def small(tmp_path_factory):
    """By configuration folder: the overrides that point at generated data, and weights of the right shape."""
    root = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)

    cifar = root / "cifar10"
    cifar.mkdir()
    for split, count in (("train", 40), ("test", 20)):
        images = [{"bytes": picture(rng, 32, "PNG"), "path": None} for _ in range(count)]
        table = pa.table({"img": images, "label": [number % 10 for number in range(count)]})
        pq.write_table(table, cifar / f"{split}-00000-of-00001.parquet")

    patch = pytest.MonkeyPatch()
    write_cifar100(cifar, rng, patch)

    tiny = root / "tiny-imagenet-200"
    (tiny / "val" / "images").mkdir(parents=True)
    lines = []
    for number in range(200):
        name = f"n{number:08d}"
        folder = tiny / "train" / name / "images"
        folder.mkdir(parents=True)
        (folder / f"{name}_0.JPEG").write_bytes(picture(rng, 16, "JPEG"))
        if number < 20:
            (tiny / "val" / "images" / f"val_{number}.JPEG").write_bytes(picture(rng, 16, "JPEG"))
            lines.append(f"val_{number}.JPEG\t{name}\t0\t0\t62\t62\n")
    (tiny / "val" / "val_annotations.txt").write_text("".join(lines))

    networks = {
        "digits": SmallCNN(),
        "cifar10": normalized(resnet18(), "cifar10"),
        "cifar10_small": normalized(resnet8(), "cifar10"),
        "cifar10_resnet20": normalized(resnet20(), "imagenet"),
        "digits_pooled": SmallCNN(pooled=True),
        "tiny_imagenet": normalized(torchvision_network(STAND_IN, 200), "imagenet"),
    }
    for name, network in networks.items():
        weights = save_weights(network, root / f"{name}.safetensors")
        folder = root / name.removesuffix("_pooled") / "ensemble"
        if name in ("digits_pooled", "cifar10", "cifar10_small"):
            folder.mkdir(parents=True)
            shutil.copy(weights, folder / "one.safetensors")
            two = [Checkpoint("one.safetensors", epoch, 1, file_hash(weights)) for epoch in range(2)]
            write_list(folder, two, submodule="network", dtype="native", complete=True, num_classes=10)
    overrides = {
        "digits": {},
        "cifar10": {"root": cifar, "download": "false", "batch_size": 8},
        "cifar10_small": {"path": cifar, "subset": 20, "batch_size": 8},
        "cifar10_resnet20": {"path": cifar, "subset": 20, "batch_size": 8, "validation": 4},
        "cifar100": {"root": cifar, "download": "false", "batch_size": 8},
        "tiny_imagenet": {"root": tiny, "image_size": 16, "input_size": 32, "batch_size": 50},
        "imagenet": {
            "root": tiny,
            "test_folder": "train",
            "image_size": 32,
            "subset": 200,
            "validation": 20,
            "num_workers": 0,
        },
        "sharpness": {"root": cifar, "download": "false", "batch_size": 2},
    }
    yield {name: (values, root / f"{name}.safetensors") for name, values in overrides.items()}
    patch.undo()


def run(name, command, words, small, weights, folder):
    """Run a command line with small data; the names of the data's arguments depend on whether it is wrapped."""
    values, _ = small[name]
    wrapped = any(part in word for word in words for part in ("forget_", "proxy", "protect_data", "appropriator"))
    data = "--data.init_args.data.init_args" if wrapped else "--data.init_args"
    words = [*words, *CPU, *(f"{data}.{key}={value}" for key, value in values.items())]
    words += [f"--trainer.default_root_dir={folder}", f"--model.init_args.weights={weights}"] if weights else []
    words += [option for part, option in SHORTER.items() if any(word.endswith(part) for word in words)]
    stems = [Path(word).stem for word in words if word.endswith(".yaml")]
    few: dict[str, object] = {}
    if any(stem.startswith(("sep", "checkpoint_")) for stem in stems):
        few = {"ensemble": small[name][1].with_name(name) / "ensemble", "checkpoints": 2}
    if any(stem.startswith("sep") for stem in stems):
        few |= {"steps": 1} | ({"inner_steps": 1} if any("vr" in stem for stem in stems) else {})
    if any(stem.startswith("ap_") for stem in stems):
        few = {"steps": 2, "restarts": 1}
    few |= next((values for stem, values in QUICK.items() if stem in stems), {})
    words += [f"--model.init_args.{key}={value}" for key, value in few.items()]
    words += ["--data.init_args.batch_size=4"] if few and "protect_data" in stems else []
    if name == "tiny_imagenet":
        network = "--model.init_args.network.init_args.network.init_args"
        words += [f"{network}.pretrained=false", *([f"{network}.name={STAND_IN}"] if weights else [])]
    if name == "imagenet":
        network = "--model.init_args.network.init_args.network.init_args"
        words += [f"{network}.pretrained=false", f"{network}.name={STAND_IN}", f"{network}.num_classes=200"]
        words += ["--model.init_args.num_classes=200", "--trainer.precision=32"]
    if any("deit" in word for word in words):
        network = "--model.init_args.network.init_args.network.init_args"
        words += [f"{network}.pretrained=false", f"{network}.options.img_size=32", f"{data}.input_size=32"]
    return main([command, *words])


def test_first_line_says_what_a_file_is():
    assert FILES
    for path in FILES:
        first = path.read_text().splitlines()[0]
        assert first.startswith("# "), path
        assert first.endswith((".", ":")) or ". " in first or ": " in first, path
        assert re.search(r"# (lethe |.*[Pp]art of )", path.read_text()), f"{path} does not say how to run it"


def test_every_file_is_used():
    used = {CONFIGS.parent / word for path in FILES for words in commands(path) for word in words if ".yaml" in word}
    for path in FILES:
        for name in re.findall(r"[\w./]+\.yaml", "\n".join(x for x in path.read_text().splitlines() if x[:1] != "#")):
            assert (path.parent / name).is_file(), f"{path} names {name}"
            used.add(Path(os.path.normpath(path.parent / name)))
    assert set(FILES) == used


@pytest.mark.parametrize("words", LINES, ids=lambda words: " ".join(Path(w).stem for w in words if ".yaml" in w))
def test_command_in_a_comment_runs(words, small, tmp_path, capfd):
    name = next(Path(word).parent.name for word in words if ".yaml" in word)
    weights = small[name][1] if "--model.weights" in words else None
    texts = [(CONFIGS.parent / word).read_text() for word in words if word.endswith(".yaml")]
    if weights and any("pooled_network" in text for text in texts):
        weights = weights.with_name(f"{name}_pooled.safetensors")
    words = [word for word in words if word not in ("--model.weights", "weights.safetensors")]
    assert run(name, words[0], words[1:], small, weights, tmp_path) == 0
    assert "dropped" not in capfd.readouterr().err


def kinds(jobs, study):
    """One job of each stage, and one of each scenario where that has settings of the method for it."""
    found = {}
    for job in jobs:
        own = job.scenario and job.stage.base in job.scenario.stages
        own = own and any(key.startswith("model.") for key in job.scenario.stages[job.stage.base].set)
        own = own or job.stage.name == study.reference
        found.setdefault((job.stage.base, job.scenario.name if own else None), job)
    return found.values()


def example(job):
    """The command line of a job, of a trial for a search; what other stages would write is there, and empty."""
    for name, path in job.inputs.items():
        if name.endswith(".best"):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("{}\n")
    if job.stage.search:
        space = parse_search(job.stage.search).space
        first = {key: values[0] if isinstance(values, list) else values["low"] for key, values in space.items()}
        job = trial_job(job, 0, first)
    return [job.stage.command, *job.words], job.folder


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_study_is_sound(path, small, tmp_path, capsys):
    study = load_study(path)
    assert study.reference
    assert study.original or "original" not in study.stages
    jobs = [job for job in plan_jobs(study, tmp_path) if job.seed in (None, study.seeds[0])]
    assert {job.stage.name for job in jobs} == set(study.stages)
    for job in kinds(jobs, study):
        words, folder = example(job)
        assert main([*words, "--print_config"]) == 0, job.title
        output = capsys.readouterr()
        assert "dropped" not in output.err
        assert f"default_root_dir: {folder}" in output.out


def test_stages_of_the_demo_run(small, tmp_path):
    study = load_study(CONFIGS / "digits" / "study.yaml")
    for job in plan_jobs(study, tmp_path):
        if job.seed == study.seeds[0]:
            for source in job.inputs.values():
                source.parent.mkdir(parents=True, exist_ok=True)
                source.write_bytes(small["digits"][1].read_bytes())
            assert run("digits", job.stage.command, list(job.words), small, None, tmp_path) == 0
