"""What files are by their names, as the field's tools give them: found, or left out with a word."""

import importlib.util
import json
import logging
import os
import unicodedata

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from PIL import Image
from running import ROOT

from latentdm import InpaintEncoder, LatentDataModule, PlainEncoder
from latentdm.data import ImageFolderData
from latentdm.data.matching import match
from latentdm.data.names import LIKE_FOLDERS, LIKE_MARKS, folded
from latentdm.masks import AlphaMask, BatchMask, MaskSource, MixedMask, RandomMask, SegmentationMask


def save(path, level=0, mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, (8, 8), (level,) * 3 if mode == "RGB" else level).save(path)


def write(root, *names):
    """Pictures: each of one level, its number; masks are told from images by it."""
    for number, name in enumerate(names):
        save(root / name, 10 * (number + 1))


def loaded(root, **settings):
    data = ImageFolderData(root, **{"size": 8, "batch_size": 1, "val_share": 0, **settings})
    data.setup()
    return data


def found(root, **settings):
    """Name → the level of its mask, or None."""
    samples = loaded(root, **settings).predict_set
    return {s["name"]: int(s["mask"].max()) if "mask" in s else None for s in samples}


# -------------------------------------------------------------------- masks


LAYOUTS = {
    "ours": ("1.png", "1-mask.png"),
    "in capitals": ("astronaut.png", "astronaut-Mask.PNG"),
    "U-Net repositories": ("1.jpg", "1_mask.png"),
    "OneTrainer": ("1.jpg", "1-masklabel.png"),
    "cellpose": ("1.tif", "1_masks.tif"),
    "cellpose with a filter": ("1_img.tif", "1_masks.tif"),
    "cellpose's own": ("1.png", "1_cp_masks.png"),
    "webdataset": ("1.jpg", "1.mask.png"),
    "a blank": ("a b.jpg", "a b mask.png"),
    "a folder inside": ("1.jpg", "masks/1.png"),
    "a folder in capitals": ("1.jpg", "Masks/1.png"),
    "a folder of one mask": ("1.jpg", "mask/1.png"),
    "two folders": ("images/1.jpg", "masks/1.png"),
    "Pytorch-UNet": ("imgs/1.jpg", "masks/1_mask.bmp"),
    "any folder": ("JPEGImages/1.jpg", "Masks/1.png"),
    "Carvana": ("train/1.jpg", "train_masks/1_mask.png"),
    "folders of splits": ("images/train/1.jpg", "masks/train/1.png"),
    "splits of folders": ("train/images/1.jpg", "train/masks/1.png"),
    "a folder in each": ("cats/1.jpg", "cats/masks/1.png"),
    "deeper": ("cats/in/1.jpg", "cats/masks/in/1.png"),
    "another case": ("A.JPG", "masks/a.png"),
    "decomposed": ("caf\u00e9.png", "cafe\u0301_mask.png"),
    "an image called like a mask": ("gas_mask.png", "gas_mask_mask.png"),
    "numbers behind": ("image_1.png", "mask_1.png"),
    "numbers at once": ("img1.png", "mask1.png"),
    "numbers in folders": ("images/images01.jpg", "masks/masks01.jpg"),
    "the image's ending": ("1.jpg", "1.jpg_mask.png"),
    "the image's ending in a folder": ("images/1.jpg", "masks/1.jpg.png"),
    "ComfyUI": ("ComfyUI_0001_.png", "ComfyUI_0001_mask.png"),
    "a dash with blanks": ("1.jpg", "1 - mask.png"),
}


@pytest.mark.parametrize(("image", "mask"), LAYOUTS.values(), ids=LAYOUTS)
def test_the_mask_is_found(tmp_path, image, mask):
    write(tmp_path, image, mask)
    assert found(tmp_path) == {image: 20}
    assert found(tmp_path, masks="ignore") == {image: None}
    assert f"left out: 1 mask ({mask}), as masks=ignore" in loaded(tmp_path, masks="ignore").notes()


