"""Encoding: images a second against the public ways, the accuracy of bfloat16, and the floor that arithmetic sets."""

import warnings
from collections.abc import Callable
from functools import cache, partial
from itertools import product
from statistics import median
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import models, peers
from benchmarks.rows import interleaved, own_processes, row
from latentdm import FrozenVAE, InpaintEncoder, LatentDataModule, PlainEncoder
from latentdm.encoders import Encoder
from latentdm.frozen.weights import computes_bfloat16

ROUNDS = 5
PRODUCTS = 8
"""Of matrices, in a measurement of the peak."""
MODELS: dict[str, Callable[[], Any]] = {"sd": models.sd_size, "demo": models.demo}


def hook(encoder: Encoder, batch: dict[str, Any]) -> Callable[[], Any]:
    """The three hooks of the data module, as Lightning calls them for a batch; returns the batch of latents."""
    module = LatentDataModule(LightningDataModule(), encoder)
    device = encoder.vae.device

    def transfer() -> Any:
        taken = module.on_before_batch_transfer(batch, 0)
        return module.on_after_batch_transfer(module.transfer_batch_to_device(taken, device, 0), 0)

    return transfer


def timed(function: Callable[[], Any]) -> Callable[[], None]:
    """A function that returns when its work is done, and nothing."""

    @torch.no_grad()
    def run() -> None:
        function()
        if models.DEVICE.type == "cuda":
            torch.cuda.synchronize()

    return run


def times_faster(seconds: dict[str, list[float]], theirs: str, ours: str) -> float:
    """The median over the rounds of how many times faster ours was in a round."""
    return median(their / our for their, our in zip(seconds[theirs], seconds[ours], strict=True))


def matrix_side() -> int:
    """Of matrices whose product keeps the device busy."""
    return 8192 if models.DEVICE.type == "cuda" else 2048


def matrices(dtype: torch.dtype) -> Callable[[], None]:
    """Some products of two square matrices: the arithmetic's peak."""
    a = torch.randn(matrix_side(), matrix_side(), device=models.DEVICE).to(dtype)

    def products() -> None:
        for _ in range(PRODUCTS):
            a @ a

    return products


def matrix_peak(seconds: float) -> float:
    """Operations a second, of `matrices` that took so long."""
    return PRODUCTS * 2 * matrix_side() ** 3 / seconds


def way(name: str, model: str, view: str, side: int, count: int) -> Callable[[], None]:
    """One way to encode a batch; run in a process of its own."""
    data, autoencoder = models.batch(count, side), MODELS[model]()
    kind = PlainEncoder if view == "plain" else InpaintEncoder

    def ours(dtype: str, **settings: Any) -> Callable[[], Any]:
        return hook(kind(FrozenVAE(autoencoder, dtype=dtype, **settings).to(models.DEVICE)), data)

    makers: dict[str, Callable[[], Callable[[], Any]]] = {
        "ours": lambda: ours("auto"),
        "ours float32": lambda: ours("float32"),
        "ours float32 compiled": lambda: ours("float32", compile=True),
        "ours compiled": lambda: ours("auto", compile=True),
        "diffusers": lambda: getattr(peers.InpaintScript(autoencoder, data), view),
        "diffusers bfloat16": lambda: getattr(peers.InpaintScript(autoencoder, data, torch.bfloat16), view),
        "sliced": lambda: getattr(peers.Sliced(autoencoder, data), view),
        "float32 matrices": lambda: matrices(torch.float32),
        "bfloat16 matrices": lambda: matrices(torch.bfloat16),
    }
    return timed(makers[name]())


@cache
def rounds(model: str, view: str, side: int, count: int, ways: tuple[str, ...]) -> dict[str, list[float]]:
    """Seconds of each way to encode the same batch, round for round; one round before them warms up.

    Each in a process of its own, as their users run them: what an allocator keeps is a process's, and ours sets it.
    """
    with own_processes({name: partial(way, name, model, view, side, count) for name in ways}) as functions:
        interleaved(functions, 1)
        return interleaved(functions, ROUNDS)


# ---------------------------------------------------------------- against the public ways


EAGER = ("diffusers", "ours", "ours float32")
COMPILED = ("ours compiled", "ours float32 compiled")


def _sd_count(quick: bool) -> int:
    return 1 if quick else 2


