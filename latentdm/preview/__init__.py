"""Pictures of what a model sees of its data, and of what it samples."""

from latentdm.preview.batch import before_and_after, describe, preview
from latentdm.preview.notebook import preview_data
from latentdm.preview.samples import captions_of, first_samples

__all__ = ["before_and_after", "captions_of", "describe", "first_samples", "preview", "preview_data"]
