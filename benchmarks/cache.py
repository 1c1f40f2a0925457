"""An epoch from the cache against one that encodes, and reading a sample against the ways of others.

Each epoch is a real ``Trainer.fit`` of a model that does next to nothing, in a process of its own that has opened
nothing before; the files are in the page cache. Seconds are those between the first batch's start and the last one's
end.
"""

import json
import pickle
import re
import resource
import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from textwrap import dedent
from time import perf_counter
from typing import Any

import numpy as np
import torch

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.models import images, sd_size
from benchmarks.rows import interleaved, row
from latentdm import Cache, FrozenVAE, InpaintEncoder, LatentDataModule, PlainEncoder
from latentdm.cache.index import Index
from latentdm.cache.keys import key_of
from latentdm.cache.store import Store
from latentdm.cache.writer import Writer
from latentdm.data import ImageFolderData
from latentdm.masks import RandomMask

SIDE, BATCH, PHOTOS = 256, 4, 8
AGAINST = "an epoch that encodes: SD-size encoder in its defaults, 256², without a cache"


@cache
def _folder() -> TemporaryDirectory[str]:
    """Photographs as JPEGs, and beside them the caches of all rows."""
    from PIL import Image

    folder = TemporaryDirectory()
    photos = Path(folder.name, "photos")
    photos.mkdir()
    for number, pixels in enumerate(images(PHOTOS, 2 * SIDE)):
        image = Image.fromarray(pixels.permute(1, 2, 0).roll(number, 1).numpy())
        image.save(photos / f"{number:02}.jpg", quality=90)
    return folder


def _epochs(kind: str, name: str | None, epochs: int) -> list[float]:
    """Seconds an image of each epoch, in a process of its own."""
    command = [sys.executable, "-W", "ignore", __file__, _folder().name, kind, name or "", str(epochs)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    seconds: list[float] = json.loads(done.stdout.strip().splitlines()[-1])
    return seconds


def _fit(folder: str, kind: str, name: str, epochs: int) -> list[float]:
    from lightning.pytorch import Callback, LightningModule, Trainer

    class Nothing(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))

        def training_step(self, batch: dict[str, Any], batch_idx: int) -> torch.Tensor:
            return (batch["latents"].mean() * self.weight).sum()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    class Clock(Callback):
        def __init__(self) -> None:
            self.seconds: list[float] = []

        def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            self.began = perf_counter()

        def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
            self.ended = perf_counter()

        def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
            self.seconds.append((self.ended - self.began) / PHOTOS)

    data = ImageFolderData(Path(folder, "photos"), SIDE, BATCH, val_share=0, random_crop=False)
    vae, held = FrozenVAE(sd_size()), None
    if name:
        held = Cache(Path(folder, name), mask_variants=1 if kind == "variants" else None)
    inpaints = kind != "plain"
    encoder = InpaintEncoder(vae) if inpaints else PlainEncoder(vae)
    datamodule = LatentDataModule(data, encoder, masks=RandomMask() if inpaints else None, cache=held)
    clock = Clock()
    Trainer(
        max_epochs=epochs, callbacks=[clock], logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, accelerator="auto", devices=1, default_root_dir=folder,
    ).fit(Nothing(), datamodule=datamodule)  # fmt: skip
    return clock.seconds


def _ratio(kind: str, quick: bool) -> float:
    """Seconds of an encoding epoch over those of one that reads."""
    _epochs(kind, kind, 1)
    encoded = median(_epochs(kind, None, 1 if quick else 3))
    read = median(_epochs(kind, kind, (1 if quick else 3) if kind == "inpaint" else 20))
    return encoded / read


@row("cache_plain_ratio", "times", f"{AGAINST}; read from cache=disk; aim: at least 50")
def plain(quick: bool) -> float:
    """Latents alone."""
    return _ratio("plain", quick)


@row("cache_inpaint_ratio", "times", f"{AGAINST}; inpainting with new masks each time; aim: at least 1.8")
def inpaint(quick: bool) -> float:
    """The clean half is read, the masked one encoded."""
    return _ratio("inpaint", quick)


@row("cache_inpaint_variants_ratio", "times", f"{AGAINST}; inpainting with mask_variants; aim: at least 40")
def variants(quick: bool) -> float:
    """Both halves are read."""
    return _ratio("variants", quick)


