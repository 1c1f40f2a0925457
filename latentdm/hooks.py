"""What the batch-transfer hooks ask of Lightning: a batch's draws, callbacks to notify, models that go past them."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import inf
from typing import Any

import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn, TrainerStatus
from lightning.pytorch.utilities import CombinedLoader, rank_zero_warn
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor

from latentdm.batch import CAPTION, EPOCH, INDEX, MASK, PIXELS, BatchKeys, Key, Path, sample_ids
from latentdm.containers import is_frozen, rebuild
from latentdm.data.module import PixelDataModule
from latentdm.draws import Draws, FreshDraws
from latentdm.encoders.base import Encoder
from latentdm.errors import UserError, attributed
from latentdm.progress import training_epoch
from latentdm.stages import Stage
from latentdm.tensors import describe

HOOKS = ("on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer")
STEPS = ("training_step", "validation_step", "test_step", "predict_step")
_ATTRIBUTED = attributed("LatentDataModule")  # made once, as each batch enters it


def check_model(model: LightningModule) -> None:
    """A model that replaces the hooks, or fetches batches itself, would silently train on pixels.

    Raises:
        UserError: it does; naming the method and the remedy.
    """
    name = type(model).__name__
    for hook in HOOKS:
        if is_overridden(hook, model, LightningModule):
            raise UserError(
                f"LatentDataModule: {name} overrides {hook}, where the latents are made, and Lightning would call only "
                "one of the two; move that code into the pixel data module, whose hooks are called too"
            )
    for step in STEPS:
        code = getattr(getattr(model, step, None), "__code__", None)
        if code is not None and "dataloader_iter" in code.co_varnames[: code.co_argcount]:
            raise UserError(
                f"LatentDataModule: {name}.{step} takes dataloader_iter, which bypasses the batch-transfer hooks; "
                f"take batch and batch_idx instead: {step}(self, batch, batch_idx)"
            )


def unused_masks(stages: Sequence[Stage], keys: Mapping[str, Key]) -> str:
    """Why masks that a batch brings have no effect, as ``masks=random``; "" where a stage reads them.

    Args:
        stages: in their order.
        keys: our name → the user's.
    """
    for stage in stages:
        if any(keys.get(name, name) == MASK for name in stage.reads):
            return ""
        if MASK in stage.writes:
            return f"masks={_choice(stage, 'Mask')}"
    encoder = next((stage for stage in stages if isinstance(stage, Encoder)), None)
    return "" if encoder is None else f"encoder={_choice(encoder, 'Encoder')}"


def _choice(stage: Stage, kind: str) -> str:
    """What a stage is called in a config, as far as its class tells."""
    name = type(stage).__name__
    return name.removesuffix(kind).lower() if type(stage).__module__.startswith("latentdm.") else name


def has_own(module: Any, names: Sequence[str], base: type) -> bool:
    """Whether a module has methods of its own, by its class or set on it, where ``base`` has some of these names."""
    return any(getattr(getattr(module, name), "__func__", None) is not getattr(base, name) for name in names)


def check_sample(datamodule: Any) -> None:
    """Look into a sample for what the stages read, where batches hold what samples hold.

    Args:
        datamodule: a `latentdm.LatentDataModule` whose pixels are set up.

    Raises:
        UserError: something is missing; naming the stage and the remedies.
    """
    pixels, keys = datamodule.pixels, datamodule.keys
    if has_own(datamodule, ("train_dataloader",), PixelDataModule) or has_own(pixels, HOOKS, LightningDataModule):
        return  # which may add what samples lack
    sample = pixels.example()
    found = {} if sample is None else keys.find(sample)
    for name, stage in datamodule.line.needs.items() if found else ():
        if name != PIXELS and found.get(name) is None:
            raise UserError(keys.missing(sample, name, type(stage).__name__))


def is_example_input(batch: Any, trainer: Trainer) -> bool:
    """Whether it is the model's ``example_input_array``, which Lightning sends through the hooks as well."""
    model = trainer.lightning_module
    return model is not None and batch is not None and batch is model.example_input_array


def movable(batch: Any, pixels: LightningDataModule) -> Any:
    """A batch in a form that Lightning moves to a device, unless the data module of the pixels has a hook that does."""
    if type(batch) is not dict and is_frozen(batch) and not is_overridden("transfer_batch_to_device", pixels):
        return rebuild(batch, {})
    return batch


def check_bare(batch: Any, keys: BatchKeys, multiple: int) -> None:
    """Refuse what holds images and is no batch, instead of handing it to the model as it is.

    Args:
        batch: no dict, tuple, list or dataclass.
        keys: of the data module.
        multiple: what sides are cropped to: a smaller tensor is no image.

    Raises:
        UserError: it is a tensor of images, or an object that has some.
    """
    if isinstance(batch, Tensor):
        if keys.may_be_images(batch, multiple):
            raise UserError(
                f"LatentDataModule: the batch is a bare tensor ({describe(batch)}), and the results need names; yield "
                "a dict, as in {'pixels': images}"
            )
    elif isinstance(getattr(batch, str(keys.key(PIXELS)), None), Tensor):
        raise UserError(
            f"LatentDataModule: the batch is of the class {type(batch).__name__}, whose items cannot be exchanged; "
            "yield a dict, a tuple, a list or a dataclass"
        )


