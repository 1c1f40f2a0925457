"""The way of a user's batch through the line of stages, from the host to the device, each of its parts by itself."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from lightning.fabric.utilities.apply_func import move_data_to_device
from lightning.pytorch import Trainer

from latentdm.batch import PIXELS, BatchKeys, Path
from latentdm.cache.rows import CACHED, CachedRows
from latentdm.containers import MAPPINGS, is_batch
from latentdm.draws import Draws
from latentdm.errors import UserError
from latentdm.hooks import notify
from latentdm.stages import Line, MissingKeyError


class Passage:
    """Runs the stages of the host on the parts of a batch, and later those of the device on the same parts.

    Args:
        line: the stages.
        keys: where a batch holds what they read.
        draws: what a part holds under our names, and its path → the draws of its samples; None as long as nobody can
            tell how many there are.
    """

    def __init__(self, line: Line, keys: BatchKeys, draws: Callable[[Mapping[str, Any], Path], Draws | None]) -> None:
        self.line = line
        self.keys = keys
        self._draws = draws
        self._prepared: dict[Path, tuple[Draws | None, dict[str, Any]]] = {}  # of the parts on their way to the device

    def begin(self) -> None:
        """Forget a batch that did not arrive."""
        self._prepared = {}

    def prepare(self, batch: Any, path: Path) -> Any:
        """On the host: settle the draws of a part's samples, so that none waits for the device, and run its stages."""
        if not is_batch(batch):
            return batch
        found = self.keys.find(batch)
        draws = self._draws(found, path)
        self._prepared[path] = draws, {}
        if draws is None or not self.line.host:
            return batch
        written = self._stages(batch, found, draws, on_host=True)
        changed = {name: value for name, value in written.items() if name in found}
        self._prepared[path] = draws, {name: value for name, value in written.items() if name not in changed}
        return self.keys.replace(batch, changed) if changed else batch

    def move(self, device: torch.device) -> None:
        """Move to the device what the host's stages wrote and the batch has no place for."""
        for path, (draws, written) in self._prepared.items() if self.line.host else ():
            if written:
                self._prepared[path] = draws, move_data_to_device(written, device)

    def run(self, batch: Any, path: Path, trainer: Trainer | None) -> tuple[dict[str, Any], dict[str, Any]]:
        """On the device: run its stages on a part.

        Returns:
            Under our names: what the part holds, and all that the stages wrote. What these drop is in both.
        """
        draws, prepared = self._prepared.pop(path, (None, {}))
        cached = batch.get(CACHED) if isinstance(batch, MAPPINGS) else None
        blank = cached.images() if isinstance(cached, CachedRows) else {}
        inputs = self.keys.read({**batch, **blank} if blank else batch)
        inputs.update(prepared)
        if draws is None or len(draws.ids) != inputs[PIXELS].shape[0]:  # len of a tensor is slow
            draws = self._draws(inputs, path)
            assert draws is not None
        if trainer is not None:
            notify(trainer, "on_encode_start", inputs)
        outputs = self._stages(batch, inputs, draws, on_host=False)
        if prepared:
            outputs = prepared | outputs
        if used_up := {name: outputs[name] for name in self.line.drops if name in outputs}:
            inputs = inputs | used_up
        return inputs, outputs

    def _stages(self, batch: Any, found: Mapping[str, Any], draws: Draws, on_host: bool) -> dict[str, Any]:
        try:
            return self.line.run(found, draws, on_host)
        except MissingKeyError as error:
            raise UserError(self.keys.missing(batch, error.name, error.stage)) from None
