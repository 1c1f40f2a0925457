"""Every source gives the same steps for any ranks and workers, and goes on where a state was saved."""

import pytest
from four_sources import COUNT, GLOBAL_BATCH, SOURCES, digests, latent_data, pixels, write_sources

from latentdm.batch import EPOCH

EPOCHS = 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sources")
    write_sources(folder)
    return folder


def loader_of(data, rank=0, ranks=1):
    """The training loader of one rank."""
    data.pixels.setup()
    data.pixels.trainer = type("Ranks", (), {"distributed_sampler_kwargs": {"num_replicas": ranks, "rank": rank}})()
    loader = data.pixels.train_dataloader()
    data.pixels.trainer = None
    return loader


def steps(folder, source, ranks=1, workers=0, epoch=0, state=None):
    """The digests of each step: of crops, mirroring, masks, noise and captions, of all ranks in turns."""
    of_ranks = []
    for rank in range(ranks):
        data = latent_data(folder, source, batch_size=GLOBAL_BATCH // ranks, num_workers=workers)
        loader = loader_of(data, rank, ranks)
        loader.sampler.set_epoch(epoch)
        if state:
            loader.load_state_dict(state)
        batches = [(batch, data.process(dict(batch), "cpu")) for batch in loader]
        # the pixels apart: the encoder uses them up
        of_ranks.append([list(zip(digests(raw), digests(made), strict=True)) for raw, made in batches])
    return [[sample for row in zip(*step, strict=True) for sample in row] for step in zip(*of_ranks, strict=True)]


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
@pytest.mark.parametrize("workers", [0, 2])
def test_a_source_goes_on_where_another_number_of_ranks_has_stopped(folder, source, workers):
    whole = steps(folder, source, epoch=1)
    state = {"epoch": 1, "steps": [[GLOBAL_BATCH, 3]]}
    state["settings"] = loader_of(latent_data(folder, source)).state_dict()["settings"]
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
    assert state["settings"]["samples"] == COUNT
    assert state["settings"]["size"] == 32
    assert state["settings"]["flip"] is True


def test_what_has_changed_since_a_state_was_saved_is_named(folder):
    state = loader_of(latent_data(folder, "squares", flip=False, seed=5)).state_dict()
    loader = loader_of(latent_data(folder, "squares"))
    with pytest.warns(UserWarning, match=r"^ImageFolderData: the run that goes on was begun with .*flip=False, now Tr"):
        loader.load_state_dict(state)


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
    with pytest.warns(UserWarning, match=r"another loader's \(it holds _snapshot\); the epoch begins anew"):
        loader.load_state_dict({"_snapshot": {}})
    assert sum(len(batch["index"]) for batch in loader) == 40
