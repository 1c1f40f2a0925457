"""Reading images against the pipeline of the diffusers scripts, and the index of a folder at a million entries.

Images are decoded per core: one thread, one process. The scripts' pipeline is ``train_text_to_image.py``'s with its
default interpolation: Pillow opens, converts, resizes with Lanczos, crops, and makes a normalised float tensor.
"""

import io
import os
import pickle
from collections.abc import Callable
from functools import cache
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import numpy as np
import torch
from PIL import Image

from benchmarks.rows import interleaved, row
from latentdm.data.decode import image_to_tensor
from latentdm.data.geometry import Record, ResizeCrop, square
from latentdm.data.index import Entry, FolderIndex, Found, folder_index, to_table
from latentdm.data.listing import list_files
from latentdm.data.photographs import photographs

SIDE = 512
LARGE, SMALL = (3000, 2000), (SIDE, SIDE)


@cache
def _jpeg(size: tuple[int, int]) -> bytes:
    """A photograph as a camera would have saved it: enlarged, with some noise, at quality 90."""
    image = Image.fromarray(photographs("train")["stereo_motorcycle"]).resize(size, Image.Resampling.BICUBIC)
    noise = np.random.default_rng(0).integers(-4, 5, (size[1], size[0], 3))
    file = io.BytesIO()
    Image.fromarray((np.asarray(image) + noise).clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=90)
    return file.getvalue()


def _resized(file: bytes, resample: Image.Resampling) -> Image.Image:
    """The whole image decoded, resized and cropped in the centre."""
    image = Image.open(io.BytesIO(file)).convert("RGB")
    scale = SIDE / min(image.size)
    width, height = (max(SIDE, round(side * scale)) for side in image.size)
    left, top = (width - SIDE) // 2, (height - SIDE) // 2
    return image.resize((width, height), resample).crop((left, top, left + SIDE, top + SIDE))


def _theirs(file: bytes, resample: Image.Resampling = Image.Resampling.LANCZOS) -> torch.Tensor:
    """``3 h w`` float32 in −1…1, as torchvision's ToTensor and Normalize give it."""
    levels = torch.from_numpy(np.array(_resized(file, resample))).permute(2, 0, 1).contiguous()
    return levels.float().div(255).sub(0.5).div(0.5)


def _ours(file: bytes) -> torch.Tensor:
    """``3 h w`` uint8."""
    pixels: torch.Tensor = ResizeCrop(square(SIDE))(Record("image", 0, file), epoch=0)["pixels"]
    return pixels


def _simplejpeg(file: bytes) -> torch.Tensor:
    import simplejpeg

    levels = simplejpeg.decode_jpeg(file, min_height=SIDE, min_width=SIDE, min_factor=1)
    return _finish(Image.fromarray(levels))


def _opencv(file: bytes) -> torch.Tensor:
    import cv2

    flag = cv2.IMREAD_REDUCED_COLOR_2 if len(file) > len(_jpeg(SMALL)) else cv2.IMREAD_COLOR
    levels = cv2.imdecode(np.frombuffer(file, np.uint8), flag)
    return _finish(Image.fromarray(cv2.cvtColor(levels, cv2.COLOR_BGR2RGB)))


def _libvips(file: bytes) -> torch.Tensor:
    import pyvips

    image = pyvips.Image.thumbnail_buffer(file, SIDE, height=SIDE, crop="centre")
    return torch.from_numpy(image.numpy().copy()).permute(2, 0, 1)


def _finish(image: Image.Image) -> torch.Tensor:
    """The crop of a reduced image, as ours makes it."""
    side = min(image.size)
    left, top = (image.width - side) / 2, (image.height - side) / 2
    box = (left, top, left + side, top + side)
    return image_to_tensor(image.resize((SIDE, SIDE), Image.Resampling.BICUBIC, box=box))


def _ratio(
    size: tuple[int, int], quick: bool, theirs: Callable[[bytes], object], ours: Callable[[bytes], object]
) -> float:
    """How much longer theirs takes than ours."""
    file = _jpeg(size)
    torch.set_num_threads(1)
    times = 1 if size == LARGE else 20

    def repeated(decode: Callable[[bytes], object]) -> Callable[[], None]:
        def run() -> None:
            for _ in range(times):
                decode(file)

        return run

    ways = {"theirs": repeated(theirs), "ours": repeated(ours)}
    for way in ways.values():
        way()
    seconds = interleaved(ways, 9 if quick else 31)
    return median(seconds["theirs"]) / median(seconds["ours"])


@row("decode_6mp_ratio", "times", "train_text_to_image.py's pipeline on a 6-megapixel JPEG to 512²; aim: at least 3")
def decode_6mp_ratio(quick: bool) -> float:
    """Ours against the scripts' default."""
    return _ratio(LARGE, quick, _theirs, _ours)


@row("decode_6mp_bilinear_ratio", "times", "the same with bilinear interpolation, as the older scripts have it")
def decode_6mp_bilinear_ratio(quick: bool) -> float:
    """Ours against the cheapest the scripts do."""
    return _ratio(LARGE, quick, lambda file: _theirs(file, Image.Resampling.BILINEAR), _ours)


