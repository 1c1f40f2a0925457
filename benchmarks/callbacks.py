"""What watching costs: the example's model with and without the callbacks.

Measured in CPU seconds on one thread, which other work on the machine disturbs less than wall time.
"""

import logging
import tempfile
import warnings
from io import BytesIO
from statistics import median
from time import process_time
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.loggers import CSVLogger

from benchmarks.rows import interleaved, row
from latentdm import FrozenVAE, InpaintEncoder, LatentDataModule, demo_vae
from latentdm.callbacks import EncodeMonitor, LatentPreview, LatentStats
from latentdm.data import SamplesData
from latentdm.masks import RandomMask
from latentdm.preview import first_samples, preview
from train_example import LatentDiffusion

SIZE, BATCH = 128, 8
PICTURE_EVERY = 500
"""Steps from one picture to the next, `LatentPreview`'s default."""


class Stopwatch(Callback):
    """Seconds from the end of the first batch, which warms up and draws the first picture, to the end of the fit."""

    def __init__(self) -> None:
        self.began = self.seconds = 0.0

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Begin."""
        if batch_idx == 0:
            self.began = process_time()

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        """End."""
        self.seconds = process_time() - self.began


def _fit(vae: FrozenVAE, callbacks: list[Callback], steps: int) -> float:
    """Seconds a step."""
    seed_everything(0, workers=True, verbose=False)
    watch = Stopwatch()
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = Trainer(
            accelerator="cpu",
            max_steps=steps + 1,
            max_epochs=-1,
            limit_val_batches=0,
            log_every_n_steps=10,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=folder,
            logger=CSVLogger(folder),
            callbacks=[*callbacks, watch],
        )
        pixels = SamplesData(size=SIZE, batch_size=BATCH)
        datamodule = LatentDataModule(pixels, InpaintEncoder(vae), masks=RandomMask())
        trainer.fit(LatentDiffusion([64, 128], 1, 1e-3), datamodule=datamodule)
    return watch.seconds / steps


@row("callbacks_overhead_pct", "%", "the same fit without callbacks; a picture every 500 steps; aim: at most 3")
def callbacks_overhead_pct(quick: bool) -> float:
    """EncodeMonitor, LatentStats and LatentPreview against none: the median of the rounds' ratios, in percent more."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    vae = FrozenVAE.from_pretrained(demo_vae.__path__[0])
    steps = 10 if quick else 15

    def on() -> float:
        return _fit(vae, [EncodeMonitor(), LatentStats(), LatentPreview(every_n_steps=PICTURE_EVERY)], steps)

    _fit(vae, [], 1)
    seconds = interleaved({"off": lambda: _fit(vae, [], steps), "on": on}, rounds=5 if quick else 15)
    steady = median(on / off for off, on in zip(seconds["off"], seconds["on"], strict=True)) - 1
    picture = preview_seconds(quick) / (PICTURE_EVERY * median(seconds["off"]))
    return 100 * (steady + picture)


@row("preview_seconds", "s", "one picture of four samples at 128², drawn and written")
def preview_seconds(quick: bool) -> float:
    """`LatentPreview`'s work for one picture, the median."""
    torch.set_num_threads(1)
    vae = FrozenVAE.from_pretrained(demo_vae.__path__[0])
    datamodule = LatentDataModule(SamplesData(size=128, batch_size=4), InpaintEncoder(vae), masks=RandomMask())
    inputs, outputs, captions = first_samples(datamodule, 4, torch.device("cpu"))

    def draw() -> float:
        began = process_time()
        preview(datamodule.encoder, inputs, outputs, captions).save(BytesIO(), "PNG")
        return process_time() - began

    draw()
    return median(interleaved({"draw": draw}, rounds=3 if quick else 9)["draw"])
