"""The config groups of latentdm, as Hydra finds them under ``pkg://latentdm.conf``."""