def test_a_gif_of_carvana(tmp_path):
    save(tmp_path / "1.jpg")
    save(tmp_path / "1_mask.gif", 20, "L")
    data = loaded(tmp_path)
    assert data.summary().startswith("1 image, 1 mask, ")


@pytest.mark.parametrize("masks", ["masks", "mask", "Masks"])
@pytest.mark.parametrize("name", ["images", "imgs", "Images"])
def test_a_folder_of_masks_beside_the_root(tmp_path, name, masks):
    write(tmp_path, f"{name}/1.jpg", f"{name}/in/2.jpg", f"{masks}/1.png", f"{masks}/in/2-mask.png", f"{masks}/9.png")
    data = loaded(tmp_path / name)
    assert data.summary() == "2 images, 2 masks, no captions; 2 train, none validate"
    assert f"masks are those in {tmp_path / masks}" in data.notes()
    assert [int(sample["mask"].max()) for sample in data.predict_set] == [30, 40]
    assert found(tmp_path / name, masks="ignore") == {"1.jpg": None, "in/2.jpg": None}


@pytest.mark.parametrize(
    ("root", "image", "mask"),
    [
        ("photos", "photos/1.jpg", "masks/1.png"),
        ("photos", "photos/1.jpg", "photos_masks/1.png"),
        ("images/train", "images/train/1.jpg", "masks/train/1.png"),
    ],
)
def test_a_folder_of_masks_for_every_image(tmp_path, root, image, mask, monkeypatch):
    write(tmp_path, image, mask)
    assert found(tmp_path / root) == {"1.jpg": 20}
    monkeypatch.chdir(tmp_path / root)
    assert found(".") == {"1.jpg": 20}


def test_a_folder_of_masks_for_some_images_is_another_one_s(tmp_path):
    write(tmp_path, "photos/1.jpg", "photos/2.jpg", "masks/1.png")
    data = loaded(tmp_path / "photos")
    assert "masks, with masks for 1 of 2 images (inside root they would be taken)" in data.notes()
    assert "mask" not in data.predict_set[0]


def test_images_named_so_want_a_mask_each(tmp_path):
    write(tmp_path, "images/1.jpg", "images/2.jpg", "masks/1.png")
    with pytest.raises(ValueError, match=r"an image without a mask: .*2\.jpg \(and 0 more of 2\)"):
        loaded(tmp_path / "images")


@pytest.mark.parametrize("source", ["1_source.png", "sources/1.png", "source/1.png", "../sources/1.png"])
def test_sources_likewise(tmp_path, source):
    write(tmp_path / "root", "1.png", source)
    (sample,) = loaded(tmp_path / "root").predict_set
    assert sample["source"].max() == 20


def test_masks_for_the_same_name_in_two_folders(tmp_path):
    write(tmp_path, "images/1.jpg", "other/1.jpg", "masks/1.png", "masks/other/1.png")
    assert found(tmp_path) == {"images/1.jpg": 30, "other/1.jpg": 40}
    write(tmp_path / "x", "a/1.jpg", "b/1.jpg", "masks/1.png")
    with pytest.raises(ValueError, match=r"a mask without an image: .*masks/1\.png"):
        loaded(tmp_path / "x", masks="auto", on_error="raise")


def test_two_marks_for_one_image(tmp_path):
    write(tmp_path, "1.png", "1_mask.png", "masks/1.png")
    with pytest.raises(ValueError, match=r"two masks for one image, .*1_mask.png and .*masks/1.png; remove one"):
        loaded(tmp_path)


def test_what_metadata_name_is_what_they_say(tmp_path):
    write(tmp_path, "gas-mask.png", "1.png", "1_mask.png")
    rows = [{"file_name": name, "text": "x"} for name in ("gas-mask.png", "1_mask.png", "1.png")]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert found(tmp_path) == {"gas-mask.png": None, "1.png": None, "1_mask.png": None}


