"""Whose batch it is: keys and positions in and out, what stays untouched, and what a wrong batch is told."""

from collections import OrderedDict, defaultdict, namedtuple

import pytest
import torch
from helpers import Photos, complains, images, masks, photo_columns
from tiny_models import close

from latentdm import LatentDataModule
from latentdm.autoencoders.images import Images
from latentdm.tensors import crop, unit_mask

RESULTS = {"latents", "masked_latents", "noise_mask", "latent_mask"}


def through_hooks(batch, encoder, **settings):
    """A batch as Lightning sends it through the hooks, without a trainer."""
    datamodule = LatentDataModule(Photos(photo_columns()), encoder, **settings)
    batch = datamodule.on_before_batch_transfer(batch, 0)
    batch = datamodule.transfer_batch_to_device(batch, torch.device("cpu"), 0)
    return datamodule.on_after_batch_transfer(batch, 0)


def same(first, second):
    for name in RESULTS:
        close(first[name], second[name])  # of another layout or another way through the hooks
    return True


# -------------------------------------------------------------------- dicts


def test_everything_else_passes_untouched(inpaint):
    extra = {
        "caption": ["a", "b"],
        "nested": {"size": [1, 2], "more": {"path": "x"}},
        "list": [None, 3],
        7: "a key that is no string",
    }
    weight = torch.tensor([0.5, 2.0], dtype=torch.float64)
    given = {**extra, "weight": weight, "nested tensor": {"weight": weight}}
    out = through_hooks({"pixels": images(2), "mask": masks(2), "index": torch.arange(2), **given}, inpaint)
    assert set(out) == {*given, *RESULTS, "index"}
    assert {name: out[name] for name in extra} == extra
    for tensor in (out["weight"], out["nested tensor"]["weight"]):
        assert torch.equal(tensor, weight)
        assert tensor.dtype == torch.float64


def test_keys_rename_inputs_and_outputs(inpaint):
    ours = {"pixels": images(2), "mask": masks(2), "index": torch.tensor([4, 9])}
    names = {name: f"my_{name}" for name in {*ours, *RESULTS}}
    theirs = {names[name]: value for name, value in ours.items()}
    out = through_hooks(theirs, inpaint, keys=names)
    assert set(out) == {names[name] for name in RESULTS | {"index"}}
    assert same({name: out[names[name]] for name in RESULTS}, through_hooks(ours, inpaint))


def test_a_result_may_take_the_place_of_the_images(plain):
    out = through_hooks({"image": images(2)}, plain, keys={"pixels": "image", "latents": "image"})
    assert {name: tuple(value.shape) for name, value in out.items()} == {"image": (2, 4, 4, 4)}


def test_the_user_s_batch_itself_is_not_changed(plain):
    batch = {"pixels": images(2)}
    LatentDataModule(Photos(photo_columns()), plain).on_after_batch_transfer(batch, 0)
    assert set(batch) == {"pixels"}


@pytest.mark.parametrize("kind", [OrderedDict, lambda items: defaultdict(list, items)], ids=["ordered", "default"])
def test_a_dict_keeps_its_class(kind, plain):
    batch = kind({"pixels": images(2), "caption": ["a", "b"]})
    out = through_hooks(batch, plain)
    assert type(out) is type(batch)
    assert set(out) == {"caption", "latents"}


def test_keep_pixels_leaves_them_cropped(plain):
    pixels = images(2, 45, 39)
    out = through_hooks({"pixels": pixels}, plain, keep_pixels=True)
    assert torch.equal(out["pixels"], pixels[..., 2:42, 3:35])
    assert set(out) == {"pixels", "latents"}


def test_a_mask_that_the_encoder_does_not_use_stays(plain):
    assert set(through_hooks({"pixels": images(2), "mask": masks(2)}, plain)) == {"latents", "mask"}


# -------------------------------------------------------------------- tuples


@pytest.mark.parametrize("kind", [tuple, list])
def test_positions_put_latents_where_the_images_were(kind, plain):
    out = through_hooks(kind([images(2), ["a", "b"]]), plain, keys={"pixels": 0, "latents": 0})
    assert type(out) is kind
    assert out[0].shape == (2, 4, 4, 4)
    assert out[1] == ["a", "b"]


