"""Any classification datamodule, divided into what is forgotten and what remains."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch.utils.data import DataLoader

from torchlethe.arguments import check_at_least
from torchlethe.data.batches import IMAGE_KEYS, as_batch, unit_range
from torchlethe.data.forget import ForgetIndices, ForgetRequest, ForgetSplit
from torchlethe.data.images import ImageDataset
from torchlethe.data.loaders import PositionedLoader
from torchlethe.data.overlap import shared_images
from torchlethe.data.roles import ROLES, Feed, Single, feed_loader
from torchlethe.data.wrapped import WrappedDataset
from torchlethe.datamodules.base import ImageDataModule, as_input, loader_settings


class UnlearningDataModule(LightningDataModule):
    """Wraps a classification datamodule and serves what an unlearning method reads, and nothing else.

    The module under training says what that is: by its ``feed`` (one of :mod:`torchlethe.data.roles`), or by ``reads``,
    a set with one role. A module that declares nothing gets the whole training set. A role that is not declared is
    never read.

    Any LightningDataModule works whose training and test loaders hold map-style data sets of (image, label); its data
    hooks are called as Lightning would. For a foreign module the labels come from ``targets`` or ``labels`` where it
    has them, evaluation of training data uses the test set's transform, and its own random transforms are neither
    reproduced nor resumed.

    Forget images that the test set has too are counted in a warning: by content, for data in memory.

    Args:
        data: The datamodule to wrap.
        forget: What to forget.
        seed: Seed of order and augmentation during unlearning, apart from ``data.seed`` and the request's seed.
        batch_size: Samples of a role per step and rank; that of ``data`` by default.

    Attributes:
        split: The :class:`~torchlethe.data.ForgetSplit`, after :meth:`setup`. Its hash is stored in checkpoints, and a
            checkpoint of another split is refused when training goes on from it (not for test, validate or predict).

    Raises:
        ValueError: If the request does not fit the data, or ``batch_size`` is not positive.

    >>> from torchlethe.data import ForgetClasses
    >>> from torchlethe.datamodules import DigitsDataModule
    >>> data = UnlearningDataModule(DigitsDataModule(), ForgetClasses([3]))
    >>> data.setup()
    >>> len(data.split.forget), sorted(data.evaluation_loaders())
    (122, ['forget', 'remain', 'test', 'test_forget', 'test_remain'])
    """

    def __init__(
        self, data: LightningDataModule, forget: ForgetRequest, seed: int = 0, batch_size: int | None = None
    ) -> None:
        if batch_size is not None:
            check_at_least(1, batch_size=batch_size)
        self.data = data
        super().__init__()
        self.request, self.seed, self._batch_size = forget, seed, batch_size
        self.prepare_data_per_node = data.prepare_data_per_node
        self.allow_zero_length_dataloader_with_multiple_devices = (
            data.allow_zero_length_dataloader_with_multiple_devices
        )
        self.split: ForgetSplit | None = None
        self._expected_hash: str | None = None
        self._sets: dict[str, ImageDataset] = {}
        self._augment = True  # unless the module under training is fed as evaluation is

    # --- what the wrapped module does ---------------------------------------------------------------------------

    @property
    def trainer(self) -> Any:
        """The trainer, which the wrapped module sees too."""
        return self.data.trainer

    @trainer.setter
    def trainer(self, trainer: Any) -> None:
        self.data.trainer = trainer

    @property
    def native(self) -> bool:
        """Whether the wrapped module is one of Lethe's."""
        return isinstance(self.data, ImageDataModule)

    @property
    def num_classes(self) -> int | None:
        """Number of classes; None before :meth:`setup` where the wrapped module does not say."""
        return len(self.classes) if self._sets else getattr(self.data, "num_classes", None)

    @property
    def classes(self) -> list[str]:
        """Names of the classes."""
        return self._sets["train"].classes

    @property
    def batch_size(self) -> int:
        """Samples of a role per step and rank."""
        return self._batch_size or getattr(self.data, "batch_size", None) or self._foreign_batch_size

    def prepare_data(self) -> None:
        """Download, if the wrapped module does."""
        self.data.prepare_data()

    def setup(self, stage: str | None = None) -> None:
        """Set the wrapped module up and divide its training set (for every stage: each part is evaluated)."""
        first = self.split is None
        if first:
            self.data.setup("fit")
        if stage not in (None, "fit") or (first and not self.native):
            self.data.setup(stage if stage not in (None, "fit") else "test")
        if first:
            self._divide()
        if stage == "fit" and self.trainer is not None:
            # here rather than in `train_dataloader`: Lightning leaves DataLoader patched when a loader's hook raises
            feed = self.feed()
            for role in feed.roles:
                if role not in self._sets and (sentence := feed.without(role)):
                    raise ValueError(sentence)
                self.role_set(role)

    def _divide(self) -> None:
        if isinstance(self.data, ImageDataModule):
            found = {"train": self.data.train_set, "validation": self.data.validation_set, "test": self.data.test_set}
        else:
            found = self._foreign_sets()
        self._sets = {name: dataset for name, dataset in found.items() if dataset is not None}
        if self.native and "validation" in self._sets and isinstance(self.request, ForgetIndices):
            self.request.refuse_held_out(self._sets["validation"])  # foreign validation sets count from 0 anew
        split = ForgetSplit.create(self._sets["train"], self.request)
        self._check(split.hash)
        self._sets["forget"] = self._sets["train"].subset(split.forget)
        self._sets["remain"] = self._sets["train"].subset(split.remain)
        self.split = split
        self._log(split)
        self._look_for_overlap()

    def _look_for_overlap(self) -> None:
        """Warn of images that are to be forgotten and judge the result too (known for data in memory)."""
        if self._sets.get("test") and (shared := len(shared_images(self._sets["forget"], self._sets["test"]))):
            rank_zero_warn(
                f"{shared} of {len(self._sets['forget'])} forget images are in the test set too: test accuracy then "
                "falls with forgetting and membership attacks take them for strangers; remove them from the test set."
            )

    def _log(self, split: ForgetSplit) -> None:
        found = split.describe()
        rank_zero_info(
            f"UnlearningDataModule: {found['request']} forgets {found['forget']} images, {found['remain']} remain, "
            f"split {found['hash'][:12]}."
        )
        for logger in self.trainer.loggers if self.trainer is not None else []:
            logger.log_hyperparams({f"split_{name}": value for name, value in found.items()})

    def _foreign_sets(self) -> dict[str, ImageDataset | None]:
        loaders = {}
        for name, hook in (
            ("train", "train_dataloader"),
            ("validation", "val_dataloader"),
            ("test", "test_dataloader"),
        ):
            loader = getattr(self.data, hook)() if is_overridden(hook, self.data) else None
            loaders[name] = loader[0] if isinstance(loader, (list, tuple)) and loader else loader or None
        for name in ("train", "test"):
            if getattr(loaders[name], "dataset", None) is None:
                raise ValueError(
                    f"data is a {type(self.data).__name__}, but its {name} loader has no data set to divide."
                )
        train_loader: Any = loaders["train"]
        self._foreign_batch_size, self._foreign_workers = train_loader.batch_size or 1, train_loader.num_workers
        train = WrappedDataset(train_loader.dataset)
        return {
            name: train if name == "train" else WrappedDataset(loader.dataset, train.classes) if loader else None
            for name, loader in loaders.items()
        }

    def teardown(self, stage: str | None = None) -> None:
        """Tear the wrapped module down."""
        self.data.teardown(stage)  # type: ignore[arg-type]

    def on_exception(self, exception: BaseException) -> None:
        """Let the wrapped module clean up."""
        self.data.on_exception(exception)

    # --- loaders ------------------------------------------------------------------------------------------------

    def role_set(self, role: str) -> ImageDataset:
        """The samples of a role: ``forget``, ``remain``, ``train`` or ``validation``; also ``test``.

        Args:
            role: The role.

        Raises:
            ValueError: If there is no such role, or it has no samples.
        """
        if self.split is None:
            raise RuntimeError("role_set is known after `setup()`, which was not called yet.")
        if role not in self._sets:
            allowed = ", ".join(sorted(self._sets))
            raise ValueError(
                f"role is {role!r}, but this data has {allowed} (`validation` of the wrapped module sets one)."
            )
        return self._sets[role]

    def feed(self) -> Feed:
        """How the module under training wants to be fed."""
        module = self.trainer.lightning_module if self.trainer is not None else None
        feed = getattr(module, "feed", None)
        if feed is not None:
            return feed
        reads = sorted(getattr(module, "reads", None) or {"train"})
        if len(reads) > 1 or reads[0] not in ROLES:
            raise ValueError(
                f"reads of {type(module).__name__} is {reads}, but without a `feed` it must be one of {ROLES}."
            )
        return Single(reads[0])

    def _settings(self) -> dict[str, Any]:
        workers = self.data.num_workers if isinstance(self.data, ImageDataModule) else self._foreign_workers
        return loader_settings(self, workers)

    def train_dataloader(self) -> PositionedLoader:
        """What the module under training declares to read, in the order it declares."""
        feed = self.feed()
        self._augment = feed.augment
        role_set = self.role_set if feed.augment else self._plain_set
        return feed_loader(feed, role_set, self.batch_size, self.seed, **self._settings())

    def role_loader(self, role: str, *, shuffle: bool = False) -> PositionedLoader:
        """A loader of one role, for example to accumulate a Fisher matrix.

        Args:
            role: See :meth:`role_set`.
            shuffle: False for stored order and deterministic transforms; True for training batches.

        Returns:
            Loader of unprepared batches (see :meth:`prepare_batch`). Without shuffling, the padding duplicates that
            fill up the ranks under DDP carry the label -100 and the index -1.
        """
        dataset = self.role_set(role)
        if shuffle:
            return PositionedLoader(
                dataset, batch_size=self.batch_size, shuffle=True, seed=self.seed, **self._settings()
            )
        return self._eval_loader(dataset, self.batch_size)

    def _plain_set(self, role: str) -> ImageDataset:
        return self._plain(self.role_set(role))

    def _plain(self, dataset: ImageDataset) -> ImageDataset:
        """A data set with the transforms of evaluation."""
        test = self._sets["test"]
        if isinstance(dataset, WrappedDataset) and isinstance(test, WrappedDataset):
            return dataset.with_transform_of(test.dataset)
        return dataset

    def _eval_loader(self, dataset: ImageDataset, batch_size: int) -> PositionedLoader:
        return PositionedLoader(self._plain(dataset), batch_size=batch_size, **self._settings())

    def evaluation_loaders(self) -> dict[str, DataLoader[Any]]:
        """Loaders that judge a model, in stored order and without augmentation.

        Returns:
            ``forget``, ``remain`` and ``test`` unless it is empty; ``validation`` if there is one; ``test_forget`` and
            ``test_remain`` when whole classes (or subclasses that the test set knows) are forgotten.
        """
        sets = {name: self.role_set(name) for name in ("forget", "remain", "test")}
        if "validation" in self._sets:
            sets["validation"] = self._sets["validation"]
        if self.request.divides(sets["test"]):
            mask = self.request.mask(sets["test"])
            parts = {"test_forget": sets["test"].subset(mask), "test_remain": sets["test"].subset(~mask)}
            sets.update({name: part for name, part in parts.items() if len(part)})
        size = self.data.eval_batch_size if isinstance(self.data, ImageDataModule) else self.batch_size
        return {name: self._eval_loader(dataset, size) for name, dataset in sets.items() if len(dataset)}

    def val_dataloader(self) -> Any:
        """Validation loaders of the wrapped module; none if it has none."""
        return self.data.val_dataloader() if is_overridden("val_dataloader", self.data) else []

    def test_dataloader(self) -> Any:
        """Test loaders of the wrapped module."""
        return self.data.test_dataloader()

    def predict_dataloader(self) -> Any:
        """Prediction loaders of the wrapped module."""
        return self.data.predict_dataloader()

    # --- batches ------------------------------------------------------------------------------------------------

    def prepare_batch(self, batch: Any, device: torch.device | str | None = None, augment: bool = False) -> Any:
        """Do outside of Lightning's loops what these do to a batch.

        Args:
            batch: A batch of one of this module's loaders, or a dict from role to batch.
            device: Where to move it; it stays where it is by default.
            augment: Augment batches that carry ``epoch`` (wrapped Lethe modules only; others augment on their own).

        Returns:
            The batch as a dict; ``image`` (B, C, H, W) float32.
        """
        if isinstance(self.data, ImageDataModule):
            return self.data.prepare_batch(batch, device, augment, self.seed)
        batch = self.on_before_batch_transfer(batch, 0)
        if device is not None:
            batch = self.transfer_batch_to_device(batch, torch.device(device), 0)
        batch = self._after_transfer(batch)
        return {role: as_batch(part) for role, part in batch.items()} if _by_role(batch) else as_batch(batch)

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Call the hook of the wrapped module."""
        return self._delegate("on_before_batch_transfer", batch, dataloader_idx)

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Call the hook of the wrapped module."""
        return self._delegate("transfer_batch_to_device", batch, device, dataloader_idx)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Call the hook of the wrapped module; Lethe's own augments with this module's seed."""
        if type(self.data).on_after_batch_transfer is ImageDataModule.on_after_batch_transfer:
            assert isinstance(self.data, ImageDataModule)
            return as_input(self, self.data.prepare_batch(batch, augment=self._augment, seed=self.seed))
        return as_input(self, self._after_transfer(batch, dataloader_idx))

    def _after_transfer(self, batch: Any, dataloader_idx: int = 0) -> Any:
        return _to_unit_range(self._delegate("on_after_batch_transfer", batch, dataloader_idx))

    def _delegate(self, name: str, batch: Any, *args: Any) -> Any:
        """Call a hook of the wrapped module (or of the model, as Lightning would) in the form of batch it knows."""
        if is_overridden(name, self.data):
            hook = getattr(self.data, name)
        elif self.trainer is not None and is_overridden(name, self.trainer.lightning_module):
            return getattr(self.trainer.lightning_module, name)(batch, *args)
        else:
            return getattr(super(), name)(batch, *args)
        if self.native or not isinstance(batch, dict):
            return hook(batch, *args)
        if _by_role(batch):
            return {role: self._delegate(name, part, *args) for role, part in batch.items()}
        if "image" not in batch:  # a batch of the wrapped module's own loaders
            return hook(batch, *args)
        # A foreign hook expects (image, label): give it that, and let the rest go the usual way.
        rest = {key: value for key, value in batch.items() if key not in ("image", "label")}
        rest = getattr(super(), name)(rest, *args)
        return {**as_batch(hook((batch["image"], batch["label"]), *args)), **rest}

    # --- state --------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The split's hash and the state of the wrapped module."""
        return {"split": None if self.split is None else self.split.hash, "data": self.data.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the wrapped module.

        Raises:
            ValueError: If training is to go on from a checkpoint that was made with another split.
        """
        # weights of any split may be tested, on any split
        if self.trainer is None or self.trainer.state.fn in (None, TrainerFn.FITTING):
            self._expected_hash = state_dict["split"]
            if self.split is not None:
                self._check(self.split.hash)
        self.data.load_state_dict(state_dict["data"])

    def _check(self, found: str) -> None:
        if self._expected_hash is not None and self._expected_hash != found:
            raise ValueError(
                f"forget is {self.request!r} with split hash {found[:12]}, but the checkpoint was made with split "
                f"{self._expected_hash[:12]}; resume with the same data, request and seeds."
            )


def _by_role(batch: Any) -> bool:
    return isinstance(batch, dict) and bool(batch) and all(isinstance(part, dict) for part in batch.values())


def _to_unit_range(batch: Any) -> Any:
    """Bring uint8 images to [0, 1] in whatever form a batch has, and keep the form."""
    if _by_role(batch):
        return {role: _to_unit_range(part) for role, part in batch.items()}
    if isinstance(batch, dict):
        return {**batch, **{key: unit_range(batch[key]) for key in IMAGE_KEYS if key in batch}}
    if isinstance(batch, (list, tuple)) and len(batch) >= 2 and getattr(batch[0], "ndim", 0) == 4:
        parts = [unit_range(batch[0]), *batch[1:]]
        return type(batch)(*parts) if hasattr(batch, "_fields") else type(batch)(parts)
    return batch
