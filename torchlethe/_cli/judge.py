"""What ``lethe evaluate`` runs: one ``lethe test`` of a network with given weights, with every metric."""

from __future__ import annotations

import inspect
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jsonargparse import Namespace
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser
from safetensors.torch import save_file
from torch import Tensor, nn

from torchlethe._cli.errors import UsageError
from torchlethe._cli.lightning import LetheCLI
from torchlethe._cli.overrides import target_of
from torchlethe.callbacks import UnlearningEvaluation
from torchlethe.callbacks.evaluation_passes import collect_outputs
from torchlethe.components.originals import randomised_copy
from torchlethe.data import ForgetRequest
from torchlethe.datamodules import UnlearningDataModule
from torchlethe.functional.divergence import zero_retrain_forgetting
from torchlethe.io import load_weights


class JudgedModel(LightningModule):
    """A network with the weights of a file, to be tested and nothing else.

    Args:
        network: maps images ``(B, C, H, W)`` in [0, 1] to logits ``(B, K)``.
        weights: file for :func:`torchlethe.io.load_weights`.
    """

    def __init__(self, network: nn.Module, weights: str | Path) -> None:
        super().__init__()
        self.network = load_weights(network, weights)

    def forward(self, image: Tensor) -> Tensor:
        """Logits ``(B, K)``."""
        return self.network(image)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """Nothing: the evaluation makes its own passes."""


class BesideUntrained(Callback):
    """ZRF of each judged model: how far its forget-set predictions are from those of an untrained network.

    Args:
        weights: files of other models by the prefix of their metrics.

    Attributes:
        metrics: ``zrf`` by prefix, after the test; on rank 0.

    Note:
        The untrained network is the module's, initialised anew from seed 0 by
        :func:`~torchlethe.components.originals.randomised_copy`.
    """

    def __init__(self, weights: dict[str, Path]) -> None:
        self.weights = weights
        self.metrics: dict[str, float] = {}

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Pass the forget set through all of them."""
        network: Any = getattr(pl_module, "network", None)
        if not isinstance(network, nn.Module):
            return
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "untrained.safetensors"
            save_file({name: value.contiguous() for name, value in untrained(network).items()}, path)
            files: dict[str, Path | None] = {"untrained": path, "": None, **self.weights}
            logits = {
                title: collect_outputs(trainer, pl_module, names=("forget",), weights=file)["forget"].logits
                for title, file in files.items()
            }
        if trainer.is_global_zero:
            other = logits.pop("untrained")
            finite = {title: found for title, found in logits.items() if bool(found.isfinite().all())}
            self.metrics = {f"{title}zrf": zero_retrain_forgetting(found, other) for title, found in finite.items()}


def untrained(network: nn.Module) -> dict[str, Tensor]:
    """The state of a copy of the network with new random weights, the same at every call; on the CPU, without ties."""
    fresh = randomised_copy(network)
    return {name: value.detach().cpu().clone() for name, value in fresh.state_dict().items()}


class JudgeCLI(LetheCLI):
    """LightningCLI's test with a forget request at the top level and the evaluation of unlearning.

    Args:
        words: the command line, with ``--forget`` beside ``--model`` and ``--data``.
        evaluation: the callback that measures.
        untrained: the callback that adds ZRF.
    """

    def __init__(self, words: Sequence[str], evaluation: UnlearningEvaluation, untrained: BesideUntrained) -> None:
        self.evaluation, self.untrained = evaluation, untrained
        super().__init__("test", words)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """``--forget``, by class path like everything else."""
        parser.add_subclass_arguments(ForgetRequest, "forget", required=False, instantiate=False)

    def _note(self, text: str) -> None:
        sys.stderr.write(f"lethe evaluate: note: {text}.\n")

    def before_instantiate_classes(self) -> None:
        """Divide the data as requested."""
        config = self.config[self.command]
        data, forget = config.get("data"), config.get("forget")
        if data is None:
            raise UsageError(
                "there are no data: give --data with the name of a datamodule, or a --config that has them"
            )
        kind = target_of(data.class_path)
        if inspect.isclass(kind) and issubclass(kind, UnlearningDataModule):
            if forget is not None:
                data.init_args.forget = forget
        elif forget is None:
            raise UsageError(
                f"{data.class_path.rsplit('.', 1)[-1]} is not divided: say what was to be forgotten with --forget, "
                "such as --forget ForgetClasses --forget.classes '[3]'"
            )
        else:
            divided = {"data": data, "forget": forget, "seed": 0, "batch_size": None}
            path = f"{UnlearningDataModule.__module__}.{UnlearningDataModule.__name__}"
            config.data = Namespace(class_path=path, init_args=Namespace(**divided))

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """The evaluation of the command line in place of those of the configuration."""
        trainer = self.config_init[self.command].trainer
        own = trainer.get("callbacks") or []
        own = list(own) if isinstance(own, list | tuple) else [own]
        kept = [callback for callback in own if not isinstance(callback, UnlearningEvaluation)]
        trainer.callbacks = [*kept, self.evaluation, self.untrained]
        return super().instantiate_trainer(**kwargs)
