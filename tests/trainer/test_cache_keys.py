"""What entries depend on, and what they do not: one ingredient is changed at a time, and its entries alone change."""

import os
import shutil

import PIL
import pytest
import torch
from helpers import tiny_kl
from test_cache import COUNT, SIZE, data, masked_photos, photos, write_photo  # noqa: F401

from latentdm import Cache, FrozenVAE, InpaintEncoder, LatentDataModule, PlainEncoder
from latentdm.augment import Augment
from latentdm.cache import cache as caching
from latentdm.cache import keys
from latentdm.cache.fill import FillData
from latentdm.cache.wanted import needed_keys
from latentdm.captions import Captions
from latentdm.masks import AlphaMask, RandomMask


def entries(folder, root, cache=None, vae=None, pixels=None, encoder=None, config=None, weights=None, **settings):
    """All that a configuration would look up."""
    autoencoder = tiny_kl(**{"scaling_factor": 0.5} | (config or {}))
    with torch.no_grad():
        (weights or (lambda _: None))(autoencoder)
    frozen = FrozenVAE(autoencoder, **{"dtype": "float32"} | (vae or {}))
    kind = InpaintEncoder if "masks" in settings or "own" in (encoder or {}) else PlainEncoder
    made = kind(frozen, **{name: value for name, value in (encoder or {}).items() if name != "own"})
    datamodule = LatentDataModule(data(folder, **pixels or {}), made, cache=Cache(root, **cache or {}), **settings)
    datamodule.pixels = FillData(datamodule.pixels)
    datamodule.pixels.setup()
    datamodule.line.setup("cpu")
    datamodule.cache.setup(datamodule)
    return {(datamodule.cache.store.folder.name, key) for key in needed_keys(datamodule.pixels.able())}


RANDOM = {"pixels": {"random_crop": True}, "cache": {"variants": 2}}
AUGMENTED = {"augment": Augment(crop=(0.3, 0.9)), "cache": {"variants": 1}}
MASKED = {"masks": RandomMask(), "cache": {"mask_variants": 2}}
BUCKETS = {"pixels": {"buckets": {"area": SIZE * SIZE, "step": 8, "min_images": 1}}}


def changed(first, **more):
    """A configuration with something else in it."""
    both = dict(first)
    for name, value in more.items():
        both[name] = {**first.get(name, {}), **value} if isinstance(value, dict) else value
    return both


DEPENDS = {
    # The space: all entries change.
    "weights": ({}, {"weights": lambda vae: vae.encoder.mid_block.resnets[0].conv1.weight[0, 0, 0, 0].add_(1e-3)}),
    "config": ({}, {"config": {"act_fn": "gelu"}}),
    "compute dtype": ({}, {"vae": {"dtype": "bfloat16"}}),
    "tiling": ({}, {"vae": {"tiling": "always"}}),
    "store dtype": ({}, {"cache": {"dtype": "float32"}}),
    # The entry.
    "identity": ({}, {"cache": {"identity": "content"}}),
    "size": ({}, {"pixels": {"size": SIZE + 8}}),
    "crop mode": ({"cache": {"variants": 1}}, RANDOM),
    "bucket": (BUCKETS, {"pixels": {"buckets": {"area": 4 * SIZE * SIZE, "step": 8, "min_images": 1}}}),
    "alpha": ({}, {"pixels": {"alpha": True}}),
    "limit": ({}, {"pixels": {"max_pixels": 10**6}}),
    "multiple": ({}, {"encoder": {"multiple": 16}}),
    "seed of drawn crops": (RANDOM, changed(RANDOM, pixels={"seed": 1})),
    "augmentation": (AUGMENTED, changed(AUGMENTED, augment=Augment(crop=(0.3, 0.8)))),
    "seed of augmentation": (AUGMENTED, changed(AUGMENTED, seed=1)),
}


@pytest.mark.parametrize(("first", "other"), DEPENDS.values(), ids=DEPENDS)
def test_all_entries_depend_on(photos, tmp_path, first, other):  # noqa: F811
    before, after = entries(photos, tmp_path, **first), entries(photos, tmp_path, **other)
    assert len(before) >= COUNT
    assert len(after) >= COUNT
    assert not before & after


def test_versions_of_the_format_and_of_what_decodes_are_part_of_it(photos, tmp_path, monkeypatch):  # noqa: F811
    seen = [entries(photos, tmp_path)]
    for module, name in ((caching, "FORMAT"), (keys, "PIXELS_VERSION"), (PIL, "__version__")):
        with monkeypatch.context() as context:
            context.setattr(module, name, "another")
            keys.decoder.cache_clear()
            seen.append(entries(photos, tmp_path))
        keys.decoder.cache_clear()
    assert len(set.union(*seen)) == 4 * COUNT
    assert entries(photos, tmp_path) == seen[0]


def test_the_class_of_the_autoencoder_is_part_of_it(photos, tmp_path):  # noqa: F811
    def other(autoencoder):
        autoencoder.__class__ = type("Subclass", (type(autoencoder),), {})

    assert not entries(photos, tmp_path) & entries(photos, tmp_path, weights=other)


