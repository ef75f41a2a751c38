"""Data sets as lists of images, and their way into batches."""

from cge_fast.data.images import Image, ReidSet
from cge_fast.data.sets import read

__all__ = ["Image", "ReidSet", "read"]
