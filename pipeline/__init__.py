"""Whole-slide nucleus pipeline: every nucleus of a folder of H&E slides, outlined, measured and counted."""

__version__ = "0.1.0"
