"""Pixel data modules: uint8 images, and masks where there are some, drawn per sample from (seed, epoch, index)."""

from latentdm.data.base import EpochSampler, PixelDataModule, PixelDataset
from latentdm.data.folder import ImageFolderData
from latentdm.data.samples import SamplesData

__all__ = ["EpochSampler", "ImageFolderData", "PixelDataModule", "PixelDataset", "SamplesData"]
