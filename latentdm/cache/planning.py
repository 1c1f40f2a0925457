"""What of a data module can be looked up, and how; what cannot says so, with the remedy."""

from typing import TYPE_CHECKING, Any

from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities.model_helpers import is_overridden

from latentdm.batch import MASK, PIXELS, SEGMENTATION, SOURCE, SOURCE_LATENTS
from latentdm.cache.keys import described
from latentdm.cache.samples import FIXED, OWN, VARIANTS, Plan, can_look_up, draws_freely, look_up
from latentdm.cache.steps import NO_KEY, CachedStep
from latentdm.cache.store import Store
from latentdm.data.dataset import PixelDataset
from latentdm.data.module import PixelDataModule
from latentdm.errors import UserError
from latentdm.hooks import HOOKS

if TYPE_CHECKING:
    from latentdm.cache.cache import Cache

SETS = ("train_set", "val_set", "test_set", "predict_set")

LOADERS = ("train_dataloader", "val_dataloader", "test_dataloader", "predict_dataloader")

MOVED = {PIXELS, SOURCE, MASK, SEGMENTATION}
"""What lies on an image, or is one."""


class Planner:
    """Lets the data sets of one data module look their samples up.

    Args:
        cache: whose settings these are.
        datamodule: a `latentdm.LatentDataModule` that is set up.
        store: where entries are.
    """

    def __init__(self, cache: "Cache", datamodule: Any, store: Store) -> None:
        self.cache = cache
        self.datamodule = datamodule
        self.store = store

    def look_up(self) -> None:
        """Plan for each data set, or say why not."""
        pixels, why, keyed = self.datamodule.pixels, self._reason(), self.cache.keyed
        if why:
            self._say_not(why)
        keyed.plan = None if why else self.plan(None, training=False)
        keyed.augmented = self.datamodule.augment is not None
        if not isinstance(pixels, PixelDataModule):
            keyed.no_key = NO_KEY.format(type(pixels).__name__)
            if not why:
                self._tell(f"batches of {type(pixels).__name__} are looked up by their cache_key, a text an image")
            return
        for name in SETS:
            dataset = getattr(pixels, name)
            if dataset is None:
                continue
            able = can_look_up(dataset)
            its_why = why or self._set_reason(dataset, able, name == "train_set")
            if its_why and not why:
                self._say_not(f"{type(pixels).__name__}'s {name}: {its_why}")
            if able:
                look_up(dataset, None if its_why else self.plan(dataset, name == "train_set"))

    def _reason(self) -> str:
        """Why nothing can be cached; "" if something can."""
        encoder, pixels = self.datamodule.encoder, self.datamodule.pixels
        kind = type(encoder)
        if not all(getattr(kind, name).__module__.startswith("latentdm.encoders.") for name in ("_prepare", "_encode")):
            return f"{kind.__name__} prepares images by code of its own, which no key can tell; use latentdm's encoders"
        for stage in self.datamodule.line.host:
            if MOVED & set(stage.writes):
                name = type(stage).__name__
                return f"{name} changes images on the host, which no key can tell; let the data do that"
        for name in LOADERS if isinstance(pixels, PixelDataModule) else ():
            if not getattr(type(pixels), name).__module__.startswith("latentdm."):
                return f"{type(pixels).__name__} has a {name} of its own, whose batches may need images; use latentdm's"
        for hook in HOOKS:
            if is_overridden(hook, pixels, LightningDataModule):
                return (
                    f"{type(pixels).__name__} overrides {hook}, and no key can tell what that does to images; make it "
                    "one of the stages, which run behind the encoder"
                )
        return ""

    def _set_reason(self, dataset: PixelDataset, able: bool, training: bool) -> str:
        """Why one data set cannot be cached; "" if it can."""
        if not able:
            return NO_KEY.format(type(dataset).__name__)
        if not training:
            return ""
        if self.cache.variants is not None:
            try:
                self._augment()
            except UserError as error:
                return str(error)
            return ""
        if draws_freely(dataset):
            return "each epoch draws other crops; set cache.variants, say 4 crops an image, or random_crop=false"
        if self.datamodule.augment is not None:
            return "augment changes images anew each epoch; set cache.variants, say 4 an image, or leave augment out"
        return ""

    def _augment(self) -> Any:
        """What augments, as JSON."""
        augment = self.datamodule.augment
        return None if augment is None else described(augment, type(augment).__name__)

    def plan(self, dataset: PixelDataset | None, training: bool) -> Plan:
        """How a data set's samples are looked up; with None, those of batches with a ``cache_key``."""
        datamodule, encoder = self.datamodule, self.datamodule.encoder
        augment = datamodule.augment if training else None
        drawn = augment is not None or (dataset is not None and draws_freely(dataset))
        if drawn and training:
            self._tell(f"crops are drawn from variants={self.cache.variants} an image")
        others = [s for s in datamodule.line.device if s is not encoder and not isinstance(s, CachedStep)]
        inpaints = MASK in encoder.reads
        masked, mask, reads_mask = None, None, False
        if inpaints and not any(MASK in stage.reads for stage in others):  # else they want masks as they were drawn
            masked, mask, reads_mask = self._masked(augment is not None)
        looks = any(MOVED & set(stage.reads) for stage in others)
        return Plan(
            store=self.store,
            identity=self.cache.identity,
            multiple=encoder.multiple or encoder.vae.spatial_compression,
            variants=self.cache.variants if drawn else None,
            augment=self._augment() if training else None,
            masked=masked,
            mask=mask,
            mask_variants=self.cache.mask_variants or 1,
            reads_mask=reads_mask,
            source=SOURCE_LATENTS in encoder.writes,
            needs_pixels=looks or datamodule.keep_pixels or (inpaints and masked is None),
            seed=datamodule.seed,
            training=training,
        )

    def _masked(self, augmented: bool) -> tuple[str | None, Any, bool]:
        """Which masked images have entries, by what masks, and whether these read the data set's own."""
        encoder, masks = self.datamodule.encoder, self.datamodule.masks
        settings = [encoder.grow_mask_by, encoder.mask_offset, encoder.fill]
        kind = type(masks).__name__
        if masks is None or kind == "BatchMask":
            if augmented:
                self._tell("masked images are encoded each time, as augment moves the data's own masks")
                return None, None, True
            return OWN, settings, True
        fixed = kind == "AlphaMask"
        if not fixed and self.cache.mask_variants is None:
            return None, None, False
        if unknown := set(masks.reads) - {PIXELS, MASK}:
            self._say_not(f"masked images: {kind} reads {min(unknown)!r} of the batch, which no key can tell")
            return None, None, False
        try:
            source = described(masks, kind)
        except UserError as error:
            self._say_not(f"masked images: {error}")
            return None, None, False
        if not fixed:
            self._tell(f"masks are drawn from mask_variants={self.cache.mask_variants} an image")
        return FIXED if fixed else VARIANTS, [settings, source], MASK in masks.reads

    def _say_not(self, why: str) -> None:
        self.cache.said.warn(f"Cache: not cached: {why}")

    def _tell(self, what: str) -> None:
        self.cache.said.info(f"Cache: {what}")
