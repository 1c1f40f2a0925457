"""Frozen autoencoders: `FrozenVAE`, and the table of the families it knows."""

from latentdm.autoencoders.families import Family, known_families, register_family
from latentdm.autoencoders.frozen import FrozenVAE
from latentdm.autoencoders.normalization import Normalization

__all__ = ["Family", "FrozenVAE", "Normalization", "known_families", "register_family"]
