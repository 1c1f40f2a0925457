"""What a batch looks like to the model: its images, masks and latents as a picture, and what to check in words.

Shapes: ``b`` batch, ``h w`` pixels after the crop, ``z`` latent channels, ``r`` the VAE's factor; of clips the first
frame is shown.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from latentdm.alarms import STD_RANGE, latent_std_alarm, mask_alarm
from latentdm.batch import LATENT_MASK, LATENTS, MASK, MASKED_LATENTS, NOISE_MASK, PIXELS, SOURCE
from latentdm.cache.rows import is_blank
from latentdm.encoders.base import Encoder
from latentdm.preview.samples import first
from latentdm.preview.sheet import ORANGE, Sheet, three_components, tinted
from latentdm.tensors import dtype_name, unit_levels, unit_mask


@dataclass
class Drawn:
    """Samples of one size, as they are drawn.

    Attributes:
        size: what images become of which latents, in a sentence.
        columns: header → ``b 3 h w`` or ``b 1 h w`` in 0…1; those at latent resolution are smaller.
        titles: one a sample.
        figures: what goes behind each.
    """

    size: str
    columns: dict[str, Tensor]
    titles: list[str]
    figures: list[str]


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
        inputs: what it was given: ``pixels``, ``mask``, ``source``.
        outputs: what it gave: ``latents`` and, if it inpaints, ``masked_latents``, ``noise_mask``, ``latent_mask``.
        captions: titles of the rows.
        samples: how many of the batch; None draws all.
        notes: sentences to go below, such as those of `describe`.

    Returns:
        An RGB picture.
    """
    b = min(samples or len(outputs[LATENTS]), len(outputs[LATENTS]))
    drawn = rows(encoder, first(inputs, b), first(outputs, b), captions)
    titles = [f"{title} · {told}" for title, told in zip(drawn.titles, drawn.figures, strict=True)]
    return _sheet(drawn.columns, titles, notes)


def rows(
    encoder: Encoder,
    inputs: Mapping[str, Any],
    outputs: Mapping[str, Tensor],
    captions: Sequence[str] | None = None,
) -> Drawn:
    """What `preview` draws, before it is one picture.

    Args:
        encoder: as for `preview`.
        inputs: as for `preview`.
        outputs: as for `preview`.
        captions: as for `preview`.
    """
    b = len(outputs[LATENTS])
    images, columns = _given(encoder, inputs, outputs)
    masked = [""] * b
    if NOISE_MASK in outputs:
        shares = (part.tolist() for part in mask_shares(encoder, inputs, outputs))
        masked = [f"mask {mask:.0%}, noise_mask {moved:.0%} · " for mask, moved in zip(*shares, strict=True)]
    figures = [
        f"{masks}latents' std {float(latents.std()):.2f}"
        for masks, latents in zip(masked, outputs[LATENTS], strict=True)
    ]
    if MASKED_LATENTS in images:
        columns["mask\nover image"] = tinted(images[LATENTS], _mask(encoder, inputs, b))
        columns["masked\nimage"] = images[MASKED_LATENTS]
    if encoder.vae.can_decode:
        for key in images:
            columns[f"decoded\n{key}"] = _decoded(encoder, outputs[key])
    if NOISE_MASK in outputs:
        columns["noise_mask\n+ latent_mask"] = _both_masks(outputs[NOISE_MASK], outputs[LATENT_MASK])
    columns["latents\nas colour"] = three_components(_frame(outputs[LATENTS]))
    return Drawn(_sizes(encoder, inputs, outputs), columns, _titles(captions, b), figures)


def before_and_after(
    encoder: Encoder,
    inputs: Mapping[str, Any],
    outputs: Mapping[str, Tensor],
    sampled: Tensor,
    captions: Sequence[str] | None = None,
) -> Image.Image:
    """Draw what a model made: image, source, masked image, the sample, and the sample in the masked part.

    Args:
        encoder: as for `preview`.
        inputs: as for `preview`.
        outputs: as for `preview`.
        sampled: of the first ``b`` samples, latents ``b z h/r w/r`` or pixels ``b 3 h w`` float in 0…1.
        captions: titles of the rows.

    Returns:
        An RGB picture; without masks, of images and samples alone.
    """
    b = len(sampled)
    inputs, outputs = first(inputs, b), first(outputs, b)
    images, columns = _given(encoder, inputs, outputs)
    is_latents = sampled.shape[1:] == outputs[LATENTS].shape[1:]
    made = _decoded(encoder, sampled) if is_latents else sampled
    kept = columns.get("source", columns["image"]).to(made.device)
    if MASKED_LATENTS in images:
        columns["masked\nimage"] = images[MASKED_LATENTS]
    columns["sampled"] = made
    if MASKED_LATENTS in images:
        hole = outputs[NOISE_MASK].to(made.device)
        columns["sampled,\nin the image"] = kept * (1 - hole) + made * hole
    return _sheet(columns, _titles(captions, b))


