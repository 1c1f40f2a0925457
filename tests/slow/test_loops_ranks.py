"""Loops without a Trainer on two ranks: Fabric's, Accelerate's and plain PyTorch's see one order, each its share."""

import json

import pytest
from four_sources import GLOBAL_BATCH, digests, latent_data, write_sources
from running import fork_ranks

SCRIPT = """
import json
import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from four_sources import GLOBAL_BATCH, digests, latent_data
from lightning.fabric import Fabric

from latentdm.errors import UserError

torch.set_num_threads(1)
folder = Path(sys.argv[1])
data = latent_data(folder, "buckets", batch_size=GLOBAL_BATCH // 2, num_workers=1)
data.setup("fit")
early = data.train_dataloader()
fabric = Fabric(accelerator="cpu", devices=2, strategy="ddp")
fabric.launch()
loader, seen = data.train_dataloader(), {}


def look(name, batches):
    seen[name] = [digests(data.process(batch, "cpu")) for batch in batches]


look("plain", loader)
AcceleratorState._reset_state(reset_partial_state=True)  # another test's, in the process that was forked
accelerator = Accelerator(cpu=True)
assert accelerator.num_processes == 2
look("accelerate", data.train_dataloader())
by_fabric = fabric.setup_dataloaders(data.train_dataloader(), move_to_device=False)
look("fabric", by_fabric)
look("fabric's second epoch", by_fabric)
loader.sampler.set_epoch(1)
look("plain second epoch", loader)
loader.load_state_dict({"epoch": 1, "steps": [[GLOBAL_BATCH, 2]]})
look("resumed", loader)
for name, batches in {"early": early, "prepared": accelerator.prepare(data.train_dataloader())}.items():
    try:
        next(iter(batches))
    except UserError as error:
        seen[name] = str(error)
without_index = data.encoder({"pixels": torch.zeros(1, 3, 32, 32), "mask": torch.ones(1, 1, 32, 32)})
seen["noise"] = without_index["latents"].flatten().tolist()
(folder / f"rank{fabric.global_rank}.json").write_text(json.dumps(seen))
fabric.barrier()
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("loops")
    write_sources(folder)
    return folder


def test_loops_without_a_trainer_share_the_data(folder):
    fork_ranks(SCRIPT, folder)
    of_ranks = [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(2)]
    data = latent_data(folder, "buckets", batch_size=GLOBAL_BATCH)
    data.setup("fit")
    loader, epochs = data.train_dataloader(), []
    for epoch in range(2):
        loader.sampler.set_epoch(epoch)
        epochs.append([set(digests(data.process(batch, "cpu"))) for batch in loader])
    first, second = epochs
    expected = {"plain": first, "accelerate": first, "fabric": first, "resumed": second[2:]}
    for name, steps in (expected | {"fabric's second epoch": second, "plain second epoch": second}).items():
        both = [{*mine, *other} for mine, other in zip(*(seen[name] for seen in of_ranks), strict=True)]
        assert both == steps, name
    for seen in of_ranks:
        assert seen["early"].startswith("ImageFolderData: the loader was made for 1 of the 2 processes")
        assert seen["prepared"].endswith("without accelerator.prepare")
    assert of_ranks[0]["noise"] != of_ranks[1]["noise"]
