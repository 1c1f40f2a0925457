"""``latentdm preview``: encode one batch, draw it, and say what to check."""

from argparse import ArgumentParser, Namespace
from pathlib import Path

from latentdm.commands.config import add_data, composed, count, device_of
from latentdm.errors import RunError, UserError

DESCRIPTION = (
    "Draw what a model would see of your data: images, masks, and latents decoded again. Takes the overrides of "
    "train_example.py, as in: latentdm preview pixels=folder pixels.root=photos pixels.size=256 masks=batch"
)


def add_options(parser: ArgumentParser) -> None:
    """Those of the command."""
    parser.add_argument("--samples", type=count, default=4, help="rows of the picture (default: 4)")
    parser.add_argument("--output", type=Path, default=Path("preview.png"), help="the PNG (default: preview.png)")
    add_data(parser)


def run(settings: Namespace) -> None:
    """Write the picture, and print its path and what to check.

    Raises:
        HydraException: the settings or the data are wrong.
    """
    with composed(settings) as cfg:
        import torch  # all of it late, as composing says sooner what is wrong
        from hydra.utils import instantiate
        from PIL import Image

        from latentdm.data import PixelDataModule
        from latentdm.preview import describe, first_samples, preview

        if settings.output.is_dir() or settings.output.suffix.lower() not in Image.registered_extensions():
            raise UserError(f"--output {settings.output}: expected the name of a picture, such as preview.png")
        device = device_of(settings.device)
        torch.manual_seed(cfg.get("seed", 0))
        datamodule = instantiate(cfg.datamodule)
        inputs, outputs, captions = first_samples(datamodule, settings.samples, device, settings.stage)
        notes = describe(datamodule.encoder, inputs, outputs)
        picture = preview(datamodule.encoder, inputs, outputs, captions, settings.samples, notes)
        try:
            settings.output.parent.mkdir(parents=True, exist_ok=True)
            picture.save(settings.output)
        except OSError as error:
            raise RunError(f"--output {settings.output}: cannot write it: {error.strerror or error}") from error
        print(settings.output.resolve())
        data = datamodule.pixels
        if isinstance(data, PixelDataModule):
            notes += [f"Data: {text}." for text in (data.summary(), data.notes()) if text]
        for note in notes:
            print(f"  {note}")