def _versus(model: str, quick: bool) -> dict[str, list[float]]:
    """Seconds of all ways that are compared. Where bfloat16 is emulated, what is in it by choice takes minutes."""
    half = computes_bfloat16(models.DEVICE)
    if model == "demo":
        script = ("diffusers bfloat16",) if half else ()
        return rounds(model, "inpaint", 256, 4, (*EAGER, *script, "sliced", *COMPILED))
    matrices = ("float32 matrices", "bfloat16 matrices") if half else ("float32 matrices",)
    return rounds(model, "inpaint", 256, _sd_count(quick), (*EAGER, *(() if quick else COMPILED), *matrices))


SCRIPT = "the diffusers inpaint script's way: float32, NCHW, two calls, eager; 256²"
SCRIPT_BF16 = "the same script with --mixed_precision bf16: bfloat16 weights, NCHW, two calls, eager; 256²"


@row("encode_vs_diffusers_default", unit="times", versus=f"{SCRIPT}, SD-size encoder; ours in its defaults")
def encode_vs_diffusers_default(quick: bool) -> float:
    """Defaults against defaults."""
    return times_faster(_versus("sd", quick), "diffusers", "ours")


@row("encode_vs_diffusers_fp32_eager_sd", unit="times", versus=f"{SCRIPT}, SD-size encoder; ours in float32, eager")
def encode_vs_diffusers_fp32_eager_sd(quick: bool) -> float:
    """At equal precision, where both spend their time in the same convolutions."""
    return times_faster(_versus("sd", quick), "diffusers", "ours float32")


@row("encode_vs_diffusers_compiled", unit="times", versus=f"{SCRIPT}, SD-size encoder; ours with compile: true")
def encode_vs_diffusers_compiled(quick: bool) -> float | None:
    """Our fastest. To compile it takes a minute, too long for a quick run."""
    return None if quick else times_faster(_versus("sd", quick), "diffusers", "ours compiled")


@row(
    "encode_vs_diffusers_fp32_compiled_sd",
    unit="times",
    versus=f"{SCRIPT}, SD-size encoder; ours in float32 with compile: true",
)
def encode_vs_diffusers_fp32_compiled_sd(quick: bool) -> float | None:
    """At equal precision, compiled: `floor_share_diffusers_fp32` says how much there is to gain."""
    return None if quick else times_faster(_versus("sd", quick), "diffusers", "ours float32 compiled")


@row("encode_vs_diffusers_fp32", unit="times", versus=f"{SCRIPT}, demo VAE; ours in float32 with compile: true")
def encode_vs_diffusers_fp32(quick: bool) -> float:
    """At equal precision, compiled."""
    return times_faster(_versus("demo", quick), "diffusers", "ours float32 compiled")


@row("encode_vs_diffusers_fp32_eager", unit="times", versus=f"{SCRIPT}, demo VAE; ours in float32, eager")
def encode_vs_diffusers_fp32_eager(quick: bool) -> float:
    """At equal precision, eager."""
    return times_faster(_versus("demo", quick), "diffusers", "ours float32")


@row(
    "encode_vs_diffusers_bf16",
    unit="times",
    versus=f"{SCRIPT_BF16}, demo VAE, four images; ours in its defaults; left out where the device lacks bfloat16; "
    "aim: at least 1.5",
)
def encode_vs_diffusers_bf16(quick: bool) -> float | None:
    """As the script's users run it. Where bfloat16 is emulated, it is no way to run it."""
    if not computes_bfloat16(models.DEVICE):
        return None
    return times_faster(_versus("demo", quick), "diffusers bfloat16", "ours")


@row("encode_vs_diffusers_demo", unit="times", versus=f"{SCRIPT}, demo VAE; ours in its defaults")
def encode_vs_diffusers_demo(quick: bool) -> float:
    """Defaults against defaults, on a small encoder."""
    return times_faster(_versus("demo", quick), "diffusers", "ours")


@row("encode_vs_diffusers_demo_compiled", unit="times", versus=f"{SCRIPT}, demo VAE; ours with compile: true")
def encode_vs_diffusers_demo_compiled(quick: bool) -> float:
    """Our fastest."""
    return times_faster(_versus("demo", quick), "diffusers", "ours compiled")