# -------------------------------------------------------------------- what only looks like a mask


LIKE = ["1_mask_0.png", "1_mask (2).png", "mask_1.png", "1mask.png", "1_labels.tif", "1-SEG.PNG"]
LIKE += ["1_mask_inverted.png", "1_gt_mask.png", "1-condlabel.png", "1_gtFine_labelIds.png", "1_binary_mask.png"]
LIKE += ["ISIC2018_GroundTruth/1_segmentation.png", "DUTS-TR-Mask/1.png", "1_mask001.png", "face masks/1.png"]
LIKE += [f"1_{mark}.png" for mark in LIKE_MARKS[1:]]
LIKE += [f"{folder}/1.png" for folder in LIKE_FOLDERS]


@pytest.mark.parametrize("name", LIKE)
def test_it_is_never_trained_on_without_a_word(tmp_path, name):
    write(tmp_path, "1.png", "2.png", name)
    data = loaded(tmp_path)
    assert {sample["name"] for sample in data.predict_set} == {"1.png", "2.png"}
    assert f"left out: 1 picture ({name}) called like a mask or label map" in data.notes()


def test_layouts_whose_masks_lie_in_folders_of_their_own(tmp_path):
    """Cityscapes, P3M, Supervisely, and a trainer of edits."""
    for number, (image, *others) in enumerate(
        [
            ("leftImg8bit/a/x_0_leftImg8bit.png", "gtFine/a/x_0_gtFine_labelIds.png", "gtFine/a/x_0_gtFine_color.png"),
            ("img/1.png", "masks_human/1.png", "masks_machine/1.png"),
            ("target/1.png", "control/1.png", "trimap/1.png"),
        ]
    ):
        write(tmp_path / f"{number}", image, *others)
        data = loaded(tmp_path / f"{number}")
        assert [sample["name"] for sample in data.predict_set] == [image]
        assert "left out: 2 pictures" in data.notes()


@pytest.mark.parametrize("name", ["CelebAMask-HQ-mask-anno/0/00000_hair.png", "7_dmask.png"])
def test_a_word_in_the_path_is_told_too(tmp_path, name):
    write(tmp_path, "2.png", name)
    assert f"taken as images: 1 picture ({name}) called like a mask, but of no image" in loaded(tmp_path).notes()


@pytest.mark.parametrize("name", ["wearing_mask.png", "in/masks/1.png", "mask/7.png"])
def test_without_an_image_beside_it_is_one_with_a_word(tmp_path, name):
    write(tmp_path, "2.png", name)
    data = loaded(tmp_path)
    assert {sample["name"] for sample in data.predict_set} == {"2.png", name}
    assert f"taken as images: 1 picture ({name}) called like a mask, but of no image" in data.notes()


@pytest.mark.parametrize("name", ["segment.png", "maskarade.png", "1-label-of-wine.png", "alphabet.png", "1-2.png"])
def test_a_usual_name_is_an_image(tmp_path, name):
    write(tmp_path, "1.png", name)
    data = loaded(tmp_path)
    assert len(data.predict_set) == 2
    assert data.notes() == ""


def test_what_is_called_like_masks_is_told_in_proportion_to_its_number(monkeypatch):
    calls = []
    monkeypatch.setattr("latentdm.data.matching.folded", lambda name: calls.append(name) or folded(name))
    counts = []
    for number in (100, 400):
        calls.clear()
        assert len(match(f"{image:03} mask.png" for image in range(number)).images) == number
        counts.append(len(calls))
    assert counts[1] < 6 * counts[0]


def test_two_pictures_of_one_name_are_images_with_a_word(tmp_path):
    write(tmp_path, "1.jpg", "1.png")
    data = loaded(tmp_path)
    assert len(data.predict_set) == 2
    assert "taken as images: 2 pictures (1.jpg) with one name but for the ending" in data.notes()