def describe(encoder: Encoder, inputs: Mapping[str, Any], outputs: Mapping[str, Tensor]) -> list[str]:
    """What a person should check in a preview, a sentence or two each; what is wrong begins with ``CHECK``."""
    vae, latents = encoder.vae, outputs[LATENTS]
    r = vae.spatial_compression
    lines = [_sizes(encoder, inputs, outputs)]
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
        mask, moved = mask_shares(encoder, inputs, outputs)
        lines.append(
            "Masks: white = repaint (red over the image, orange at latent resolution). The mask covers "
            f"{_spread(mask)} of the image, noise_mask, the mask as the encoder grew or shrank it, {_spread(moved)}; "
            "is the mask the part which the model shall fill?"
        )
        if getattr(encoder, "latent_mask", None) == "nearest":
            lines.append(
                f"latent_mask=nearest takes the top left pixel of each {r} by {r} block, as in Stable Diffusion: "
                "orange should lie half a block further right and down than white, on average."
            )
        alarms.append(mask_alarm(moved))
    return lines + [f"CHECK: {alarm}." for alarm in alarms if alarm]


def _sizes(encoder: Encoder, inputs: Mapping[str, Any], outputs: Mapping[str, Tensor]) -> str:
    """What images become of which latents, by what, in a sentence."""
    vae, latents = encoder.vae, outputs[LATENTS]
    whole, cropped, small = (
        f"{value.shape[-1]} by {value.shape[-2]}" for value in (inputs[PIXELS], encoder.crop(inputs[PIXELS]), latents)
    )
    return (
        f"Images: {whole} pixels{'' if cropped == whole else f', cropped to {cropped},'} become {small} latents of "
        f"{latents.shape[1]} channels, by {vae.class_name} "
        f"(1/{vae.spatial_compression} of the side, {dtype_name(vae.dtype)} on {vae.device})."
    )


def mask_shares(encoder: Encoder, inputs: Mapping[str, Any], outputs: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """``b`` and ``b``: the share of its image that each mask covers, and each noise mask."""
    moved = outputs[NOISE_MASK]
    mask = _mask(encoder, inputs, len(moved))
    return mask.float().flatten(1).mean(1), moved.float().flatten(1).mean(1)


def _decoded(encoder: Encoder, latents: Tensor) -> Tensor:
    """``b 3 h w``; one at a time, for it should fit wherever training does. Of clips the first frame alone."""
    first = latents[:, :, :1] if latents.ndim == 5 else latents
    return torch.cat([_frame(encoder.vae.decode(row)) for row in torch.split(first, 1)])


def _both_masks(noise_mask: Tensor, latent_mask: Tensor) -> Tensor:
    """``b 3 h w``: the noise mask in white, over it the latent mask in orange."""
    if latent_mask.shape[1] > 1:  # unshuffled: as large as the noise mask again
        latent_mask = F.pixel_shuffle(latent_mask, round(latent_mask.shape[1] ** 0.5))
    over = F.interpolate(latent_mask.float(), size=noise_mask.shape[-2:], mode="nearest")
    return tinted(noise_mask.float().expand(-1, 3, -1, -1), over, ORANGE, strength=0.6)


def _given(
    encoder: Encoder, inputs: Mapping[str, Any], outputs: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The images that are encoded, under the keys of their latents, and the first columns.

    These are the image, and the picture that the model is shown where it is another one. Where a cache had the latents
    and no image was read, those latents are decoded.
    """
    if is_blank(inputs) and encoder.vae.can_decode:
        inputs = {**inputs, PIXELS: _decoded(encoder, outputs[LATENTS])}
    images = {key: _frame(image) for key, image in encoder.images(inputs).items()}
    columns = {"image": images[LATENTS]}
    if SOURCE in inputs:
        source = unit_levels(_frame(inputs[SOURCE])[:, :3])
        columns["source"] = encoder.crop(source).expand(-1, 3, -1, -1)
    return images, columns


def _mask(encoder: Encoder, inputs: Mapping[str, Any], b: int) -> Tensor:
    """``b 1 h w`` in 0…1: the mask that the encoder was given, cropped."""
    return encoder.crop(unit_mask(inputs[MASK], inputs[PIXELS])).expand(b, -1, -1, -1)


def _spread(shares: Tensor) -> str:
    """Mean, smallest and largest share."""
    return f"{float(shares.mean()):.0%} ({float(shares.min()):.0%} to {float(shares.max()):.0%})"


def _titles(captions: Sequence[str] | None, b: int) -> list[str]:
    """A title a sample: its caption, or else its number."""
    if captions is None:
        return [f"sample {row}" for row in range(b)]
    return [caption or "(no caption)" for caption in captions[:b]]


def _sheet(columns: Mapping[str, Tensor], titles: Sequence[str], notes: Sequence[str] = ()) -> Image.Image:
    """Header → ``b c h w`` images; the first ones give the size of the tiles."""
    height, width = columns["image"].shape[-2:]
    rows = [[images[row] for images in columns.values()] for row in range(len(titles))]
    return Sheet(list(columns), (width, height)).draw(rows, titles, notes)


def _frame(images: Tensor) -> Tensor:
    """``b c h w`` as it is; of clips ``b c f h w`` the first frame."""
    return images[:, :, 0] if images.ndim == 5 else images
