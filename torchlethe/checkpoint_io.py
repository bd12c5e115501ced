"""Checkpoints that are either whole or absent."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.fabric.utilities.cloud_io import _is_local_file_protocol

from torchlethe.io import atomic_write, local_path


class AtomicCheckpointIO(TorchCheckpointIO):
    """Write checkpoints beside their final name and move them into place; read them without executing code.

    A process killed while it writes leaves the previous checkpoint as it was. Pass it to the Trainer as a plugin:
    ``Trainer(plugins=AtomicCheckpointIO())``; the ``lethe`` command does so by itself. ``file:///…`` URLs are local
    paths. Remote ones (``s3://…``) are written by Lightning, as object stores are atomic by themselves.

    Note:
        Under DDP rank 0 writes, every rank reads.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Save a checkpoint atomically.

        Args:
            checkpoint: what Lightning collected.
            path: where to.
            storage_options: refused, as by Lightning.

        Raises:
            IsADirectoryError: ``path`` is a folder.
        """
        if not _is_local_file_protocol(str(path)) or storage_options is not None:
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        with atomic_write(local_path(path)) as temporary:
            torch.save(checkpoint, temporary)

    def load_checkpoint(
        self, path: str | Path, map_location: Any = lambda storage, loc: storage, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Load a checkpoint of tensors and plain values.

        Args:
            path: the file.
            map_location: as in ``torch.load``.
            weights_only: ``False`` trusts the file; otherwise nothing in it is executed.

        Returns:
            The checkpoint.

        Raises:
            FileNotFoundError: the file does not exist.
            OSError: the file cannot be read, or is a folder.
            ValueError: the file is damaged or would execute code.
        """
        if _is_local_file_protocol(str(path)):
            path = local_path(path)
            if path.is_dir():
                raise IsADirectoryError(f"checkpoint '{path}' is a folder, a file is needed.")
            if not path.is_file():
                raise FileNotFoundError(f"checkpoint '{path}' does not exist.")
        try:
            return super().load_checkpoint(path, map_location, weights_only=weights_only is not False)
        except OSError as error:
            raise OSError(f"checkpoint '{path}' cannot be read: {error.strerror or error}.") from error
        except torch.OutOfMemoryError:
            raise  # the file is not to blame
        except Exception:  # a crafted file can fail in any way the unpickler knows
            if weights_only is False:
                raise
            raise ValueError(
                f"checkpoint '{path}' was refused: the file is damaged, or holds more than tensors and plain values "
                "and could execute code."
            ) from None
