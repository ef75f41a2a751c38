"""Training for re-identification with Comprehensive Global Embedding (CGE)."""

from cge_fast.losses.cge import CGEHead, HeadOutput

__version__ = "0.2.0"

__all__ = ["CGEHead", "HeadOutput", "__version__"]