PART = {
    # Which of two: kept, gone, new.
    "mirrored": ({}, {"pixels": {"flip": True}}, COUNT, 0, COUNT),
    "variant": (RANDOM, changed(RANDOM, cache={"variants": 3}), 2 * COUNT, 0, COUNT),
    "mask variant": (MASKED, changed(MASKED, cache={"mask_variants": 3}), 3 * COUNT, 0, COUNT),
    "masks": (MASKED, changed(MASKED, masks=RandomMask(kinds=["boxes"])), COUNT, 2 * COUNT, 2 * COUNT),
    "seed of drawn masks": (MASKED, changed(MASKED, seed=1), COUNT, 2 * COUNT, 2 * COUNT),
    "growth": (MASKED, changed(MASKED, encoder={"grow_mask_by": 9}), COUNT, 2 * COUNT, 2 * COUNT),
    "fill": (MASKED, changed(MASKED, encoder={"fill": 0.0}), COUNT, 2 * COUNT, 2 * COUNT),
    "fresh masks": (MASKED, changed(MASKED, cache={"mask_variants": None}), COUNT, 2 * COUNT, 0),
}


@pytest.mark.parametrize(("first", "other", "kept", "gone", "new"), PART.values(), ids=PART)
def test_some_entries_depend_on(photos, tmp_path, first, other, kept, gone, new):  # noqa: F811
    before, after = entries(photos, tmp_path, **first), entries(photos, tmp_path, **other)
    assert (len(before & after), len(before - after), len(after - before)) == (kept, gone, new)


NEVER = {
    "batch size": {"pixels": {"batch_size": 5}},
    "per_batch": {"encoder": {"per_batch": 1}},
    "workers": {"pixels": {"num_workers": 2}},
    "compile": {"vae": {"compile": True}},
    "captions": {"captions": Captions(dropout=0.5, templates=["a {caption}"])},
    "posterior": {"encoder": {"posterior": "mode"}},
    "scaling": {"config": {"scaling_factor": 0.1, "shift_factor": 0.2}},
    "decoder": {"weights": lambda vae: vae.decoder.conv_in.weight.add_(1)},
    "no decoder": {"vae": {"encoder_only": True}},
    "masks": {"masks": RandomMask()},
    "seeds where nothing is drawn": {"seed": 3, "pixels": {"seed": 4}},
    "what validates": {"pixels": {"val_share": 0.5}},
    "what happens to broken images": {"pixels": {"on_error": "skip"}},
    "variants where nothing is drawn": {"cache": {"variants": 3, "mask_variants": 2}},
    "kept pixels": {"keep_pixels": True},
}


@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method.*:DeprecationWarning")
@pytest.mark.parametrize("other", NEVER.values(), ids=NEVER)
def test_no_entry_depends_on(photos, tmp_path, other):  # noqa: F811
    assert entries(photos, tmp_path) == entries(photos, tmp_path, **other)


@pytest.mark.parametrize("other", [{"latent_mask": "unshuffle"}, {"posterior": "mode"}, {"per_batch": 1}])
def test_no_masked_entry_depends_on(photos, tmp_path, other):  # noqa: F811
    assert entries(photos, tmp_path, **MASKED) == entries(photos, tmp_path, **changed(MASKED, encoder=other))


# -------------------------------------------------------------------- files


def differs(before, after):
    return len(before - after), len(after - before)


def test_a_file_is_its_path_size_and_times(photos, tmp_path):  # noqa: F811
    before = entries(photos, tmp_path)
    (photos / "1.txt").write_text("another caption")
    assert entries(photos, tmp_path) == before
    os.utime(photos / "1.png", ns=(0, 0))
    touched = entries(photos, tmp_path)
    assert differs(before, touched) == (1, 1)
    (photos / "1.png").rename(photos / "9.png")
    assert differs(touched, entries(photos, tmp_path)) == (1, 1)


def test_or_what_it_holds(photos, tmp_path):  # noqa: F811
    def by_content(folder):
        return entries(folder, tmp_path, cache={"identity": "content"})

    before = by_content(photos)
    os.utime(photos / "1.png", ns=(0, 0))
    shutil.copytree(photos, tmp_path / "elsewhere")
    assert by_content(photos) == by_content(tmp_path / "elsewhere") == before
    status = (photos / "1.png").stat()
    content = bytearray((photos / "1.png").read_bytes())
    content[-1] ^= 1
    (photos / "1.png").write_bytes(content)
    os.utime(photos / "1.png", ns=(status.st_atime_ns, status.st_mtime_ns))
    assert differs(before, by_content(photos)) == (1, 1)


@pytest.mark.parametrize("drawn", [{}, RANDOM, AUGMENTED, MASKED], ids=["still", "crops", "augmented", "masks"])
def test_an_image_more_changes_no_other(photos, tmp_path, drawn):  # noqa: F811
    before = entries(photos, tmp_path, **drawn)
    write_photo(photos / "00.png", 77)
    (photos / "00.txt").write_text("the first by name: all others move by one")
    after = entries(photos, tmp_path, **drawn)
    assert before < after
    assert len(after) == len(before) * (COUNT + 1) // COUNT


def test_masks_of_the_data_have_files_of_their_own(masked_photos, tmp_path):  # noqa: F811
    before = entries(masked_photos, tmp_path, encoder={"own": True})
    assert len(before) == 2 * COUNT
    os.utime(masked_photos / "1-mask.png", ns=(0, 0))
    assert differs(before, entries(masked_photos, tmp_path, encoder={"own": True})) == (1, 1)
    os.utime(masked_photos / "2.png", ns=(0, 0))  # and what is made of it
    assert differs(before, entries(masked_photos, tmp_path, encoder={"own": True})) == (3, 3)
    shapes = entries(masked_photos, tmp_path, masks=AlphaMask(), pixels={"alpha": True})
    assert len(shapes) == 2 * COUNT
