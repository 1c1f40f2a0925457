"""What `pip install latentdm` brings: the wheel, built from the sdist, serves a Hydra app that somebody else wrote."""

import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
from running import ROOT

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
    plugin = ROOT / "latentdm/hydra_plugins/latentdm_search_path.py"
    shipped[plugin] = "hydra_plugins/latentdm_search_path.py"
    assert set(shipped.values()) <= names
    assert {"latentdm/py.typed", "latentdm/demo_vae/diffusion_pytorch_model.safetensors"} <= names


def test_hydra_app_of_a_third_party_composes_our_groups(wheel, tmp_path):
    run(sys.executable, "-m", "venv", "--without-pip", "environment", cwd=tmp_path)
    [site] = (tmp_path / "environment").glob("lib/python*/site-packages")
    run(sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(site), str(wheel), cwd=tmp_path)
    # The dependencies come from the environment of this test; a plain path does not bring its editable install along.
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib"), encoding="utf-8")
    app = tmp_path / "app"
    (app / "conf" / "encoder").mkdir(parents=True)
    (app / "conf" / "encoder" / "batched.yaml").write_text(
        "defaults: [/schema/encoder/plain@_here_, _self_]\nvae: ${vae}\nper_batch: 5\n", encoding="utf-8"
    )
    (app / "conf" / "config.yaml").write_text(
        "defaults: [{pixels: samples}, {vae: tiny}, {encoder: batched}, {datamodule: latent}, _self_]\n"
        "pixels: {size: 64, batch_size: 2}\n",
        encoding="utf-8",
    )
    (app / "app.py").write_text(APP, encoding="utf-8")
    printed = run(str(tmp_path / "environment" / "bin" / "python"), "app.py", cwd=app)
    assert printed.split(maxsplit=1) == [str(site / "latentdm" / "__init__.py"), "(2, 4, 8, 8)\n"]
    assert not Path(printed.split()[0]).is_relative_to(ROOT)


def test_encoding_in_a_notebook_does_not_import_the_trainer():
    code = (
        "import sys; from latentdm import FrozenVAE; FrozenVAE.from_pretrained('pkg://latentdm.demo_vae').to('cpu'); "
        "assert 'lightning' not in sys.modules and 'hydra' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
