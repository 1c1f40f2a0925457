"""Which classes `FrozenVAE` takes, and how it learns another."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, AutoencoderKLMochi, ConsistencyDecoderVAE
from helpers import RecordingAutoencoder, complains
from tiny_models import build, close, frozen, pictures, signed
from torch import nn

from latentdm import FrozenVAE, register_family
from latentdm.autoencoders import Family, Normalization, known_families
from latentdm.autoencoders.families import CLASSES, FAMILIES


@pytest.fixture
def registry(monkeypatch):
    """The table, put back afterwards."""
    monkeypatch.setattr("latentdm.autoencoders.families.FAMILIES", dict(FAMILIES))
    monkeypatch.setattr("latentdm.autoencoders.families.CLASSES", dict(CLASSES))


def test_an_unknown_class_of_diffusers_is_refused_with_the_list():
    mochi = object.__new__(AutoencoderKLMochi)  # its class is all that is looked at
    with complains("AutoencoderKLMochi", "AutoencoderDC, AutoencoderKL, AutoencoderKLFlux2", "register_family"):
        FrozenVAE(mochi)
    with complains("ConsistencyDecoderVAE", "not known"):
        FrozenVAE(object.__new__(ConsistencyDecoderVAE))


class HalvedAutoencoder(nn.Module):
    """An autoencoder as a user writes one: pixels in 0…1, latents their means over 2×2 squares."""

    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(2.0))

    def encode(self, x):
        assert x.min() >= 0
        assert x.max() <= 1
        return SimpleNamespace(latent=self.gain * F.avg_pool2d(x, 2))

    def decode(self, z):
        return SimpleNamespace(sample=F.interpolate(z / self.gain, scale_factor=2))


def test_a_class_of_ones_own_is_registered_in_one_call(registry):
    register_family(
        HalvedAutoencoder,
        Family(
            spatial_compression=lambda autoencoder: 2,
            latent_channels=lambda autoencoder: 3,
            normalization=lambda autoencoder: Normalization(mean=0.5, scale=4.0),
            pixel_range=(0.0, 1.0),
            has_posterior=False,
        ),
    )

    class Inherits(HalvedAutoencoder):
        pass

    pixels = pictures()
    for kind in (HalvedAutoencoder, Inherits):
        vae = FrozenVAE(kind(), dtype="float32")
        assert (vae.spatial_compression, vae.latent_channels) == (2, 3)
        encoded = vae.encode(pixels)
        close(encoded, (2 * F.avg_pool2d(pixels, 2) - 0.5) * 4)
        close(vae.decode(encoded), F.interpolate(F.avg_pool2d(pixels, 2), scale_factor=2))


def test_what_is_known_of_a_class_can_be_changed_by_its_name(registry):
    changed = Family(
        spatial_compression=lambda autoencoder: 8,
        latent_channels=lambda autoencoder: 4,
        normalization=lambda autoencoder: Normalization(scale=2.0),
    )
    register_family("AutoencoderKL", changed)
    assert known_families()["AutoencoderKL"] is changed
    pixels = pictures()
    encoded = FrozenVAE(build("kl"), dtype="float32").encode(pixels, posterior="mode")
    close(encoded, 2 * build("kl").encode(signed(pixels)).latent_dist.mean)


def test_a_subclass_is_known_by_its_base():
    class Finetuned(AutoencoderKL):
        pass

    model = build("kl")
    model.__class__ = Finetuned
    encoded = FrozenVAE(model, dtype="float32").encode(pictures(), posterior="mode")
    close(encoded, frozen("kl").encode(pictures(), posterior="mode"))


def test_a_plain_module_says_what_it_is_or_is_tried():
    assert FrozenVAE(RecordingAutoencoder()).latent_channels == 192
    tried = FrozenVAE(HalvedOfSigned())
    assert (tried.spatial_compression, tried.latent_channels, tried.has_posterior) == (2, 3, False)
    with complains("Linear", "encode", error=TypeError):
        FrozenVAE(nn.Linear(1, 1))


class HalvedOfSigned(nn.Module):
    def encode(self, x):
        return SimpleNamespace(latent=F.avg_pool2d(x, 2))
