"""Which images a folder holds, which mask belongs to which, and which side of the split each is on."""

import os
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

from latentdm.data.images import EXTENSIONS

MASK_SUFFIX = "-mask"
MASK_FOLDER = "masks"


@dataclass(frozen=True)
class ImageFile:
    """An image of a folder.

    Attributes:
        path: the file.
        name: its path inside the folder, with ``/`` on every system.
        index: its place among all images of the folder, sorted by name.
        mask: the file of its mask.
    """

    path: Path
    name: str
    index: int
    mask: Path | None = None


def find_images(root: Path, owner: str, masks: str, skip: Path | None = None) -> list[ImageFile]:
    """The images of a folder and of the folders inside it, sorted by name; hidden files are left out.

    The mask of ``a/b.jpg`` is ``a/b-mask.png`` or ``masks/a/b.png``, with any image ending.

    Args:
        root: the folder.
        owner: the class that an error names.
        masks: ``"auto"``, ``"require"`` or ``"ignore"``, see `latentdm.data.ImageFolderData`.
        skip: a folder inside ``root`` that is left out.

    Raises:
        ValueError: no images, a mask without an image, two masks for one image, an image without a mask where others
            have one (or where ``masks`` is ``"require"``).
    """
    images: list[str] = []
    mask_of: dict[str, str] = {}
    for name in sorted(_image_names(root, skip)):
        image_stem = _masked_stem(name)
        if image_stem is None:
            images.append(name)
        elif image_stem in mask_of and masks != "ignore":
            raise ValueError(
                f"{owner}: two masks for one image, {root / mask_of[image_stem]} and {root / name}; remove one"
            )
        else:
            mask_of[image_stem] = name
    if not images:
        raise ValueError(f"{owner}: no images in root={str(root)!r}; expected files ending in {', '.join(EXTENSIONS)}")
    if masks == "ignore":
        mask_of = {}
    _check_pairs(root, images, mask_of, owner, required=masks == "require")
    return [
        ImageFile(root / name, name, index, root / mask_of[_stem(name)] if mask_of else None)
        for index, name in enumerate(images)
    ]


def split_files(files: list[ImageFile], val_share: float) -> tuple[list[ImageFile], list[ImageFile]]:
    """Split by a hash of each name, so that an image stays on its side when others are added.

    So ``val_share`` is met on average. Neither side is left empty where there are two images and ``val_share`` is
    above 0: the image that comes nearest to the other side then goes there. One image alone is for training.

    Returns:
        The training and the validation files, each in their old order.
    """
    place = {file.name: _unit_hash(file.name) for file in files}
    by_place = sorted(place, key=lambda name: place[name])
    val = {name for name in place if place[name] < val_share}
    if val_share > 0 and len(files) > 1 and not val:
        val = {by_place[0]}
    if len(val) == len(files):
        val.remove(by_place[-1])
    return [file for file in files if file.name not in val], [file for file in files if file.name in val]


def _image_names(root: Path, skip: Path | None) -> list[str]:
    names = []
    seen = {os.path.realpath(skip)} if skip else set()
    for folder, subfolders, files in os.walk(root, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:  # a link back up, which would never end
            subfolders.clear()
            continue
        seen.add(real)
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        inside = Path(folder).relative_to(root)
        names += [
            (inside / name).as_posix()
            for name in files
            if name.lower().endswith(EXTENSIONS) and not name.startswith(".")
        ]
    return names


def _check_pairs(root: Path, images: list[str], mask_of: dict[str, str], owner: str, required: bool) -> None:
    stems = {_stem(name) for name in images}
    for stem, mask in mask_of.items():
        if stem not in stems:
            raise ValueError(
                f"{owner}: a mask without an image: {root / mask}; name it after its image, remove it, "
                "or set masks=ignore"
            )
    without = [name for name in images if _stem(name) not in mask_of]
    if without and (mask_of or required):
        raise ValueError(
            f"{owner}: an image without a mask: {root / without[0]} (and {len(without) - 1} more of {len(images)}); "
            f"add {_stem(without[0])}{MASK_SUFFIX}.png to {root}, or set masks=ignore"
        )


def _masked_stem(name: str) -> str | None:
    """The stem of the image that a mask is for; None for an image."""
    stem = _stem(name)
    image_stem = stem.removeprefix(f"{MASK_FOLDER}/").removesuffix(MASK_SUFFIX)
    return image_stem if image_stem != stem else None


def _stem(name: str) -> str:
    return name[: name.rindex(".")]


def _unit_hash(name: str) -> float:
    return int.from_bytes(blake2b(name.encode("utf-8", "surrogateescape"), digest_size=8).digest(), "big") / 2**64
