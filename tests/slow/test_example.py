"""The example as a person runs it: every command of the README, and the runs that it promises."""

import re
import shlex

import pytest
import torch
from running import ROOT, run_example, run_script

import latentdm.cli

BLOCKS = re.findall(r"^```bash\n(.*?)^```$", (ROOT / "README.md").read_text(encoding="utf-8"), re.M | re.S)


def test_first_command_trains_and_says_how_well_holes_are_filled(tmp_path):
    install, run = BLOCKS[0].strip().rsplit(" && ", 1)
    assert install == "python3 -m venv .venv && .venv/bin/pip install -q -c .ci/constraints.txt -e '.[example]'"
    assert run == ".venv/bin/python train_example.py"
    printed = run_script(["trainer.max_steps=60", "pixels.val_length=8"], tmp_path)  # three minutes are a person's
    for row in (
        "images ",
        "steps ",
        "first validation loss",
        "images/s",
        "share of the step spent encoding",
        "outputs",
    ):
        assert row in printed
    [share] = re.findall(r"last validation loss\s*│ [\d.]+ \((\d+)% of the first\)", printed)
    assert int(share) < 80
    psnr = dict(re.findall(r"PSNR in 8 holes, (the \w+|mean colour|biharmonic).*│ ([\d.]+) dB", printed))
    assert 5 < float(psnr["the model"]) < float(psnr["the VAE"])
    assert float(psnr["mean colour"]) < float(psnr["biharmonic"]) < float(psnr["the VAE"])

    [checkpoint] = tmp_path.glob("outputs/**/last.ckpt")
    state = torch.load(checkpoint, weights_only=True)
    assert all(name.startswith("unet.") for name in state["state_dict"])
    assert list(tmp_path.glob("outputs/**/metrics.csv"))
    assert list(tmp_path.glob("outputs/**/events.out.tfevents.*"))


def test_second_command_is_what_ci_runs():
    install, run = BLOCKS[1].strip().rsplit(" && ", 1)
    assert install == "python3 -m venv .venv && .venv/bin/pip install -q -c .ci/constraints.txt -e '.[test]'"
    assert run == ".venv/bin/python -m pytest -n 2"
    assert "block == 2" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")


@pytest.mark.parametrize("command", BLOCKS[2:])
def test_recipe_runs(command, workplace):
    program, *arguments = shlex.split(command)
    if program == "latentdm":
        assert latentdm.cli.main(arguments) == 0
        assert (workplace / "preview.png").exists()
    else:
        assert (program, arguments[0]) == ("python", "train_example.py")
        run_example(arguments[1:], workplace)


@pytest.mark.parametrize(
    "overrides",
    [
        ["encoder=inpaint", "encoder.latent_mask=unshuffle"],
        ["trainer.precision=bf16-true"],
        ["trainer.precision=16-true"],
        ["pixels=huggingface", "pixels.path=dataset", "pixels.streaming=true", "pixels.val_split=train"],
    ],
    ids=" ".join,
)
def test_other_settings_run(overrides, workplace):
    run_example(overrides, workplace)


def test_a_single_step_has_no_share_of_encoding_to_show(workplace, capsys):
    run_example([], workplace)
    printed = capsys.readouterr().out
    assert "images/s" in printed
    assert "share of the step" not in printed


def test_a_group_is_left_out_as_the_config_says(workplace):
    run_example(["~masks", "pixels=folder", "pixels.root=photos"], workplace)


def test_the_same_seed_gives_the_same_losses(tmp_path):
    first, again = (run_example(["trainer.max_steps=3"], tmp_path / name) for name in ("first", "again"))
    assert first == again
