"""The cache among processes: ranks that fill it, and writers that are killed."""

import multiprocessing
import random
import subprocess
import sys
from itertools import count
from pathlib import Path

import pytest
import torch
from running import fork_ranks, write_noise_photos

from latentdm.cache import writer as writing
from latentdm.cache.keys import key_of
from latentdm.cache.store import Store
from latentdm.cache.upkeep import compact, verify
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


# -------------------------------------------------------------------- threads


THREADS = """
import os
import sys
from pathlib import Path
from threading import Event, Thread

import torch

from latentdm.cache.keys import key_of
from latentdm.cache.store import Store
from latentdm.cache.writer import Writer

torch.set_num_threads(4)
large = torch.randn(64, 2, 4, 64, 64)
keep = large.isfinite().flatten(1).all(1)  # the main thread has all of its own from here on
keep[::3] = False
sideways = large.transpose(3, 4)  # whose bytes do not lie in order


def threads():
    return len(os.listdir("/proc/self/task"))


def compute():
    large.isfinite().all()
    done.set()
    Event().wait()


counts = [threads()]
writer = Writer()
store = Store(Path(sys.argv[1]))
writer.put(store, [key_of("all", row) for row in range(64)], {"moments": sideways}, wait=True)
writer.put(store, [key_of("some", row) for row in range(64)], {"moments": large, "keep": keep}, wait=True)
writer.flush()
assert writer.entries == 64 + int(keep.sum())
counts.append(threads())
done = Event()
Thread(target=compute, daemon=True).start()
done.wait()
counts.append(threads())
print(*counts)
"""


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="the system does not tell a process's threads")
def test_the_writer_is_one_thread(tmp_path):
    """A thread in which torch computes gets three more to help it, which stay; the last count shows that they do."""
    command = [sys.executable, "-c", THREADS, str(tmp_path)]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    before, written, computed = map(int, printed.split())
    assert written == before + 1
    assert computed > written + 1


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


def test_two_ranks_with_workers_fill_and_read_one_cache(tmp_path):
    write_noise_photos(tmp_path / "photos", COUNT)
    fork_ranks(RANKS, tmp_path)
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
