"""Noise keyed on (seed, epoch, index, purpose): the same sample meets the same noise, and nothing touches the rest."""

import random
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from helpers import (
    LatentModel,
    Photos,
    by_index,
    fit,
    images,
    masks,
    noise_vae,
    photo_columns,
    predict,
    quiet_trainer,
    tiny_kl,
)
from lightning.pytorch import seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint

from latentdm import FrozenVAE, InpaintEncoder, LatentDataModule, PlainEncoder
from latentdm.draws import Draws, sample_generator, sample_seed
from latentdm.masks import RandomMask

COUNT = 6


def equal_images(index=False, **columns):
    """The same image again and again: latents differ by their noise alone."""
    return photo_columns(COUNT, index=index, **columns) | {"pixels": images(1).repeat(COUNT, 1, 1, 1)}


def noise_module(columns, batch_size=2, order=None, **settings):
    """Its latents are the noise itself, bit for bit."""
    return LatentDataModule(Photos(columns, batch_size, order=order), PlainEncoder(noise_vae()), **settings)


def rows(latents):
    return [tuple(row.flatten().tolist()) for row in latents]


def all_distinct(latents):
    return len(set(rows(latents))) == len(latents)


# -------------------------------------------------------------------- the streams


def test_each_part_of_the_key_changes_the_stream():
    base = {"seed": 0, "epoch": 0, "index": 5, "purpose": "latents"}
    changes = [{}, {"seed": 1}, {"epoch": 1}, {"index": 6}, {"purpose": "mask"}, {"index": "rank0"}]
    seeds = [sample_seed(**(base | change)) for change in changes]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_the_parts_of_the_key_do_not_run_into_each_other():
    assert sample_seed(1, 11, 1, "x") != sample_seed(11, 1, 1, "x") != sample_seed(1, 1, 11, "x")


def test_a_stream_is_the_same_in_every_process():
    assert sample_seed(0, 1, 2, "latents") == 1004058835604495609
    assert torch.randint(2**31, (1,), generator=sample_generator(0, 1, 2, "latents")).item() == 31245070


@pytest.mark.parametrize("draw", ["normal", "uniform"])
def test_a_sample_s_draw_does_not_depend_on_its_batch(draw):
    def drawn(ids):
        draws = Draws(0, 0, ids)
        return draws.uniform("mask", 5) if draw == "uniform" else draws.normal("x", (5,), torch.device("cpu"))

    whole = drawn([3, 1, 4, 15])
    assert all_distinct(whole)
    assert torch.equal(whole[2:3], drawn([4]))
    assert torch.equal(whole[[3, 1]], drawn([15, 1]))


def test_noise_is_standard_normal_over_many_samples():
    noise = Draws(0, 0, range(400)).normal("latents", (4, 8, 8), torch.device("cpu"))
    assert abs(noise.mean()) < 0.01
    assert abs(noise.std() - 1) < 0.01
    assert np.abs(np.corrcoef(noise.flatten(1)[:50].numpy()) - np.eye(50)).max() < 0.35  # samples share nothing


# -------------------------------------------------------------------- with an index, through a trainer


def trained_noise(batch_size, order, **settings):
    """Epoch → the noise of each sample, by index."""
    model = fit(noise_module(equal_images(index=True), batch_size, order, **settings), max_epochs=2)
    columns = {epoch: [model.column("train", name, epoch) for name in ("latents", "index")] for epoch in (0, 1)}
    return {epoch: by_index(*column) for epoch, column in columns.items()}


@pytest.mark.parametrize(("batch_size", "order"), [(1, None), (3, None), (4, None), (2, [5, 2, 0, 1, 4, 3])])
def test_a_sample_meets_the_same_noise_in_any_batch_and_order(batch_size, order):
    expected = trained_noise(2, None)
    noise = trained_noise(batch_size, order)
    for epoch in (0, 1):
        assert torch.equal(noise[epoch], expected[epoch])


