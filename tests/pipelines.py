"""The encode path of diffusers' own pipelines, run without what else they import.

The pipelines need transformers, which latentdm does not. Their methods that encode need only a VAE: they are taken
from the installed source as they stand, compiled, and given a light object in place of the pipeline. So a change in
diffusers is a change here.
"""

import __future__

import ast
from pathlib import Path
from types import SimpleNamespace

import diffusers
import torch
from tiny_models import VIDEO

FOLDER = Path(diffusers.__file__).parent / "pipelines"


def pipeline(path, class_name, *methods, posterior="argmax", **attributes):
    """An object with some methods of a pipeline.

    Args:
        path: the pipeline's file, relative to diffusers' ``pipelines``.
        class_name: the pipeline.
        methods: names of its methods.
        posterior: ``"argmax"`` or ``"sample"``, whatever the pipeline itself asks ``retrieve_latents`` for.
        attributes: what the methods read of ``self``.
    """
    tree = ast.parse((FOLDER / path).read_text(encoding="utf-8"))
    (pipeline_class,) = (node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == class_name)
    wanted = [node for node in pipeline_class.body if isinstance(node, ast.FunctionDef) and node.name in methods]
    assert {node.name for node in wanted} == set(methods)
    static = {node.name for node in wanted if any(ast.unparse(d) == "staticmethod" for d in node.decorator_list)}
    for node in wanted:
        node.decorator_list = []
    helpers = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "retrieve_latents"]
    source = ast.Module(body=[*helpers, *wanted], type_ignores=[])
    names = {"torch": torch, "PIL": SimpleNamespace(Image=SimpleNamespace(Image=type(None)))}
    # annotations stay text, so that the types of whole pipelines need not be there
    code = compile(ast.unparse(source), path, "exec", flags=__future__.annotations.compiler_flag, dont_inherit=True)
    exec(code, names)
    if helpers:
        retrieve = names["retrieve_latents"]
        names["retrieve_latents"] = lambda output, generator=None, sample_mode=None: retrieve(
            output, generator, posterior
        )
    names["randn_tensor"] = lambda shape, **_: torch.zeros(shape)
    owner = SimpleNamespace(**attributes)
    for name in methods:
        setattr(owner, name, names[name] if name in static else names[name].__get__(owner))
    return owner


# ---------------------------------------------------------------- what each pipeline encodes, from images in −1…1


def stable_diffusion(vae, image, **settings):
    path = "stable_diffusion/pipeline_stable_diffusion_inpaint.py"
    return _encode_vae_image(path, "StableDiffusionInpaintPipeline", vae, image, **settings)


def sdxl(vae, image, **settings):
    path = "stable_diffusion_xl/pipeline_stable_diffusion_xl_inpaint.py"
    return _encode_vae_image(path, "StableDiffusionXLInpaintPipeline", vae, image, **settings)


def sdxl_with_statistics(vae, image, generator=None, **settings):
    path, name = "stable_diffusion_xl/pipeline_stable_diffusion_xl_img2img.py", "StableDiffusionXLImg2ImgPipeline"
    pipe = pipeline(path, name, "prepare_latents", vae=vae, **settings)
    return pipe.prepare_latents(image, None, len(image), 1, torch.float32, "cpu", generator, add_noise=False)


def stable_diffusion_3(vae, image, **settings):
    path = "stable_diffusion_3/pipeline_stable_diffusion_3_inpaint.py"
    return _encode_vae_image(path, "StableDiffusion3InpaintPipeline", vae, image, **settings)


def flux(vae, image, **settings):
    return _encode_vae_image("flux/pipeline_flux_inpaint.py", "FluxInpaintPipeline", vae, image, **settings)


def flux2(vae, image, generator=None, **settings):
    methods = ("_encode_vae_image", "_patchify_latents")
    pipe = pipeline("flux2/pipeline_flux2.py", "Flux2Pipeline", *methods, vae=vae, **settings)
    return pipe._encode_vae_image(image, generator)


def sana(vae, image, generator=None, posterior="argmax"):
    settings = SimpleNamespace(config=SimpleNamespace(sigma_data=1.0))
    path, name = "sana/pipeline_sana_sprint_img2img.py", "SanaSprintImg2ImgPipeline"
    pipe = pipeline(path, name, "prepare_latents", vae=vae, scheduler=settings, vae_scale_factor=8)
    z = vae.config.latent_channels
    size = image.shape[-2:]  # at time 0 the noise that it mixes in is left out
    return pipe.prepare_latents(image, torch.zeros(()), len(image), z, *size, torch.float32, "cpu", generator)


