"""Protections of image sets against training, as modules for ``predict``."""