def test_the_noise_differs_by_sample_epoch_and_seed():
    first, other = trained_noise(2, None), trained_noise(2, None, seed=1)
    assert all_distinct(torch.cat([first[0], first[1], other[0], other[1]]))


def test_real_latents_agree_whatever_the_batch_size(vae):
    def latents(batch_size):
        columns = photo_columns(COUNT, mask=True)
        encoded = predict(LatentDataModule(Photos(columns, batch_size), InpaintEncoder(vae)))
        return {name: torch.cat([batch[name] for batch in encoded]) for name in ("latents", "masked_latents")}

    expected = latents(6)
    for batch_size in (1, 4):
        torch.testing.assert_close(latents(batch_size), expected, rtol=0, atol=1e-5)


def test_random_masks_follow_the_sample_too():
    def noise_masks(batch_size, order):
        encoder = InpaintEncoder(noise_vae())
        datamodule = LatentDataModule(Photos(equal_images(True), batch_size, order=order), encoder, masks=RandomMask())
        model = fit(datamodule)
        return by_index(model.column("train", "noise_mask"), model.column("train", "index"))

    expected = noise_masks(2, None)
    assert all_distinct(expected)
    assert torch.equal(noise_masks(4, [3, 0, 5, 1, 2, 4]), expected)


def test_strings_serve_as_index():
    names = [f"photo {number}" for number in range(COUNT)]
    by_name = {}
    for batch_size in (1, 4):
        datamodule = noise_module(equal_images(name=names), batch_size, keys={"index": "name"})
        by_name[batch_size] = torch.cat([batch["latents"] for batch in predict(datamodule)])
    assert all_distinct(by_name[1])
    assert torch.equal(by_name[1], by_name[4])


def test_an_encoder_by_itself_keys_on_the_index_as_well():
    batch = {"pixels": images(3), "index": torch.tensor([7, 8, 9])}
    whole = PlainEncoder(noise_vae())(batch)["latents"]
    alone = PlainEncoder(noise_vae())({name: value[1:2] for name, value in batch.items()})["latents"]
    assert torch.equal(whole[1:2], alone)


def test_an_encoder_by_itself_draws_anew_each_call_without_an_index():
    def calls():
        encoder = PlainEncoder(noise_vae())
        return torch.cat([encoder({"pixels": images(2)})["latents"] for _ in range(3)])

    assert all_distinct(calls())
    assert torch.equal(calls(), calls())


def test_hooks_called_by_hand_draw_anew_each_batch():
    datamodule = noise_module(equal_images())
    batches = [datamodule.on_after_batch_transfer({"pixels": images(2)}, 0)["latents"] for _ in range(3)]
    assert all_distinct(torch.cat(batches))


# -------------------------------------------------------------------- without an index


def fit_without_index(**settings):
    return fit(noise_module(equal_images()), **({"max_epochs": 2} | settings))


def test_no_two_training_samples_share_their_noise():
    assert all_distinct(fit_without_index().column("train"))


@pytest.mark.parametrize("every", [1, 2])
def test_a_validation_inside_an_epoch_does_not_repeat_its_noise(every):
    assert all_distinct(fit_without_index(val_check_interval=every).column("train"))


def test_a_validation_inside_an_epoch_does_not_change_the_training_noise():
    plain, checked = fit_without_index(limit_val_batches=0), fit_without_index(val_check_interval=1)
    assert torch.equal(plain.column("train"), checked.column("train"))


def test_another_run_draws_the_same():
    first, second = fit_without_index(), fit_without_index()
    for stage in ("train", "val"):
        assert torch.equal(first.column(stage), second.column(stage))


