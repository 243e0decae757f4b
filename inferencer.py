"""The import the user guide promises: ``from inferencer import InterleaveInferencer``."""

from unigen.inference.inferencer import InterleaveInferencer

__all__ = ["InterleaveInferencer"]
