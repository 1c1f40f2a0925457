"""``latentdm doctor`` says what a bug report needs, and what is missing, whatever is broken."""

import importlib
import json
import platform
import sys
from shutil import rmtree

import pytest
import torch
import yaml

import latentdm
from latentdm.cache.keys import key_of
from latentdm.cache.store import open_space
from latentdm.cache.writer import Writer
from latentdm.cli import main
from latentdm.commands.doctor import report
from latentdm.frozen.weights import computes_bfloat16

DEVICES = ["cpu", *(f"cuda:{number}" for number in range(torch.cuda.device_count()))]


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """Packages put in front of those that are there: name and version, and lines of metadata."""

    def install(name, version, *lines):
        folder = tmp_path / f"{name}-{version}.dist-info"
        folder.mkdir()
        head = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}"]
        (folder / "METADATA").write_text("\n".join([*head, *lines]) + "\n", encoding="utf-8")
        importlib.invalidate_caches()

    monkeypatch.syspath_prepend(tmp_path)
    return install


def told(capsys, *arguments):
    assert main(["doctor", *arguments]) == 0
    return capsys.readouterr().out


def test_versions_devices_and_the_dtype_are_told(capsys):
    text = told(capsys)
    assert text.isascii()
    assert max(map(len, text.splitlines())) < 160
    assert f"latentdm: {latentdm.__version__}\npython: {platform.python_version()}\n" in text
    assert f"\n  torch: {{version: {torch.__version__}}}\n" in text
    found = yaml.safe_load(text)
    assert {"lightning", "diffusers", "hydra-core"} <= set(found["packages"])
    assert {"cores", "memory", "environment"} <= set(found)
    assert "finetune" in found["extras"]
    native = computes_bfloat16(torch.device("cpu"))
    assert found["devices"][0]["dtype_auto"] == ("bfloat16" if native else "float32")
    assert found["devices"][0]["why"].startswith("it multiplies" if native else "it does not multiply")


def test_the_cache_is_told(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    folder = tmp_path / "home" / "latentdm" / "latents"
    assert report()["cache"] | {"dir": str(folder), "encoders": 0, "writable": True} == report()["cache"]
    store = open_space(folder, {"encoder": 1})
    writer = Writer()
    writer.put(store, [key_of(0)], {"moments": torch.zeros(1, 2, 16, 1024, 1024)})
    writer.flush()
    found = report()["cache"]
    assert (found["encoders"], found["used_gib"]) == (1, 0.1)
    assert found["free_gib"] >= 0
    assert {"format", "pixels", "Pillow"} <= found["versions"].keys()
    rmtree(tmp_path / "home")
    (tmp_path / "home").write_text("a file in the way of a folder")
    assert "problem: may not be written to; set cache.dir" in told(capsys)


def test_json_says_the_same(capsys):
    found = json.loads(told(capsys, "--json"))
    assert found == report() == yaml.safe_load(told(capsys))
    assert found["packages"]["torch"] == {"version": torch.__version__}
    assert [device["device"] for device in found["devices"]][: len(DEVICES)] == DEVICES
    assert found["cores"]["usable"] <= found["cores"]["machine"]
    assert "test" not in found["extras"]  # no user needs it
    assert "scikit-image" in found["extras"]["example"]  # by way of another extra


@pytest.mark.parametrize("native", [True, False])
def test_the_reason_of_the_dtype_is_that_of_the_processor(native, capsys, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": native}, raising=False)
    [line] = [line for line in told(capsys).splitlines() if "device: cpu" in line]
    assert ("dtype_auto: bfloat16, why: it multiplies in bfloat16 itself (amx_bf16)" in line) == native
    assert ("dtype_auto: float32, why: it does not" in line) != native


def test_what_is_missing_is_told_with_the_extra_that_brings_it(installed, capsys):
    installed(
        "latentdm", "0.1.0", "Provides-Extra: wings", "Requires-Dist: torch>=2.4",
        "Requires-Dist: no-such-thing>=1; extra == 'wings'",
        "Requires-Dist: tqdm; extra == 'wings'", "Requires-Dist: of-another; sys_platform == 'no' and extra == 'wings'",
    )  # fmt: skip
    wings = report()["extras"]["wings"]
    assert wings["no-such-thing"] == {"version": None, "problem": "missing; pip install 'latentdm[wings]'"}
    assert wings.keys() == {"no-such-thing", "tqdm"}
    assert yaml.safe_load(told(capsys))["extras"]["wings"] == wings


def test_a_package_that_is_too_old_is_told(installed, capsys):
    installed("kornia", "0.1")
    kornia = yaml.safe_load(told(capsys))["extras"]["augment"]["kornia"]
    assert kornia == {"version": "0.1", "problem": "needs >=0.8; pip install 'latentdm[augment]'"}


def test_a_package_that_is_broken_is_told(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)  # to import it raises
    problem = yaml.safe_load(told(capsys))["packages"]["diffusers"]["problem"]
    assert problem.startswith("cannot be imported: ModuleNotFoundError")


def test_without_torch_all_else_is_told(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    text = told(capsys)
    assert "cannot be imported" in text
    assert "memory" in text


def test_no_secret_is_told(capsys, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    text = told(capsys) + told(capsys, "--json")
    assert "hf_secret" not in text
    assert "environment: {OMP_NUM_THREADS: '3'" in text
