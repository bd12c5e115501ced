"""A callback that ends its process as the system does, in a file of its own: a configuration names it."""

import os
import signal
from pathlib import Path

from lightning.pytorch import Callback


class DieOnce(Callback):
    """SIGKILL at the start of the fourth epoch, unless the working directory holds ``mercy``."""

    def on_train_epoch_start(self, trainer, pl_module):
        if trainer.current_epoch == 3 and not Path("mercy").exists():
            os.kill(os.getpid(), signal.SIGKILL)
