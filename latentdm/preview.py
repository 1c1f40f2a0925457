"""What a batch looks like to the model: its images, masks and latents as a picture, and what to check in words.

Shapes: ``b`` batch, ``h w`` pixels after the crop, ``z`` latent channels, ``r`` the VAE's factor; of clips the first
frame is shown.
"""

from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from latentdm.alarms import MASK_RANGE, STD_RANGE, latent_std_alarm, mask_alarm
from latentdm.batch import LATENT_MASK, LATENTS, MASK, MASKED_LATENTS, NOISE_MASK, PIXELS, Key, crop, unit_mask
from latentdm.datamodule import LatentDataModule
from latentdm.encoders.base import Encoder
from latentdm.errors import UserError
from latentdm.pictures import ORANGE, Sheet, three_components, tinted

CAPTIONS: tuple[Key, ...] = ("caption", "captions", "text", "prompt", "name")
"""Where captions are looked for in a batch, if nobody says."""


def preview(
    encoder: Encoder,
    inputs: Mapping[str, Any],
    outputs: Mapping[str, Tensor],
    captions: Sequence[str] | None = None,
    samples: int | None = None,
    notes: Sequence[str] = (),
) -> Image.Image:
    """Draw a batch: one row a sample, under each header what the encoder and its results have to show.

    Args:
        encoder: the one that made the results.
        inputs: what it was given: ``pixels``, ``mask``.
        outputs: what it gave: ``latents`` and, if it inpaints, ``masked_latents``, ``noise_mask``, ``latent_mask``.
        captions: titles of the rows.
        samples: how many of the batch; None draws all.
        notes: sentences to go below, such as those of `describe`.

    Returns:
        An RGB picture.
    """
    b = min(samples or len(outputs[LATENTS]), len(outputs[LATENTS]))
    inputs, outputs = _first(inputs, b), _first(outputs, b)
    columns = _columns(encoder, inputs, outputs)
    height, width = next(iter(columns.values())).shape[-2:]
    titles = [
        _title((captions or [])[row : row + 1], row, {name: value[row] for name, value in outputs.items()})
        for row in range(b)
    ]
    rows = [[images[row] for images in columns.values()] for row in range(b)]
    return Sheet(list(columns), (width, height)).draw(rows, titles, notes)


def before_and_after(
    encoder: Encoder,
    inputs: Mapping[str, Any],
    outputs: Mapping[str, Tensor],
    sampled: Tensor,
    captions: Sequence[str] | None = None,
) -> Image.Image:
    """Draw what a model made: image, masked image, the sample, and the sample in the image's masked part.

    Args:
        encoder: as for `preview`.
        inputs: as for `preview`.
        outputs: as for `preview`.
        sampled: ``b z h/r w/r`` latents of the first ``b`` samples.
        captions: titles of the rows.

    Returns:
        An RGB picture; without masks, of images and samples alone.
    """
    b = len(sampled)
    inputs, outputs = _first(inputs, b), _first(outputs, b)
    images = {key: _frame(image) for key, image in encoder.images(inputs).items()}
    columns = {"image": images[LATENTS], "sampled": _decoded(encoder, sampled)}
    if MASKED_LATENTS in images:
        hole = outputs[NOISE_MASK].to(columns["sampled"].device)
        image = images[LATENTS].to(hole.device)
        columns = {"image": image, "masked\nimage": images[MASKED_LATENTS], "sampled": columns["sampled"]}
        columns["sampled,\nin the image"] = image * (1 - hole) + columns["sampled"] * hole
    titles = [captions[row] if captions else f"sample {row}" for row in range(b)]
    rows = [[column[row] for column in columns.values()] for row in range(b)]
    return Sheet(list(columns), (images[LATENTS].shape[-1], images[LATENTS].shape[-2])).draw(rows, titles)


def describe(encoder: Encoder, inputs: Mapping[str, Any], outputs: Mapping[str, Tensor]) -> list[str]:
    """What a person should check in a preview, a sentence or two each; what is wrong begins with ``CHECK``."""
    vae, latents = encoder.vae, outputs[LATENTS]
    dtype = str(vae.dtype).removeprefix("torch.")
    whole, cropped, small = (
        f"{value.shape[-1]} by {value.shape[-2]}"
        for value in (inputs[PIXELS], crop(inputs[PIXELS], vae.spatial_compression), latents)
    )
    lines = [
        f"Images: {whole} pixels{'' if cropped == whole else f', cropped to {cropped},'} become {small} latents of "
        f"{latents.shape[1]} channels, by {vae.class_name} "
        f"(1/{vae.spatial_compression} of the side, {dtype} on {vae.device})."
    ]
    if vae.can_decode:
        lines.append(
            "Decoded latents should look like the image; what is lost there, no model trained on them can learn."
        )
    std = float(latents.std())
    lines.append(
        f"Latents: standard deviation {std:.2f}, mean {round(float(latents.mean()), 2) + 0.0:.2f}; about 1 is right, "
        f"outside {STD_RANGE[0]:g}…{STD_RANGE[1]:g} the scaling is wrong."
    )
    alarms = [latent_std_alarm(std)]
    if NOISE_MASK in outputs:
        shares = outputs[NOISE_MASK].flatten(1).mean(1)
        lines.append(
            "Masks: white = repaint (red over the image, orange at latent resolution). They cover "
            f"{float(shares.mean()):.0%} of the image "
            f"({float(shares.min()):.0%} to {float(shares.max()):.0%}); is that the part which the model shall fill?"
        )
        if getattr(encoder, "latent_mask", None) == "nearest":
            side = vae.spatial_compression
            lines.append(
                f"latent_mask=nearest takes the top left pixel of each {side} by {side} block, as in Stable Diffusion: "
                "orange should lie half a block further right and down than white, on average."
            )
        low, high = MASK_RANGE
        alarms.append(mask_alarm(float((shares < low).float().mean()), float((shares > high).float().mean())))
    return lines + [f"CHECK: {alarm}." for alarm in alarms if alarm]


