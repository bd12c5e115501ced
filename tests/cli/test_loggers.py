"""The shipped loggers: what they keep of a run, read back with their own tools."""

import csv
import json
import shlex
import struct

import pytest
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from torchlethe.cli import main

FIT = shlex.split(
    "fit --config digits/data.yaml --config digits/original.yaml --data.validation 0.1 --trainer.max_epochs=2"
    " --trainer.enable_progress_bar=false --trainer.enable_model_summary=false --trainer.enable_checkpointing=false"
)
METRICS = {"train_loss", "train_accuracy", "val_loss", "val_accuracy"}


@pytest.fixture(autouse=True)
def empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def fit(name, *words):
    assert main([*FIT, "--config", f"loggers/{name}.yaml", *words]) == 0


def check_hyperparameters(found):
    """Model, data, seed and Trainer are there, with their values."""
    assert found["num_classes"] == 10
    assert found["optimizer"]["init_args"]["lr"] == 0.05
    assert found["data"]["init_args"]["batch_size"] == 64
    assert found["data"]["init_args"]["label_noise"]["init_args"]["fraction"] == 0.15
    assert found["trainer"]["max_epochs"] == 2
    assert found["seed_everything"] == 0


def test_csv(tmp_path):
    fit("csv")
    folder = tmp_path / "lightning_logs/version_0"
    rows = list(csv.DictReader((folder / "metrics.csv").open()))
    assert set(rows[0]) >= METRICS
    assert sum(bool(row["val_loss"]) for row in rows) == 2
    assert sum(bool(row["train_loss"]) for row in rows) > 2
    check_hyperparameters(yaml.safe_load((folder / "hparams.yaml").read_text()))
    assert (folder / "weights.safetensors").is_file()


def test_tensorboard(tmp_path):
    fit("tensorboard")
    folder = tmp_path / "lightning_logs/version_0"
    events = EventAccumulator(str(folder)).Reload()
    assert set(events.Tags()["scalars"]) >= METRICS
    assert [0 <= event.value <= 1 for event in events.Scalars("val_accuracy")] == [True, True]
    summary = events.PluginTagToContent("hparams")["_hparams_/session_start_info"]
    assert b"optimizer/init_args/lr" in summary
    check_hyperparameters(yaml.safe_load((folder / "hparams.yaml").read_text()))


def records(path):
    """The records of a W&B file: a LevelDB log of protocol buffers."""
    from wandb.proto.wandb_internal_pb2 import Record

    content, start, parts = path.read_bytes(), 7, []
    while start + 7 <= len(content):
        _, length, kind = struct.unpack_from("<IHB", content, start)
        if kind == 0:  # padding at the end of a block
            start += 32768 - start % 32768
            continue
        parts.append(content[start + 7 : start + 7 + length])
        start += 7 + length
        start += 32768 - start % 32768 if 32768 - start % 32768 < 7 else 0
        if kind in (1, 4):  # whole, or the last piece
            record = Record()
            record.ParseFromString(b"".join(parts))
            yield record
            parts = []


def test_wandb_offline(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    for name, value in {"MODE": "offline", "SILENT": "true", "CONSOLE": "off", "CACHE_DIR": tmp_path / "cache"}.items():
        monkeypatch.setenv(f"WANDB_{name}", str(value))
    try:
        fit("wandb", "--trainer.logger.project=mine")
    finally:
        wandb.teardown()
    (path,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    history, config, projects = set(), {}, set()
    for record in records(path):
        kind = record.WhichOneof("record_type")
        if kind == "history":
            history |= {item.key or ".".join(item.nested_key) for item in record.history.item}
        for update in (record.config if kind == "config" else record.run.config).update:
            config[update.key or update.nested_key[0]] = json.loads(update.value_json)
        projects |= {record.run.project} if kind == "run" else set()
    assert history >= METRICS
    assert projects == {"mine"}
    check_hyperparameters(config)
    # the logger in front gives the run a folder of its own
    assert (tmp_path / "lightning_logs/version_0/weights.safetensors").is_file()
    assert (tmp_path / "lightning_logs/version_0/metrics.csv").is_file()
