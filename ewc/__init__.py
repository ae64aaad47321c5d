"""Elastic weight consolidation: the package that the book derives, chapter by chapter."""

from ewc.elastic import EWC

__all__ = ["EWC"]
__version__ = "0.1.0"
