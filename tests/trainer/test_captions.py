"""Captions: dropout, tags and templates by each sample's own draws, in training alone, in anybody's batches."""

from collections import Counter

import pytest
import torch
from helpers import Photos, fit, noise_vae, photo_columns

from latentdm import Captions, LatentDataModule, PlainEncoder
from latentdm.draws import Draws

TAGS = "sks dog, grass , sun,sky, tree"


def changed_by(captions, texts, ids=None, seed=0, epoch=0, training=True):
    """What the stage makes of texts, one a sample."""
    draws = Draws(seed, epoch, list(range(len(texts)) if ids is None else ids), training)
    written = captions({"caption": texts, "other": 1}, draws)
    assert list(written) == ["caption"]
    return written["caption"]


def test_dropout_has_its_probability():
    changed = changed_by(Captions(dropout=0.3), ["a dog"] * 400)
    assert set(changed) == {"a dog", ""}
    assert 90 < changed.count("") < 150
    assert changed_by(Captions(), ["a dog", None]) == ["a dog", ""]


def test_tags_are_shuffled_behind_those_that_stay():
    changed = changed_by(Captions(shuffle_tags=True, keep_tags=2), [TAGS] * 60)
    assert len(set(changed)) == 6
    for text in changed:
        tags = text.split(", ")
        assert tags[:2] == ["sks dog", "grass"]
        assert sorted(tags[2:]) == ["sky", "sun", "tree"]
    first = {text.split(", ")[0] for text in changed_by(Captions(shuffle_tags=True, keep_tags=0), [TAGS] * 60)}
    assert first == {"sks dog", "grass", "sun", "sky", "tree"}
    assert changed_by(Captions(shuffle_tags=True, separator="|"), ["a, b"]) == ["a, b"]
    assert changed_by(Captions(shuffle_tags=True, keep_tags=9), ["a, b"]) == ["a, b"]


def test_templates_and_several_captions_are_drawn_evenly():
    captions = Captions(templates=["a photo of {caption}", "{caption} {x}"])
    changed = Counter(changed_by(captions, [["a dog", "a hound"]] * 200))
    assert set(changed) == {"a photo of a dog", "a photo of a hound", "a dog {x}", "a hound {x}"}
    assert min(changed.values()) > 30
    assert changed_by(captions, [[]], training=False) == ["a photo of "]


def test_outside_training_what_comes_first_is_taken():
    captions = Captions(dropout=1.0, shuffle_tags=True, templates=["a {caption}", "the {caption}"])
    assert changed_by(captions, [TAGS, ["x", "y"]], training=False) == [f"a {TAGS}", "a x"]


def test_a_caption_depends_on_its_own_draws_alone():
    captions = Captions(dropout=0.2, shuffle_tags=True, templates=["a {caption}", "{caption}"])
    together = changed_by(captions, [TAGS] * 20)
    assert [changed_by(captions, [TAGS], ids=[index])[0] for index in range(20)] == together
    assert changed_by(captions, [TAGS] * 20, epoch=1) != together
    assert changed_by(captions, [TAGS] * 20, seed=1) != together


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dropout": 1.1}, "dropout must be a probability in 0…1, got 1.1"),
        ({"keep_tags": -1}, "keep_tags must be an integer of at least 0, got -1"),
        ({"separator": ""}, "separator must not be empty"),
        ({"templates": ["a photo"]}, "templates: 'a photo' has no {caption} in it"),
        ({"templates": "a {caption}"}, "templates must be a list of texts, got 'a {caption}'"),
    ],
)
def test_wrong_settings(settings, message):
    with pytest.raises(ValueError, match=f"^Captions: {message}"):
        Captions(**settings)


@pytest.mark.parametrize(
    ("captions", "message"),
    [
        (torch.zeros(2), r"expected a list of strings, one an image, got \(2,\) float32; name another key"),
        ("ab", "expected a list of strings, one an image, got str"),
        (["a", "b", "c"], "expected a list of strings, one an image, got 3 for 2 images"),
        ([1, 2], "expected strings, got 1 for the sample 0"),
        ([["a", b"b"], "c"], r"expected strings, got \['a', b'b'\] for the sample 0"),
    ],
)
def test_wrong_captions(captions, message):
    with pytest.raises(ValueError, match=f"^Captions: caption: {message}"):
        changed_by(Captions(), captions, ids=range(2))


def trained(index=True, epochs=1, **settings):
    columns = photo_columns(8, index=index, text=[f"{number}, b, c, d" for number in range(8)])
    photos = Photos(columns, batch_size=4)
    datamodule = LatentDataModule(photos, PlainEncoder(noise_vae()), keys={"caption": "text"}, **settings)
    model = fit(datamodule, max_epochs=epochs)
    return {
        stage: [text for batch in model.batches(stage) for text in batch["text"]] for stage in ("train", "val")
    }, model


def test_captions_of_any_data_module_are_changed_in_training_and_pass_through_otherwise():
    plain = [f"{number}, b, c, d" for number in range(8)]
    assert trained()[0] == {"train": plain, "val": plain}
    seen, _ = trained(captions=Captions(dropout=0.3, shuffle_tags=True), epochs=2)
    assert seen["val"] == plain * 2
    expected = [changed_by(Captions(dropout=0.3, shuffle_tags=True), plain, epoch=epoch) for epoch in range(2)]
    assert seen["train"] == expected[0] + expected[1]
    assert expected[0] != expected[1] != plain


def test_captions_without_an_index_draw_by_rank_and_batch_and_the_noise_stays():
    seen, model = trained(index=False, captions=Captions(shuffle_tags=True))
    assert len({text[1:] for text in seen["train"]}) > 2
    _, without = trained(index=False)
    assert torch.equal(model.column("train"), without.column("train"))


def test_a_batch_without_captions_says_so():
    datamodule = LatentDataModule(Photos(photo_columns()), PlainEncoder(noise_vae()), captions=Captions(dropout=0.1))
    with pytest.raises(ValueError, match=r"the batch has no 'caption', only 'pixels', 'index'; name the captions with"):
        fit(datamodule)
