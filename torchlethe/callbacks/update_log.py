"""Log weight updates during training, so that they can be taken back: what amnesiac unlearning needs."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from torchlethe.arguments import check_choice
from torchlethe.callbacks.run_folder import run_folder
from torchlethe.components.distributed import all_reduce_sum
from torchlethe.components.originals import tensors_hash
from torchlethe.components.update_archive import SUMMARY, UpdateArchive
from torchlethe.data import ForgetRequest


class UpdateLog(Callback):
    """Write the weight change of every optimizer step whose batch holds a sample that may have to be forgotten later.

    :class:`~torchlethe.lightning_modules.Amnesiac` takes these changes back, for any part of the candidates. A step
    costs a copy of the weights and a file of their size: with 1 % of candidates and batches of 128 that is most steps,
    so keep candidates few or together (a class, one customer). Batches must carry ``index`` (B,).

    Args:
        candidates: the samples that may have to be forgotten: a request as for unlearning, made of the training set, or
            a list of indices.
        folder: where the log goes; by default ``update_log`` in the run's folder.
        dtype: in which the changes are stored: ``bfloat16`` (half the space of float32, three digits), ``float32``, or
            ``native``, that of the weights.

    Raises:
        ValueError: there are no candidates, the training set of a request is not found, a batch has no ``index``, or
            the folder already holds a log.

    Note:
        Parameters only: BatchNorm statistics are not logged. Under DDP a step counts when any rank's batch holds a
        candidate, and rank 0 writes. A run that is resumed goes on with its log. A ``fast_dev_run`` writes nothing.
    """

    def __init__(
        self,
        candidates: ForgetRequest | list[int],
        folder: str | Path | None = None,
        dtype: Literal["bfloat16", "float32", "native"] = "bfloat16",
    ) -> None:
        check_choice(("bfloat16", "float32", "native"), dtype=dtype)
        if isinstance(candidates, list) and (not candidates or min(candidates) < 0):
            raise ValueError(f"candidates has {len(candidates)} indices, it needs at least one and none below 0.")
        self.candidates, self.folder, self.dtype = candidates, folder, dtype
        self.archive: UpdateArchive | None = None
        self.indices = torch.zeros(0, dtype=torch.long)
        self.table = torch.zeros(0, dtype=torch.long)
        self.before: list[Tensor] = []
        self.hits: Tensor | None = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the candidates and the folder; refuse one that holds another run's log."""
        self.indices = self._indices(trainer)
        self.table = torch.zeros(int(self.indices.max()) + 1, dtype=torch.long)
        self.table[self.indices] = 1
        self.table = self.table.to(pl_module.device)
        own = run_folder(trainer) / "update_log"
        self.archive = UpdateArchive(own if self.folder is None else self.folder)
        if trainer.ckpt_path is None and self.archive.steps() and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            raise ValueError(
                f"folder '{self.archive.folder}' already holds an update log; choose another or remove it."
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """A resumed run writes again what was logged after its checkpoint."""
        if trainer.is_global_zero and trainer.ckpt_path is not None and self.archive is not None:
            self.archive.drop_from(trainer.global_step)
            (self.archive.folder / SUMMARY).unlink(missing_ok=True)

    def _indices(self, trainer: Trainer) -> Tensor:
        if isinstance(self.candidates, list):
            return torch.tensor(sorted(set(self.candidates)))
        datamodule: Any = getattr(trainer, "datamodule", None)
        dataset = getattr(datamodule, "train_set", None)
        if dataset is None and hasattr(datamodule, "role_set"):
            dataset = datamodule.role_set("train")
        if dataset is None:
            raise ValueError(
                "candidates is a request, but the training set it asks is not found: give a list of indices."
            )
        return dataset.indices[self.candidates.select(dataset)].sort().values

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Copy the weights when the batch (or another one that the same step accumulates) may hold a candidate."""
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        if not isinstance(batch, dict) or "index" not in batch:
            raise ValueError("UpdateLog needs batches with an 'index' (B,), to know which samples they hold.")
        index = batch["index"]
        known = index[(index >= 0) & (index < len(self.table))]
        hits = torch.zeros_like(self.table)
        hits[known] = self.table[known]
        accumulates = trainer.accumulate_grad_batches > 1
        if self.hits is None or not accumulates:
            self.hits = all_reduce_sum(hits)
            copy = accumulates or bool(self.hits.any())
            self.before = [p.detach().clone() for p in self._parameters(pl_module).values()] if copy else []
        else:
            self.hits = self.hits + all_reduce_sum(hits)
        self.step = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Write what the step changed."""
        if self.hits is None or trainer.global_step == self.step:  # nothing was stepped: still accumulating
            return
        hits, self.hits = self.hits, None
        if self.before and bool(hits.any()) and trainer.is_global_zero and self.archive is not None:
            parameters = self._parameters(pl_module)
            changes = torch._foreach_sub([p.detach() for p in parameters.values()], self.before)
            named = dict(zip(parameters, changes, strict=True))
            dtype = changes[0].dtype if self.dtype == "native" else getattr(torch, self.dtype)
            self.archive.write(self.step, hits.nonzero().flatten(), named, dtype)
        self.before = []

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say that the log is whole, and which weights it ends in."""
        if trainer.is_global_zero and not trainer.fast_dev_run and self.archive is not None:  # type: ignore[attr-defined]
            final = {name: p.detach() for name, p in self._parameters(pl_module).items()}
            self.archive.finish(self.indices.tolist(), tensors_hash(final))

    @staticmethod
    def _parameters(pl_module: LightningModule) -> dict[str, torch.nn.Parameter]:
        network = getattr(pl_module, "network", pl_module)
        return {name: p for name, p in network.named_parameters() if p.requires_grad}
