"""Training for re-identification with Comprehensive Global Embedding (CGE)."""

from cge_fast.losses.cge import CGEHead, HeadOutput

__all__ = ["CGEHead", "HeadOutput"]