@row(
    "encode_vs_slicing", unit="times", versus="one image at a time (enable_slicing), demo VAE at 256²; ours in defaults"
)
def encode_vs_slicing(quick: bool) -> float:
    """What people do to save memory."""
    return times_faster(_versus("demo", quick), "sliced", "ours")


@row("accuracy_bf16_rel", unit="relative error", versus="float32 latents, demo VAE, eight real photographs at 256²")
def accuracy_bf16_rel(quick: bool) -> float:
    """What bfloat16 costs: norm of the difference over the norm."""
    pixels = models.images(8, 256) / 255
    exact, rounded = (
        FrozenVAE(models.demo(), dtype=dtype).to(models.DEVICE).encode(pixels, posterior="mode")
        for dtype in ("float32", "bfloat16")
    )
    return float((rounded - exact).norm() / exact.norm())


# ---------------------------------------------------------------- images a second


def _register(model: str, view: str, side: int) -> None:
    name = {"sd": "an SD-size encoder", "demo": "the demo VAE"}[model]
    views = 2 if view == "inpaint" else 1
    count = {("sd", 256): 2, ("sd", 512): 1, ("demo", 256): 8, ("demo", 512): 4}[model, side]
    if models.DEVICE.type == "cuda":
        count = {256: 32, 512: 16}[side]

    @row(f"images_per_s_{view}_{model}_{side}", unit="images/s", versus=f"{name}, {count} images, ours in its defaults")
    def images_per_s(quick: bool) -> float | None:
        if quick and model == "sd" and (side > 256 or view == "inpaint"):
            return None  # which would take a quick run's time
        return count / median(rounds(model, view, side, count, ("ours",))["ours"])

    images_per_s.__doc__ = f"Each image encoded {views} times."


for _model in MODELS:
    for _view in ("plain", "inpaint"):
        for _side in (256, 512):
            _register(_model, _view, _side)


# ---------------------------------------------------------------- the default chunk


CHUNKS = (1, 2, 4, 8, 16)
CHUNK_ROWS = 16
"""Rows that are encoded in a call: so many images, or half as many of which each is encoded clean and masked."""


