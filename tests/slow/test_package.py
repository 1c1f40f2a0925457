"""What `pip install latentdm` brings: the wheel, built from the sdist, serves a Hydra app that somebody else wrote."""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import hydra
import pytest
from running import ROOT

import latentdm

APP = """
import hydra, sys
from hydra.utils import instantiate
import latentdm

@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(cfg):
    assert cfg.encoder.per_batch == 5, "the app's own encoder/batched.yaml must win"
    datamodule = instantiate(cfg.datamodule)
    datamodule.setup("fit")
    batch = next(iter(datamodule.train_dataloader()))
    batch = datamodule.on_after_batch_transfer(datamodule.on_before_batch_transfer(batch, 0), 0)
    print(latentdm.__file__, tuple(batch["latents"].shape))

main()
"""


def run(*command, cwd):
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel that is built from the sdist that is built from the checkout."""
    folder = tmp_path_factory.mktemp("build")
    ignore = shutil.ignore_patterns(".*", "outputs", "build", "dist", "*.egg-info", "__pycache__", "tests")
    checkout = shutil.copytree(ROOT, folder / "checkout", ignore=ignore)
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", "dist", ".", cwd=checkout)
    [path] = checkout.glob("dist/*.whl")
    return path


def test_wheel_holds_every_module_yaml_and_weight(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    shipped = {
        **{path: f"latentdm/{path.relative_to(ROOT / 'latentdm')}" for path in (ROOT / "latentdm").rglob("*.py")},
        **{path: f"latentdm/conf/{path.relative_to(ROOT / 'conf')}" for path in (ROOT / "conf").rglob("*.yaml")},
    }
    shipped[ROOT / "conf/__init__.py"] = "latentdm/conf/__init__.py"
    assert set(shipped.values()) <= names
    assert all(name.startswith(("latentdm/", "latentdm-")) for name in names), "a guest adds to no other package"
    assert {
        "latentdm/py.typed",
        "latentdm/report/page.html",
        "latentdm/demo_vae/diffusion_pytorch_model.safetensors",
    } <= names


def test_the_wheel_is_small_and_says_what_it_is(wheel):
    assert wheel.stat().st_size < 6e6
    [metadata] = (name for name in zipfile.ZipFile(wheel).namelist() if name.endswith(".dist-info/METADATA"))
    told = zipfile.ZipFile(wheel).read(metadata).decode()
    head, _, description = told.partition("\n\n")
    assert {f"Version: {latentdm.__version__}", "Description-Content-Type: text/markdown"} <= set(head.splitlines())
    assert description.startswith("# latentdm")


def environment(folder, *wheels):
    """A fresh environment that holds some wheels, and what they depend on; returns its Python."""
    run(sys.executable, "-m", "venv", "--without-pip", str(folder), cwd=folder.parent)
    [site] = folder.glob("lib/python*/site-packages")
    for path in wheels:
        run(sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(site), str(path), cwd=folder)
    # The dependencies come from the environment of this test; a plain path does not bring its editable install along.
    (site / "dependencies.pth").write_text(str(Path(hydra.__file__).parent.parent), encoding="utf-8")
    return str(folder / "bin" / "python")


@pytest.fixture(scope="module")
def python(wheel, tmp_path_factory):
    """The Python of an environment with latentdm."""
    return environment(tmp_path_factory.mktemp("with") / "environment", wheel)


@pytest.fixture(scope="module")
def other_python(tmp_path_factory):
    """The Python of one without."""
    return environment(tmp_path_factory.mktemp("without") / "environment")


@pytest.fixture
def third_party_app(tmp_path):
    """The folder of an app of somebody else that asks for our groups, and has an encoder of its own."""
    (tmp_path / "conf" / "encoder").mkdir(parents=True)
    (tmp_path / "conf" / "encoder" / "batched.yaml").write_text(
        "defaults: [/latentdm/schema/PlainEncoder@_here_, _self_]\nvae: ${vae}\nper_batch: 5\n", encoding="utf-8"
    )
    (tmp_path / "conf" / "config.yaml").write_text(
        "defaults: [{pixels: samples}, {vae: tiny}, {encoder: batched}, {datamodule: latent}, _self_]\n"
        "hydra: {searchpath: [pkg://latentdm.conf]}\n"
        "pixels: {size: 64, batch_size: 2}\n",
        encoding="utf-8",
    )
    (tmp_path / "app.py").write_text(APP, encoding="utf-8")
    return tmp_path


def test_hydra_app_of_a_third_party_composes_our_groups(python, third_party_app):
    package, shape = run(python, "app.py", cwd=third_party_app).split(maxsplit=1)
    assert Path(package).is_relative_to(Path(python).parent.parent)
    assert shape == "(2, 4, 8, 8)\n"


def test_the_wheel_alone_draws_a_preview_in_an_empty_folder(python, tmp_path):
    run(python, "-m", "latentdm", "preview", "pixels.size=32", "--samples", "1", cwd=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["preview.png"]


@pytest.mark.parametrize("override", ["encoder.per_bach=3", "encoder.per_batch=many", "masks.kind=[boxes]"])
def test_a_typo_fails_in_it_before_anything_runs(override, python, third_party_app):
    command = [python, "app.py", "+masks=random", override]
    done = subprocess.run(command, cwd=third_party_app, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert f"full_key: {override.partition('=')[0]}" in done.stderr


# ---------------------------------------------------------------- a good guest

STRANGER = """
import hydra

