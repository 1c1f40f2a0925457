"""``encode_ahead``: while a step trains on one batch, the next one is fetched, transferred and encoded.

A training loader yields its batches as `Upcoming` ones, which pass Lightning's hooks untouched. When
`latentdm.LatentDataModule` hands one over, it begins the one behind it, on a stream of its own.
"""

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from lightning.fabric.utilities.apply_func import apply_to_collection  # type: ignore[attr-defined]
from lightning.pytorch.utilities import CombinedLoader, rank_zero_warn
from torch import Tensor

from latentdm.loaders import derived

Join = Callable[..., None]
"""Called with tensors in any collection: lets the trainer's stream wait for what was queued when it was made, and keeps
their memory from being reused before the trainer's stream is done with them."""


def _nothing(*made: Any) -> None:
    """On a CPU there is nothing to wait for."""


@dataclass
class Begun:
    """A batch that is being encoded.

    Args:
        batch: the user's, on the device.
        transferred: joins what was queued until it was there.
        read: what it holds under our names.
        inputs: the same, augmented and with the mask that was made.
        finish: waits for the encoder's results; None where there is nothing to encode.
        encoded: joins what was queued until they were there.
    """

    batch: Any
    transferred: Join
    read: dict[str, Any] = field(default_factory=dict)
    inputs: dict[str, Any] = field(default_factory=dict)
    finish: Callable[[], dict[str, Tensor]] | None = None
    encoded: Join = _nothing


class Upcoming:
    """A batch as the loader yields it, on its way to the step.

    Attributes:
        batch: what the loader made.
        begun: its encoding, or what went wrong with it; None before it began.
    """

    def __init__(self, batch: Any, batches: "_Batches") -> None:
        self.batch = batch
        self.begun: Begun | Exception | None = None
        # In a circle of references a whole batch would stay on the device until Python looks for circles.
        self._batches = weakref.ref(batches)
        self._next: Upcoming | None = None

    def taken(self) -> tuple[Any, Begun | Exception | None]:
        """``batch`` and ``begun``, of which this keeps nothing: Lightning holds on to it during the step."""
        taken = self.batch, self.begun
        self.batch = self.begun = None
        return taken

    def next(self) -> "Upcoming | None":
        """The batch behind this one, fetched now if it was not yet; None where there is none."""
        batches = self._batches()
        if self._next is None and batches is not None:
            batches.look_ahead()
        return self._next


class _Batches:
    """A loader's iterator that can look one batch ahead.

    While it has, ``loader._state_before`` is the loader's state from before: a checkpoint may know nothing of a batch
    that no step has seen. It outlives the iterator, for a checkpoint that is saved when a fit was stopped.
    """

    def __init__(self, batches: Iterator[Any], loader: Any, kind: Any) -> None:
        self._batches = batches
        self._loader = loader
        self._kind = kind
        self._held: Upcoming | Exception | None = None
        self._last: weakref.ref[Upcoming] | None = None

    def __iter__(self) -> "_Batches":
        return self

    def __next__(self) -> Upcoming:
        held, self._held, self._loader._state_before = self._held, None, None
        if isinstance(held, Exception):
            raise held
        return held or self._fetch()

    def look_ahead(self) -> None:
        """Fetch a batch and hold it back. What goes wrong is held back as well: its turn is after this step."""
        if self._held is None:
            if hasattr(self._kind, "state_dict"):
                self._loader._state_before = self._kind.state_dict(self._loader)
            try:
                self._held = self._fetch()
            except Exception as error:  # StopIteration among them
                self._held = error

    def _fetch(self) -> Upcoming:
        batch = Upcoming(next(self._batches), self)
        last = None if self._last is None else self._last()
        if last is not None:
            last._next = batch
        self._last = weakref.ref(batch)
        return batch


def looking_ahead(loader: Any, training: Callable[[], bool]) -> None:
    """Let the trainer get `Upcoming` batches of a loader.

    Args:
        loader: any iterable that is no collection of loaders; with one, this has no effect and warns.
        training: whether a fit is running; otherwise the batches are given as they are.
    """
    kind = type(loader)

    def iterate(self: Any, batches: Any) -> Any:
        if not training():
            return batches
        self._state_before = None
        return _Batches(iter(batches), self, kind)

    def state_dict(self: Any) -> Any:
        return kind.state_dict(self) if self._state_before is None else self._state_before

    members = {"state_dict": state_dict} if hasattr(kind, "state_dict") else {}
    if isinstance(loader, CombinedLoader) or not derived(loader, iterate, _state_before=None, **members):
        rank_zero_warn(
            f"LatentDataModule: encode_ahead=1 has no effect: it takes one train loader, got {kind.__name__}; set it "
            "to 0, or return a single loader"
        )


class SideStream:
    """A CUDA stream beside the trainer's. On other devices what is begun on it is done at once."""

    def __init__(self) -> None:
        self._stream: Any = None

    def __getstate__(self) -> dict[str, Any]:
        """A copy makes a stream of its own."""
        return {"_stream": None}

    @contextmanager
    def running(self, device: torch.device) -> Iterator[Callable[[], Join]]:
        """Queue what follows behind all that the trainer has queued so far, beside all that comes next.

        Gives a function that makes a `Join` for what was queued until then.
        """
        if device.type != "cuda":
            yield lambda: _nothing
            return
        if self._stream is None or self._stream.device != device:
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._stream.wait_stream(torch.cuda.current_stream(device))

        def mark() -> Join:
            done = self._stream.record_event()

            def join(*made: Any) -> None:
                current = torch.cuda.current_stream(device)
                current.wait_event(done)
                apply_to_collection(made, Tensor, lambda tensor: tensor.is_cuda and tensor.record_stream(current))

            return join

        with torch.cuda.stream(self._stream):
            yield mark

    def join(self) -> None:
        """Let the trainer's stream wait for all that was queued here: whatever uses the autoencoder next."""
        if self._stream is not None:
            torch.cuda.current_stream(self._stream.device).wait_stream(self._stream)