@row("decode_512_ratio", "times", "train_text_to_image.py's pipeline on a 512² JPEG; aim: at least 1")
def decode_512_ratio(quick: bool) -> float:
    """Ours where nothing is resized."""
    return _ratio(SMALL, quick, _theirs, _ours)


@row("decode_6mp_difference", "levels of 255", "the mean difference to decoding in full and resizing with Lanczos")
def decode_6mp_difference(quick: bool) -> float:
    """What reduced decoding costs."""
    return _difference(_ours(_jpeg(LARGE)).float())


@row("decode_6mp_bilinear_difference", "levels of 255", "the same of the scripts' pipeline with bilinear interpolation")
def decode_6mp_bilinear_difference(quick: bool) -> float:
    """To compare with ours."""
    return _difference(_theirs(_jpeg(LARGE), Image.Resampling.BILINEAR) * 127.5 + 127.5)


def _difference(levels: torch.Tensor) -> float:
    best = image_to_tensor(_resized(_jpeg(LARGE), Image.Resampling.LANCZOS)).float()
    return float((levels - best).abs().mean())


for _name, _peer in {"simplejpeg": _simplejpeg, "opencv": _opencv, "libvips": _libvips}.items():

    @row(
        f"decode_6mp_{_name}_ratio",
        "times",
        f"{_name}; above 1: ours is faster; left out if not installed",
    )
    def _peer_ratio(quick: bool, peer: Callable[[bytes], torch.Tensor] = _peer) -> float | None:
        try:
            peer(_jpeg(LARGE))
        except ImportError:
            return None
        return _ratio(LARGE, quick, peer, _ours)


# ---------------------------------------------------------------- the index


def _entries(count: int) -> list[Entry]:
    """Images without a size or a time, as files have them that are not there: an index of others would not be true."""
    return [Entry(f"{n // 1000:04}/photograph-{n:07}.jpg") for n in range(count)]


def _build(folder: Path, count: int) -> FolderIndex:
    """A kept index of synthetic entries."""
    entries = _entries(count)
    index = folder_index(folder, {"count": count}, lambda: Found(entries), folder / "kept", 0)
    assert index.file is not None
    return index


@row("index_open_ratio", "times", "walking and statting a folder over opening its index; aim: at least 20")
def index_open_ratio(quick: bool) -> float:
    """On real files, a tenth of a million where there is time."""
    count = 10_000 if quick else 100_000
    with TemporaryDirectory() as name:
        root = Path(name) / "images"
        for number in range(count):
            file = root / f"{number // 1000:04}" / f"{number:07}.jpg"
            if number % 1000 == 0:
                file.parent.mkdir(parents=True)
            file.touch()
        for folder in (root, *root.iterdir()):
            os.utime(folder, (10**9, 10**9))

        def build() -> Found:
            listing = list_files(root)
            images = sorted(listing.images.items())
            return Found([Entry(n, size, mtime) for n, (mtime, size) in images], watched=listing.watched)

        def kept() -> FolderIndex:
            return folder_index(root, {}, build, Path(name) / "kept", 0)

        assert kept().file is not None
        seconds = interleaved({"walk": lambda: _drop(list_files(root)), "open": lambda: _drop(kept())}, 5)
    return median(seconds["walk"]) / median(seconds["open"])


@row("index_bytes_per_sample", "bytes", "memory of a process's own per sample of an opened index; aim: below 300")
def index_bytes_per_sample(quick: bool) -> float:
    """Growth of the private memory on opening a million entries (or a tenth) and touching every one's hash."""
    count = 100_000 if quick else 1_000_000
    with TemporaryDirectory() as name:
        sent = pickle.dumps(_build(Path(name), count))  # as to a worker, which opens the file anew
        before = _private_bytes()
        index = pickle.loads(sent)
        rows = np.flatnonzero(index.hashes >= 0.1)
        assert len(index) == count
        assert len(rows) < count
        return max(0, _private_bytes() - before) / count


@row("index_growth", "times", "seconds to make a table of 10⁶ entries over 100 × those of 10⁴; aim: at most 1.2")
def index_growth(quick: bool) -> float:
    """A tenth of that in a quick run."""
    small, large = (10_000, 100_000) if quick else (10_000, 1_000_000)

    counts = {"small": small, "large": large}
    tables = {count: _entries(count) for count in counts.values()}
    rounds = interleaved(
        {name: lambda count=count: _drop(to_table(Found(tables[count]))) for name, count in counts.items()}, 7
    )
    return median(rounds["large"]) / (large / small * median(rounds["small"]))


def _private_bytes() -> int:
    """What this process alone holds; files mapped into memory are shared."""
    text = Path("/proc/self/smaps_rollup").read_text(encoding="ascii")
    lines = {line.split(":")[0]: line.split()[1] for line in text.splitlines()[1:]}
    return (int(lines["Private_Dirty"]) + int(lines.get("Swap", 0))) * 1024


def _drop(result: object) -> None:
    del result
