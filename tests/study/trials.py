"""Trials that only write a metric; in a file of its own, so that a subprocess need not import Lightning."""

import json
from pathlib import Path


class Stages:
    """Runs a trial by writing a metric that depends on its settings; may stop at a call or break at a value."""

    def __init__(self, stop=None, broken=lambda options: False):
        self.calls = []
        self.stop, self.broken = stop, broken

    def __call__(self, command, words):
        options = dict(word[2:].split("=", 1) for word in words)
        self.calls.append(options)
        if len(self.calls) == self.stop:
            raise KeyboardInterrupt
        if self.broken(options):
            raise ValueError("the loss is nan")
        folder = Path(options["trainer.default_root_dir"])
        (folder / "weights.safetensors").write_text(json.dumps(options))
        loss = abs(float(options["lr"]) - 0.1) + int(options.get("size", 1)) / 100 + (options.get("kind") == "b")
        (folder / "metrics.json").write_text(json.dumps({"val_loss": loss, "train_loss": 0.1, "val_nan": None}))