# -------------------------------------------------------------------- captions by name, and what is left out


@pytest.mark.parametrize(
    ("image", "text"),
    [
        ("A.PNG", "A.TXT"),
        ("a.png", "A.TXT"),
        ("A.png", "a.caption"),
        ("a.png", "a.png.txt"),
        ("a.JPG", "A.jpg.TXT"),
        ("caf\u00e9.png", "cafe\u0301.txt"),
        ("cafe\u0301.png", "caf\u00e9.txt"),
        ("STRASSE.png", "stra\u00dfe.txt"),
    ],
)
def test_the_caption_is_found(tmp_path, image, text):
    write(tmp_path, image)
    (tmp_path / text).write_text("a caption")
    (sample,) = loaded(tmp_path).predict_set
    assert sample["caption"] == "a caption"


def test_names_that_differ_in_case_alone_are_two(tmp_path):
    write(tmp_path, "a.png", "A.png")
    if len(list(tmp_path.iterdir())) == 1:
        pytest.skip("this file system knows no case")
    (tmp_path / "a.txt").write_text("small")
    (tmp_path / "A.txt").write_text("large")
    assert {s["name"]: s["caption"] for s in loaded(tmp_path).predict_set} == {"a.png": "small", "A.png": "large"}
    (tmp_path / "A.txt").unlink()
    assert {s["name"]: s["caption"] for s in loaded(tmp_path).predict_set} == {"a.png": "small", "A.png": ""}


@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_metadata_may_write_a_name_in_another_form(tmp_path, form):
    other = {"NFC": "NFD", "NFD": "NFC"}[form]
    write(tmp_path, unicodedata.normalize(form, "in/Café.png"))
    row = {"file_name": unicodedata.normalize(other, "in\\café.PNG"), "text": "a caption"}
    (tmp_path / "metadata.jsonl").write_text(json.dumps(row))
    (sample,) = loaded(tmp_path).predict_set
    assert sample["caption"] == "a caption"


