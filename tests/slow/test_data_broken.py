"""Odd and broken files of every kind in one folder, in both modes: nothing crashes, everything bad is reported."""

import io

import numpy as np
import pytest
import torch
from pictures import read_image
from PIL import Image

from latentdm.data import ImageFolderData, SampleError

SIZE = 8
COLOUR = (200, 90, 30)


def encoded(image, ending, **options):
    file = io.BytesIO()
    image.save(file, {"jpg": "JPEG", "tif": "TIFF"}.get(ending, ending.upper()), **options)
    return file.getvalue()


def flat(mode="RGB", size=(24, 20)):
    return Image.new("RGB", size, COLOUR).convert(mode)


def noise(size=(24, 20)):
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


def good_files():
    """Name → (content, the colour that it shows)."""
    gray = flat("L").getpixel((0, 0))
    files = {}
    for ending in ("png", "jpg", "webp", "bmp", "tif"):
        options = {"quality": 100} if ending in ("jpg", "webp") else {}
        for label, size in {"usual": (24, 20), "dot": (1, 1), "line": (1, 30), "wide": (300, 9)}.items():
            files[f"{label}-{ending}.{ending}"] = encoded(flat(size=size), ending, **options), COLOUR
    for ending in ("png", "jpg", "bmp", "tif"):
        files[f"gray-{ending}.{ending}"] = encoded(flat("L"), ending), (gray,) * 3
    for ending in ("png", "tif", "bmp"):
        files[f"palette-{ending}.{ending}"] = encoded(flat().quantize(4), ending), COLOUR
    for ending in ("png", "webp", "tif"):
        files[f"alpha-{ending}.{ending}"] = encoded(flat("RGBA"), ending), COLOUR
    files["gray-alpha.png"] = encoded(flat("LA"), "png"), (gray,) * 3
    files["bits.png"] = encoded(Image.new("1", (9, 9), 1), "png"), (255,) * 3
    files["deep.png"] = encoded(Image.fromarray(np.full((9, 9), 257 * 80, np.uint16)), "png"), (80,) * 3
    files["deep.tif"] = encoded(Image.fromarray(np.full((9, 9), 257 * 80, np.uint16)), "tif"), (80,) * 3
    files["cmyk.tif"] = encoded(Image.new("CMYK", (9, 9), (0, 255, 255, 0)), "tif"), (255, 0, 0)
    files["cmyk.jpg"] = encoded(Image.new("CMYK", (9, 9), (0, 255, 255, 0)), "jpg", quality=100), (255, 0, 0)
    frames = [flat(), Image.new("RGB", (24, 20))]
    files["animated.webp"] = encoded(frames[0], "webp", save_all=True, append_images=frames[1:], lossless=True), COLOUR
    files["animated.png"] = encoded(frames[0], "png", save_all=True, append_images=frames[1:]), COLOUR
    files["pages.tif"] = encoded(frames[0], "tif", save_all=True, append_images=frames[1:]), COLOUR
    files["progressive.jpg"] = encoded(flat(size=(64, 64)), "jpg", progressive=True, quality=100), COLOUR
    files["half.jpg"] = encoded(flat(size=(400, 300)), "jpg", quality=100), COLOUR
    files["misnamed.png"] = encoded(flat(), "jpg", quality=100), COLOUR
    files["tail.jpg"] = encoded(flat(), "jpg", quality=100) + b"rubbish", COLOUR
    files["odd-profile.png"] = encoded(flat(), "png", icc_profile=b"no profile"), COLOUR
    files["odd-exif.jpg"] = encoded(flat(), "jpg", quality=100, exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff"), COLOUR
    return files


def bad_files():
    """Name → content."""
    files = {
        "empty.png": b"", "text.jpg": b"not an image", "zeros.png": bytes(500), "html.webp": b"<html></html>",
        "head.png": b"\x89PNG\r\n\x1a\n", "head.jpg": b"\xff\xd8\xff\xe0", "head.bmp": b"BM", "head.tif": b"II*\0",
        "floats.tif": encoded(Image.fromarray(np.zeros((4, 4), np.float32)), "tif"),
        "huge.png": encoded(Image.new("1", (400, 400)), "png"),
        "bomb.png": encoded(flat(), "png")[:16] + (10**6).to_bytes(4, "big") * 2 + encoded(flat(), "png")[24:],
        "none.png": encoded(flat(), "png")[:16] + bytes(8) + encoded(flat(), "png")[24:],
    }  # fmt: skip
    for ending in ("png", "jpg", "webp", "bmp", "tif"):
        content = encoded(noise((64, 64)), ending)
        for share in (0.1, 0.5):
            files[f"cut-{share}-{ending}.{ending}"] = content[: int(len(content) * share)]
    return files


@pytest.fixture(scope="module")
def zoo(tmp_path_factory):
    """A folder with good and bad files, and links to nowhere and to themselves."""
    root = tmp_path_factory.mktemp("zoo")
    good, bad = good_files(), bad_files()
    assert len(good) + len(bad) >= 60
    for name, content in {**{name: content for name, (content, _) in good.items()}, **bad}.items():
        (root / name).write_bytes(content)
    (root / "self.png").symlink_to(root / "self.png")
    (root / "nowhere.png").symlink_to(root / "not there.png")
    (root / "around").symlink_to(root)
    return root, {name: colour for name, (_, colour) in good.items()}, {*bad, "self.png", "nowhere.png"}


def loaded(root, **settings):
    defaults = {"size": SIZE, "batch_size": 7, "val_share": 0, "max_pixels": 150_000, "max_skipped_share": 1.0}
    data = ImageFolderData(root, **{**defaults, **settings})
    data.setup()
    return data


@pytest.mark.parametrize("workers", [0, 2])
def test_an_epoch_past_every_bad_file(zoo, workers):
    root, good, bad = zoo
    data = loaded(root, on_error="skip", num_workers=workers)
    batches = list(data.predict_dataloader())
    count = len(good) + len(bad)
    assert [len(batch["index"]) for batch in batches] == [7] * (count // 7) + [count % 7] * (count % 7 > 0)
    seen = {}
    for batch in batches:
        for name, pixels in zip(batch["name"], batch["pixels"], strict=True):
            seen[name] = pixels
            difference = (pixels.int() - torch.tensor(good[name])[:, None, None]).abs().max()
            assert difference <= 6, name
    assert set(seen) == set(good)
    assert set(data.skips.read()) == bad


@pytest.mark.parametrize("workers", [0, 2])
def test_the_first_bad_file_ends_an_epoch_that_raises(zoo, workers):
    root, _, bad = zoo
    with pytest.raises(SampleError, match=r"^ImageFolderData: cannot read [^\n]*\Z") as caught:
        list(loaded(root, num_workers=workers).predict_dataloader())
    assert any(name in str(caught.value) for name in bad)


def test_every_bad_file_is_named_and_every_good_one_read(zoo):
    root, good, bad = zoo
    data = loaded(root)
    for position in range(len(data.predict_set)):
        name = data.predict_set.name(position)
        if name in bad:
            with pytest.raises(SampleError, match=name):
                data.predict_set[position]
        elif name in good:
            data.predict_set[position]


@pytest.fixture(scope="module")
def mutated(tmp_path_factory):
    """A thousand mutations of valid files, forty intact ones, and the names of those that our reader refuses."""
    root = tmp_path_factory.mktemp("mutated")
    random = np.random.default_rng(0)
    kinds = {ending: encoded(noise((SIZE, SIZE)), ending) for ending in ("png", "jpg", "webp", "bmp", "tif")}
    for number in range(1000):
        ending = list(kinds)[number % 5]
        content = bytearray(kinds[ending])
        for _ in range(random.integers(1, 6)):
            content[random.integers(0, min(len(content), 200 if number % 2 else len(content)))] = random.integers(256)
        if number % 7 == 0:
            content = content[: random.integers(0, len(content))]
        (root / f"{number:04}.{ending}").write_bytes(content)
    for number in range(40):
        Image.new("RGB", (SIZE, SIZE), (number, 255 - number, 9)).save(root / f"good{number:02}.png")
    refused = set()
    for path in sorted(root.iterdir()):
        try:
            image, size = read_image(path, max_pixels=150_000)
        except SampleError:
            refused.add(path.name)
        else:
            assert image.mode in ("RGB", "RGBA")
            assert image.size == size
    assert 300 < len(refused) < 800
    return root, refused


@pytest.mark.parametrize("workers", [0, 2])
def test_an_epoch_of_a_thousand_mutations(mutated, workers):
    root, refused = mutated
    data = loaded(root, on_error="skip", num_workers=workers, batch_size=13)
    seen = {}
    for batch in data.predict_dataloader():
        assert batch["pixels"].shape == (13, 3, SIZE, SIZE)
        seen |= dict(zip(batch["name"], batch["pixels"], strict=True))
    assert set(data.skips.read()) == refused
    assert set(seen) == {path.name for path in root.iterdir()} - refused
    exact = 0
    for name, pixels in seen.items():
        if name.startswith("good"):
            number = int(name[4:6])
            assert (pixels == torch.tensor([number, 255 - number, 9])[:, None, None]).all()
            continue
        image, _ = read_image(root / name)
        if image.size == (SIZE, SIZE):  # nothing to resize or crop
            exact += 1
            assert np.array_equal(pixels.permute(1, 2, 0), np.asarray(image.convert("RGB"))), name
    assert exact > 150


@pytest.mark.parametrize("workers", [0, 2])
def test_the_first_of_a_thousand_mutations_is_named(mutated, workers):
    root, refused = mutated
    with pytest.raises(SampleError, match="ImageFolderData: cannot read") as caught:
        list(loaded(root, num_workers=workers, batch_size=13).predict_dataloader())
    named = next(name for name in sorted(path.name for path in root.iterdir()) if str(root / name) in str(caught.value))
    assert named in refused
    assert workers or named == min(refused)


# Masks


def mask_kinds():
    """Valid masks of every depth and kind: ending → content."""
    levels = np.random.default_rng(0).integers(0, 2, (SIZE, SIZE))
    ones = Image.fromarray(levels.astype(np.uint8))
    deep, floats = Image.fromarray((levels * 65535).astype(np.uint16)), Image.fromarray(levels.astype(np.float32))
    palette = Image.fromarray(levels.astype(np.uint8)).convert("P")
    palette.putpalette([0, 0, 0, 128, 0, 0])
    return [
        ("png", encoded(ones, "png")), ("png", encoded(deep, "png")), ("png", encoded(palette, "png")),
        ("tif", encoded(deep, "tif")), ("tif", encoded(floats, "tif")), ("tif", encoded(ones, "tif")),
        ("gif", encoded(palette, "gif")), ("bmp", encoded(ones.convert("1"), "bmp")),
        ("png", encoded(Image.merge("LA", [ones, ones]), "png")),
        ("tif", encoded(deep, "tif", compression="tiff_lzw")),
    ]  # fmt: skip


@pytest.fixture(scope="module")
def mutated_masks(tmp_path_factory):
    """A thousand images whose masks, or label maps, are mutations of valid ones, and the names of those refused."""
    root = tmp_path_factory.mktemp("masks")
    random, kinds = np.random.default_rng(0), mask_kinds()
    kind_of = {}
    for number in range(1000):
        ending, content = kinds[number % len(kinds)]
        content = bytearray(content)
        for _ in range(random.integers(1, 6)):
            content[random.integers(0, len(content))] = random.integers(256)
        if number % 7 == 0:
            content = content[: random.integers(0, len(content))]
        flat(size=(SIZE, SIZE)).save(root / f"{number:04}.bmp")
        for kind in ("mask", "segmentation"):
            (root / f"{number:04}-{kind}.{ending}").write_bytes(content)
        kind_of[f"{number:04}.bmp"] = ending
    return root, kind_of


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("ignored", ["masks", "segmentations"])
def test_an_epoch_of_a_thousand_mutated_masks(mutated_masks, workers, ignored):
    root, names = mutated_masks
    key = "segmentation" if ignored == "masks" else "mask"
    data = loaded(root, on_error="skip", num_workers=workers, batch_size=25, **{ignored: "ignore"})
    seen = set()
    for batch in data.predict_dataloader():
        assert batch[key].shape == (25, 1, SIZE, SIZE)
        assert batch[key].dtype == (torch.int32 if key == "segmentation" else torch.uint8)
        seen |= set(batch["name"])
    skipped = data.skips.read()
    assert seen | set(skipped) == set(names)
    assert not seen & set(skipped)
    assert 200 < len(skipped) < 900
    assert all(f"-{key}." in why for why in skipped.values())


@pytest.mark.parametrize("ignored", ["masks", "segmentations"])
def test_the_first_mutated_mask_is_named(mutated_masks, ignored):
    root, _ = mutated_masks
    with pytest.raises(SampleError, match=r"^ImageFolderData: .*\d{4}-(mask|segmentation)\.\w+[: ][^\n]*\Z"):
        list(loaded(root, batch_size=25, **{ignored: "ignore"}).predict_dataloader())
