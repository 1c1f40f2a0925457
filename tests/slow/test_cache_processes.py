"""The cache among processes: ranks that fill it, writers that are killed, and the commands."""

import json
import multiprocessing
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from itertools import count

import numpy as np
import pytest
import torch
from PIL import Image
from running import ROOT, run_ranks

from latentdm.cache import writer as writing
from latentdm.cache.keys import key_of
from latentdm.cache.store import Store
from latentdm.cache.upkeep import compact, spaces, verify
from latentdm.cache.writer import Writer

COUNT = 24

ROUNDS = 17
"""Each kills three processes: 51 in all."""


def expected(number):
    moments = torch.full((2, 4, 16, 16), float(number % 2048), dtype=torch.bfloat16)
    moments[..., 0] = float(number % 255)
    return moments


def write_for_ever(folder, rank, start, acknowledged):
    """Write entries, and say after each flush up to which all are on the disk."""
    writing.SEAL_BYTES = 40_000
    writer, store = Writer(rank), Store(folder)
    for number in count(start):
        writer.put(store, [key_of(number)], {"moments": expected(number)[None]}, wait=True)
        if number % 16 == 15:
            writer.flush()
            acknowledged.send(number)


def compact_for_ever(folder, acknowledged):
    acknowledged.send(0)
    while True:
        compact(folder)


def start(target, *arguments):
    """A process that can be killed at any moment, and what it has acknowledged."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=target, args=(*arguments, sender), daemon=True)
    process.start()
    sender.close()
    return process, receiver


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_writers_and_a_compactor_are_killed_and_nothing_is_wrong_or_lost(tmp_path):
    draw, acknowledged, starts = random.Random(0), [], [0, 10**6]
    reader = Store(tmp_path)
    for _ in range(ROUNDS):
        writers = [start(write_for_ever, tmp_path, rank, first) for rank, first in enumerate(starts)]
        compactor, ready = start(compact_for_ever, tmp_path)
        ready.recv()
        for rank, (_, said) in enumerate(writers):
            last = starts[rank] - 1
            for _ in range(draw.randint(1, 8)):
                last = said.recv()
                reader.refresh()
                for number in range(max(starts[rank], last - 40), last + 1):
                    found = reader.read(key_of(number))
                    assert found is None or torch.equal(found["moments"], expected(number))
            acknowledged += range(starts[rank], last + 1)
            starts[rank] = last + 1
        for process in draw.sample([*(process for process, _ in writers), compactor], 3):
            process.kill()
            process.join()
    reader = Store(tmp_path)
    reader.refresh()
    for number in acknowledged:
        assert torch.equal(reader.read(key_of(number))["moments"], expected(number))
    assert reader.failures == 0
    before = verify(tmp_path)
    assert before.failures == 0
    compact(tmp_path)
    after = verify(tmp_path)
    assert after.shards < before.shards
    assert after.failures == 0
    reader = Store(tmp_path)
    reader.refresh()
    assert all(torch.equal(reader.read(key_of(number))["moments"], expected(number)) for number in acknowledged)


# -------------------------------------------------------------------- ranks


RANKS = """
import sys
import torch
from helpers import LatentModel, quiet_trainer, tiny_kl
from latentdm import Cache, FrozenVAE, InpaintEncoder, LatentDataModule
from latentdm.data import ImageFolderData
from latentdm.masks import RandomMask

torch.set_num_threads(1)
folder = sys.argv[1]


def fit(name, cache):
    pixels = ImageFolderData(f"{folder}/photos", 32, 4, 0, random_crop=False, flip=True, num_workers=2)
    encoder = InpaintEncoder(FrozenVAE(tiny_kl(), dtype="bfloat16"), per_batch=1)
    datamodule = LatentDataModule(pixels, encoder, masks=RandomMask(), cache=cache)
    model = LatentModel()
    trainer = quiet_trainer(strategy="ddp_find_unused_parameters_false", devices=2, max_epochs=3)
    trainer.fit(model, datamodule=datamodule)
    seen = [
        {k: v for k, v in batch.items() if k in ("latents", "masked_latents", "index", "caption", "noise_mask")}
        for _, batch in model.seen["train"]
    ]
    counts = None if cache is None else cache.report()
    torch.save((seen, counts), f"{folder}/{name}{trainer.global_rank}.pt")