def test_what_is_left_out_is_one_line_with_counts_and_examples(tmp_path, caplog):
    write(tmp_path, "1.png", "2.png", "2_seg.png")
    for name in ("b.heic", "c.HEIC", "notes.txt", "in/LICENSE", "model.safetensors", "1.txt", ".hidden.psd"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    with caplog.at_level(logging.INFO):
        data = loaded(tmp_path)
    line = (
        "ImageFolderData: left out: 2 .heic (b.heic), 1 without an ending (in/LICENSE), 1 .safetensors "
        "(model.safetensors), 1 .txt (notes.txt); left out: 1 picture (2_seg.png) called like a mask or label map "
        "(rename masks: name-mask.png)"
    )
    assert line in [record.message for record in caplog.records]
    assert "ImageFolderData: 2 images, no masks, 1 caption; 2 train, none validate" in caplog.messages
    assert data.notes() in line


def test_a_folder_that_nobody_may_list(tmp_path):
    write(tmp_path, "1.png", "secret/2.png")
    (tmp_path / "secret").chmod(0)
    if os.access(tmp_path / "secret", os.R_OK):
        pytest.skip("this user may read anything")
    try:
        with pytest.raises(ValueError, match=r"^ImageFolderData: cannot list .*secret: Permission denied; let it be"):
            loaded(tmp_path)
        assert "cannot list" in str(loaded(tmp_path, on_error="skip").problems())
    finally:
        (tmp_path / "secret").chmod(0o755)


def test_of_an_index_that_is_kept_the_line_is_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr("latentdm.data.folder.KEPT_FROM", 1)
    write(tmp_path / "root", "1.png")
    (tmp_path / "root" / "b.heic").touch()
    for path in (tmp_path / "root", *(tmp_path / "root").iterdir()):
        os.utime(path, (1_600_000_000, 1_600_000_000))
    first = loaded(tmp_path / "root", index_dir=tmp_path / "cache")
    monkeypatch.setattr(os, "scandir", None)
    again = loaded(tmp_path / "root", index_dir=tmp_path / "cache")
    assert (again.notes(), again.summary()) == (first.notes(), first.summary())
    assert "b.heic" in again.notes()


file_names = st.text(
    st.characters(exclude_categories=["Cs"], exclude_characters="/\0"), min_size=1, max_size=12
).filter(lambda name: not name.startswith(".") and len(name.encode()) < 200)  # fmt: skip


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(names=st.lists(file_names, min_size=1, max_size=4, unique_by=folded))
def test_any_name_is_an_image_or_belongs_to_one(tmp_path_factory, names):
    root = tmp_path_factory.mktemp("names")
    picture = np.zeros((2, 2, 3), np.uint8)
    for name in names:
        Image.fromarray(picture).save(root / f"{name}.png")
        (root / f"{name}.txt").write_text(name)
    rows = "".join(json.dumps({"file_name": f"{name}.png", "wide": name}) + "\n" for name in names)
    (root / "metadata.jsonl").write_text(rows)
    assume(not any(name.lower().endswith(".txt") for name in names))
    samples = list(loaded(root, size=2).predict_set)
    assert sorted(sample["name"] for sample in samples) == sorted(f"{name}.png" for name in names)
    for sample in samples:
        assert sample["wide"] == sample["name"][:-4]
        assert sample["caption"] == sample["wide"].strip() or not sample["wide"].strip()


# -------------------------------------------------------------------- the line of a run


class MyMasks(MaskSource):
    def masks(self, batch, draws):
        return batch["pixels"][:, :1]


def summary(root, encoder, **settings):
    data = loaded(root, val_share=0.1)
    latents = LatentDataModule(data, encoder, **settings)
    latents.setup("fit")
    return data.summary()


def test_whether_masks_are_used(tmp_path, vae):
    for number in range(12):
        write(tmp_path, f"images/{number}.png", f"masks/{number}.png")
        (tmp_path / f"images/{number}.txt").write_text("a caption")
    counts = "12 images, 12 masks, 12 captions; 11 train, 1 validates"
    inpaint, mixed = InpaintEncoder(vae), MixedMask({"a": BatchMask(), "b": RandomMask()}, {"a": 0.5, "b": 0.5})
    assert summary(tmp_path, inpaint, masks=RandomMask()) == f"{counts}; masks are not used: masks=random"
    assert summary(tmp_path, inpaint, masks=AlphaMask()) == f"{counts}; masks are not used: masks=alpha"
    assert summary(tmp_path, inpaint, masks=MyMasks()) == f"{counts}; masks are not used: masks=MyMasks"
    assert summary(tmp_path, PlainEncoder(vae)) == f"{counts}; masks are not used: encoder=plain"
    for masks in (None, BatchMask(), mixed):
        assert summary(tmp_path, inpaint, masks=masks) == counts
    maps = {"masks": SegmentationMask(classes=[1]), "keys": {"segmentation": "mask"}}
    assert summary(tmp_path, inpaint, **maps) == counts


# -------------------------------------------------------------------- docs/data.md


def docs():
    spec = importlib.util.spec_from_file_location("data_page", ROOT / "docs/data.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_is_up_to_date():
    assert (ROOT / "docs/data.md").read_text(encoding="utf-8") == docs().page(), "run docs/data.py"


def test_what_the_page_calls_masks_are_masks(tmp_path):
    names = [row[0].replace("`", "").split(", ") for row in docs().rows() if row[1].startswith("its mask")]
    for number, name in enumerate(name for some in names for name in some):
        folder = tmp_path / f"{number}" / "images"
        image = "train/a.png" if name.startswith("train") else "a.png"
        write(folder, image, name)
        assert found(folder) == {image: 20}, name
