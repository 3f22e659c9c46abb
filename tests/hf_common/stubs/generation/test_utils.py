"""Stands in for a file of transformers' tests that the source distribution leaves out."""


class GenerationTesterMixin:
    """Upstream's tests of `generate`: an encoder does not generate."""
