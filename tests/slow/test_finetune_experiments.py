"""The experiments' own commands, pointed at tiny pipelines: they train, save, and diffusers loads and inpaints."""

import importlib.util
import json

import diffusers
import pytest
import torch
from helpers import complains
from hydra.errors import HydraException
from PIL import Image
from running import ROOT, compose_example, run_example
from tiny_pipelines import EXPERIMENTS, experiment_stand_in, photographs, save_pipeline

import latentdm.cli
import train_example

pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),  # diffusers and numpy
    pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight:UserWarning"),  # FLUX under autocast
]

CLASSES = {
    "sd15_inpaint": "StableDiffusionInpaintPipeline",
    "sd15_to_inpaint": "StableDiffusionInpaintPipeline",
    "sdxl_inpaint": "StableDiffusionXLInpaintPipeline",
    "sdxl_plain": "StableDiffusionXLPipeline",
    "flux_fill": "FluxFillPipeline",
}
PHOTOS = ["pixels=folder", "pixels.root=photos", "trainer.max_steps=2"]
FAST = ["model.learning_rate=1e-2", "model.warmup_steps=0"]
CASES = [(name, rank) for name in EXPERIMENTS for rank in (None, 4) if (name, rank) != ("sd15_to_inpaint", 4)]


def test_every_experiment_is_tried():
    assert set(EXPERIMENTS) == set(CLASSES) == {path.stem for path in (ROOT / "conf/experiment").glob("*.yaml")}


def picture(pipeline):
    """What a pipeline makes of a photograph or, without masks, of a prompt."""
    pixels, masks = photographs(1, 64, 64)
    masked = {"image": pixels / 255, "mask_image": masks / 255} if "image" in call_names(pipeline) else {}
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    size = {"height": 64, "width": 64, "num_inference_steps": 2}
    return pipeline("a photo of the cat", **masked, **size, generator=generator, output_type="pt").images


def call_names(pipeline):
    import inspect

    return inspect.signature(type(pipeline).__call__).parameters


@pytest.mark.parametrize(("experiment", "rank"), CASES)
def test_its_command_trains_and_diffusers_loads_what_it_saves(experiment, rank, workplace):
    overrides = [f"experiment={experiment}", *PHOTOS, *FAST, f"model.lora.rank={'null' if rank is None else rank}"]
    overrides += experiment_stand_in(overrides, workplace)
    if rank is not None:
        overrides.append("model.lora.alpha=3")
    losses = run_example(overrides, workplace)
    assert losses["first"] != losses["last"]
    pretrained = workplace / "pretrained"
    before = picture(diffusers.DiffusionPipeline.from_pretrained(pretrained)) if "to" not in experiment else None
    if rank is None:
        assert not (workplace / "lora").exists()
        pipeline = diffusers.DiffusionPipeline.from_pretrained(workplace / "pipeline")
        assert type(pipeline).__name__ == CLASSES[experiment]
    else:
        assert not (workplace / "pipeline").exists()
        pipeline = diffusers.DiffusionPipeline.from_pretrained(pretrained)
        pipeline.load_lora_weights(workplace / "lora")
    after = picture(pipeline)
    assert after.shape == (1, 3, 64, 64)
    assert before is None or not torch.equal(before, after)


def test_the_widened_model_is_an_inpainting_model(workplace):
    overrides = ["experiment=sd15_to_inpaint", *PHOTOS]
    run_example([*overrides, *experiment_stand_in(overrides, workplace)], workplace)
    assert json.loads((workplace / "pretrained/unet/config.json").read_text())["in_channels"] == 4
    assert json.loads((workplace / "pipeline/unet/config.json").read_text())["in_channels"] == 9


def test_it_trains_on_the_sample_photographs(tmp_path):
    folder = save_pipeline("sd15_inpaint", tmp_path / "pretrained")
    overrides = ["experiment=sd15_inpaint", "datamodule.keys={caption: name}", f"model.pretrained={folder}"]
    run_example([*overrides, "pixels=samples"], tmp_path)
    assert (tmp_path / "pipeline" / "model_index.json").exists()


def test_the_installed_command_does_the_same(workplace, capsys):
    overrides = ["experiment=sd15_inpaint", *PHOTOS, "model.lora.rank=2", "debug=step"]
    overrides += [*experiment_stand_in(overrides, workplace), "callbacks.save_for_diffusers.kohya=true"]
    assert latentdm.cli.main(["train", *overrides, "--output", "run"]) == 0
    names = {path.name for path in (workplace / "run" / "lora").iterdir()}
    assert names == {"pytorch_lora_weights.safetensors", "lora_kohya.safetensors"}
    assert (workplace / "run" / "config.yaml").exists()
    assert list((workplace / "run" / "samples").glob("*.png"))
    assert "validation loss" in capsys.readouterr().out


