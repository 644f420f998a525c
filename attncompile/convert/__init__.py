"""Conversion: from a model that was lifted to a folder that runs without it."""

from attncompile.convert.artifact import Conversion, NoSiteError, Progress, new_folder, silent

__all__ = ["Conversion", "NoSiteError", "Progress", "new_folder", "silent"]
