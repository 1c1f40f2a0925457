"""Pixel data modules: uint8 images, and masks where there are some, drawn per sample from (seed, epoch, index)."""

from latentdm.data.base import EpochSampler, PixelDataModule, PixelDataset
from latentdm.data.folder import ImageFolderData
from latentdm.data.huggingface import HuggingFaceData
from latentdm.data.samples import SamplesData
from latentdm.data.skips import SampleError
from latentdm.data.webdataset import WebDatasetData

__all__ = [
    "EpochSampler",
    "HuggingFaceData",
    "ImageFolderData",
    "PixelDataModule",
    "PixelDataset",
    "SampleError",
    "SamplesData",
    "WebDatasetData",
]
