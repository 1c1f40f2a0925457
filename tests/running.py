"""Running the example in this process, on a small scale, with images of the kinds that the commands ask for."""

import os
import subprocess
import sys
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


def run_example(overrides, output_dir):
    """One step of train_example.py: in this process, or as a script where Lightning starts more processes."""
    if "trainer=ddp" in overrides:
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


def write_cutouts(folder):
    """The same photographs, transparent where they are to be repainted."""
    folder.mkdir()
    for name, image in list(photographs("val").items())[:4]:
        photo = Image.fromarray(image[:150, :150])
        photo.putalpha(box_mask(photo.size).point(lambda level: 255 - level))
        photo.save(folder / f"{name}.png")


def box_mask(size):
    """A white box on black."""
    mask = Image.new("L", size)
    ImageDraw.Draw(mask).rectangle((30, 40, 90, 110), fill=255)
    return mask