@row("cache_write_overhead_pct", "%", "the first epoch without a cache; aim: at most 5")
def overhead(quick: bool) -> float:
    """What writing behind costs; the two take turns."""
    rounds = 1 if quick else 5
    ratios = []
    for number in range(rounds):
        without = _epochs("plain", None, 1)[0]
        ratios.append(_epochs("plain", f"overhead{number}", 1)[0] / without)
    return 100 * (median(ratios) - 1)


# -------------------------------------------------------------------- README's example


@cache
def _example_rates() -> dict[str, float]:
    """Images a second, as its table says, without a cache, with one that is empty, and with one that is full."""
    folder = Path(_folder().name, "example")
    held = ["cache=disk", f"cache.dir={folder / 'latents'}"]
    runs = {"without": [], "empty": held, "full": held}
    return {name: _example_rate(folder / name, overrides) for name, overrides in runs.items()}


def _example_rate(folder: Path, overrides: Sequence[str]) -> float:
    script = Path(__file__).parents[1] / "train_example.py"
    command = [sys.executable, "-W", "ignore", str(script), f"hydra.run.dir={folder}", *overrides]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found = re.search(r"images/s[^0-9]+([0-9.]+)", done.stdout)
    assert found is not None, done.stdout
    return float(found[1])


@row(
    "cache_example_ratio", "times", "images a second of README's example without a cache; a first run; aim: at least 2"
)
def example(quick: bool) -> float | None:
    """With ``cache=disk``, whose folder is empty at first."""
    return None if quick else _example_rates()["empty"] / _example_rates()["without"]


@row("cache_example_full_ratio", "times", "the same of a second run, which finds everything")
def example_full(quick: bool) -> float | None:
    """Nothing is left but the model."""
    return None if quick else _example_rates()["full"] / _example_rates()["without"]


# -------------------------------------------------------------------- a sample, against the ways of others

COUNT = 2000


@cache
def _samples() -> dict[str, Any]:
    """The same moments, 64 KiB a sample as SD has at 512², kept in three ways."""
    folder = Path(_folder().name, "samples")
    pickled = folder / "pickled"
    pickled.mkdir(parents=True)
    writer, store = Writer(), Store(folder / "space")
    generator = torch.Generator().manual_seed(0)
    held = []
    for number in range(COUNT):
        moments = torch.randn(1, 2, 4, 64, 64, generator=generator).to(torch.bfloat16)
        writer.put(store, [key_of(number)], {"moments": moments}, wait=True)
        with (pickled / f"{number}.pt").open("wb") as file:
            pickle.dump(moments[0].float().numpy(), file)
        held.append(moments[0].clone())
    writer.flush()
    store.refresh()
    return {"store": store, "pickled": pickled, "held": held}


def _read_seconds(ways: Sequence[str], rounds: int) -> dict[str, float]:
    ours = _samples()
    order = np.random.default_rng(0).permutation(COUNT).tolist()

    def store() -> None:
        for number in order:
            assert ours["store"].read(key_of(number)) is not None

    def pickled() -> None:
        for number in order:
            with (ours["pickled"] / f"{number}.pt").open("rb") as file:
                torch.from_numpy(pickle.load(file))

    def held() -> None:
        for number in order:
            ours["held"][number].clone()

    functions: dict[str, Callable[[], None]] = {"store": store, "pickled": pickled, "held": held}
    seconds = interleaved({name: functions[name] for name in ways}, rounds)
    return {name: median(times) / COUNT for name, times in seconds.items()}


@row("cache_read_us", "µs", "one sample of 64 KiB in bfloat16, checksum included; page cache warm")
def read_us(quick: bool) -> float:
    """Reading one sample."""
    return 1e6 * _read_seconds(["store"], 1 if quick else 5)["store"]


@row("cache_read_vs_pickled_ratio", "times", "a pickled float32 file a sample, as SimpleTuner and OneTrainer keep them")
def against_pickled(quick: bool) -> float:
    """How many times faster than one file a sample."""
    seconds = _read_seconds(["pickled", "store"], 1 if quick else 5)
    return seconds["pickled"] / seconds["store"]


