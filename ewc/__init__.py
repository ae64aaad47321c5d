"""Elastic weight consolidation: the package that the book derives, chapter by chapter."""

__version__ = "0.1.0"
