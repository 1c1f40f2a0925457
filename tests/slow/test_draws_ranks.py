"""Noise on two ranks: a sample with an index meets the noise it would meet alone, one without draws its own."""

import pytest
import torch
from helpers import Photos, by_index, fit, photo_columns, tiny_kl
from running import fork_ranks

from latentdm import FrozenVAE, LatentDataModule, PlainEncoder

RANK_SCRIPT = """
import sys

import torch
from helpers import LatentModel, Photos, images, noise_vae, photo_columns, quiet_trainer, tiny_kl
from latentdm import FrozenVAE, LatentDataModule, PlainEncoder

torch.set_num_threads(1)
trainer = quiet_trainer(strategy="ddp", devices=2, max_epochs=2)
model = LatentModel()
vae = FrozenVAE(tiny_kl(), dtype="float32")
trainer.fit(model, datamodule=LatentDataModule(Photos(photo_columns(8)), PlainEncoder(vae)))
unkeyed = {"pixels": images(1).repeat(8, 1, 1, 1)}
predicted = trainer.predict(model, datamodule=LatentDataModule(Photos(unkeyed), PlainEncoder(noise_vae())))
seen = {
    "noise": torch.cat([batch["latents"] for batch in predicted]),
    "epochs": [[model.column("train", name, epoch) for name in ("latents", "index")] for epoch in (0, 1)],
}
torch.save(seen, f"{sys.argv[1]}/rank{trainer.global_rank}.pt")
trainer.strategy.barrier()
"""


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    """What each of two CPU ranks saw."""
    folder = tmp_path_factory.mktemp("ranks")
    fork_ranks(RANK_SCRIPT, folder)
    return [torch.load(folder / f"rank{rank}.pt") for rank in (0, 1)]


def test_with_an_index_two_ranks_see_what_one_sees(two_ranks):
    encoder = PlainEncoder(FrozenVAE(tiny_kl(), dtype="float32"))
    alone = fit(LatentDataModule(Photos(photo_columns(8)), encoder), max_epochs=2)
    for epoch in (0, 1):
        columns = zip(*(rank["epochs"][epoch] for rank in two_ranks), strict=True)
        latents, index = (torch.cat(column) for column in columns)
        assert sorted(index.tolist()) == list(range(8))  # each rank saw samples of its own
        expected = alone.column("train", epoch=epoch)
        torch.testing.assert_close(by_index(latents, index), expected, rtol=0, atol=1e-5)


def test_without_an_index_two_ranks_draw_noise_of_their_own(two_ranks):
    noise = torch.cat([rank["noise"] for rank in two_ranks])
    assert len(torch.unique(noise, dim=0)) == len(noise)
