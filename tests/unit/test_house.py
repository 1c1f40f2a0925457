"""Rules of the house that a program can check; CONTRIBUTING.md says the others."""

import ast
import re
import tomllib
from functools import cache
from graphlib import CycleError, TopologicalSorter

import pytest
from running import ROOT

PACKAGE = ROOT / "latentdm"
LINES = 350
CLOCKS = {"time", "time_ns", "perf_counter", "perf_counter_ns", "monotonic", "monotonic_ns", "process_time", "sleep"}

TESTS = ROOT / "tests"


def without_fault(folder, faults):
    """Fails with what ``faults`` says of each file below a folder that has any."""
    found = {str(path.relative_to(folder)): said for path in sorted(folder.rglob("*.py")) if (said := faults(path))}
    assert found == {}


@cache
def tree(path):
    return ast.parse(path.read_text(encoding="utf-8"))


def walk(path, kind):
    return [node for node in ast.walk(tree(path)) if isinstance(node, kind)]


# -------------------------------------------------------------------- the package


def name_of(path):
    """``latentdm/masks/__init__.py`` → ``latentdm.masks``."""
    return ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")


def imported(statements):
    """The modules that statements import when they run; what is for the type checker alone does not run."""
    for node in statements:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            yield from imported(node.orelse)
        elif not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):  # their imports run late
            yield from imported(child for child in ast.iter_child_nodes(node) if isinstance(child, ast.stmt))


def test_no_module_imports_itself_by_way_of_others():
    paths = {name_of(path): path for path in PACKAGE.rglob("*.py")}
    graph = {name: set(imported(tree(path).body)) & set(paths) for name, path in paths.items()}
    assert graph["latentdm.masks.random"] >= {"latentdm.draws"}  # the graph is not empty
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" → ".join(error.args[1]))


def test_a_module_has_one_idea():
    """More lines than that are usually two."""

    def too_long(path):
        count = len(path.read_text(encoding="utf-8").splitlines())
        return count if count > LINES else None

    without_fault(PACKAGE, too_long)


def test_every_package_is_shipped():
    """setuptools takes a list, as conf/ lies beside the package and cannot be found in it."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    folders = {name_of(path) for path in PACKAGE.rglob("__init__.py")}
    assert set(settings["packages"]) == folders | {"latentdm.conf"}


# -------------------------------------------------------------------- its tests


@cache
def private_names():
    """All that the package defines with one underscore in front: functions, classes, variables, attributes."""
    names = set()
    for path in PACKAGE.rglob("*.py"):
        names |= {node.name for node in walk(path, ast.FunctionDef | ast.ClassDef)}
        names |= {node.attr for node in walk(path, ast.Attribute) if isinstance(node.ctx, ast.Store)}
        names |= {node.id for node in walk(path, ast.Name) if isinstance(node.ctx, ast.Store)}
    return {name for name in names if re.match(r"_[A-Za-z]", name)}


def reached(path):
    """The private names of the package that a test uses: as attributes, imports, and texts as for ``setattr``."""
    for node in walk(path, ast.Attribute):
        # What a test class keeps of its own, and the internals of other libraries, may have the same name.
        own = isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")
        if node.attr in private_names() and not own:
            yield node.lineno, ast.unparse(node)
    for node in walk(path, ast.ImportFrom):
        for alias in node.names if (node.module or "").startswith("latentdm") else ():
            if alias.name in private_names():
                yield node.lineno, f"{node.module}.{alias.name}"
    for node in walk(path, ast.Constant):
        text = node.value if isinstance(node.value, str) else ""
        if re.fullmatch(r"(latentdm\.[\w.]*\.)?\w+", text) and text.rpartition(".")[2] in private_names():
            yield node.lineno, text


def test_a_test_uses_public_names_alone():
    without_fault(TESTS, lambda path: list(reached(path)))


def clocks(path):
    names = {alias.name for node in walk(path, ast.ImportFrom) if node.module == "time" for alias in node.names}
    names |= {node.attr for node in walk(path, ast.Attribute) if ast.unparse(node.value) == "time"}
    names |= {node.attr for node in walk(path, ast.Attribute) if node.attr in ("recorded_durations", "time_elapsed")}
    return names & (CLOCKS | {"recorded_durations", "time_elapsed"})


def test_a_test_uses_no_clock():
    """Machines differ in speed: a test that measures time fails on some of them."""
    without_fault(TESTS, clocks)


def test_the_layers_are_there():
    folders = {path.parent.name for path in TESTS.rglob("test_*.py")}
    assert folders == {"unit", "trainer", "slow"}


def heavy(path):
    """What of a unit test belongs in another layer."""
    names = {node.id for node in walk(path, ast.Name)} | {node.attr for node in walk(path, ast.Attribute)}
    helpers = {alias.name for node in walk(path, ast.ImportFrom) for alias in node.names if node.module == "helpers"}
    return (names & {"Trainer", "run_example", "subprocess"}) | (helpers & {"fit", "predict", "quiet_trainer"})


def test_a_unit_test_trains_nothing_and_starts_no_other_program():
    without_fault(TESTS / "unit", heavy)