@row("cache_read_vs_held_ratio", "times", "a list in memory, as the diffusers scripts have it; below 1: it is faster")
def against_held(quick: bool) -> float:
    """The list costs 64 KiB of memory a sample in each process; the cache 20 bytes, which all share."""
    seconds = _read_seconds(["held", "store"], 1 if quick else 5)
    return seconds["held"] / seconds["store"]


# -------------------------------------------------------------------- ten million entries


@cache
def _large_index() -> tuple[Path, int]:
    """An index of ten million entries, without the shards."""
    count, folder = 10_000_000, Path(_folder().name, "index")
    draw = np.random.default_rng(0)
    index = Index(
        [f"shard{number}" for number in range(5000)],
        np.sort(draw.integers(0, 2**63, count, dtype=np.uint64)),
        draw.integers(0, 5000, count, dtype=np.uint32),
        draw.integers(0, 2000, count, dtype=np.uint32),
        draw.integers(0, 2**32, count, dtype=np.uint32),
    )
    return index.save(folder, folder / "tmp"), count


@row("cache_index_open_ms", "ms", "an index of ten million entries, mapped")
def index_open(quick: bool) -> float:
    """Opening it reads its head alone."""
    path, _ = _large_index()
    seconds = interleaved({"open": lambda: Index.open(path) and None}, 3 if quick else 20)
    return 1e3 * median(seconds["open"])


@row("cache_index_bytes_per_sample", "bytes", "memory of a process's own, after 10⁵ lookups among ten million; aim: 20")
def index_bytes(quick: bool) -> float:
    """What one more process takes, per entry."""
    path, count = _large_index()
    script = """
        index = Index.of([])
        list(index.places(bytes(16)))
        before = own()
        index = Index.open(Path(argument))
        for number in range(100_000):
            list(index.places(number.to_bytes(8, "big") * 2))
        """
    return _own_bytes(script, str(path)) / count


@row(
    "cache_index_grown_bytes_per_sample",
    "bytes",
    "of entries that came since it was opened; 20 of them are the arrays; aim: below 100",
)
def grown_bytes(quick: bool) -> float:
    """What a process holds of new shards by itself, until an index is written at the end of the epoch."""
    script = """
        keys = np.random.default_rng(0).integers(0, 256, (10, 100_000, 16), np.uint8)
        index = Index.of([("first", keys[0, :1], np.zeros(1, "<u4"))])
        before = own()
        for number in range(10):
            index = index.joined(Index.of([(str(number), keys[number], np.zeros(100_000, "<u4"))]))
        """
    return _own_bytes(script, "") / 1_000_000


@row("cache_held_bytes_per_sample", "bytes", "a list in memory, as the diffusers scripts have it: of each process")
def held_bytes(quick: bool) -> float:
    """The same 64 KiB a sample as for reading; the cache leaves them in files, which the page cache shares."""
    script = """
        samples = [torch.zeros(2, 4, 64, 64, dtype=torch.bfloat16)]
        before = own()
        samples += [torch.ones(2, 4, 64, 64, dtype=torch.bfloat16) for _ in range(2000)]
        """
    return _own_bytes(script, "") / COUNT


@row("cache_pickled_bytes_per_sample", "bytes", "a pickled file a sample: the list of their paths, of each process")
def pickled_bytes(quick: bool) -> float:
    """A path of forty letters."""
    script = """
        before = own()
        paths = [f"/data/photographs/cache/latents/{number:07}.pt" for number in range(1_000_000)]
        """
    return _own_bytes(script, "") / 1_000_000


def _own_bytes(script: str, argument: str) -> int:
    """Memory of a process's own that a script takes, which says from where on (``before = own()``)."""
    whole = f"""
import sys
from pathlib import Path
import numpy as np
import torch
from latentdm.cache.index import Index
argument = sys.argv[1]
def own():
    return sum(int(line.split()[1]) for line in open("/proc/self/smaps_rollup") if line.startswith("Private"))
{dedent(script)}
print(1024 * (own() - before))
"""
    command = [sys.executable, "-c", whole, argument]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return max(int(done.stdout), 0)


if __name__ == "__main__":
    _, where, which, chosen, times = sys.argv
    print(json.dumps(_fit(where, which, chosen, int(times))))
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, file=sys.stderr)
