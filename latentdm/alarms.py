"""Alarms of latents, masks and batches that look wrong, in words that say what to check."""

from torch import Tensor

STD_RANGE = (0.5, 2.0)
"""The range of the standard deviation of normalised latents.

Every family scales to about 1, channel by channel or over all; single channels and plain images stray by a third. A
factor forgotten or applied twice gives 5.5 or 0.18 for Stable Diffusion, 2.8 or 0.36 for FLUX.
"""

MASK_RANGE = (0.001, 0.95)
"""A mask that covers less or more of its image counts as empty or full."""

UNUSABLE_SHARE = 0.9
"""From this share of empty (or of full) masks on, masks are wrong."""

REPEAT_SHARE = 0.5
"""From this share on, repeats are wrong: a few come with samplers that draw with replacement."""


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


def mask_alarm(shares: Tensor, bounds: tuple[float, float] = MASK_RANGE) -> str | None:
    """What is wrong with masks that cover these shares of their images, ``n``; None where nothing is."""
    low, high = bounds
    empty, full = float((shares < low).float().mean()), float((shares > high).float().mean())  # NaN without masks
    if empty >= UNUSABLE_SHARE:
        return (
            f"{empty:.0%} of the masks cover less than {low:.1%} of their image, so that there is next to nothing to "
            "repaint; check that masks are not inverted (white = repaint), that they belong to these images, and that "
            "float masks lie in 0…1"
        )
    if full >= UNUSABLE_SHARE:
        return (
            f"{full:.0%} of the masks cover more than {high:.0%} of their image, so that the model sees next "
            "to nothing of it; check that masks are not inverted (white = repaint; masks=alpha has invert), and "
            "grow_mask_by or mask_offset"
        )
    return None


def repeated_batches_alarm(share: float) -> str | None:
    """What is wrong where this share of an epoch's samples has latents that it had before; None where nothing is."""
    if share < REPEAT_SHARE:
        return None
    return (
        f"{share:.0%} of the samples have latents that were there before in the same epoch, so that the model sees "
        "little that is new; check the sampler, and that the dataset gives each sample its own image and index"
    )


def repeated_ranks_alarm(share: float) -> str | None:
    """What is wrong where ranks share their image in this share of the steps; None where nothing is."""
    if share < REPEAT_SHARE:
        return None
    return (
        f"in {share:.0%} of the steps several ranks read the same image, so that they do the same work; check that the "
        "sampler shares the dataset out (use_distributed_sampler=True, or a sampler with num_replicas and rank), and "
        "that random crops are not seeded alike"
    )
