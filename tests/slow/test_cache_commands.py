"""The commands of the cache: ahead of time, looked after, exported; in this process, but for ranks that are killed."""

import json
import os
import signal
import subprocess
import sys
from contextlib import suppress

import pytest
import torch
from running import ROOT, compose_example, write_noise_photos
from tiny_pipelines import save_pipeline

import train_example
from latentdm.cache.store import Store
from latentdm.cache.upkeep import spaces
from latentdm.cli import main

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*return_predictions.*:UserWarning"),
]

COUNT = 10


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The current one, with photographs in it."""
    write_noise_photos(tmp_path / "photos", COUNT)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def command(capsys):
    """Runs a command in this process; gives its last line, which is JSON."""

    def run(*arguments):
        status = main(list(arguments))
        printed = capsys.readouterr()
        assert status == 0, printed.err
        return json.loads(printed.out.strip().splitlines()[-1])

    return run


def overrides(cache, *more, size=32):
    """Entries in float32, encoded one by one: their bits do not depend on who encodes what."""
    return [
        "pixels=folder", "pixels.root=photos", f"pixels.size={size}", "pixels.batch_size=4", "pixels.val_share=0.2",
        "encoder=plain", "~masks", "cache=disk", f"cache.dir={cache}", "cache.variants=2", "cache.dtype=float32",
        "vae.dtype=float32", "encoder.per_batch=1", "+trainer.enable_progress_bar=false", *more,
    ]  # fmt: skip


def contents(root):
    """Key → moments, of all entries of a cache."""
    found = {}
    for space in spaces(root):
        store = Store(space)
        store.refresh()
        for shard in store.all_shards():
            from safetensors.torch import load_file

            fields = load_file(space / "shards" / shard)
            for key, moments in zip(fields["keys"], fields["moments"], strict=True):
                found[bytes(key.tolist())] = moments
    return found


def assert_same(first, second):
    one, other = contents(first), contents(second)
    assert one.keys() == other.keys()
    assert all(torch.equal(moments, other[key]) for key, moments in one.items())


def test_encode_goes_on_divides_and_agrees(folder, command):
    whole = command("encode", *overrides("whole"))
    assert whole["failures"] == whole["hits"] == 0
    # Two of each in training, whose crops are drawn, and one of each that validates.
    assert COUNT < whole["images"] == whole["entries"] == whole["written"] == whole["misses"] <= 2 * COUNT
    again = command("encode", *overrides("whole"))
    assert (again["images"], again["misses"], again["hits"]) == (0, 0, whole["entries"])
    halves = [command("encode", *overrides("parts", f"part={i}/2")) for i in range(2)]
    assert sum(half["images"] for half in halves) == whole["images"]
    assert halves[1]["entries"] == whole["entries"]
    assert_same(folder / "whole", folder / "parts")


def test_info_prune_and_verify(folder, command):
    whole = command("encode", *overrides("cache"))

    def cache(action):
        return command("cache", action, "--json", *overrides("cache"))

    info = cache("info")
    assert (info["entries"], info["hits"], info["misses"], info["stale"]) == (whole["entries"], whole["entries"], 0, 0)
    assert info["bytes"] == whole["bytes"] > 0
    (folder / "photos" / "03.png").unlink()
    write_noise_photos(folder / "more", 1)
    (folder / "more" / "00.png").rename(folder / "photos" / "99.png")
    info = cache("info")
    assert info["stale"] > 0
    assert info["misses"] > 0
    assert cache("prune")["freed"] > 0
    info = cache("info")
    assert info["stale"] == 0
    assert info["entries"] == info["hits"] > 0
    assert cache("verify")["failures"] == 0


def test_ranks_that_are_killed_and_started_again_equal_one_process(folder, command):
    write_noise_photos(folder / "many", 80)
    settings = ["pixels.root=many"]
    alone = command("encode", *overrides("alone", *settings, size=256))
    ranks = ["trainer.devices=2", "trainer.strategy=ddp", "trainer.accelerator=cpu"]
    run = [sys.executable, "-m", "latentdm", "encode", *overrides("killed", *settings, *ranks, size=256)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", "PYTHONPATH": str(ROOT)}

    def start():
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        return subprocess.Popen(run, cwd=folder, env=environment, text=True, start_new_session=True, **pipes)

    first = start()
    while not list((folder / "killed").glob("*/shards/*/*.safetensors")):
        assert first.poll() is None, first.communicate()[1]
        with suppress(subprocess.TimeoutExpired):
            first.wait(timeout=0.02)
    os.killpg(first.pid, signal.SIGKILL)  # both ranks
    first.communicate()
    there = len(contents(folder / "killed"))
    assert 0 < there < alone["entries"]
    again = start()
    printed, errors = again.communicate(timeout=240)
    assert again.returncode == 0, errors
    last = json.loads(printed.strip().splitlines()[-1])
    padding = 1  # two ranks have equally many: the first sample may come twice
    assert there <= last["hits"] <= there + padding
    assert 0 <= last["images"] - (alone["images"] - there) <= padding
    assert last["entries"] == alone["entries"]
    assert_same(folder / "killed", folder / "alone")


@pytest.mark.parametrize("kind", ["safetensors", "webdataset", "comfyui"])
def test_each_export_trains(folder, command, kind):
    size = 64  # that of debug=step
    command("encode", *overrides("cache", size=size))
    found = command("cache", "export", "--format", kind, "--output", kind, "--json", *overrides("cache", size=size))
    assert found["misses"] == 0 < found["entries"]
    training = ["pixels=latents", f"pixels.root={kind}", "encoder=plain", "~masks", "pixels.batch_size=4", "debug=step"]
    losses = train_example.train(compose_example([*training, "vae.dtype=float32"], folder))
    assert losses["last"] == losses["last"]


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
def test_captions_are_encoded_ahead_and_kept_by_prune(folder, command):
    save_pipeline("sd15", folder / "pipeline")
    text = ["text=pipeline", "text.source=pipeline", "captions=dropout", "cache.variants=1"]
    first = command("encode", *overrides("cache", *text))
    # One image each, one caption each, and the empty one.
    assert first["entries"] == first["written"] == 2 * COUNT + 1
    pruned = command("cache", "prune", "--json", *overrides("cache", *text))
    assert (pruned["captions"], pruned["others"]) == (COUNT + 1, [])
    again = command("encode", *overrides("cache", *text))
    assert again["entries"] == 2 * COUNT + 1
    assert again["written"] == 0


def test_broken_images_are_reported_by_name(folder, capsys):
    (folder / "photos" / "04.png").write_bytes(b"no image")
    assert main(["encode", *overrides("cache")]) == 0
    printed = capsys.readouterr().out
    assert "04.png" in printed
    assert json.loads(printed.strip().splitlines()[-1])["failures"] == 1


@pytest.mark.parametrize("part", ["4/4", "-1/4", "half"])
def test_a_part_that_there_is_not_is_said_in_a_line(part, folder, capsys):
    assert main(["encode", f"part={part}", *overrides("cache")]) == 1
    assert capsys.readouterr().err.startswith(f"latentdm encode: part={part}: expected i/n")


def test_encode_without_a_folder_says_what_to_add(folder, capsys):
    assert main(["encode", "pixels=folder", "pixels.root=photos"]) == 1
    assert "add cache=disk" in capsys.readouterr().err
