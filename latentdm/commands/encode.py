"""``latentdm encode``: fill the cache ahead of time."""

import json
from argparse import ArgumentParser, Namespace
from pathlib import Path
from time import perf_counter
from typing import Any

from omegaconf import DictConfig, open_dict

from latentdm.commands.config import composed
from latentdm.errors import UserError

DESCRIPTION = (
    "Encode all images of a configuration into its cache. Takes the overrides of train_example.py, as in: latentdm "
    "encode cache=disk pixels=folder pixels.root=photos trainer.devices=2 trainer.strategy=ddp. What is there is not "
    "encoded again. part=0/4 encodes a quarter by itself, for arrays of jobs."
)


def add_options(parser: ArgumentParser) -> None:
    """It has none: ``part`` stands among the overrides."""


def run(settings: Namespace) -> None:
    """Fill the cache, and print what was done; the last line is JSON.

    Raises:
        HydraException: the settings or the data are wrong.
    """
    parts = [each for each in settings.overrides if each.startswith("part=")]
    settings.overrides = [each for each in settings.overrides if each not in parts]
    with composed(settings) as cfg:
        _encode(cfg, _part(parts[-1].removeprefix("part=")) if parts else (0, 1))


def _part(text: str) -> tuple[int, int]:
    first, _, count = text.partition("/")
    if not (first.isdigit() and count.isdigit() and int(first) < int(count)):
        raise UserError(f"part={text}: expected i/n with i in 0…n−1, as in part=0/4")
    return int(first), int(count)


def _encode(cfg: DictConfig, part: tuple[int, int]) -> None:
    """Fill the cache, and print what was done; the last line is JSON."""
    from hydra.utils import instantiate  # all of it late, as composing says sooner what is wrong
    from lightning.pytorch import Trainer, seed_everything

    from latentdm.batch import CAPTION
    from latentdm.cache.fill import Fill, FillData
    from latentdm.cache.upkeep import totals
    from latentdm.data.module import PixelDataModule

    seed_everything(cfg.get("seed", 0), workers=True, verbose=False)
    datamodule = instantiate(cfg.datamodule)
    cache = datamodule.cache
    if cache is None or cache.dir is None:
        raise UserError("latentdm encode: there is no folder to fill; add cache=disk cache.dir=…")
    if not isinstance(datamodule.pixels, PixelDataModule):
        raise UserError(
            f"latentdm encode: {type(datamodule.pixels).__name__} makes batches by code of its own, and which there "
            "are is not known ahead; it is cached as it trains, where its batches have a cache_key"
        )
    column = None if cache.text is None else datamodule.keys.key(CAPTION)
    datamodule.pixels = pixels = FillData(datamodule.pixels, part, column)
    alone: dict[str, Any] = {"callbacks": [], "logger": False, "enable_checkpointing": False}
    with open_dict(cfg):
        cfg.trainer.default_root_dir = str(Path.cwd())
        cfg.trainer.pop("fast_dev_run", None)
    trainer: Trainer = instantiate(cfg.trainer, **alone)
    model = Fill(cache, datamodule.captions)
    started = perf_counter()
    trainer.predict(model, datamodule=datamodule, return_predictions=False)
    seconds = perf_counter() - started
    if not trainer.is_global_zero:
        return
    skipped = pixels.skips.read() if pixels.skips else {}
    for name, why in skipped.items():
        print(f"  {name}: {why}")
    done = model.totals
    done["failures"] += len(skipped)
    if cache.writer.stopped:
        print(f"  nothing more could be written: {cache.writer.stopped}")
    print(
        f"{done['images']} images encoded in {seconds:.0f} s ({done['images'] / seconds:.1f} images/s), "
        f"{done['bytes'] / 2**20:.1f} MiB written to {cache.store.folder}; {len(skipped)} images could not be read"
    )
    held = [totals(store.folder) for store in cache.stores]
    print(
        json.dumps({**done, "written": done["entries"], **{name: sum(each[name] for each in held) for name in held[0]}})
    )
