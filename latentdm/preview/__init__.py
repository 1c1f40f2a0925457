"""Pictures of what a model sees of its data, and of what it samples."""

from latentdm.preview.batch import before_and_after, captions_of, describe, first_samples, preview
from latentdm.preview.notebook import preview_data

__all__ = ["before_and_after", "captions_of", "describe", "first_samples", "preview", "preview_data"]