def test_the_preview_shows_what_the_model_will_be_given(workplace, capsys):
    overrides = ["experiment=sdxl_inpaint", "pixels=folder", "pixels.root=photos", "pixels.size=64"]
    overrides += experiment_stand_in(overrides, workplace)
    assert latentdm.cli.main(["preview", *overrides]) == 0
    assert (workplace / "preview.png").exists()


def test_pairs_of_before_and_after_train_and_are_shown(workplace):
    """The model is shown the sources: the loss and the preview differ from those without them."""
    overrides = ["experiment=sd15_inpaint", "masks=batch", *PHOTOS, *FAST, "pixels.size=64"]
    overrides += experiment_stand_in(overrides, workplace)
    seen = []
    for paired in (False, True):
        for mask in (workplace / "photos").glob("*-mask.png") if paired else ():
            Image.new("RGB", (150, 150), (200, 30, 30)).save(str(mask).replace("-mask", "-source"))
        losses = run_example(overrides, workplace / f"paired={paired}")
        assert latentdm.cli.main(["preview", *overrides]) == 0
        with Image.open(workplace / "preview.png") as preview:
            seen.append((losses["first"], preview.width))
    (loss, width), (paired_loss, paired_width) = seen
    assert loss != paired_loss
    assert paired_width > width, "no column shows the source"
    assert picture(diffusers.DiffusionPipeline.from_pretrained(workplace / "paired=True/pipeline")).shape


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (["model.lora.rank=0"], ["Lora: rank must be an integer of at least 1, got 0"]),
        (["experiment=sd15_to_inpaint", "model.widen=false"], ["takes 4 channels", "widen: true"]),
        (["experiment=sdxl_plain", "model.pretrained=pretrained_inpaint"], ["encoder=inpaint", "grow_mask_by=0"]),
        (["~text"], ["no stage of the data module makes 'prompt_embeds'", "text=pipeline"]),
        (["vae=tiny"], ["scaling_factor", "vae.source="]),
        (["model.pretrained=photos"], ["no pipeline at 'photos'", "model_index.json"]),
    ],
    ids=" ".join,
)
def test_wrong_use_is_told_before_the_model_loads(overrides, parts, workplace, capsys, monkeypatch):
    def load(*_, **__):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(diffusers.UNet2DConditionModel, "from_pretrained", load)
    given = overrides if overrides[0].startswith("experiment=") else ["experiment=sd15_inpaint", *overrides]
    stand_in = experiment_stand_in(given, workplace)
    if "model.pretrained=pretrained_inpaint" in given:
        save_pipeline("sdxl_inpaint", workplace / "pretrained_inpaint")
    given = [given[0], *PHOTOS, *stand_in, *given[1:]]
    if overrides == ["vae=tiny"]:
        given += ["vae.subfolder=null", "vae.source=pkg://latentdm.demo_vae"]
    assert latentdm.cli.main(["train", *given]) == 1
    told = capsys.readouterr().err
    for part in parts:
        assert part in told


def test_a_command_without_a_model_is_told_to_choose(workplace, capsys):
    assert latentdm.cli.main(["train"]) == 1
    assert "experiment=sd15_inpaint" in capsys.readouterr().err


def test_a_typo_in_a_lora_fails_at_compose():
    with pytest.raises(HydraException) as caught:
        compose_example(["experiment=sd15_inpaint", "model.lora.rnk=4"], ROOT)
    assert "'rnk'" in str(caught.value) + str(caught.value.__cause__)


def test_the_example_checks_the_model_before_it_is_loaded(workplace):
    overrides = ["experiment=sd15_to_inpaint", *PHOTOS, "model.widen=false"]
    cfg = compose_example([*overrides, *experiment_stand_in(overrides, workplace)], workplace)
    with complains("widen: true"):
        train_example.train(cfg)


# ---------------------------------------------------------------- the memory table


@pytest.fixture(scope="module")
def memory():
    spec = importlib.util.spec_from_file_location("memory_table", ROOT / "scripts/memory_table.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_the_header_holds_the_computed_table(experiment, memory):
    header = (ROOT / "conf/experiment" / f"{experiment}.yaml").read_text(encoding="utf-8")
    table = "\n".join(f"# {line}" for line in memory.table(experiment))
    assert table in header, "run scripts/memory_table.py"


def test_the_weights_are_those_of_the_published_models(memory):
    """Stable Diffusion 1.5's inpainting UNet has 859.5 million weights, SDXL's 2.57 and FLUX 11.9 thousand million."""
    with torch.device("meta"):
        counts = {name: memory.count(memory.EXPERIMENTS[name][0]()[0]) for name in EXPERIMENTS}
    assert counts["sd15_inpaint"] == 859_535_364
    assert counts["sdxl_plain"] == 2_567_463_684
    assert counts["flux_fill"] == pytest.approx(11.9e9, rel=0.001)