def test_positions_past_the_end_are_appended(inpaint):
    keys = {"pixels": 1, "mask": 2, "latents": 1, "masked_latents": 2, "noise_mask": 3, "latent_mask": 4}
    out = through_hooks((["a", "b"], images(2), masks(2)), inpaint, keys=keys)
    expected = through_hooks({"pixels": images(2), "mask": masks(2)}, inpaint)
    assert out[0] == ["a", "b"]
    assert same({name: out[keys[name]] for name in RESULTS}, expected)


def test_keep_pixels_keeps_their_position(plain):
    pixels = images(2)
    out = through_hooks((pixels, "label"), plain, keys={"pixels": 0, "latents": 2}, keep_pixels=True)
    assert torch.equal(out[0], pixels)
    assert out[1] == "label"
    assert out[2].shape == (2, 4, 4, 4)


def test_a_named_tuple_stays_one(plain):
    kind = namedtuple("kind", ["image", "caption"])
    out = through_hooks(kind(images(2), ["a", "b"]), plain, keys={"pixels": 0, "latents": 0})
    assert type(out) is kind
    assert out.image.shape == (2, 4, 4, 4)


def test_null_keeps_an_output_out_of_the_batch(inpaint):
    keys = {"pixels": 0, "mask": 1, "latents": 0, "masked_latents": 1, "noise_mask": None, "latent_mask": None}
    latents, masked_latents = through_hooks((images(2), masks(2)), inpaint, keys=keys)
    expected = through_hooks({"pixels": images(2), "mask": masks(2)}, inpaint)
    close(latents, expected["latents"])
    close(masked_latents, expected["masked_latents"])


def test_what_is_no_batch_passes_unchanged(plain):
    for thing in (torch.ones(2, 4, 4, 4), None, "text", 3):
        assert through_hooks(thing, plain) is thing


# -------------------------------------------------------------------- channels last


def test_channels_last_images_and_masks_are_the_same_images(inpaint):
    expected = through_hooks({"pixels": images(2, 32, 40), "mask": masks(2, 32, 40)}, inpaint)
    for mask in (masks(2, 32, 40).movedim(1, -1), masks(2, 32, 40)[:, 0], masks(2, 32, 40)):
        batch = {"pixels": images(2, 32, 40).movedim(1, -1), "mask": mask}
        assert same(through_hooks(batch, inpaint, layout="HWC"), expected)


# -------------------------------------------------------------------- what is wrong is said

TUPLE = (images(2), ["a", "b"])
WRONG_BATCHES = {
    "no pixels": ({"image": images(2), "a": ""}, {}, ["no 'pixels'", "only 'image', 'a'", "keys={pixels: image}"]),
    "no renamed pixels": ({"pixels": images(2)}, {"pixels": "image"}, ["no 'image'", "only 'pixels'"]),
    "empty dict": ({}, {}, ["no 'pixels', only nothing"]),
    "rank": ({"pixels": images(2)[0]}, {}, ["batch['pixels']", "b c H W", "got (3, 32, 32) uint8"]),
    "no tensor": ({"pixels": images(2).numpy()}, {}, ["batch['pixels']", "expected a tensor", "got ndarray"]),
    "no position": (TUPLE, {}, ["a tuple of 2", "keys={pixels: 0, latents: 0}"]),
    "position past the end": (TUPLE, {"pixels": 5, "latents": 5}, ["a tuple of 2", "no position 5", "count from 0"]),
    "latents without position": (TUPLE, {"pixels": 0}, ["'latents' has no position", "tuple batch of 2", "latents: 2"]),
    "images leave a hole": (TUPLE, {"pixels": 0, "latents": 2}, ["leave position 0", "or set keep_pixels"]),
    "position taken": (TUPLE, {"pixels": 0, "latents": 1}, ["position 1 already holds list", "use 2 or more"]),
    "key taken": (
        {"pixels": images(2), "latents": torch.ones(2)},
        {},
        ["already has 'latents' ((2,) float32)", "would overwrite", "keys={latents: my_latents}"],
    ),
    "index": ({"pixels": images(2), "index": torch.arange(3)}, {}, ["index: got 3 for 2 images", "give one an image"]),
}


@pytest.mark.parametrize("case", WRONG_BATCHES)
def test_a_wrong_batch_is_named(case, plain):
    batch, keys, parts = WRONG_BATCHES[case]
    with complains("LatentDataModule: ", *parts):
        through_hooks(batch, plain, keys=keys)


