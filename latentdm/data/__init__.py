"""Pixel data modules: uint8 images, with masks and sources if they have any, drawn from (seed, epoch, index)."""

from latentdm.data.buckets import Buckets
from latentdm.data.dataset import PixelDataset
from latentdm.data.folder import ImageFolderData
from latentdm.data.huggingface import HuggingFaceData
from latentdm.data.latents import LatentsData
from latentdm.data.module import PixelDataModule
from latentdm.data.order import GlobalOrder
from latentdm.data.samples import SamplesData
from latentdm.data.skips import SampleError
from latentdm.data.webdataset import WebDatasetData

__all__ = [
    "Buckets",
    "GlobalOrder",
    "HuggingFaceData",
    "ImageFolderData",
    "LatentsData",
    "PixelDataModule",
    "PixelDataset",
    "SampleError",
    "SamplesData",
    "WebDatasetData",
]
