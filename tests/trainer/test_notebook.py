"""The notebook of the documentation: its cells run in order, and their last lines are what a reader is shown."""

import ast
import json

import pytest
from running import ROOT

NOTEBOOK = ROOT / "docs" / "plug_in" / "notebook.ipynb"


def shown(source, names):
    """Runs a cell; returns the value of its last line, which a notebook shows."""
    tree = ast.parse(source)
    last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, NOTEBOOK.name, "exec"), names)
    return eval(compile(ast.Expression(last.value), NOTEBOOK.name, "eval"), names) if last else None


@pytest.fixture
def cells():
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    assert notebook["nbformat"] == 4
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def test_its_cells_run(cells, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "__main__"}
    values = [shown("".join(cell["source"]), names) for cell in cells]
    datamodule, picture, steps, shape = values
    assert repr(datamodule).startswith("LatentDataModule(")
    assert picture._repr_png_()
    assert (steps, shape) == (4, (4, 3, 64, 64))
    assert not list(tmp_path.iterdir())


def test_it_holds_no_outputs(cells):
    """They would be pictures in base64, as they were on somebody's machine."""
    assert [(cell["outputs"], cell["execution_count"]) for cell in cells] == [([], None)] * len(cells)
