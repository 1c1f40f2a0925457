"""`train`: a run as its config has it: validate, fit, validate."""

from typing import Any

from hydra.utils import instantiate
from lightning.pytorch import Trainer, seed_everything
from omegaconf import DictConfig

from latentdm.errors import UserError


def train(cfg: DictConfig) -> dict[str, float]:
    """Make data module, model, callbacks, loggers and trainer of a config, then validate, fit and validate again.

    Before anything large is loaded, the data are looked at: whether they bring what the stages read, such as captions.
    Then the model is compared with the data module, before text encoders and denoiser are loaded.

    Args:
        cfg: with ``model``, ``datamodule``, ``trainer``, ``seed`` and, if there are any, ``callbacks``, ``logger`` and
            ``ckpt_path``, as ``conf/train.yaml`` has them under an experiment.

    Returns:
        The first and the last ``val/loss``; NaN where validation is switched off.

    Raises:
        UserError: a setting is wrong, or there is no model to train.
    """
    if "_target_" not in (cfg.get("model") or {}):
        raise UserError(
            "the config has no model to train; choose an experiment, such as experiment=sd15_inpaint, "
            "or a model with a _target_ of your own"
        )
    seed_everything(cfg.get("seed", 0), workers=True, verbose=False)
    model = instantiate(cfg.model)
    datamodule = instantiate(cfg.datamodule)
    if hasattr(datamodule, "check"):
        datamodule.check()
    if hasattr(model, "check"):
        model.check(datamodule)
    callbacks, loggers = (list(instantiate(cfg.get(group) or {}).values()) for group in ("callbacks", "logger"))
    trainer: Trainer = instantiate(cfg.trainer, callbacks=callbacks, logger=loggers)
    first = _validation_loss(trainer, model, datamodule)
    trainer.fit(model, datamodule, ckpt_path=cfg.get("ckpt_path"))
    return {"first": first, "last": _validation_loss(trainer, model, datamodule)}


def _validation_loss(trainer: Trainer, model: Any, datamodule: Any) -> float:
    results = trainer.validate(model, datamodule, verbose=False)
    return float(results[0].get("val/loss", "nan")) if results else float("nan")
