"""Make README's pictures, each by the command beside it: ``python scripts/readme_pictures.py``, in four minutes.

``docs/after.png`` is the last picture in ``samples/`` of ``python train_example.py``, ``docs/preview.png`` what
``latentdm preview`` writes.
"""

import shutil
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

ROOT = Path(__file__).parents[1]


def main() -> None:
    """Run both commands in an empty folder and keep their pictures."""
    with TemporaryDirectory() as folder:
        subprocess.run([sys.executable, str(ROOT / "train_example.py")], cwd=folder, check=True)
        after = max(Path(folder).glob("outputs/*/*/samples/*.png"))
        shutil.copy(after, ROOT / "docs" / "after.png")
        subprocess.run([sys.executable, "-m", "latentdm", "preview"], cwd=folder, check=True)
        shutil.copy(Path(folder) / "preview.png", ROOT / "docs" / "preview.png")


if __name__ == "__main__":
    main()
