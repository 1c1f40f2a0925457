"""Over a hundred steps the models learn, in the hole above all."""

import pytest
from helpers import quiet_trainer
from tiny_pipelines import model_of, ready, save_pipeline


@pytest.mark.parametrize("lora", [None, {"rank": 4, "alpha": 8}], ids=["full", "lora"])
@pytest.mark.parametrize("name", ["sd15_inpaint", "sdxl_inpaint", "flux_fill"])
def test_the_loss_in_the_hole_falls(name, lora, tmp_path):
    folder = save_pipeline(name, tmp_path)
    mask = {"latent_mask": "unshuffle"} if name == "flux_fill" else {}
    datamodule = ready(folder, height=64, width=64, **mask)
    lora = lora and {**lora, "targets": ["to_q", "to_v", "x_embedder", "proj_out"]}
    if lora and name != "flux_fill":
        lora["targets"] = ["to_q", "to_v", "to_out.0", "conv_in", "conv_out", "conv1"]
    model = model_of(name, folder, lora=lora, learning_rate=5e-3 if lora else 2e-3)
    trainer = quiet_trainer(max_steps=100, max_epochs=-1, gradient_clip_val=1.0, limit_val_batches=4)
    before = trainer.validate(model, datamodule, verbose=False)[0]
    trainer.fit(model, datamodule=datamodule)
    after = trainer.validate(model, datamodule, verbose=False)[0]
    assert set(before) == {"val/loss", "val/loss_in_mask"}
    assert after["val/loss_in_mask"] < 0.9 * before["val/loss_in_mask"]
    assert after["val/loss"] < before["val/loss"]
