"""Draw docs/report.png: a report on scikit-image's photographs, from its head to the latents, as Chromium shows it.

All but two of its sample rows are hidden, so that the charts are in the picture.

    .venv/bin/python scripts/report_picture.py

Needs Chromium (apt-get install -y chromium). Nothing of the page depends on the machine but its figures of time.
"""

import shutil
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from PIL import Image

from latentdm.cli import main
from latentdm.data.photographs import photographs

ROOT = Path(__file__).parents[1]

WIDTH, HEIGHT = 1000, 1800
"""Of the window, in pixels."""

HIDDEN = "<style>#samples h3:nth-of-type(n+3), #samples .tiles:nth-of-type(n+3) { display: none; }</style></head>"

COLOURS = 255
"""Of the picture: letters and photographs stay legible, and the file is a third as long."""


def draw(target: Path) -> None:
    """Write the picture."""
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        sys.exit("there is no Chromium; apt-get install -y chromium")
    with TemporaryDirectory() as folder:
        photos, report, picture = Path(folder, "photos"), Path(folder, "report.html"), Path(folder, "report.png")
        photos.mkdir()
        for name, image in (photographs("train") | photographs("val")).items():
            Image.fromarray(image).save(photos / f"{name}.jpg", quality=92)
            (photos / f"{name}.txt").write_text(f"a photograph of {name.replace('_', ' ')}", encoding="utf-8")
        data = [
            "pixels=folder",
            f"pixels.root={photos}",
            "pixels.size=192",
            "pixels.batch_size=4",
            "pixels.val_share=0",
        ]
        if main(["report", *data, "--output", str(report)]):
            sys.exit("there is no report to draw")
        report.write_text(report.read_text(encoding="utf-8").replace("</head>", HIDDEN, 1), encoding="utf-8")
        options = [
            "--headless=new",
            "--no-sandbox",
            "--disable-gpu",
            "--hide-scrollbars",
            f"--user-data-dir={folder}/x",
        ]
        window = [f"--window-size={WIDTH},{HEIGHT}", f"--screenshot={picture}"]
        subprocess.run([browser, *options, *window, report.as_uri()], check=True, capture_output=True)
        with Image.open(picture) as drawn:
            drawn.convert("RGB").quantize(COLOURS).save(target, optimize=True)


if __name__ == "__main__":
    draw(ROOT / "docs" / "report.png")
