"""Everything random is drawn per sample, from (seed, epoch, index, purpose), and never from the global generator.

So a sample meets the same noise, mask and crop whatever the batch size, the number of workers or ranks, and whether
the run was resumed. (With ``seed_everything`` the global generator gives every rank the *same* posterior noise.)
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b

import torch
from torch import Tensor

from latentdm.ranks import process_ranks


def sample_seed(seed: int, epoch: int, index: int | str, purpose: str) -> int:
    """The 63-bit seed of one sample for one purpose: a hash, so that neighbours share nothing."""
    key = f"{seed}/{epoch}/{index}/{purpose}".encode()
    return int.from_bytes(blake2b(key, digest_size=8).digest(), "big") >> 1


def sample_generator(seed: int, epoch: int, index: int | str, purpose: str) -> torch.Generator:
    """A generator on the CPU for one sample and one purpose, as a dataset's ``__getitem__`` wants it."""
    return torch.Generator().manual_seed(sample_seed(seed, epoch, index, purpose))


@dataclass  # not frozen: that triples the time to make them, which a small batch feels
class Draws:
    """The random numbers of one batch, one stream a sample and purpose.

    Args:
        seed: the run's seed.
        epoch: the training epoch; 0 outside training, so that the figures of two epochs compare.
        ids: one id a sample: its ``index``, or for data without one any string that names rank, batch and position.
        training: False in validation, test and predict, where what is drawn for variety's sake is not drawn.
    """

    seed: int
    epoch: int
    ids: Sequence[int | str]
    training: bool = True

    def uniform(self, purpose: str, count: int) -> Tensor:
        """``b count`` float32 in 0…1 on the CPU: the few numbers that place a mask or a crop, alike on every device."""
        numbers = torch.empty(len(self.ids), count, dtype=torch.float32, device="cpu")
        for row, generator in zip(numbers, self._generators(purpose, torch.device("cpu")), strict=True):
            row.uniform_(generator=generator)
        return numbers

    def normal(self, purpose: str, shape: Sequence[int], device: torch.device) -> Tensor:
        """``b *shape`` float32 standard normal, made on ``device`` (whose generator sets the bits)."""
        noise = torch.empty(len(self.ids), *shape, dtype=torch.float32, device=device)
        for row, generator in zip(noise, self._generators(purpose, device), strict=True):
            row.normal_(generator=generator)
        return noise

    def __getitem__(self, rows: slice) -> "Draws":
        """The draws of some of the samples."""
        return Draws(self.seed, self.epoch, self.ids[rows], self.training)

    def of(self, rows: Sequence[int]) -> "Draws":
        """The draws of the samples at these rows of the batch."""
        return Draws(self.seed, self.epoch, [self.ids[row] for row in rows], self.training)

    def _generators(self, purpose: str, device: torch.device) -> Iterator[torch.Generator]:
        """One generator, seeded anew for each sample: making a generator costs more than seeding one."""
        generator = torch.Generator(device)
        for i in self.ids:
            yield generator.manual_seed(sample_seed(self.seed, self.epoch, i, purpose))


class FreshDraws:
    """Draws for samples without an id, such as those of a call by hand: every call gets its own.

    They follow from the rank and the number of calls so far, so that a program that is run again draws the same.
    """

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, count: int) -> Draws:
        """The draws of ``count`` samples."""
        rank = process_ranks()["rank"]
        call = f"rank{rank}.call{self.calls}" if rank else f"call{self.calls}"
        ids = [f"{call}.{row}" for row in range(count)]
        self.calls += 1
        return Draws(0, 0, ids)
