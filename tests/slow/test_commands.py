"""The command ``latentdm``: ``latentdm preview`` draws one's own data, and says below the picture what to check."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers import COLUMNS
from PIL import Image

import latentdm
from latentdm.cli import main
from latentdm.preview.sheet import Sheet

SMALL = ["pixels.size=64", "pixels.batch_size=2"]


def run(capsys, *arguments):
    """The picture that the command writes, and the lines that it prints below its path."""
    assert main(["preview", *arguments]) == 0
    path, *notes = capsys.readouterr().out.splitlines()
    with Image.open(path) as picture:
        picture.load()
    return picture, [note.strip() for note in notes]


def fails(capsys, *arguments):
    """What the command says on stderr."""
    assert main(["preview", *arguments]) == 1
    return capsys.readouterr().err


def tile(picture, sheet, row, column):
    """float64 ``h w 3`` in 0…255."""
    return np.asarray(picture.crop(sheet.box(row, sheet.columns.index(column)))).astype(float)


def psnr(one, other):
    return 10 * np.log10(255**2 / np.square(one - other).mean())


def width_of(columns, size):
    """The width of a sheet of these columns."""
    return Sheet(columns, size).box(0, len(columns) - 1)[2] + 14


def test_default_preview_shows_the_photographs_again_after_decoding(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    picture, notes = run(capsys)
    assert (tmp_path / "preview.png").exists()
    sheet = Sheet(COLUMNS, (128, 128))
    assert picture.width == width_of(COLUMNS, (128, 128))
    originals = [tile(picture, sheet, row, "image") for row in range(4)]
    decoded = [tile(picture, sheet, row, "decoded\nlatents") for row in range(4)]
    assert min(original.std() for original in originals) > 15  # photographs, not plain colours
    assert np.mean(list(map(psnr, decoded, originals))) >= 24.5
    assert psnr(decoded[0], originals[1]) < 15
    assert 0.8 < float(re.search(r"standard deviation (\d\.\d+)", " ".join(notes))[1]) < 1.2
    assert any("128 by 128 pixels become 16 by 16 latents of 4 channels, by AutoencoderKL" in note for note in notes)
    assert any(re.search(r"white = repaint.* covers \d+% .* of the image, noise_mask.* \d+%", note) for note in notes)
    assert not any(note.startswith("CHECK") for note in notes)


def test_masked_columns_agree_with_each_other(tmp_path, capsys):
    picture, _ = run(
        capsys, "pixels.size=128", "pixels.batch_size=2", "--output", str(tmp_path / "a.png"), "--samples=1"
    )
    sheet = Sheet(COLUMNS, (128, 128))
    original, over, masked, noise = (tile(picture, sheet, 0, COLUMNS[n]) for n in (0, 1, 2, 5))
    inside = (over != original).any(-1)
    assert 0.05 < inside.mean() < 0.6
    assert (np.abs(masked[inside] - 127.5) <= 1).mean() > 0.99
    assert np.array_equal(masked[~inside], original[~inside])
    assert (over[inside][:, 0] >= over[inside][:, 2]).mean() > 0.9  # tinted red
    assert (noise[inside].sum(-1) > 0).all()  # the grown mask holds the mask
    assert (noise[~inside].sum(-1) > 0).mean() < 0.5


@pytest.mark.parametrize(
    ("overrides", "columns"),
    [
        (["encoder=plain"], [COLUMNS[0], COLUMNS[3], COLUMNS[6]]),
        (["encoder=inpaint"], COLUMNS),
        (["encoder=inpaint", "encoder.latent_mask=unshuffle"], COLUMNS),
        (["encoder=inpaint_offset", "encoder.mask_offset=-4"], COLUMNS),
    ],
    ids=["plain", "inpaint", "unshuffle", "inpaint_offset"],
)
def test_each_encoder_has_its_columns(overrides, columns, tmp_path, capsys):
    picture, notes = run(capsys, *SMALL, *overrides, "--output", str(tmp_path / "sub" / "a.png"))
    assert picture.width == width_of(columns, (64, 64))
    assert any("Masks:" in note for note in notes) == (len(columns) > 3)


def test_a_folder_of_ones_own_with_masks(workplace, capsys):
    picture, notes = run(
        capsys, "pixels=folder", "pixels.root=photos", "masks=batch", "pixels.size=100", "--samples", "3"
    )
    assert picture.width == width_of(COLUMNS, (96, 96))
    assert "Images: 100 by 100 pixels, cropped to 96 by 96, become 12 by 12 latents" in notes[0]
    assert re.search(r"The mask covers 21% .* noise_mask, .* 2\d%", notes[3])  # a fifth of each image, and grown


def test_a_folder_whose_transparency_is_the_mask(workplace, capsys):
    picture, notes = run(
        capsys, "pixels=folder", "pixels.root=cutouts", "pixels.alpha=true", "masks=alpha", "pixels.size=96"
    )
    masked = tile(picture, Sheet(COLUMNS, (96, 96)), 0, "masked\nimage")
    assert (np.abs(masked[30:60, 30:50] - 127.5) <= 1).all()
    assert re.search(r"The mask covers (19|20)% ", notes[3])


@pytest.mark.parametrize(("masks", "unused"), [("batch", ""), ("random", "; masks are not used: masks=random")])
def test_a_line_says_what_the_data_hold(masks, unused, workplace, capsys):
    (workplace / "photos" / "notes.docx").touch()
    folder = ["pixels=folder", "pixels.root=photos", *SMALL, f"masks={masks}", "--samples=1"]
    _, notes = run(capsys, *folder)
    assert f"Data: 4 images, 4 masks, no captions; 3 train, 1 validates{unused}." in notes
    assert "Data: left out: 1 .docx (notes.docx)." in notes


def test_validation_data_can_be_shown(tmp_path, capsys):
    train, _ = run(capsys, *SMALL, "encoder=plain", "--output", str(tmp_path / "train.png"))
    val, _ = run(capsys, *SMALL, "encoder=plain", "--stage=val", "--output", str(tmp_path / "val.png"))
    assert train.tobytes() != val.tobytes()


def test_options_may_stand_between_overrides(tmp_path, capsys):
    run(capsys, "encoder=plain", "--samples", "1", *SMALL, "--output", str(tmp_path / "a.png"), "seed=3")


def test_an_app_of_ones_own(workplace, capsys):
    (workplace / "configs").mkdir()
    (workplace / "configs" / "app.yaml").write_text(
        "defaults: [{pixels: folder}, {vae: tiny}, {encoder: plain}, {masks: batch}, {datamodule: latent}, _self_]\n"
        "seed: 0\npixels: {root: photos, size: 96, batch_size: 2}\n"
        "elsewhere: ${hydra:runtime.output_dir}\n",
        encoding="utf-8",
    )
    picture, _ = run(capsys, "--config-dir", "configs", "--config-name", "app", "pixels.size=64")
    assert picture.width == width_of([COLUMNS[0], COLUMNS[3], COLUMNS[6]], (64, 64))


def test_an_app_without_a_data_module_is_told(workplace, capsys):
    (workplace / "app.yaml").write_text("seed: 0\n", encoding="utf-8")
    assert "the config 'app' has no datamodule" in fails(capsys, "--config-dir=.", "--config-name=app")


def test_what_is_wrong_is_said_without_a_traceback(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert "inpaint_offset" in fails(capsys, "encoder=outpaint")
    assert "'encoder.grow_mask'" in fails(capsys, "encoder=inpaint", "encoder.grow_mask=3")
    assert fails(capsys, "pixels=folder").endswith("preview: pixels.root has no value; give it one: pixels.root=…\n")
    assert "~masks instead of masks=null" in fails(capsys, "masks=null")
    said = fails(capsys, "pixels=folder", "pixels.root=nowhere")
    assert said.startswith("latentdm preview: ImageFolderData: root='nowhere' does not exist")
    assert "such as preview.png" in fails(capsys, "--output", "x.foo")
    assert "such as preview.png" in fails(capsys, "--output", str(tmp_path))
    assert "preview: --device foo: " in fails(capsys, "--device", "foo")
    assert said.count("\n") == 1


def test_unknown_commands_are_answered_with_the_usage(capsys):
    assert main(["encode_all"]) == 2
    assert re.search(r"no command 'encode_all'\nusage: .*latentdm preview", capsys.readouterr().err, re.DOTALL)
    for asked in ([], ["--help"]):
        assert main(asked) == 0
        assert "latentdm preview" in capsys.readouterr().out


def test_the_version_is_told(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"latentdm {latentdm.__version__}\n"


def test_a_class_of_ones_own_in_the_current_folder_is_found_from_yaml(workplace, capsys):
    (workplace / "masks_of_mine.py").write_text(
        "from latentdm.masks import MaskSource\n\n\n"
        "class LeftHalf(MaskSource):\n"
        "    def masks(self, batch, draws):\n"
        "        mask = batch['pixels'][:, :1] * 0\n"
        "        mask[..., : mask.shape[-1] // 2] = 255\n"
        "        return mask\n",
        encoding="utf-8",
    )
    (workplace / "app.yaml").write_text(
        "defaults: [{pixels: folder}, {vae: tiny}, {encoder: inpaint}, {datamodule: latent}, _self_]\n"
        "seed: 0\npixels: {root: photos, size: 64, batch_size: 2}\n"
        "masks: {_target_: masks_of_mine.LeftHalf}\n",
        encoding="utf-8",
    )
    before = list(sys.path)
    _, notes = run(capsys, "--config-dir=.", "--config-name=app", "--samples=2")
    assert "The mask covers 50% (50% to 50%)" in notes[3]
    assert sys.path == before


@pytest.mark.parametrize("samples", ["0", "three"])
def test_samples_are_counted_from_one(samples, capsys):
    with pytest.raises(SystemExit):
        main(["preview", "--samples", samples])
    assert "--samples" in capsys.readouterr().err


def shell(name, script, *arguments):
    """What a shell prints for a script, with this environment's latentdm on its path."""
    if shutil.which(name) is None:
        pytest.skip(f"no {name} here")
    env = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    command = [name, *{"bash": ["--norc", "-c"], "zsh": ["-f", "-c"], "fish": ["--no-config", "-c"]}[name], script]
    names = ["name"] if name != "fish" else []
    done = subprocess.run([*command, *names, *arguments], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.parametrize(
    ("line", "replies"),
    [
        ("latentdm tr", ["train "]),
        ("latentdm preview masks=ran", ["random "]),  # bash completes behind the equals sign
        ("latentdm preview pixels.si", ["pixels.size="]),
        ("latentdm preview --out", ["--output "]),
        ("latentdm preview pixels.root=nowhere", [""]),
    ],
)
def test_bash_completes(line, replies):
    asked = 'COMP_LINE=$1 COMP_POINT=${#1}; _latentdm latentdm; printf "%s\\n" "${COMPREPLY[@]}"'
    assert shell("bash", f'eval "$(latentdm completion bash)"; {asked}', line) == replies


def test_bash_that_parts_no_words_at_the_equals_sign_completes():
    asked = 'COMP_LINE=$1 COMP_POINT=${#1}; _latentdm latentdm; printf "%s\\n" "${COMPREPLY[@]}"'
    script = f'COMP_WORDBREAKS=" "; eval "$(latentdm completion bash)"; {asked}'
    assert shell("bash", script, "latentdm preview masks=ran") == ["masks=random "]


def test_to_press_tab_runs_no_code_of_the_current_folder(tmp_path, monkeypatch):
    for name in ("bz2", "lzma", "shutil", "tempfile", "zipfile"):  # of those that are imported late
        (tmp_path / f"{name}.py").write_text("open('ran', 'w')\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    assert shell("bash", 'latentdm completion --query "$1"', "latentdm preview masks=ran") == ["masks=random"]
    assert not (tmp_path / "ran").exists()


def test_fish_completes():
    for line, reply in (("latentdm tr", "train"), ("latentdm preview masks=ran", "masks=random")):
        assert reply in shell("fish", "latentdm completion fish | source; complete -C $argv[1]", line)


def test_zsh_takes_its_script():
    assert shell("zsh", 'eval "$(latentdm completion zsh)"; print $_comps[latentdm]') == ["_latentdm"]


def test_a_terminal_without_unicode_ends_nothing():
    env = {**os.environ, "PYTHONIOENCODING": "ascii"}
    command = [sys.executable, "-m", "latentdm", "config", "--help"]
    done = subprocess.run(command, env=env, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    assert b"Captions ? prompt_embeds" in done.stdout


def test_the_doctor_needs_no_settings(tmp_path):
    command = [sys.executable, "-m", "latentdm", "doctor", "--json"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["latentdm"] == latentdm.__version__
    assert list(tmp_path.iterdir()) == []


def test_the_current_folder_is_on_the_path_of_the_command(workplace):
    (workplace / "of_mine.py").write_text("def fail():\n    raise SystemExit('found: of_mine')\n", encoding="utf-8")
    (workplace / "app.yaml").write_text(
        "defaults: [{pixels: folder}, {vae: tiny}, {encoder: plain}, {masks: batch}, {datamodule: latent}, _self_]\n"
        "pixels: {root: photos}\ncaptions: {_target_: of_mine.fail}\nmodel: {_target_: torch.nn.Identity}\n",
        encoding="utf-8",
    )
    app = ["preview", "--config-dir=.", "--config-name=app"]
    program = [str(Path(sys.executable).with_name("latentdm")), *app]
    done = subprocess.run(program, capture_output=True, text=True, check=False)
    assert done.stderr.endswith("found: of_mine\n")
    safe = {**os.environ, "PYTHONSAFEPATH": "1"}
    done = subprocess.run(program, env=safe, capture_output=True, text=True, check=False)
    assert "Error locating target 'of_mine.fail'" in done.stderr
