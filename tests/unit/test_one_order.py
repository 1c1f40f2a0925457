"""Every source gives the same steps for any ranks and workers, and goes on where a state was saved."""

import pytest
import torch
from four_sources import COUNT, GLOBAL_BATCH, SOURCES, latent_data, loader_of, pixels, steps, write_sources
from helpers import tiny_kl

from latentdm.batch import EPOCH

EPOCHS = 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sources")
    write_sources(folder)
    return folder


@pytest.mark.filterwarnings("ignore:This DataLoader will create 3 worker processes:UserWarning")
@pytest.mark.parametrize("source", SOURCES)
def test_a_step_is_the_same_on_any_number_of_ranks_and_workers(folder, source):
    alone = steps(folder, source)
    assert len(alone) >= COUNT // GLOBAL_BATCH
    samples = [sample for step in alone for sample in step]
    assert len(set(samples)) == len(samples)
    if source != "buckets":  # of which some steps do not divide by the ranks, and repeat samples
        assert steps(folder, source, ranks=2, workers=1) == alone
        assert steps(folder, source, ranks=4) == alone
    else:
        for ranks in (2, 4):
            assert list(map(set, steps(folder, source, ranks))) == list(map(set, alone))
    assert steps(folder, source, workers=3) == alone
    assert steps(folder, source, epoch=1) != alone


@pytest.mark.parametrize("source", SOURCES)
def test_latents_agree_on_any_number_of_ranks(folder, source):
    def latents(ranks):
        found = {}
        for rank in range(ranks):
            data = latent_data(folder, source, tiny_kl(), batch_size=GLOBAL_BATCH // ranks)
            for batch in loader_of(data, rank, ranks):
                made = data.process(dict(batch), "cpu")
                found |= zip(
                    batch["index"].tolist(), zip(made["latents"], made["masked_latents"], strict=True), strict=True
                )
        return found

    alone = latents(1)
    for ranks in (2, 4):
        shared = latents(ranks)
        assert shared.keys() == alone.keys()
        for index, made in shared.items():
            torch.testing.assert_close(made, alone[index], rtol=0, atol=1e-5)


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("workers", [0, 2])
def test_a_source_goes_on_where_another_number_of_ranks_has_stopped(folder, source, workers):
    whole = steps(folder, source, epoch=1)
    state = {"epoch": 1, "steps": [[GLOBAL_BATCH, 3]]}
    rest = steps(folder, source, ranks=2, workers=workers, epoch=1, state=state)
    assert list(map(set, rest)) == list(map(set, whole[3:]))


def test_the_epoch_travels_with_training_samples_as_far_as_the_encoder(folder):
    data = latent_data(folder, "squares")
    loader = loader_of(data)
    loader.sampler.set_epoch(4)
    batch = next(iter(loader))
    assert batch[EPOCH].tolist() == [4] * GLOBAL_BATCH
    made = data.process(dict(batch), "cpu")
    assert set(made) >= {"latents", "index"}
    assert EPOCH not in made
    assert EPOCH not in next(iter(pixels_of(folder).predict_dataloader()))


def pixels_of(folder):
    data = pixels(folder, "squares")
    data.setup()
    return data


def test_a_state_is_plain_and_says_what_was_seen(folder):
    loader = loader_of(latent_data(folder, "squares"))
    batches = iter(loader)
    next(batches), next(batches)
    state = loader.state_dict()
    assert state["epoch"] == 0
    assert state["steps"] == [[GLOBAL_BATCH, 2]]
    assert state["samples"] == 2 * GLOBAL_BATCH
    assert set(state) == {"epoch", "steps", "samples"}


def test_what_has_changed_since_a_state_was_saved_is_named(folder):
    before = latent_data(folder, "squares", flip=False, seed=5)
    before.setup("fit")
    state = before.state_dict()
    assert state["settings"] | {"size": 32, "flip": False, "seed": 5, "training samples": COUNT} == state["settings"]
    same, other = latent_data(folder, "squares", flip=False, seed=5, batch_size=3), latent_data(folder, "squares")
    for data in (same, other):
        data.setup("fit")
    same.load_state_dict(state)
    with pytest.warns(UserWarning, match=r"^ImageFolderData: .*: flip=False \(now True\), seed=5 \(now 0\)\. What"):
        other.load_state_dict(state)


def test_another_global_batch_is_told_with_what_is_kept(folder):
    state = loader_of(latent_data(folder, "squares")).state_dict() | {"steps": [[8, 2]]}
    loader = loader_of(latent_data(folder, "squares", batch_size=5))
    with pytest.warns(UserWarning, match=r"had 8 samples a step.*now 5. The 29 of 45 samples of epoch 0 .* in 5 steps"):
        loader.load_state_dict(state)
    seen = [index for step in steps(folder, "squares")[:2] for index in step]
    rest = [index for batch in loader for index in batch["index"].tolist()]
    assert len(rest) == len(set(rest)) == 25
    assert len(seen) == 16


def test_the_state_of_another_loader_is_not_taken_for_one_of_ours(folder):
    loader = loader_of(latent_data(folder, "squares"))
    with pytest.warns(UserWarning, match=r"another loader's: it holds _snapshot$"):
        loader.load_state_dict({"_snapshot": {}})
    assert sum(len(batch["index"]) for batch in loader) == 40
