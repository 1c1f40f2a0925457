"""Run the benchmarks: ``python benchmarks/run.py``, one line of JSON a row.

``--only NAME,NAME`` runs some of them, ``--quick`` the same on less (about two minutes on idle cores), ``--list`` names
them, ``--write`` puts the table and a plot into docs/benchmarks.md.
"""

import sys
from argparse import ArgumentParser
from importlib import import_module
from pathlib import Path

FOLDER = Path(__file__).parent
sys.path.insert(0, str(FOLDER.parent))  # the example, and this folder as a package

from benchmarks.report import write  # noqa: E402
from benchmarks.rows import ROWS  # noqa: E402


def main() -> None:
    """Import every module here, so that it registers its rows; then measure."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="names of rows, separated by commas")
    parser.add_argument("--quick", action="store_true", help="fewer rounds")
    parser.add_argument("--list", action="store_true", help="names of all rows")
    parser.add_argument("--write", action="store_true", help="write docs/benchmarks.md")
    options = parser.parse_args()
    for module in sorted(FOLDER.glob("*.py")):
        if module.stem not in ("run", "rows", "report", "gpu"):
            import_module(f"benchmarks.{module.stem}")
    names = [name for name in options.only.split(",") if name] or list(ROWS)
    unknown = [name for name in names if name not in ROWS]
    if unknown:
        parser.error(f"no row {unknown[0]!r}; there are {', '.join(ROWS)}")
    if options.list:
        print("\n".join(names))
        return
    lines = []
    for name in names:
        line = ROWS[name].line(options.quick)
        if line is not None:
            print(line, flush=True)
            lines.append(line)
    if options.write:
        write(lines, "python " + " ".join(["benchmarks/run.py", *sys.argv[1:]]))


if __name__ == "__main__":
    main()
