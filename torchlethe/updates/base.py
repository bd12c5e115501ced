"""What an update rule is: what it reads, how it prepares, what one step does."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from torchlethe.arguments import check_choice
from torchlethe.components.modes import batch_norm_in_eval
from torchlethe.data import Feed, model_input

OptimizerFactory = Callable[[Iterable[Any]], Optimizer]
Backward = Callable[[Tensor], None]
BatchNormMode = Literal["train", "eval", "remain"]


def default_optimizer(parameters: Iterable[Any]) -> Optimizer:
    """SGD with the settings that unlearning methods are usually run with on CIFAR-10."""
    return SGD(parameters, lr=0.01, momentum=0.9, weight_decay=5e-4)


def plain_backward(loss: Tensor) -> None:
    """Backpropagate, as outside any trainer."""
    loss.backward()


class UpdateRule(ABC):
    """One method's way of changing a network, usable in a plain loop, a Trainer or another method.

    A plain loop::

        rule = SFRonUpdate(steps=100)
        rule.configure(network.train())
        rule.prepare(network, {"forget": forget_loader, "remain": remain_loader})
        for k in range(rule.steps):
            rule.step(network, {"forget": next(forget_batches), "remain": next(remain_batches)}, k)
        rule.finish(network)

    Attributes:
        feed: which roles the rule reads in training, and how (:mod:`torchlethe.data.roles`).
        optimizers: the optimizers that ``configure`` made; the caller saves and restores their state.
        prepared: whether ``prepare`` has run, or its outcome was restored.
        stopped: whether the rule has ended the run by itself, before its ``steps``; further steps would do nothing.
        prepares_augmented: whether ``prepare`` wants shuffled, augmented batches in place of fixed ones.
        reads_ahead: whether ``prepare`` can use ``loaders["steps"]``, the batches of the steps to come as a Trainer
            will pass them, from the first one each time that it is iterated over.
    """

    feed: Feed
    optimizers: list[Optimizer]
    prepared: bool = False
    stopped: bool = False
    prepares_augmented: bool = False
    reads_ahead: bool = False

    @property
    def reads(self) -> frozenset[str]:
        """The roles, out of forget, remain, train and validation, whose data the rule is given."""
        return self.feed.roles

    @abstractmethod
    def configure(self, network: nn.Module) -> list[Optimizer]:
        """Make the optimizers for a network; called once, before ``prepare`` and ``step``."""

    def prepare(self, network: nn.Module, loaders: Mapping[str, Iterable[Any]]) -> dict[str, float]:
        """Do what comes before the first step, such as measuring importances.

        Args:
            network: the network to be changed, on its device.
            loaders: a loader for each role in ``reads``, in a fixed order and without augmentation.

        Returns:
            Numbers worth logging.
        """
        self.prepared = True
        return {}

    def set_passes(self, batches: Mapping[str, int]) -> None:  # noqa: B027 (optional)
        """Say how many batches a pass over each role has, for rules whose run is made of whole passes.

        A Trainer does, before ``prepare`` and after a resume; in a plain loop the caller has to.

        Args:
            batches: the number of batches by role.
        """

    @abstractmethod
    def step(
        self, network: nn.Module, batch: Any, k: int, backward: Backward = plain_backward
    ) -> dict[str, Tensor | float]:
        """Change the network by one training batch.

        Args:
            network: the network, in train mode.
            batch: what the feed yields: a batch, or a dict from role to batch.
            k: the number of updates done before, from 0.
            backward: how to backpropagate (a Trainer passes its own).

        Returns:
            Scalars worth logging: detached tensors on the device, or plain numbers.
        """

    def finish(self, network: nn.Module) -> None:  # noqa: B027 (optional)
        """Look back after the last step, for instance to warn that it had little effect."""

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs beside the weights and the optimizers: tensors and plain values.

        Sums that each rank counts for itself are joined here, so every rank has to call it, as a Trainer does.
        """
        return {"prepared": self.prepared}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore :meth:`state_dict`; called after ``configure``."""
        self.prepared = state["prepared"]


class LossUpdate(UpdateRule):
    """A rule that is one loss for each batch and an ordinary optimizer step on it.

    Under a Trainer such a rule runs with automatic optimization, so that accumulation, clipping, mixed precision and
    optimizer hooks work as flags.

    Args:
        optimizer: makes the optimizer from the parameters.
        bn_mode: whose statistics BatchNorm normalises with (and gathers): ``train``, those of every batch; ``eval``,
            of none, the running statistics stay as they are; ``remain``, those of remaining batches only, forget
            batches are normalised with the running statistics.

    Raises:
        ValueError: ``bn_mode`` is unknown.
    """

    def __init__(self, optimizer: OptimizerFactory = default_optimizer, bn_mode: BatchNormMode = "train") -> None:
        check_choice(("train", "eval", "remain"), bn_mode=bn_mode)
        self.optimizer = optimizer
        self.bn_mode = bn_mode
        self.length: tuple[int, int] | None = None

    def set_length(self, steps: int, steps_per_epoch: int) -> None:
        """Say how long the run is: a Trainer does; a plain loop has to for rules with a schedule over the run.

        Args:
            steps: optimizer steps of the whole run.
            steps_per_epoch: optimizer steps of one epoch.
        """
        self.length = (steps, steps_per_epoch)

    def required_length(self) -> tuple[int, int]:
        """Steps of the run and of an epoch, for rules with a schedule over the run.

        Raises:
            RuntimeError: nobody said how long the run is.
        """
        if self.length is None:
            raise RuntimeError(
                f"{type(self).__name__} needs to know how long the run is: give the Trainer max_epochs and loaders "
                "with a length, or call set_length(steps, steps_per_epoch) in a plain loop."
            )
        return self.length

    def batch_norm(self, network: nn.Module, role: str = "remain") -> AbstractContextManager[None]:
        """What a forward pass on a batch of a role runs in, so that BatchNorm does as ``bn_mode`` says."""
        held = self.bn_mode == "eval" or (self.bn_mode == "remain" and role == "forget")
        return batch_norm_in_eval(network) if held else nullcontext()

    def configure(self, network: nn.Module) -> list[Optimizer]:
        """One optimizer over all trainable parameters."""
        self.optimizers = [self.optimizer([p for p in network.parameters() if p.requires_grad])]
        return self.optimizers

    @abstractmethod
    def loss(self, network: nn.Module, batch: Any, k: int) -> tuple[Tensor, dict[str, Tensor | float]]:
        """The scalar to minimise on this batch, and detached scalars worth logging."""

    def before_optimizer_step(self) -> None:
        """Change the gradients of the whole (accumulated, unscaled) batch, for instance mask them."""

    def after_optimizer_step(self, k: int) -> None:
        """Change the weights that step k, from 0, has left."""

    def finish(self, network: nn.Module) -> None:
        """Warn when weights are no longer finite, as ascent on an unbounded loss can leave them."""
        if not torch.stack([p.detach().isfinite().all() for p in network.parameters()]).all():
            warnings.warn(
                f"{type(self).__name__} has left weights that are not finite: lower the learning rate or the weight of "
                "the forget set, or clip the gradient.",
                stacklevel=2,
            )

    def step(
        self, network: nn.Module, batch: Any, k: int, backward: Backward = plain_backward
    ) -> dict[str, Tensor | float]:
        """Minimise :meth:`loss` by one optimizer step."""
        (optimizer,) = self.optimizers
        optimizer.zero_grad(set_to_none=True)
        loss, logs = self.loss(network, batch, k)
        backward(loss)
        self.before_optimizer_step()
        optimizer.step()
        self.after_optimizer_step(k)
        return logs


def logits_and_labels(network: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
    """Run a network on a batch; logits come in at least float32, whatever the network's precision.

    Args:
        network: maps images to logits ``(B, K)``.
        batch: a dict with ``image`` and ``label``, or an ``(image, label)`` tuple.

    Returns:
        Logits ``(B, K)`` and labels ``(B,)``.
    """
    batch = model_input(batch)
    logits = network(batch["image"])
    return (logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits), batch["label"]


def cross_entropy(network: nn.Module, batch: Any) -> Tensor:
    """Mean cross-entropy of a network on a batch, a scalar; see :func:`logits_and_labels`."""
    return nn.functional.cross_entropy(*logits_and_labels(network, batch))
