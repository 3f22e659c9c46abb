"""Stands in for a file of transformers' tests that the source distribution leaves out."""


class ExportTesterMixin:
    """Upstream's tests of its own exporters, marked slow there; `suite.py` has tests of `torch.export`."""
