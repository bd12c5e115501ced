"""Weights and reports on the Hugging Face Hub, or in a folder of the same layout.

:func:`push` writes ``model.safetensors``, a model card (``README.md``), the run's ``config.yaml`` and
``evaluation.json``, and a study's report; :func:`pull` brings such a repository back. Only safetensors travel, and
nothing that could execute code. Needs ``pip install torchlethe[hub]``.
"""

import importlib.util

if importlib.util.find_spec("huggingface_hub") is None:
    raise ImportError("push and pull need huggingface_hub: pip install 'torchlethe[hub]'.")

from torchlethe.hub.transfer import pull, push

__all__ = ["pull", "push"]
