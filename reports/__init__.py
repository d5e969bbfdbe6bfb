"""A record of a run as one HTML file. Knows the record only: never a pass, a target or a model."""

from onnxslim.reports.render import render, write

__all__ = ["render", "write"]
