"""Metadata in metadata.csv and in metadata.jsonl: the same columns, captions and masks, and the same errors."""

import csv
import json

import pytest
import torch
from PIL import Image

from latentdm.data import ImageFolderData

SIZES = ("original_size", "crop_top_left", "target_size")
KINDS = ["metadata.csv", "metadata.jsonl"]


def write(path, rows, encoding="utf-8"):
    """Rows of texts as either kind of file."""
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding=encoding)
        return
    with path.open("w", encoding=encoding, newline="") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(name for row in rows for name in row)))
        writer.writeheader()
        writer.writerows(rows)


@pytest.fixture
def root(tmp_path):
    """Three images, the last in a folder of its own, and masks that no name pairs with them."""
    for number, name in enumerate(("1.png", "2.png", "in/3.png")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (8, 8), (number, 0, 0)).save(tmp_path / name)
        Image.new("L", (8, 8), 100 + number).save(tmp_path / f"{name[:-4]}x.png")
    return tmp_path


def samples(root, **settings):
    data = ImageFolderData(root, size=8, batch_size=2, **settings)
    data.setup()
    return {sample["name"]: sample for sample in data.predict_set}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("caption", "mask"), [("caption", "mask"), ("text", "mask_file_name"), ("prompt", "alpha")])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_captions_masks_and_columns(root, kind, caption, mask, encoding):
    texts = {"1.png": 'A "quoted", text', "2.png": "Schloß 城", "in/3.png": "three"}
    rows = [
        {"file_name": name, caption: text, mask: f"{name[:-4]}x.png", "license": "free"} for name, text in texts.items()
    ]
    write(root / kind, rows, encoding)
    columns = {"caption": caption, "mask": mask} if caption == "prompt" else {}
    found = samples(root, columns=columns)
    assert {name: sample["caption"] for name, sample in found.items()} == texts
    for number, name in enumerate(texts):
        assert set(found[name]) == {"pixels", "mask", "index", "name", "caption", "license", *SIZES}
        assert torch.equal(found[name]["mask"], torch.full((1, 8, 8), 100 + number, dtype=torch.uint8))
        assert found[name]["license"] == "free"
    ignored = samples(root, columns=columns, masks="ignore", captions="ignore")
    assert all(not {"mask", "caption"} & set(sample) for sample in ignored.values())
    assert set(ignored) == set(texts)  # an ignored mask is no image


@pytest.mark.parametrize("kind", KINDS)
def test_names_are_relative_to_the_file_that_holds_them(root, kind):
    write(root / "in" / kind, [{"file_name": "3.png", "caption": "three", "mask": "../1x.png"}])
    data = ImageFolderData(root, size=8, on_error="skip")
    data.setup()
    (position,) = [
        position for position in range(len(data.predict_set)) if data.predict_set.name(position) == "in/3.png"
    ]
    sample = data.predict_set[position]
    assert sample["caption"] == "three"
    assert sample["mask"].max() == 100


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"file_name": "../1.png"}, "names a file outside root="),
        ({"file_name": "1.png", "mask": "../1.png"}, "names a file outside root="),
        ({"file_name": "9.png"}, "names 9.png, which is no image in root="),
        ({"file_name": "1.png", "mask": "9.png"}, "names the mask 9.png, which does not exist in root=.*masks=ignore"),
        ({"file_name": "1.png", "source": "a web site"}, "names the source a web site, which .*sources=ignore"),
        ({"name": "1.png"}, "a row must have a column 'file_name'"),
    ],
)
def test_a_wrong_row_is_named(root, kind, row, message):
    write(root / kind, [row])
    with pytest.raises(ValueError, match=rf"^ImageFolderData: .*{kind}, line {1 + (kind == KINDS[0])}:? {message}"):
        samples(root)
