"""`Stage`: the one form of every step of the way of a batch; and the `Line` that runs them in order."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, Self

import torch

from latentdm.batch import MASK
from latentdm.draws import Draws
from latentdm.errors import UserError, UserTypeError
from latentdm.shown import one_line


class Stage(ABC):
    """A step that reads some of a batch and writes more of it.

    A data module runs its stages in a fixed order: on the host captions and tokenizers; on the device augmentation,
    masks, the encoder, the text encoder, and then a user's own, which still see the pixels. All names are ours, those
    of the table in README; ``keys`` of the data module turns them into the user's.

    Attributes:
        reads: what must be there.
        writes: what it gives.
        drops: what the batch no longer holds when it reaches the model, because this stage has used it up.
        on_host: runs before the batch is sent to the device.
        training_only: is left out in validation, test and predict.

    Example:
        >>> class Brightness(Stage):
        ...     reads, writes = ("pixels",), ("brightness",)
        ...
        ...     def __call__(self, batch, draws):
        ...         return {"brightness": batch["pixels"].float().mean(dim=(1, 2, 3)) / 255}
    """

    reads: tuple[str, ...] = ()
    writes: tuple[str, ...] = ()
    drops: tuple[str, ...] = ()
    on_host: bool = False
    training_only: bool = False

    @property
    def channels(self) -> dict[str, int]:
        """Name → channels, of what it writes at latent resolution: what a model may concatenate."""
        return {}

    def setup(self, device: torch.device | str) -> None:  # noqa: B027  # most hold nothing
        """Move what it holds to a device: once on every rank before the first batch, and to the CPU after the last."""

    def __repr__(self) -> str:
        return one_line(self)

    @abstractmethod
    def __call__(self, batch: Mapping[str, Any], draws: Draws) -> dict[str, Any]:
        """What it writes, and nothing else.

        Args:
            batch: what the batch holds so far under our names, channels first.
            draws: the random numbers of its samples. ``draws.training`` tells training from evaluation.

        Raises:
            UserError: what it reads has a wrong shape, dtype or range.
        """


class MissingKeyError(UserError):
    """A batch lacks what a stage reads.

    Args:
        name: ours.
        stage: the one that reads it.
    """

    def __init__(self, name: str, stage: Stage) -> None:
        super().__init__(f"{type(stage).__name__}: the batch has no {name!r}")
        self.name = name
        self.stage = type(stage).__name__


class Line:
    """Stages in the order in which they run.

    Args:
        stages: those of the host first.

    Raises:
        UserError: one of the host comes after one of the device, or two write the same name that neither reads.
    """

    def __init__(self, stages: Sequence[Stage]) -> None:
        self.stages = tuple(stages)
        self.host = tuple(stage for stage in stages if stage.on_host)
        self.device = tuple(stage for stage in stages if not stage.on_host)
        self.drops = tuple(dict.fromkeys(name for stage in stages for name in stage.drops))
        self.names = frozenset(name for stage in stages for name in (*stage.reads, *stage.writes, *stage.drops))
        writers: dict[str, Stage] = {}
        for before, stage in zip((None, *stages), stages, strict=False):
            name = type(stage).__name__
            if stage.on_host and before is not None and not before.on_host:
                raise UserError(
                    f"LatentDataModule: {name} runs on the host (on_host), but stands behind {type(before).__name__}, "
                    "which runs on the device; put it in front"
                )
            for written in stage.writes:
                if written in writers and written not in stage.reads:
                    raise UserError(
                        f"LatentDataModule: {type(writers[written]).__name__} and {name} both write {written!r}; let "
                        "one of them give it another name"
                    )
                writers[written] = stage

    @classmethod
    def arrange(
        cls,
        encoder: Stage,
        *,
        masks: Stage | None = None,
        augment: Stage | None = None,
        captions: Stage | None = None,
        text: Stage | None = None,
        stages: Sequence[Stage] = (),
    ) -> Self:
        """The line of a data module, in its one order; see `latentdm.LatentDataModule` for the arguments.

        Raises:
            UserTypeError: one of them is no stage.
        """
        own = {f"stages[{number}]": stage for number, stage in enumerate(stages)}
        on_host = {name: stage for name, stage in own.items() if getattr(stage, "on_host", False)}
        asks_for_mask = any(MASK in getattr(stage, "reads", ()) for stage in (encoder, *stages))
        named: dict[str, Any] = {
            "captions": captions,
            "text.tokenizer": getattr(text, "tokenizer", None),
            **on_host,
            "augment": augment,
            "masks": masks if asks_for_mask else None,
            "encoder": encoder,
            "text": text,
            **{name: stage for name, stage in own.items() if name not in on_host},
        }
        for name, stage in named.items():
            if not isinstance(stage, Stage) and (stage is not None or name in own):
                raise UserTypeError(f"LatentDataModule: {name} must be a Stage, got {type(stage).__name__}")
        return cls([stage for stage in named.values() if stage is not None])

    @property
    def channels(self) -> dict[str, int]:
        """Name → channels, of all that is written at latent resolution."""
        return {name: channels for stage in self.stages for name, channels in stage.channels.items()}

    @property
    def needs(self) -> dict[str, Stage]:
        """What a batch must bring: name → the stage that reads it, of all that no stage before that one writes."""
        needs: dict[str, Stage] = {}
        written: set[str] = set()
        for stage in self.stages:
            needs |= {name: stage for name in stage.reads if name not in written and name not in needs}
            written |= set(stage.writes)
        return needs

    def setup(self, device: torch.device | str) -> None:
        """Move all stages to a device."""
        for stage in self.stages:
            stage.setup(device)

    def run(self, batch: Mapping[str, Any], draws: Draws, on_host: bool) -> dict[str, Any]:
        """Run the stages of the host, or those of the device.

        Args:
            batch: under our names.
            draws: the random numbers of its samples.
            on_host: which stages.

        Returns:
            All that they wrote.

        Raises:
            MissingKeyError: a stage reads what neither the batch nor a stage before it gives.
        """
        written: dict[str, Any] = {}
        seen = dict(batch)
        for stage in self.host if on_host else self.device:
            if stage.training_only and not draws.training:
                continue
            for name in stage.reads:
                if seen.get(name) is None:
                    raise MissingKeyError(name, stage)
            made = stage(seen, draws)
            seen.update(made)
            written.update(made)
        return written