def chunked(size: int, view: str, dtype: str, side: int) -> Callable[[], None]:
    """`CHUNK_ROWS` rows, so many at once; run in a process of its own."""
    vae = FrozenVAE(models.demo(), dtype=dtype).to(models.DEVICE)
    kind, views = (PlainEncoder, 1) if view == "plain" else (InpaintEncoder, 2)
    return timed(hook(kind(vae, per_batch=size), models.batch(CHUNK_ROWS // views, side)))


def default_chunk(dtype: str, side: int) -> int:
    """How many images go through at once where nobody says."""
    vae = FrozenVAE(models.demo(), dtype=dtype).to(models.DEVICE)
    return vae.best_chunk((side, side)) or CHUNK_ROWS


@cache
def chunk_ratio(view: str, dtype: str, side: int, turns: int) -> float:
    """Seconds of the best of `CHUNKS` over those of the default: 1 where the default is the best of them.

    The best is found in half of the rounds and compared in the rest: among so many, the luckiest would win otherwise.
    """
    default = default_chunk(dtype, side)
    sizes = sorted({*CHUNKS, default})
    with own_processes({str(size): partial(chunked, size, view, dtype, side) for size in sizes}) as ways:
        interleaved(ways, 1)
        seconds = interleaved(ways, 2 * turns)
    best = min(ways, key=lambda way: median(seconds[way][:turns]))
    compared = {way: rounds[turns:] for way, rounds in seconds.items()}
    return 1.0 if best == str(default) else times_faster(compared, best, str(default))


@row(
    "encode_auto_chunk",
    unit="times",
    versus="the best of 1, 2, 4, 8 and 16 images a chunk, demo VAE, 16 rows; the worst of plain and inpaint, bfloat16 "
    "(where the device computes in it) and float32, 128², 256² and 512²; aim: at least 0.95",
)
def encode_auto_chunk(quick: bool) -> float:
    """How near ``per_batch: null`` comes to what a search would find."""
    dtypes = ("bfloat16", "float32") if computes_bfloat16(models.DEVICE) else ("float32",)
    cases = [("plain", 128), ("inpaint", 256)] if quick else product(("plain", "inpaint"), (128, 256, 512))
    turns = 2 if quick else 4
    return min(chunk_ratio(view, dtype, side, turns * max(1, 256 // side)) for view, side in cases for dtype in dtypes)


# ---------------------------------------------------------------- the floor


@cache
def _work(side: int) -> tuple[float, float]:
    """Operations of one image, and the bytes that its convolutions read and write in bfloat16 if nothing is cached."""
    autoencoder, moved = models.sd_size(), 0

    def count(module: Any, args: Any, output: Any) -> None:
        nonlocal moved
        moved += 2 * (args[0].numel() + output.numel() + sum(weight.numel() for weight in module.parameters()))

    handles = [
        module.register_forward_hook(count)
        for module in autoencoder.modules()
        if not list(module.children()) and list(module.parameters())
    ]
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        autoencoder.encode(torch.zeros(1, 3, side, side, device=models.DEVICE))
    for handle in handles:
        handle.remove()
    return float(counter.get_total_flops()), float(moved)


@row(
    "floor_gflop_256", unit="GFLOP an image", versus="SD-size encoder at 256², counted by torch; 512² takes four times"
)
def floor_gflop_256(quick: bool) -> float:
    """Operations."""
    return _work(256)[0] / 1e9


@row(
    "floor_gbytes_256",
    unit="GB an image",
    versus="SD-size encoder at 256² in bfloat16: layers' inputs, outputs, weights",
)
def floor_gbytes_256(quick: bool) -> float:
    """Bytes."""
    return _work(256)[1] / 1e9


def _share(way: str, dtype: str, quick: bool) -> float:
    """Of the matrix peak, in percent, that a way to encode images for inpainting reaches."""
    seconds, operations = _versus("sd", quick), 2 * _sd_count(quick) * _work(256)[0]  # two views
    turns = zip(seconds[way], seconds[f"{dtype} matrices"], strict=True)
    return 100 * median(operations / encoding / matrix_peak(products) for encoding, products in turns)


@row("floor_share_diffusers_fp32", unit="% of the float32 matrix peak", versus=f"{SCRIPT}, SD-size encoder")
def floor_share_diffusers_fp32(quick: bool) -> float:
    """What is left above it bounds what any way at equal precision can gain."""
    return _share("diffusers", "float32", quick)


@row("floor_share_bf16", unit="% of the bfloat16 matrix peak", versus="the same images, ours in its defaults")
def floor_share_bf16(quick: bool) -> float | None:
    """Only where the defaults choose bfloat16."""
    return _share("ours", "bfloat16", quick) if computes_bfloat16(models.DEVICE) else None


# ---------------------------------------------------------------- what the hook costs


@cache
def _overhead(model: str, quick: bool) -> dict[str, list[float]]:
    """The hook against the raw ``encode`` in the same dtype and layout, of the same chunk."""
    autoencoder = {"sd": models.sd_size, "trivial": models.Trivial}[model]()
    vae = FrozenVAE(autoencoder).to(models.DEVICE)
    data = models.batch(1, 256 if model == "sd" else 64)
    data.pop("mask")
    half = vae.dtype != torch.float32
    ready = (data["pixels"].to(models.DEVICE) / 127.5 - 1).to(
        vae.dtype, memory_format=torch.channels_last if half else torch.contiguous_format
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        through = hook(PlainEncoder(vae, posterior="mode"), data)
    functions = {"hook": timed(through), "raw": timed(lambda: vae.module.encode(ready))}
    interleaved(functions, 1 if model == "sd" else 100)
    return interleaved(functions, 9 if model == "sd" else 20_000)


@row("hook_overhead_pct", unit="%", versus="raw vae.encode in its best setting, SD-size encoder, one image of 256²")
def hook_overhead_pct(quick: bool) -> float:
    """Of the raw call's time."""
    seconds = _overhead("sd", quick)
    return 100 * (median(ours / raw for ours, raw in zip(seconds["hook"], seconds["raw"], strict=True)) - 1)


@row("hook_overhead_us", unit="µs", versus="raw encode of a trivial VAE, one image of 64²")
def hook_overhead_us(quick: bool) -> float:
    """The hook's own code."""
    seconds = _overhead("trivial", quick)
    return 1e6 * (median(seconds["hook"]) - median(seconds["raw"]))
