"""The parts of the ``lethe`` command; :mod:`torchlethe.cli` puts them together."""
