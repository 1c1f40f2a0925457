"""``latentdm train``: fine-tune a model, as an experiment has it."""

from argparse import ArgumentParser, Namespace
from datetime import datetime
from pathlib import Path

from omegaconf import OmegaConf

from latentdm.commands.config import composed
from latentdm.errors import RunError

DESCRIPTION = (
    "Validate, fine-tune, validate again. Takes the overrides of train_example.py, as in: "
    "latentdm train experiment=sd15_inpaint pixels=folder pixels.root=photos model.lora.rank=16"
)


def add_options(parser: ArgumentParser) -> None:
    """Those of the command."""
    parser.add_argument("--output", type=Path, help="the run's folder (default: outputs/<date>/<time>)")


def run(settings: Namespace) -> None:
    """Train, keep the config beside the results, and print what came of it.

    Raises:
        HydraException: the settings or the data are wrong.
    """
    output = (settings.output or Path(f"{datetime.now():outputs/%Y-%m-%d/%H-%M-%S}")).resolve()
    with composed(settings, output) as cfg:
        from latentdm.finetune.train import train  # late, as composing says sooner what is wrong

        try:
            output.mkdir(parents=True, exist_ok=True)
            (output / "config.yaml").write_text(OmegaConf.to_yaml(cfg), encoding="utf-8")
        except OSError as error:
            raise RunError(f"--output {output}: cannot write there: {error.strerror or error}") from error
        losses = train(cfg)
    print(f"validation loss {losses['first']:.4f} → {losses['last']:.4f}\n{output}")