class BatchDraws:
    """The draws of a data module's batches."""

    def __init__(self) -> None:
        self._fresh = FreshDraws()
        self._training, self._epoch = False, 0  # outside of a trainer's training
        self._trainer = 0  # the id of that whose first training batch was seen

    @contextmanager
    def by_hand(self, training: bool, epoch: int) -> Iterator[None]:
        """What is drawn within is of this stage and epoch, unless a trainer or the batch says another one."""
        before = self._training, self._epoch
        self._training, self._epoch = training, epoch
        try:
            yield
        finally:
            self._training, self._epoch = before

    def __call__(self, found: Mapping[str, Any], seed: int, trainer: Trainer | None, path: Path) -> Draws | None:
        """The draws of a batch; None as long as nobody can tell how many samples it has.

        Args:
            found: what the batch holds under our names.
            seed: of the data module.
            trainer: whose stage counts, and whose epoch where the batch brings none; evaluation draws as in epoch 0, so
                that its figures compare.
            path: where the batch comes from.

        Returns:
            Keyed on ``index``, else on rank, loader, batch and row; without a running trainer on a count of the calls.
        """
        training, epoch = self._training, self._epoch
        if trainer is not None and trainer.training:
            training, epoch = True, training_epoch(trainer)
            if self._trainer != id(trainer):
                self._trainer = id(trainer)
                if (repeats := repeated_batches(trainer)) is not None:
                    rank_zero_warn(f"LatentDataModule: {repeats}")
        if (travelled := found.get(EPOCH)) is not None:
            epoch = int(travelled[0])
        count = _count(found)
        if count is None:
            return None
        if (index := found.get(INDEX)) is not None:
            with _ATTRIBUTED:
                return Draws(seed, epoch, sample_ids(index, count), training)
        if trainer is None or trainer.state.status != TrainerStatus.RUNNING:
            return Draws(seed, epoch, self._fresh(count).ids, training)
        loader = ".".join(map(str, path))
        prefix = f"rank{trainer.global_rank}.loader{loader}.batch{_batch_number(trainer)}"
        return Draws(seed, epoch, [f"{prefix}.{row}" for row in range(count)], training)


def repeated_batches(trainer: Trainer) -> str | None:
    """What a fit that goes on sees twice or not at all, at its first batch; None where all that follows is right."""
    seen = trainer.fit_loop.epoch_loop.batch_progress.current.ready
    loaders = CombinedLoader(trainer.train_dataloader).flattened
    batches = trainer.num_training_batches
    from_an_end = training_epoch(trainer) != trainer.current_epoch  # or on from a run that did
    if from_an_end and not 0 < seen < batches:
        return (
            "the fit goes on from the end of an epoch, and in a run of max_steps Lightning counts the next one as over "
            f"before it begins, or after one batch, as it does not know where {type(loaders[0]).__name__} is: the "
            "samples of a whole epoch are not seen. Set max_epochs instead, or use a loader of latentdm.data"
        )
    stateless = [type(loader).__name__ for loader in loaders if not hasattr(loader, "load_state_dict")]
    if not stateless or not seen or (from_an_end and batches == inf):
        return None  # of a loader without a length the next epoch is whole
    return (
        f"the fit goes on after {seen} batches of this epoch, but {stateless[0]} keeps no state and begins the epoch "
        f"anew: {seen} batches are seen twice if its order is fixed, others if not, and as many at its end not at all. "
        "torchdata.stateful_dataloader.StatefulDataLoader instead of DataLoader goes on where the checkpoint was saved"
    )


def _count(found: Mapping[str, Any]) -> int | None:
    """How many samples a batch holds; None where nothing in it tells."""
    for name in (PIXELS, INDEX, CAPTION):
        held: Any = found.get(name)
        if isinstance(held, Tensor):
            if held.ndim:
                return held.shape[0]  # len of a tensor is slow
        elif hasattr(held, "__len__"):
            return len(held)
    return None


def _batch_number(trainer: Trainer) -> int:
    """The number of a batch in its epoch or evaluation, as Lightning counts it and saves it in checkpoints."""
    epoch = trainer.fit_loop.epoch_loop
    loops: dict[TrainerFn | None, Any] = {
        TrainerFn.FITTING: epoch if trainer.training else epoch.val_loop,
        TrainerFn.VALIDATING: trainer.validate_loop,
        TrainerFn.TESTING: trainer.test_loop,
        TrainerFn.PREDICTING: trainer.predict_loop,
    }
    return int(loops[trainer.state.fn].batch_progress.current.ready)


def rounded_pixels(found: Mapping[str, Any], trainer: Trainer) -> str | None:
    """What a precision plugin, which casts before any hook, has taken from float images; None where it took nothing."""
    pixels = found.get(PIXELS)
    if not isinstance(pixels, Tensor) or pixels.dtype not in (torch.float16, torch.bfloat16):
        return None
    return (
        f"{PIXELS} came as {describe(pixels)}: precision={trainer.precision} rounds float images before they are "
        "encoded, by up to half an 8-bit level; yield uint8, which loses nothing and crosses to the device at half the "
        "bytes"
    )


def notify(trainer: Trainer, hook: str, *observed: Any) -> None:
    """Call a hook of those callbacks that have it: see `latentdm.callbacks.EncodeCallback`."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if hasattr(callback, hook):
            getattr(callback, hook)(trainer, trainer.lightning_module, *observed)
