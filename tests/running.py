"""Running the example in this process, on a small scale, with images of the kinds that the commands ask for."""

import io
import json
import multiprocessing
import os
import socket
import subprocess
import sys
import tarfile
import warnings
from contextlib import contextmanager
from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from omegaconf import open_dict
from PIL import Image, ImageDraw

import train_example
from latentdm.data.photographs import photographs

ROOT = Path(__file__).parent.parent


def compose_example(overrides, output_dir):
    """The example's config as Hydra would give it for these overrides."""
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        cfg = compose("train", overrides=list(overrides), return_hydra_config=True)
    with open_dict(cfg):
        cfg.hydra.runtime.output_dir = str(output_dir)
    HydraConfig.instance().set_config(cfg)
    with open_dict(cfg):
        del cfg["hydra"]
    return cfg


ABORTED_AT_EXIT = "terminated with signal SIGABRT"
"""What torch says of a spawned process that gloo's threads end when all is done, as now and then in plain Lightning."""


def run_example(overrides, output_dir):
    """One step of train_example.py: in this process, or as a script where Lightning starts more processes."""
    if {"trainer=ddp", "trainer=fsdp2"} & set(overrides):
        return run_script([*overrides, "debug=step"], output_dir)
    return train_example.train(compose_example([*overrides, "debug=step"], output_dir))


def run_script(overrides, output_dir):
    """train_example.py as a person runs it, in ``output_dir``; returns what it printed."""
    command = [sys.executable, str(ROOT / "train_example.py"), *overrides]
    environment = os.environ | {"COLUMNS": "160", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=output_dir, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def write_photos(folder):
    """A folder as a user has it: photographs with a mask beside each."""
    folder.mkdir()
    for name, image in list(photographs("val").items())[:4]:
        photo = Image.fromarray(image[:150, :150])
        photo.save(folder / f"{name}.png")
        box_mask(photo.size).save(folder / f"{name}-mask.png")


def write_noise_photos(folder, count):
    """Photographs of noise, of different shapes, with a caption beside each."""
    import numpy as np

    folder.mkdir()
    draw = np.random.default_rng(0)
    for number in range(count):
        shape = (32 + 3 * (number % 4), 32 + 5 * (number % 3), 3)
        Image.fromarray(draw.integers(0, 256, shape, dtype=np.uint8)).save(folder / f"{number:02}.png")
        (folder / f"{number:02}.txt").write_text(f"photograph {number}")


def write_cutouts(folder):
    """The same photographs, transparent where they are to be repainted."""
    folder.mkdir()
    for name, image in list(photographs("val").items())[:4]:
        photo = Image.fromarray(image[:150, :150])
        photo.putalpha(box_mask(photo.size).point(lambda level: 255 - level))
        photo.save(folder / f"{name}.png")


def write_latents(folder):
    """Latents as ``latentdm cache export`` writes them, of the demo VAE."""
    import torch
    from safetensors.torch import save_file

    folder.mkdir()
    for number in range(4):
        moments = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(number))
        tensors = {
            "latents.moments": moments.bfloat16(),
            "latents.sizes": torch.tensor([64, 64, 0, 0, 64, 64], dtype=torch.int32),
        }
        columns = {"index": number, "name": f"{number}.png", "caption": f"photograph {number}"}
        save_file(tensors, folder / f"{number}.safetensors", {"columns": json.dumps(columns)})


def write_dataset(folder):
    """The same photographs as a data set of the datasets package, with a caption and a mask column."""
    import datasets

    photos = [Image.fromarray(image[:150, :150]) for image in list(photographs("val").values())[:4]]
    rows = {
        "image": photos,
        "mask": [box_mask(photo.size) for photo in photos],
        "prompt": [f"photograph {number}" for number in range(4)],
    }
    features = datasets.Features(
        {"image": datasets.Image(), "mask": datasets.Image(), "prompt": datasets.Value("string")}
    )
    with quiet_datasets():
        datasets.Dataset.from_dict(rows, features).save_to_disk(folder)


@contextmanager
def quiet_datasets():
    """Without progress bars."""
    import datasets

    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


def write_shards(folder):
    """The same photographs in tar shards, unevenly filled: image, mask, caption and columns."""
    folder.mkdir()
    photos = list(photographs("val").items())[:8]
    for shard, some in {"train-0000": photos[:1], "train-0001": photos[1:4], "train-0002": photos[:0]}.items():
        write_shard(folder / f"{shard}.tar", some or photos[4:5])
    write_shard(folder / "val.tar", photos[5:])


def write_shard(path, photos):
    """One tar file of (name, array) photographs."""
    with tarfile.open(path, "w") as tar:
        for name, image in photos:
            photo = Image.fromarray(image[:150, :150])
            columns = {"width": photo.width, "license": "free"}
            files = {"png": photo, "mask.png": box_mask(photo.size), "txt": f"a photograph: {name}", "json": columns}
            for ending, content in files.items():
                add_file(tar, f"{name}.{ending}", content)


def add_file(tar, name, content):
    """An image, a text or an object as a file of a tar."""
    data = io.BytesIO()
    if isinstance(content, Image.Image):
        content.save(data, "PNG")
    else:
        data.write(content.encode() if isinstance(content, str) else json.dumps(content).encode())
    info = tarfile.TarInfo(name)
    info.size = data.tell()
    data.seek(0)
    tar.addfile(info, data)


def box_mask(size):
    """A white box on black."""
    mask = Image.new("L", size)
    ImageDraw.Draw(mask).rectangle((30, 40, 90, 110), fill=255)
    return mask


def run_ranks(script, folder):
    """Run a script that finds the tests' helpers, in a process of its own that starts its ranks; it gets the folder."""
    (folder / "ranks.py").write_text(script, encoding="utf-8")
    paths = [str(ROOT / "tests"), str(ROOT), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", str(folder / "ranks.py"), str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=180, check=False)
    assert done.returncode == 0, done.stderr


def fork_ranks(script, folder):
    """Run a script on two ranks, each a fork of this process, as if Lightning had started them; it gets the folder."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("fork")  # all is imported already
    ranks = [context.Process(target=rank_process, args=(script, str(folder), rank, port)) for rank in range(2)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # newer Pythons warn of forks where there are threads
        for rank in ranks:
            rank.start()
    for number, rank in enumerate(ranks):
        rank.join(180)
        rank.kill()
        assert rank.exitcode == 0, (Path(folder) / f"output.{number}.txt").read_text(encoding="utf-8")


def rank_process(script, folder, rank, port):
    output = os.open(f"{folder}/output.{rank}.txt", os.O_WRONLY | os.O_CREAT)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.environ |= {"LOCAL_RANK": str(rank), "NODE_RANK": "0", "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    sys.argv = ["ranks.py", folder]
    warnings.simplefilter("ignore")
    exec(compile(script, "ranks.py", "exec"), {"__name__": "__main__"})