@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(cfg):
    print(cfg)

main()
"""
ASKED = {
    "run": [],
    "help": ["--help"],
    "hydra's help": ["--hydra-help"],
    "the config": ["--info", "config"],
    "defaults": ["--info", "defaults-tree"],
    "search path": ["--info", "searchpath"],
    "plugins": ["--info", "plugins"],
    "a group of ours": ["+model=unet"],
    "a choice that is not there": ["trainer=default"],
    "a schema of ours": ["+latentdm/schema@here=Augment"],
    "completion": ["--shell-completion", "query=bash"],
}


def answer(python, arguments, folder):
    """All that an app says: status, output, errors."""
    environment = os.environ | {"COMP_LINE": "python app.py +", "COMP_POINT": "15", "PYTHONHASHSEED": "0"}
    command = [python, "app.py", *arguments]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    home = str(Path(python).parent.parent)
    seconds = re.compile(r"\d+\.\d+ sec")
    said = done.stdout.partition("Profiling information")[0]  # what it lists is sorted by time
    return done.returncode, *(seconds.sub("", text.replace(home, "")) for text in (said, done.stderr))


@pytest.mark.parametrize("arguments", ASKED.values(), ids=ASKED)
def test_an_app_that_does_not_ask_for_latentdm_is_as_without_it(arguments, python, other_python, tmp_path):
    (tmp_path / "conf" / "trainer").mkdir(parents=True)
    (tmp_path / "conf" / "trainer" / "own.yaml").write_text("steps: 3\n", encoding="utf-8")
    (tmp_path / "conf" / "config.yaml").write_text("defaults: [{trainer: own}]\nx: 1\n", encoding="utf-8")
    (tmp_path / "app.py").write_text(STRANGER, encoding="utf-8")
    assert answer(python, arguments, tmp_path) == answer(other_python, arguments, tmp_path)


def test_only_one_of_the_two_environments_has_latentdm(python, other_python, tmp_path):
    """What the comparison above rests on."""
    code = "import importlib.util; print(importlib.util.find_spec('latentdm') is not None)"
    assert [run(each, "-c", code, cwd=tmp_path).strip() for each in (python, other_python)] == ["True", "False"]


# ---------------------------------------------------------------- what is imported


def test_composing_our_groups_imports_neither_torch_nor_the_trainer():
    code = (
        "import sys; from hydra import compose, initialize_config_module as module\n"
        "with module('latentdm.conf', version_base='1.3'): compose('train')\n"
        "assert not {'torch', 'lightning', 'diffusers', 'numpy'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_encoding_in_a_notebook_does_not_import_the_trainer():
    code = (
        "import sys; from latentdm import FrozenVAE; FrozenVAE.from_pretrained('pkg://latentdm.demo_vae').to('cpu'); "
        "assert 'lightning' not in sys.modules and 'hydra' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
