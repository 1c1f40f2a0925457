"""`EncodeMonitor`: what encoding costs."""

from dataclasses import dataclass
from time import perf_counter
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer

from latentdm.batch import PIXELS
from latentdm.callbacks.base import EncodeCallback, Inputs, LogSteps, Outputs


class EncodeMonitor(EncodeCallback):
    """Logs what encoding costs, at the trainer's log steps, over the training batches since the last one.

    | metric | meaning |
    |---|---|
    | ``encode/images_per_s`` | images encoded in a second of encoding, by this rank |
    | ``encode/batch_ms`` | milliseconds a batch between the hooks of `EncodeCallback`: masks, encoding, … |
    | ``encode/step_ms`` | milliseconds a batch from ``on_train_batch_start`` to ``on_train_batch_end`` |
    | ``encode/share_of_step_pct`` | batch_ms / (batch_ms + step_ms); loading and validating count as neither |
    | ``encode/chunks_per_batch`` | passes of the autoencoder a batch (see ``per_batch``) |
    | ``encode/reencoded_samples`` | samples encoded again in float32, in the life of the autoencoder |
    | ``encode/oom_retries`` | chunks run again, smaller, because memory ran out, in the life of the autoencoder |
    | ``encode/peak_memory_gib`` | on a GPU: the most that this process had allocated so far, of anything |

    Loggers write rank 0's. A run's first batch warms up and is left out. On a GPU times come from CUDA events, which
    are read at log steps only. List this callback before others that work in the same hooks, such as `LatentPreview`:
    their time then counts as neither.

    Example:
        >>> Trainer(callbacks=[EncodeMonitor()]).fit(model, datamodule=dm)  # doctest: +SKIP

    Attributes:
        totals: the same sums over the whole fit so far; ``totals.share_of_step_pct``.
    """

    def __init__(self) -> None:
        self.totals = Costs()
        self._window: list[_Times] = []
        self._now: _Times | None = None
        self._warm = False
        self._steps = LogSteps()

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget earlier fits."""
        self.totals, self._window, self._now, self._warm, self._steps = Costs(), [], None, False, LogSteps()

    def on_encode_start(self, trainer: Trainer, pl_module: LightningModule, inputs: Inputs) -> None:
        """Mark where encoding starts."""
        if trainer.training:
            if self._now is None or self._now.stepping:
                self._now = _Times(pl_module.device)
            # A batch of several loaders has several parts that are encoded, one after another.
            self._now.images += len(inputs[PIXELS])
            self._now.chunks -= self.encoder_of(trainer).vae.chunks
            self._now.mark()

    def on_encode_end(
        self, trainer: Trainer, pl_module: LightningModule, inputs: Inputs, outputs: Outputs, batch: Any
    ) -> None:
        """Mark where encoding ends."""
        if trainer.training and self._now is not None:
            self._now.mark()
            self._now.chunks += self.encoder_of(trainer).vae.chunks

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Mark where the step starts."""
        if self._now is not None:
            self._now.stepping = True
            self._now.mark()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Mark where the step ends, and log at log steps."""
        if self._now is not None:
            self._now.mark()
            if self._warm:
                self._window.append(self._now)
            self._warm, self._now = True, None
        if self._steps.reached(trainer) and self._window:
            costs = self._read()
            vae = self.encoder_of(trainer).vae
            metrics = costs.metrics() | {
                "encode/reencoded_samples": float(vae.reencoded),
                "encode/oom_retries": float(vae.retries),
            }
            if pl_module.device.type == "cuda":
                metrics["encode/peak_memory_gib"] = torch.cuda.max_memory_allocated(pl_module.device) / 2**30
            pl_module.log_dict(metrics, batch_size=1)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Add the batches since the last log step to the totals."""
        self._read()

    def _read(self) -> "Costs":
        """The window's costs, added to the totals."""
        costs = Costs()
        for times in self._window:
            costs.add(times)
            self.totals.add(times)
        self._window = []
        return costs


@dataclass
class Costs:
    """Sums over batches.

    Args:
        batches: their number.
        images: their number.
        chunks: passes of the autoencoder.
        encode_s: seconds of encoding.
        step_s: seconds of steps.
    """

    batches: int = 0
    images: int = 0
    chunks: int = 0
    encode_s: float = 0.0
    step_s: float = 0.0

    @property
    def share_of_step_pct(self) -> float:
        """Encoding, in percent of encoding and step."""
        whole = self.encode_s + self.step_s
        return 100 * self.encode_s / whole if whole else 0.0

    def metrics(self) -> dict[str, float]:
        """Metric → value, as logged."""
        return {
            "encode/images_per_s": self.images / self.encode_s if self.encode_s else 0.0,
            "encode/batch_ms": 1000 * self.encode_s / self.batches,
            "encode/step_ms": 1000 * self.step_s / self.batches,
            "encode/share_of_step_pct": self.share_of_step_pct,
            "encode/chunks_per_batch": self.chunks / self.batches,
        }

    def add(self, times: "_Times") -> None:
        """Count a batch."""
        encode_s, step_s = times.seconds()
        self.batches += 1
        self.images += times.images
        self.chunks += times.chunks
        self.encode_s += encode_s
        self.step_s += step_s


class _Times:
    """The moments of a batch: encoding starts and ends, once for each of its parts; the step starts and ends."""

    def __init__(self, device: torch.device) -> None:
        self.images = 0
        self.chunks = 0
        self.stepping = False
        self._cuda = device.type == "cuda"
        self._marks: list[Any] = []

    def mark(self) -> None:
        """Record this moment; on a GPU the one at which its queue gets here, without waiting for it."""
        if self._cuda:
            event: Any = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            event.record()
            self._marks.append(event)
        else:
            self._marks.append(perf_counter())

    def seconds(self) -> tuple[float, float]:
        """Seconds of encoding and of the step."""
        *encoding, step_start, step_end = self._marks
        if self._cuda:
            step_end.synchronize()
        parts = zip(encoding[::2], encoding[1::2], strict=True)
        return sum(self._between(start, end) for start, end in parts), self._between(step_start, step_end)

    def _between(self, start: Any, end: Any) -> float:
        seconds: float = start.elapsed_time(end) / 1000 if self._cuda else end - start
        return seconds
