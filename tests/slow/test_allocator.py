"""What a CPU's allocator keeps for the next layer: page faults, in processes with environments of their own."""

import os
import platform
import subprocess
import sys

import pytest

from latentdm.frozen import allocator

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")

FAULTS = """
import resource, torch
from latentdm import FrozenVAE
from latentdm.autoencoders.loading import load_autoencoder
vae = FrozenVAE(load_autoencoder("pkg://latentdm.demo_vae"), dtype="float32")
pixels = torch.zeros(2, 3, 256, 256)
for _ in range(3):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    vae.encode(pixels, posterior="mode")
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(**chosen: str) -> int:
    """Page faults of the third of three encodes, in a process with its own environment."""
    kept = {name: value for name, value in os.environ.items() if name not in allocator.CHOSEN_BY}
    done = subprocess.run([sys.executable, "-c", FAULTS], env=kept | chosen, capture_output=True, text=True, check=True)
    return int(done.stdout)


def test_freed_memory_serves_the_next_layer_and_a_users_thresholds_are_obeyed():
    """Two images make buffers of 32 MiB a layer: 8192 pages each, if the system has to find them anew."""
    assert faults() < 8192
    assert faults(MALLOC_TRIM_THRESHOLD_="131072") > 8192