fit("without", None)
fit("with", Cache(f"{folder}/cache"))
fit("again", Cache(f"{folder}/cache"))
"""


def write_photos(folder, number_of=COUNT):
    folder.mkdir()
    draw = np.random.default_rng(0)
    for number in range(number_of):
        shape = (32 + 3 * (number % 4), 32 + 5 * (number % 3), 3)
        Image.fromarray(draw.integers(0, 256, shape, dtype=np.uint8)).save(folder / f"{number:02}.png")
        (folder / f"{number:02}.txt").write_text(f"photograph {number}")


def test_two_ranks_with_workers_fill_and_read_one_cache(tmp_path):
    write_photos(tmp_path / "photos")
    run_ranks(RANKS, tmp_path)
    for rank in range(2):
        without, with_cache, again = (torch.load(tmp_path / f"{n}{rank}.pt") for n in ("without", "with", "again"))
        assert len(without[0]) == 9
        for plain, cached, read in zip(without[0], with_cache[0], again[0], strict=True):
            assert plain["caption"] == cached["caption"] == [f"photograph {i}" for i in plain["index"].tolist()]
            for key in ("index", "latents", "masked_latents", "noise_mask"):
                assert torch.equal(plain[key], cached[key])
                assert torch.equal(plain[key], read[key])
        assert with_cache[1]["misses"] + with_cache[1]["hits"] == again[1]["hits"] == 3 * COUNT // 2
        assert again[1]["misses"] == again[1]["failures"] == with_cache[1]["failures"] == 0


# -------------------------------------------------------------------- commands


@pytest.fixture
def folder(tmp_path):
    write_photos(tmp_path / "photos", 10)
    return tmp_path


def command(folder, *arguments, check=True):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(
        [sys.executable, "-m", "latentdm", *arguments],
        cwd=folder, env=environment | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done


def overrides(cache="cache", *more):
    return [
        "pixels=folder", "pixels.root=photos", "pixels.size=32", "pixels.batch_size=4", "pixels.val_share=0.2",
        "encoder=plain", "~masks", "cache=disk", f"cache.dir={cache}", "cache.variants=2", "vae.dtype=float32",
        "+trainer.enable_progress_bar=false", *more,
    ]  # fmt: skip


def last_line(done):
    return json.loads(done.stdout.strip().splitlines()[-1])


def contents(root) -> Iterator[bytes]:
    from latentdm.cache.index import Index

    for space in spaces(root):
        store = Store(space)
        store.refresh()
        index: Index = store.index.joined(store.new)
        yield from np.unique(index.prefix).tolist()


def test_encode_resumes_divides_and_agrees(folder):
    whole = last_line(command(folder, "encode", *overrides("whole")))
    assert whole["failures"] == 0
    assert whole["entries"] == whole["written"] == whole["misses"] == whole["images"]
    assert whole["hits"] == 0
    again = last_line(command(folder, "encode", *overrides("whole")))
    assert (again["images"], again["misses"], again["hits"]) == (0, 0, whole["entries"])
    halves = [last_line(command(folder, "encode", *overrides("parts", f"part={i}/2"))) for i in range(2)]
    assert sum(half["images"] for half in halves) == whole["images"]
    assert halves[1]["entries"] == whole["entries"]
    ranks = ["trainer.devices=2", "trainer.strategy=ddp", "trainer.accelerator=cpu"]
    both = last_line(command(folder, "encode", *overrides("ranks", *ranks)))
    assert both["entries"] == whole["entries"]
    expected_keys = sorted(contents(folder / "whole"))
    assert sorted(contents(folder / "parts")) == sorted(contents(folder / "ranks")) == expected_keys
    info = json.loads(command(folder, "cache", "info", "--json", *overrides("whole")).stdout)
    assert (info["entries"], info["hits"], info["misses"]) == (whole["entries"], whole["entries"], 0)
    assert info["bytes"] == whole["bytes"] > 0
    (folder / "photos" / "03.png").unlink()
    (folder / "photos" / "03.txt").unlink()
    write_photos(folder / "more", 1)
    (folder / "more" / "00.png").rename(folder / "photos" / "99.png")
    (folder / "more" / "00.txt").rename(folder / "photos" / "99.txt")
    info = json.loads(command(folder, "cache", "info", "--json", *overrides("whole")).stdout)
    assert info["stale"] > 0
    assert info["misses"] > 0
    pruned = json.loads(command(folder, "cache", "prune", "--json", *overrides("whole")).stdout)
    assert pruned["freed"] > 0
    info = json.loads(command(folder, "cache", "info", "--json", *overrides("whole")).stdout)
    assert info["stale"] == 0
    assert info["entries"] == info["hits"] > 0
    assert json.loads(command(folder, "cache", "verify", "--json", *overrides("whole")).stdout)["failures"] == 0


def test_broken_images_are_reported_by_name(folder):
    (folder / "photos" / "04.png").write_bytes(b"no image")
    done = command(folder, "encode", *overrides())
    assert "04.png" in done.stdout
    assert last_line(done)["failures"] == 1


def test_encode_without_a_folder_says_what_to_add(folder):
    done = command(folder, "encode", "pixels=folder", "pixels.root=photos", check=False)
    assert done.returncode == 1
    assert "add cache=disk" in done.stderr


@pytest.mark.parametrize("kind", ["safetensors", "webdataset", "comfyui"])
def test_each_export_trains(folder, kind):
    size = "pixels.size=64"  # that of debug=step
    command(folder, "encode", *overrides("cache", size))
    found = json.loads(
        command(
            folder, "cache", "export", "--format", kind, "--output", kind, "--json", *overrides("cache", size)
        ).stdout
    )
    assert found["misses"] == 0 < found["entries"]
    script = [sys.executable, str(ROOT / "train_example.py"), "pixels=latents", f"pixels.root={kind}", "encoder=plain"]
    run = [*script, "~masks", "pixels.batch_size=4", "debug=step", "vae.dtype=float32"]
    done = subprocess.run(run, cwd=folder, capture_output=True, text=True, check=False, env=os.environ)
    assert done.returncode == 0, done.stderr
