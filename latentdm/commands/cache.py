"""``latentdm cache``: what a cache holds, whether it is whole, and putting it in order."""

import json
from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from latentdm.commands.config import composed, device_of
from latentdm.errors import UserError

DOES = {
    "info": "what it holds, and what of it the configuration finds, lacks and does not need",
    "verify": "read every entry and compare its sum",
    "prune": "remove all that the configuration does not need; --dry-run tells what that is",
    "compact": "merge small files, and leave out what is broken or there twice",
    "export": "write latents as files (--format, --output), which pixels=latents reads without images",
}


DESCRIPTION = (
    "Look after a cache of latents. Takes the overrides of train_example.py, as in: latentdm cache info cache=disk "
    "cache.dir=latents pixels=folder pixels.root=photos. " + " ".join(f"{name}: {what}." for name, what in DOES.items())
)


def add_options(parser: ArgumentParser) -> None:
    """Those of the command."""
    parser.add_argument("action", choices=list(DOES))
    parser.add_argument("--json", action="store_true", help="print one line of JSON")
    parser.add_argument("--format", choices=["safetensors", "webdataset", "comfyui"], default="safetensors")
    parser.add_argument("--output", type=Path, default=Path("exported"), help="folder (default: exported)")
    parser.add_argument("--dry-run", action="store_true", help="of prune: remove nothing")
    parser.add_argument("--device", help="where the encoder would compute (default: cuda if there is one, else cpu)")


def run(settings: Namespace) -> None:
    """Do it, and print what was found.

    Raises:
        HydraException: the settings or the data are wrong.
    """
    with composed(settings) as cfg:
        print_found(_run(cfg, settings), settings.json)


def print_found(found: dict[str, Any], as_json: bool) -> None:
    """One line of JSON, or one line for each number."""
    if as_json:
        print(json.dumps(found))
        return
    for name, value in found.items():
        lines = value if isinstance(value, list) else [value]
        for line in lines:
            shown = f"{line / 2**20:.1f} MiB" if name == "bytes" else line
            print(f"{name:>10}  {shown}")


def _run(cfg: DictConfig, settings: Namespace) -> dict[str, Any]:
    from hydra.utils import instantiate  # late, as composing says sooner what is wrong

    from latentdm.cache.upkeep import compact, spaces, verify

    if cfg.get("cache") is None or cfg.cache.get("dir") is None:
        raise UserError("latentdm cache: there is no folder to look into; add cache=disk cache.dir=…")
    root = Path(cfg.cache.dir).expanduser()
    if not root.is_dir():
        raise UserError(f"latentdm cache: cache.dir={str(root)!r} is no folder; name the one that a run has filled")
    if settings.action == "verify":
        looks = [verify(space) for space in spaces(root)]
        found = {name: sum(getattr(look, name) for look in looks) for name in ("entries", "bytes", "failures")}
        return found | {"broken": [str(path) for look in looks for path in look.broken]}
    if settings.action == "compact":
        written = [compact(space) for space in spaces(root)]
        return {name: sum(getattr(each, name) for each in written) for name in ("entries", "bytes", "failures")}
    return _compared(instantiate(cfg.datamodule), root, settings)


def _compared(datamodule: Any, root: Path, settings: Namespace) -> dict[str, Any]:
    """What of a cache a configuration needs; for ``prune``, the rest is removed, for ``export`` it is written."""
    from latentdm.cache.export import export
    from latentdm.cache.fill import ready_to_fill
    from latentdm.cache.upkeep import compact, remove, spaces, totals
    from latentdm.cache.wanted import needed_keys
    from latentdm.data.module import PixelDataModule

    if not isinstance(datamodule.pixels, PixelDataModule):
        raise UserError("latentdm cache: which entries this data module needs is not known before its batches are")
    pixels = ready_to_fill(datamodule, device_of(settings.device))
    if settings.action == "export":
        return export(pixels.able(), settings.format, settings.output) | {"output": str(settings.output.resolve())}
    store = datamodule.cache.store
    counts = totals(store.folder)
    needed = set(needed_keys(pixels.able()))
    hits = sum(key in store for key in needed)
    texts = [each for each in datamodule.cache.stores if each is not store]
    own = {each.folder for each in datamodule.cache.stores}  # which captions are needed is not known
    others = [space for space in spaces(root) if space not in own]
    sizes = {space.name: sum(path.stat().st_size for path in space.rglob("*.safetensors")) for space in others}
    found: dict[str, Any] = {
        **counts,
        "hits": hits,
        "misses": len(needed) - hits,
        "failures": store.failures,
        "stale": counts["entries"] - hits,
        **({"captions": totals(texts[0].folder)["entries"]} if texts else {}),
        "space": str(store.folder),
        "others": [f"{name} ({size / 2**20:.1f} MiB)" for name, size in sizes.items()],
    }
    if settings.action == "prune" and not settings.dry_run:
        freed = sum(remove(space) for space in others)
        compact(store.folder, keep=needed.__contains__, all_shards=True)
        found["freed"] = freed + counts["bytes"] - totals(store.folder)["bytes"]
    return found