def qwen_image(vae, image, **settings):
    path = "qwenimage/pipeline_qwenimage_edit.py"
    image = image.unsqueeze(2) if image.ndim == 4 else image
    z = vae.config.z_dim
    return _encode_vae_image(path, "QwenImageEditPipeline", vae, image, latent_channels=z, **settings)


def with_opaque_alpha(image):
    return torch.cat([image, torch.ones_like(image[:, :1])], dim=1)


def qwen_image_layered(vae, image, **settings):
    image, path = with_opaque_alpha(image).unsqueeze(2), "qwenimage/pipeline_qwenimage_layered.py"
    z = vae.config.z_dim
    return _encode_vae_image(path, "QwenImageLayeredPipeline", vae, image, latent_channels=z, **settings)


def qwen_image21(vae, image, **settings):
    image, path = with_opaque_alpha(image).unsqueeze(2), "qwenimage21/pipeline_qwenimage21.py"
    z = vae.config.z_dim
    return _encode_vae_image(path, "QwenImage21Pipeline", vae, image, latent_channels=z, **settings)


def wan(vae, image, generator=None, posterior="argmax"):
    video = image.unsqueeze(2) if image.ndim == 4 else image
    path, name = "wan/pipeline_wan_video2video.py", "WanVideoToVideoPipeline"
    noiseless = SimpleNamespace(add_noise=lambda latents, noise, timestep: latents)
    factors = {"vae_scale_factor_temporal": 4, "vae_scale_factor_spatial": vae.config.scale_factor_spatial}
    pipe = pipeline(path, name, "prepare_latents", posterior=posterior, vae=vae, scheduler=noiseless, **factors)
    with torch.random.fork_rng():  # it draws from the global generator
        torch.manual_seed(generator.initial_seed() if generator else 0)
        return pipe.prepare_latents(video, len(video), vae.config.z_dim, *video.shape[-2:], torch.float32, "cpu")


def hunyuan_image(vae, image, generator=None, posterior="argmax"):
    """Its pipeline only decodes ``latents / scaling_factor``, so that this is what it was trained on."""
    distribution = vae.encode(image).latent_dist
    z = distribution.mode() if posterior == "argmax" else distribution.sample(generator)
    return z * vae.config.scaling_factor


def kandinsky(movq, image, generator=None, posterior="argmax"):
    """One statement inside ``KandinskyInpaintPipeline.__call__``."""
    return movq.encode(image)["latents"]


def _encode_vae_image(path, name, vae, image, generator=None, posterior="argmax", **attributes):
    pipe = pipeline(path, name, "_encode_vae_image", posterior=posterior, vae=vae, **attributes)
    return pipe._encode_vae_image(image, generator)


# ---------------------------------------------------------------- and decodes


def decoded_by_pipeline(name, vae, latents):
    """The last lines of each pipeline's ``__call__``: undo the scaling, decode, and ``image * 0.5 + 0.5`` in 0…1."""
    config = vae.config
    if name in VIDEO or name == "qwen_image21":
        latents = latents.unsqueeze(2) if latents.ndim == 4 else latents
        mean = torch.tensor(config.latents_mean).view(1, -1, 1, 1, 1)
        latents = latents / (1.0 / torch.tensor(config.latents_std).view(1, -1, 1, 1, 1)) + mean
    elif name == "kl_statistics":
        mean, std = (torch.tensor(s).view(1, -1, 1, 1) for s in (config.latents_mean, config.latents_std))
        latents = latents * std / config.scaling_factor + mean
    elif name in ("kl_shift", "tiny"):
        latents = (latents / config.scaling_factor) + config.shift_factor
    elif name == "flux2":
        std = torch.sqrt(vae.bn.running_var.view(1, -1, 1, 1) + config.batch_norm_eps)
        pipe = pipeline("flux2/pipeline_flux2.py", "Flux2Pipeline", "_unpatchify_latents")
        latents = pipe._unpatchify_latents(latents * std + vae.bn.running_mean.view(1, -1, 1, 1))
    elif name not in ("vq", "movq"):
        latents = latents / config.scaling_factor
    settings = {"force_not_quantize": True} if name == "movq" else {}
    image = vae.decode(latents, **settings).sample
    return (image[:, :3] * 0.5 + 0.5).clamp(0, 1)
