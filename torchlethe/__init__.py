"""Lethe: what a model remembers and forgets, as PyTorch Lightning modules, callbacks and optimizers."""

__version__ = "0.1.0"
