"""The data module and the encoder under each strategy: every rank its share, drawn as one process would draw it."""

import os
import socket
import subprocess
import sys

import pytest
import torch
from running import ABORTED_AT_EXIT, run_ranks
from witness import IMAGES, Run, steps_seen, weights

PATIENCE_S = 170
BATCH, STEPS = 4, 4
EPOCH = IMAGES // BATCH * BATCH

two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")


@pytest.fixture(scope="module")
def alone(witness_data, tmp_path_factory):
    """Index → what one process draws for it in the first epoch."""
    run = run_of(witness_data, tmp_path_factory.mktemp("alone"), ranks=1, steps=EPOCH // BATCH)
    execute(run.command())
    drawn, index = steps_seen(run, "drawn"), steps_seen(run, "index")
    return {number: each for step in drawn for number, each in zip(index[step][0], drawn[step][0], strict=True)}


def run_of(data, folder, **settings):
    return Run("folder", str(data), str(folder), batch=BATCH, **({"steps": STEPS} | settings))


def execute(*commands):
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen([str(part) for part in command], env=environment, stderr=subprocess.PIPE, text=True)
        for command in commands
    ]
    for process in processes:
        _, error = process.communicate(timeout=PATIENCE_S)
        assert process.returncode == 0 or ABORTED_AT_EXIT in error, error


def check(run, alone):
    """No step sees an image twice, every rank trained as long, and each image met what it would have met alone."""
    index, drawn = steps_seen(run, "index"), steps_seen(run, "drawn")
    ranks = run.ranks * run.nodes
    assert index.keys() == {(rank, step) for rank in range(ranks) for step in range(run.steps)}
    seen = [number for step in sorted(index) for number in index[step][0]]
    assert len(seen) == len(set(seen)) == BATCH * run.steps
    both = [number for number in seen if number in alone]  # the last ones of an epoch are left out
    assert len(both) > BATCH
    drawn_here = {number: each for step in index for number, each in zip(index[step][0], drawn[step][0], strict=True)}
    assert [drawn_here[number] for number in both] == [alone[number] for number in both]
    assert len(weights(run)) == ranks
    assert len(set(weights(run))) == 1  # gradients were shared


@pytest.mark.parametrize(
    ("strategy", "ranks"),
    [(None, 2), (None, 4), ("ddp_spawn", 2), ("fsdp2", 2)],
    ids=["ddp2", "ddp4", "spawn", "fsdp2"],
)
def test_ranks_share_the_images(strategy, ranks, witness_data, alone, tmp_path):
    run = run_of(witness_data, tmp_path / "run", ranks=ranks, strategy=strategy)
    execute(run.command())
    check(run, alone)


def test_two_nodes_under_torchrun_share_the_images(witness_data, alone, tmp_path):
    run = run_of(witness_data, tmp_path / "run", nodes=2)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    settings = ["--nnodes=2", "--nproc-per-node=1", "--master-addr=127.0.0.1", f"--master-port={port}"]
    torchrun = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", *settings]
    execute(*([*torchrun, f"--node-rank={node}", *run.command()[3:]] for node in range(2)))
    check(run, alone)


@two_gpus
@pytest.mark.parametrize("strategy", [None, "fsdp2"])
def test_gpus_share_the_images(strategy, witness_data, tmp_path):
    run = run_of(witness_data, tmp_path / "run", ranks=2, strategy=strategy, accelerator="gpu")
    execute(run.command())
    index = steps_seen(run, "index")
    seen = [number for step in sorted(index) for number in index[step][0]]
    assert len(seen) == len(set(seen)) == BATCH * STEPS
    assert len(set(weights(run))) == 1


# ---------------------------------------------------------------- fine-tunes

FINE_TUNES = """
import sys
from pathlib import Path

import torch
from helpers import quiet_trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from tiny_pipelines import model_of, ready, save_pipeline

from latentdm.finetune import SaveForDiffusers

torch.set_num_threads(1)
folder, rank = Path(sys.argv[1]), None
source = folder / "source"
if not source.exists():
    save_pipeline("sd15_inpaint", source)
data = ready(source, height=64, width=64)
for name, settings in {"all": {}, "lora": {"lora": {"rank": 2, "alpha": 5}}}.items():
    for split in (False, True):
        strategy = ModelParallelStrategy(2, 1, save_distributed_checkpoint=False) if split else "ddp"
        output = folder / f"{name}_{'split' if split else 'whole'}"
        trainer = quiet_trainer(
            strategy=strategy, devices=2, max_steps=2, max_epochs=-1, gradient_clip_val=1.0,
            callbacks=[SaveForDiffusers(dirpath=output, kohya=name == "lora")],
        )
        trainer.fit(model_of("sd15_inpaint", str(source), learning_rate=1e-2, **settings), datamodule=data)
        trainer.strategy.barrier()
"""


def test_a_fine_tune_that_is_split_is_saved_whole(tmp_path):
    """What FSDP2 saves is what DDP saves: a pipeline of all weights, and a LoRA in both formats."""
    from safetensors.torch import load_file

    run_ranks(FINE_TUNES, tmp_path)
    files = {path.relative_to(tmp_path / "all_whole") for path in (tmp_path / "all_whole").rglob("*") if path.is_file()}
    assert files == {
        path.relative_to(tmp_path / "all_split") for path in (tmp_path / "all_split").rglob("*") if path.is_file()
    }
    for name, file in {
        "all": "pipeline/unet/diffusion_pytorch_model.safetensors",
        "lora": "lora/pytorch_lora_weights.safetensors",
        "lora_kohya": "lora/lora_kohya.safetensors",
    }.items():
        whole, split = (load_file(tmp_path / f"{name.partition('_')[0]}_{how}" / file) for how in ("whole", "split"))
        assert whole.keys() == split.keys()
        for key, weight in whole.items():
            torch.testing.assert_close(split[key], weight, rtol=1e-4, atol=1e-5)
    from diffusers import StableDiffusionInpaintPipeline

    config = StableDiffusionInpaintPipeline.from_pretrained(tmp_path / "all_split" / "pipeline").unet.config
    assert config["_class_name"] == "UNet2DConditionModel"
