"""The documentation's ``bash`` blocks, run as a reader runs them, page by page in one folder."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from pages import PAGES, blocks, commands, forgotten, name_of, write_captioned_photos, write_files

import latentdm
from latentdm.cli import main

RUN = [page for page in PAGES if any(block.language == "bash" for block in blocks(page))]


def test_some_pages_have_commands():
    assert {"quickstart", "plug_in/hydra", "how_to/masks"} <= {name_of(page) for page in RUN}


@pytest.mark.parametrize("page", RUN, ids=name_of)
def test_its_commands_run(page, tmp_path, monkeypatch, capsys):
    if name_of(page) == "plug_in/lightning_cli":
        pytest.importorskip("jsonargparse", reason="part of latentdm[test]")
    write_captioned_photos(tmp_path / "photos")
    write_files(page, tmp_path)
    monkeypatch.chdir(tmp_path)
    for block in blocks(page):
        for program, *arguments in commands(block) if block.language == "bash" else ():
            if program == "latentdm":
                with forgotten(tmp_path):
                    assert main(arguments) == 0, f"{arguments}\n{capsys.readouterr().err}"
                written = {"preview": "preview.png", "report": "report.html"}[arguments[0]]
                assert Path(written).stat().st_size > 10_000
            else:
                assert program == "python"
                run_script(arguments, tmp_path)


def run_script(arguments, folder):
    """A script of the page's own, which is a program of its own."""
    paths = [str(Path(latentdm.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    command = [sys.executable, *arguments]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{arguments}\n{done.stdout}{done.stderr}"
