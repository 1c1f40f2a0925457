"""Frozen autoencoders: `FrozenVAE`, and the table of the families it knows."""

from latentdm.autoencoders.families import Family, known_families, register_family
from latentdm.autoencoders.posterior import Normalization
from latentdm.autoencoders.vae import FrozenVAE

__all__ = ["Family", "FrozenVAE", "Normalization", "known_families", "register_family"]
