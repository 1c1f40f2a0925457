"""Callbacks that observe the way of a batch, and one that ends a run; none of them changes training."""

from latentdm.callbacks.base import EncodeCallback
from latentdm.callbacks.encode_monitor import EncodeMonitor
from latentdm.callbacks.graceful_stop import GracefulStop
from latentdm.callbacks.latent_preview import LatentPreview
from latentdm.callbacks.latent_stats import LatentStats
from latentdm.callbacks.per_batch_finder import PerBatchFinder
from latentdm.callbacks.sample_preview import SamplePreview
from latentdm.callbacks.vae_offload import VAEOffload

__all__ = [
    "EncodeCallback",
    "EncodeMonitor",
    "GracefulStop",
    "LatentPreview",
    "LatentStats",
    "PerBatchFinder",
    "SamplePreview",
    "VAEOffload",
]