def test_a_gap_in_the_positions_is_named(plain):
    with complains("LatentDataModule: keys: position 4 leaves a gap after a batch of 2; use 2"):
        through_hooks(TUPLE, plain, keys={"pixels": 0, "latents": 4}, keep_pixels=True)


def test_two_results_in_one_place_are_named(inpaint):
    keys = {"latents": "x", "masked_latents": "x"}
    with complains("LatentDataModule: keys: 'masked_latents' and another result both go to 'x'"):
        through_hooks({"pixels": images(2), "mask": masks(2)}, inpaint, keys=keys)


@pytest.mark.parametrize(
    ("batch", "keys", "parts"),
    [
        ({"pixels": images(2), "masks": masks(2)}, {}, ["no 'mask'", "only 'pixels', 'masks'", "masks=random"]),
        ((images(2), masks(2)), {"pixels": 0}, ["no 'mask'", "a tuple of 2", "keys={mask: 1}", "masks=alpha"]),
    ],
    ids=["dict", "tuple"],
)
def test_a_missing_mask_is_named_with_what_the_batch_has(batch, keys, parts, inpaint):
    with complains("LatentDataModule: ", *parts):
        through_hooks(batch, inpaint, keys=keys)


def test_a_channels_first_batch_under_hwc_is_named(plain):
    with complains("PlainEncoder: pixels: expected 1, 3 or 4 channels", "(2, 32, 3, 32) uint8"):
        through_hooks({"pixels": images(2)}, plain, layout="HWC")


WRONG_SETTINGS = {
    "unknown name": ({"keys": {"image": "x"}}, ["keys: unknown name 'image'", "the names are pixels, mask, source"]),
    "mixed": ({"keys": {"pixels": 0, "latents": "x"}}, ["mixes keys and positions", "integers for tuples"]),
    "left out input": ({"keys": {"pixels": None}}, ["keys: 'pixels' goes into a stage", "only outputs"]),
    "negative": ({"keys": {"pixels": -1}}, ["negative position", "count from 0"]),
    "layout": ({"layout": "NHWC"}, ["layout must be one of CHW, HWC, got 'NHWC'"]),
}


@pytest.mark.parametrize("case", WRONG_SETTINGS)
def test_a_wrong_setting_of_the_data_module_is_named(case, plain):
    settings, parts = WRONG_SETTINGS[case]
    with complains("LatentDataModule: ", *parts):
        LatentDataModule(Photos(photo_columns()), plain, **settings)


# -------------------------------------------------------------------- the functions underneath


@pytest.mark.parametrize(("side", "multiple"), [(8, 8), (15, 8), (16, 8), (45, 16), (33, 32), (7, 1)])
def test_crop_is_centred_and_a_view(side, multiple):
    row = torch.arange(side).expand(1, 1, side, side)
    cropped = crop(row, multiple)
    kept = side // multiple * multiple
    assert cropped[0, 0, 0].tolist() == list(range((side % multiple) // 2, (side % multiple) // 2 + kept))
    assert cropped.shape[-2:] == (kept, kept)
    assert cropped.data_ptr() == row[..., (side % multiple) // 2 :].data_ptr()


def test_a_mask_is_resized_bilinearly_without_antialias():
    mask = torch.tensor([[[[0.0, 1.0]]]])
    resized = unit_mask(mask, images(1, 1, 8), "test")[0, 0, 0]
    # Pixel centres at (i + 0.5) / 4 − 0.5, clamped to the row: 0, 0, 1/8, 3/8, 5/8, 7/8, 1, 1.
    assert resized.tolist() == [0, 0, 0.125, 0.375, 0.625, 0.875, 1, 1]
    shrunk = unit_mask(torch.arange(8.0).view(1, 1, 1, 8) / 8, images(1, 1, 2), "test")[0, 0, 0]
    assert shrunk.tolist() == [1.5 / 8, 5.5 / 8]  # two neighbours, not the mean of four


def test_a_view_never_writes_into_the_batch():
    for pixels in (images(2), images(2, channels=1), images(2) / 255):
        before = pixels.clone()
        Images(pixels, hole=torch.ones(1, 1, 32, 32, dtype=torch.bool)).unit()
        assert torch.equal(pixels, before)
