"""Writes docs/data.md from what the code recognises: ``python docs/data.py``."""

from pathlib import Path

from latentdm.batch import MASK, SEGMENTATION, SOURCE
from latentdm.data.decode import EXTENSIONS
from latentdm.data.metadata import CAPTION_COLUMNS, FILE_COLUMNS, RESERVED
from latentdm.data.names import (
    FOLDERS,
    IMAGE_FOLDERS,
    IMAGE_MARKS,
    LIKE_FOLDERS,
    LIKE_MARKS,
    MARKS,
    METADATA,
    SIDECARS,
)
from latentdm.data.texts import MAX_DEPTH

HERE = Path(__file__).parent

KINDS = {
    MASK: "its mask",
    SOURCE: "its source: what the model is shown in its place",
    SEGMENTATION: "its label map, for `masks=segmentation`",
}

TOOLS = {
    "masks/": "U-Net repositories: `imgs/`, `masks/`",
    "-mask": "U-Net repositories, Carvana: `x_mask.gif`",
    "-masks": "cellpose",
    "-masklabel": "OneTrainer",
    "-cp_masks": "cellpose",
    ".txt": "sd-scripts, OneTrainer, webdataset",
    ".caption": "sd-scripts",
    ".json": "webdataset, img2dataset",
    "metadata.jsonl": "diffusers and datasets",
    "metadata.csv": "diffusers and datasets",
    "metadata.parquet": "datasets",
}
"""Who gives a file such a name."""

TEXT = """<!-- Written by `python docs/data.py`; edit that. -->
# Data: what is recognised

`ImageFolderData` reads a folder and the folders inside it. Neither case nor the Unicode form of a name matters
(`A.TXT` belongs to `a.png`), as long as one image alone has the name.

{table}

White means repaint. Separators may be any of `-`, `_`, `.` and a blank. `mask_1.png` is the mask of `image_1.png` too,
and the image's own ending may stand before a mark: `a.jpg_mask.png`. `a-mask.png` and what lies in `masks/` of the
root are masks whatever else there is: one without an image is an error. All other names in the table count only where
an image has the rest of the name; otherwise the picture is an image, and `setup` says so.

`setup` prints one line, and `latentdm preview` repeats it:

    ImageFolderData: 12 images, 12 masks, 12 captions; 11 train, 1 validates; masks are not used: masks=random

What was left out stands in a second one, by endings with an example: `left out: 3 .heic (b.heic), 1 .npy (a_seg.npy)`.
Files and folders whose name begins with a dot are left out without a word.

## Captions and columns

Texts are UTF-8, with or without a byte order mark. CSV follows RFC 4180: a quoted field may hold commas, quotes and
line breaks, and be of any length. JSON lines end at a line feed and nowhere else. The image is in the column
{files}, or `columns={{image: …}}`; its name is relative to the metadata file,
which may lie in any folder. The caption is in {captions}, or `columns={{caption: …}}`; masks may be
named in `mask` or `mask_file_name`, sources and label maps likewise.

Several captions of an image are kept: a list, several rows or files, or a row and a file. Training draws one for each
sample and epoch, from (seed, epoch, index); otherwise the first is taken. A caption comes with the columns of its row.
Rows of one image that name different masks are an error. A text file is one caption, with all its lines.

All other columns ride along. Left out with a word are those whose names a batch has for something else ({reserved});
`columns={{my_name: name}}` takes one under another name. A row is wrong, with its file and line, if it has more cells
than the first line, an integer of more than 64 bits, half a surrogate pair, a key twice, or more than {depth} levels.
With `on_error=raise` that ends `setup`; with `skip` it is an error of that image alone, which another one replaces.

labelme's `.json` files hold polygons, which are not read: export them as masks. sd-scripts takes masks from a folder of
any name: call it `masks/`, or the pictures in it are left out (`conditioning/`, or any name with the word `mask`) or
images (any other name).

## Shards

A sample of `WebDatasetData` is the files of one name up to its first dot. Recognised are the endings of the table:
`0001.jpg`, `0001.mask.png` and so on, `0001.txt`, `0001.caption`, `0001.json`, and `0001.cls`, an integer. Two pictures
that may both be the image (`0001.jpg`, `0001.png`) are an error that asks for `columns={{image: jpg, mask: png}}`. What
is wrong with a text is an error of its sample alone. `index`, on which noise and masks are keyed, is made of the
shard's name and the sample's.
"""


def main() -> None:
    """Write the page."""
    (HERE / "data.md").write_text(page(), encoding="utf-8")


def page() -> str:
    """The page as it should be."""
    lines = [["name", "is", "as in"], ["---"] * 3, *rows()]
    reserved = ", ".join(f"`{name}`" for name in sorted(RESERVED) if name)
    return TEXT.format(
        table="\n".join("| " + " | ".join(line) + " |" for line in lines),
        files=" or ".join(f"`{name}`" for name in FILE_COLUMNS),
        captions=" or ".join(f"`{name}`" for name in CAPTION_COLUMNS),
        reserved=reserved,
        depth=MAX_DEPTH,
    )


def rows() -> list[list[str]]:
    """What is recognised, a row each."""
    found = [[many("a{}", EXTENSIONS), "an image", "what Pillow reads without running or opening anything else"]]
    for kind, what in KINDS.items():
        for mark in MARKS[kind]:
            also = f", of `a_{IMAGE_MARKS[0]}` too" if mark == "masks" else ""
            found.append([f"`a-{mark}.png`, `a_{mark}.png`", what + also, TOOLS.get(f"-{mark}", "")])
        for folder in FOLDERS[kind]:
            names = f"`{folder}/a.png`, `{folder}/a-{MARKS[kind][0]}.png`"
            found.append([names, f"{what}, where the image is `a` or in a folder beside", TOOLS.get(f"{folder}/", "")])
        called = many("{}", IMAGE_FOLDERS)
        found.append([f"`train_{FOLDERS[kind][0]}/a.png`", f"{what}, where the image is `train/a`", ""])
        found.append(
            [f"`../{FOLDERS[kind][0]}/a.png`", f"{what}, where the root is called {called}, or each image has one", ""]
        )
    for ending in SIDECARS:
        what = "its caption, and other columns" if ending == ".json" else "its caption"
        found.append([f"`a{ending}`, `a.png{ending}`", what, TOOLS.get(ending, "")])
    found += [[f"`{name}`", "captions and columns of a folder", TOOLS.get(name, "")] for name in METADATA]
    found.append(["`meta_….json`", "the same, by the paths of images", "sd-scripts: `meta_cap.json`, `meta_lat.json`"])
    like = many("a_{}.png", ("mask_2", *LIKE_MARKS[1:]))
    found.append([like, "left out: it looks like a mask or a label map of `a`", "instances, labels"])
    found.append([many("{}/a.png", LIKE_FOLDERS), "left out, where an image is called `a`", "VOC, ADE20K, sd-scripts"])
    return found


def many(pattern: str, names: tuple[str, ...]) -> str:
    """Names as code."""
    return ", ".join(f"`{pattern.format(name)}`" for name in names)


if __name__ == "__main__":
    main()