def test_a_second_fit_with_the_same_data_module_draws_the_same():
    datamodule = noise_module(equal_images())
    first, second = (fit(datamodule, max_epochs=1).column("train") for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("index", [True, False], ids=["index", "no index"])
@pytest.mark.parametrize(
    "settings",
    [{}, {"num_sanity_val_steps": 0}, {"val_check_interval": 1, "accumulate_grad_batches": 3}],
    ids=["each epoch", "no sanity check", "within a step"],
)
def test_each_validation_meets_the_same_noise(index, settings):
    model = fit(noise_module(equal_images(index)), max_epochs=3, **settings)
    validations = model.column("val").split(COUNT)
    assert len(validations) >= 3
    assert all_distinct(validations[0])
    for validation in validations[1:]:
        assert torch.equal(validation, validations[0])


def test_evaluations_draw_the_same_each_time():
    datamodule, model = noise_module(equal_images()), LatentModel()
    for evaluate, stage in (("validate", "val"), ("test", "test"), ("predict", "predict")):
        for _ in range(2):
            getattr(quiet_trainer(), evaluate)(model, datamodule=datamodule)
        first, second = model.column(stage).chunk(2)
        assert all_distinct(first)
        assert torch.equal(first, second)


# -------------------------------------------------------------------- resuming


@pytest.mark.parametrize("index", [True, False], ids=["index", "no index"])
def test_a_resumed_fit_goes_on_as_if_it_had_never_stopped(index, tmp_path):
    straight = fit(noise_module(equal_images(index)), max_epochs=4)
    trainer = quiet_trainer(max_epochs=2)
    trainer.fit(LatentModel(), datamodule=noise_module(equal_images(index)))
    trainer.save_checkpoint(tmp_path / "two.ckpt")
    resumed = fit(noise_module(equal_images(index)), ckpt_path=tmp_path / "two.ckpt", max_epochs=4)
    assert {epoch for epoch, _ in resumed.seen["train"]} == {2, 3}
    for epoch in (2, 3):
        for stage in ("train", "val"):
            assert torch.equal(resumed.column(stage, epoch=epoch), straight.column(stage, epoch=epoch))


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`:UserWarning")  # the saving one is not needed
def test_a_fit_resumed_inside_an_epoch_goes_on_counting(tmp_path):
    saving = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=2, save_top_k=-1)
    straight = fit(noise_module(equal_images()), max_epochs=2, enable_checkpointing=True, callbacks=[saving])
    lightning, ours = "your dataloader is not resumable", "goes on after 2 batches of this epoch"
    with pytest.warns(UserWarning, match=lightning), pytest.warns(UserWarning, match=ours):
        resumed = fit(noise_module(equal_images()), ckpt_path=tmp_path / "step=2.ckpt", max_epochs=2)
    # The images are all the same, so it does not matter that a plain DataLoader starts anew.
    assert torch.equal(resumed.column("train"), straight.column("train")[2 * 2 :])


# -------------------------------------------------------------------- the global generators


@contextmanager
def global_generators_untouched():
    def states():
        return torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()

    before = states()
    yield
    assert states() == before


def test_building_a_vae_leaves_the_global_generators():
    with global_generators_untouched():
        FrozenVAE.from_config({**tiny_kl().config, "_class_name": "AutoencoderKL"}, seed=3)


@pytest.mark.parametrize("posterior", ["sample", "mode"])
def test_encoding_leaves_the_global_generators(posterior, vae):
    with global_generators_untouched():
        vae.decode(vae.encode(images(2) / 255, posterior=posterior))
        InpaintEncoder(vae, posterior=posterior, per_batch=1)({"pixels": images(2), "mask": masks(2)})


@pytest.mark.parametrize("index", [True, False], ids=["index", "no index"])
def test_the_hooks_leave_the_global_generators(index, vae):
    datamodule = LatentDataModule(Photos(photo_columns()), InpaintEncoder(vae), masks=RandomMask())
    batch = {"pixels": images(2)} | ({"index": torch.arange(2)} if index else {})
    with global_generators_untouched():
        datamodule.setup("fit")
        batch = datamodule.on_before_batch_transfer(batch, 0)
        datamodule.on_after_batch_transfer(batch, 0)
        datamodule.teardown("fit")


def test_the_global_seed_changes_no_noise():
    noise = []
    for seed in (1, 2):
        seed_everything(seed, verbose=False)
        noise.append(fit_without_index().column("train"))
    assert torch.equal(*noise)
