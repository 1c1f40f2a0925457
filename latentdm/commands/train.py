"""``latentdm train``: fine-tune a model, as an experiment has it."""

from argparse import ArgumentParser
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from latentdm.commands.config import compose_config, parse
from latentdm.errors import RunError, plain_errors


def run(arguments: Sequence[str]) -> None:
    """Run the command.

    Args:
        arguments: its options and overrides.

    Raises:
        HydraException: the settings or the data are wrong.
    """
    parser = ArgumentParser(
        prog="latentdm train",
        description="Validate, fine-tune, validate again. Takes the overrides of train_example.py, as in: "
        "latentdm train experiment=sd15_inpaint pixels=folder pixels.root=photos model.lora.rank=16",
    )
    parser.add_argument("--output", type=Path, help="the run's folder (default: outputs/<date>/<time>)")
    settings = parse(parser, arguments)
    output = settings.output or Path(f"{datetime.now():outputs/%Y-%m-%d/%H-%M-%S}")
    cfg = compose_config(settings, output.resolve())
    with plain_errors(cfg):
        _train(cfg, output.resolve())


def _train(cfg: DictConfig, output: Path) -> None:
    """Train, keep the config beside the results, and print what came of it."""
    from latentdm.finetune.train import train  # late, as composing says sooner what is wrong

    try:
        output.mkdir(parents=True, exist_ok=True)
        (output / "config.yaml").write_text(OmegaConf.to_yaml(cfg), encoding="utf-8")
    except OSError as error:
        raise RunError(f"--output {output}: cannot write there: {error.strerror or error}") from error
    losses = train(cfg)
    print(f"validation loss {losses['first']:.4f} → {losses['last']:.4f}\n{output}")