def first_samples(
    datamodule: LatentDataModule, samples: int, device: torch.device, stage: str = "train"
) -> tuple[dict[str, Any], dict[str, Tensor], list[str] | None]:
    """Take the first batches of a data module through its hooks, without a trainer.

    Args:
        datamodule: it is set up here.
        samples: how many are wanted at least; fewer come where the data has fewer, or no more of the first one's size.
        device: where to encode.
        stage: ``"train"`` or ``"val"``.

    Returns:
        Inputs and outputs under our names, as `preview` takes them, and captions if all batches have some.

    Raises:
        ValueError: there is no batch.
    """
    datamodule.prepare_data()
    datamodule.setup("fit")
    datamodule.encoder.setup(device)
    loader = datamodule.train_dataloader() if stage == "train" else datamodule.val_dataloader()
    if isinstance(loader, list | tuple):
        loader = next(iter(loader), ())
    taken: list[tuple[dict[str, Any], dict[str, Tensor]]] = []
    captions: list[str] = []
    count = 0
    for batch in islice(loader, samples):
        batch = datamodule.on_before_batch_transfer(batch, 0)
        batch = datamodule.transfer_batch_to_device(batch, device, 0)
        batch = datamodule.pixels.on_after_batch_transfer(batch, 0)
        inputs, outputs = datamodule.encode(batch)
        if taken and inputs[PIXELS].shape[1:] != taken[0][0][PIXELS].shape[1:]:
            continue  # a bucket of another size
        b = len(outputs[LATENTS])
        if MASK in inputs and len(inputs[MASK]) == 1:
            inputs[MASK] = inputs[MASK].expand(b, *inputs[MASK].shape[1:])
        taken.append((inputs, outputs))
        captions += captions_of(batch) or []
        count += b
        if count >= samples:
            break
    datamodule.teardown("fit")
    if not taken:
        raise UserError(f"no batch: the {stage} data is empty; choose another stage, or look at the data")
    inputs, outputs = (_joined([part[which] for part in taken]) for which in (0, 1))
    return inputs, outputs, captions if len(captions) == count else None


def captions_of(batch: Any, key: Key | None = None) -> list[str] | None:
    """The captions in a user's batch: a list of strings at ``key``, or where they usually are; None without any."""
    for place in CAPTIONS if key is None else (key,):
        value = None
        if isinstance(batch, Mapping):
            value = batch.get(place)
        elif isinstance(place, int) and place < len(batch):
            value = batch[place]
        if isinstance(value, list | tuple) and value and all(isinstance(caption, str) for caption in value):
            return list(value)
    return None


def _columns(encoder: Encoder, inputs: Mapping[str, Any], outputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Header → ``b c h' w'`` images of the samples."""
    images = {key: _frame(image) for key, image in encoder.images(inputs).items()}
    columns = {"image": images[LATENTS]}
    if MASKED_LATENTS in images:
        mask = crop(unit_mask(inputs[MASK], inputs[PIXELS], "preview"), encoder.vae.spatial_compression)
        columns["mask\nover image"] = tinted(images[LATENTS], mask)
        columns["masked\nimage"] = images[MASKED_LATENTS]
    if encoder.vae.can_decode:
        for key in images:
            columns[f"decoded\n{key}"] = _decoded(encoder, outputs[key])
    if NOISE_MASK in outputs:
        columns["noise_mask\n+ latent_mask"] = _masks(outputs[NOISE_MASK], outputs[LATENT_MASK])
    columns["latents\nas colour"] = three_components(_frame(outputs[LATENTS]))
    return columns


def _decoded(encoder: Encoder, latents: Tensor) -> Tensor:
    """``b 3 h w``; one at a time, for it should fit wherever training does. Of clips the first frame alone."""
    first = latents[:, :, :1] if latents.ndim == 5 else latents
    return torch.cat([_frame(encoder.vae.decode(row)) for row in torch.split(first, 1)])


def _masks(noise_mask: Tensor, latent_mask: Tensor) -> Tensor:
    """``b 3 h w``: the noise mask in white, over it the latent mask in orange."""
    if latent_mask.shape[1] > 1:  # unshuffled: as large as the noise mask again
        latent_mask = F.pixel_shuffle(latent_mask, round(latent_mask.shape[1] ** 0.5))
    over = F.interpolate(latent_mask.float(), size=noise_mask.shape[-2:], mode="nearest")
    return tinted(noise_mask.float().expand(-1, 3, -1, -1), over, ORANGE, strength=0.6)


def _title(caption: Sequence[str], row: int, outputs: Mapping[str, Tensor]) -> str:
    title = caption[0] if caption else f"sample {row}"
    if NOISE_MASK in outputs:
        title += f" · {float(outputs[NOISE_MASK].mean()):.0%} masked"
    return f"{title} · latents' std {float(outputs[LATENTS].std()):.2f}"


def _joined(batches: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The tensors of several batches as those of one."""
    tensors = [name for name, value in batches[0].items() if isinstance(value, Tensor)]
    return {name: torch.cat([batch[name] for batch in batches]) for name in tensors}


def _first(values: Mapping[str, Any], b: int) -> dict[str, Any]:
    """The first samples of each tensor (a mask for all stays one)."""
    return {name: value[:b] for name, value in values.items() if isinstance(value, Tensor)}


def _frame(images: Tensor) -> Tensor:
    """``b c h w`` as it is; of clips ``b c f h w`` the first frame."""
    return images[:, :, 0] if images.ndim == 5 else images
