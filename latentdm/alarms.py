"""What tells that latents or masks are wrong, in words that say where to look: for `LatentStats` and the preview."""

STD_RANGE = (0.5, 2.0)
"""Where the standard deviation of normalised latents may lie.

Every family scales to about 1, channel by channel or over all; single channels and plain images stray by a third. A
factor forgotten or applied twice gives 5.5 or 0.18 for Stable Diffusion, 2.8 or 0.36 for FLUX.
"""

MASK_RANGE = (0.001, 0.95)
"""A mask that covers less or more of its image counts as empty or full."""

MOST = 0.9
"""Nearly always: in this share of the samples."""


def latent_std_alarm(std: float, bounds: tuple[float, float] = STD_RANGE) -> str | None:
    """What is wrong with latents of this standard deviation; None where nothing is."""
    low, high = bounds
    if low <= std <= high:
        return None
    what = "not finite" if std != std else "far above 1" if std > high else "far below 1"
    return (
        f"the latents' standard deviation is {std:.2f}, {what}: models expect about 1 ({low:g}…{high:g}); check that "
        "the autoencoder's config has the scaling_factor (or latents_mean and latents_std) of its model, and that "
        "nothing else scales the latents: FrozenVAE has done it already"
    )


def mask_alarm(empty: float, full: float, bounds: tuple[float, float] = MASK_RANGE) -> str | None:
    """What is wrong where these shares of the masks are empty and full; None where nothing is."""
    low, high = bounds
    if empty >= MOST:
        return (
            f"{empty:.0%} of the masks cover less than {low:.1%} of their image, so that there is next to nothing to "
            "repaint; check that masks are not inverted (white = repaint), that they belong to these images, and that "
            "float masks lie in 0…1"
        )
    if full >= MOST:
        return (
            f"{full:.0%} of the masks cover more than {high:.0%} of their image, so that the model sees next "
            "to nothing of it; check that masks are not inverted (white = repaint; masks=alpha has invert), and "
            "grow_mask_by or mask_offset"
        )
    return None
