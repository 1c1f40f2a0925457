"""The four sources of pictures on a small scale, and a fit that notes a digest of each sample."""

import hashlib
import json
import os
import signal
import tarfile
import traceback
import warnings
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import torch
from helpers import quiet_trainer
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from PIL import Image
from running import add_file, box_mask, quiet_datasets
from torch import nn

from latentdm import Cache, Captions, FrozenVAE, InpaintEncoder, LatentDataModule
from latentdm.data import HuggingFaceData, ImageFolderData, WebDatasetData
from latentdm.masks import RandomMask

COUNT, GLOBAL_BATCH = 45, 8
SOURCES = ("squares", "buckets", "huggingface", "webdataset")


def pictures():
    """Pictures of three shapes, whose pixels say where they were cropped and mirrored."""
    shapes = [(48, 40), (40, 48), (44, 44)]
    for number in range(COUNT):
        width, height = shapes[number % 3]
        across, down = np.meshgrid(np.arange(width), np.arange(height))
        levels = np.stack([across * 4, down * 4, np.full_like(across, number)], axis=-1)
        yield number, Image.fromarray(levels.astype(np.uint8))


def write_sources(folder):
    """A folder, a data set and tar shards of the same pictures with captions."""
    photos, shards = folder / "photos", folder / "shards"
    photos.mkdir()
    shards.mkdir()
    images = dict(pictures())
    for number, image in images.items():
        image.save(photos / f"{number:02}.png")
        (photos / f"{number:02}.txt").write_text(f"picture {number}")
    with quiet_datasets():
        features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
        rows = {"image": list(images.values()), "text": [f"picture {number}" for number in images]}
        datasets.Dataset.from_dict(rows, features).save_to_disk(folder / "rows")
    for shard in range(16):
        with tarfile.open(shards / f"{shard:02}.tar", "w") as tar:
            for number in range(shard, COUNT, 16):
                add_file(tar, f"{number:02}.png", images[number])
                add_file(tar, f"{number:02}.txt", f"picture {number}")
    box_mask((8, 8)).save(folder / "written.png")  # last


def pixels(folder, source, batch_size=GLOBAL_BATCH, **settings):
    """The pixel data module of a source."""
    settings = {"batch_size": batch_size, "flip": True, **settings}
    if source == "squares":
        return ImageFolderData(folder / "photos", size=32, val_share=0, **settings)
    if source == "buckets":
        return ImageFolderData(
            folder / "photos", val_share=0, buckets={"area": 32 * 32, "step": 8, "min_images": 4}, **settings
        )
    if source == "huggingface":
        return HuggingFaceData(str(folder / "rows"), size=32, val_share=0, **settings)
    settings = {"epoch_length": COUNT, "shuffle_buffer": 8, "parts": 2, **settings}
    return WebDatasetData(f"{folder}/shards/{{00..15}}.tar", size=32, **settings)


class CornerAutoencoder(nn.Module):
    """Its latents are noise around one pixel of each block, so that their bits show crop, mirroring, mask and noise."""

    spatial_compression = 8
    latent_channels = 4

    def encode(self, x):
        mean = torch.cat([x, x[:, :1]], dim=1)[..., ::8, ::8].contiguous()
        return SimpleNamespace(latent_dist=SimpleNamespace(mean=mean, logvar=torch.zeros_like(mean)))


def latent_data(folder, source, autoencoder=None, cache=None, **settings):
    """The same with latents, random masks, and captions that are dropped now and then."""
    encoder = InpaintEncoder(FrozenVAE(autoencoder or CornerAutoencoder(), dtype="float32"))
    stages = {"masks": RandomMask(), "captions": Captions(dropout=0.3), "cache": cache}
    return LatentDataModule(pixels(folder, source, **settings), encoder, **stages)


def cache_in(folder, variants=None):
    """A cache that loses nothing, with None in memory; with variants of masks too, so that no image is opened again."""
    return Cache(folder, dtype="float32", variants=variants, mask_variants=variants)


def digests(batch):
    """A text for each sample: all that the batch holds of it."""
    count = len(batch["index"])
    texts = []
    for row in range(count):
        whole = hashlib.blake2b(digest_size=8)
        for name in sorted(batch):
            value = batch[name][row]
            whole.update(name.encode())
            whole.update(
                value.contiguous().numpy().tobytes() if isinstance(value, torch.Tensor) else str(value).encode()
            )
        texts.append(whole.hexdigest())
    return texts


def loader_of(data, rank=0, ranks=1):
    """The training loader of one rank."""
    data.pixels.setup()
    data.pixels.trainer = type("Ranks", (), {"distributed_sampler_kwargs": {"num_replicas": ranks, "rank": rank}})()
    loader = data.pixels.train_dataloader()
    data.pixels.trainer = None
    return loader


def steps(folder, source, ranks=1, workers=0, epoch=0, state=None):
    """The digests of each step: of crops, mirroring, masks, noise and captions, of all ranks in turns."""
    of_ranks = []
    for rank in range(ranks):
        data = latent_data(folder, source, batch_size=GLOBAL_BATCH // ranks, num_workers=workers)
        loader = loader_of(data, rank, ranks)
        loader.sampler.set_epoch(epoch)
        if state:
            loader.load_state_dict(state)
        batches = [(batch, data.process(dict(batch), "cpu")) for batch in loader]
        # the pixels apart: the encoder uses them up
        of_ranks.append([list(zip(digests(raw), digests(made), strict=True)) for raw, made in batches])
    return [[sample for row in zip(*step, strict=True) for sample in row] for step in zip(*of_ranks, strict=True)]


class Learner(LightningModule):
    """Learns a little from each batch, and writes down what it saw in a file of its rank."""

    def __init__(self, notes):
        super().__init__()
        self.notes = Path(notes)
        self.layer = torch.nn.Linear(4, 1)
        with torch.no_grad():
            self.layer.weight.fill_(0.1)
            self.layer.bias.zero_()

    def training_step(self, batch, batch_idx):
        self.seen = digests(batch), batch["index"].tolist()
        return self.layer(batch["latents"].mean(dim=(2, 3))).square().mean()

    def on_train_batch_end(self, outputs, batch, batch_idx):
        with (self.notes / f"rank{self.global_rank}").open("a") as file:
            file.write(
                json.dumps([self.global_step, self.trainer.fit_loop.epoch_progress.current.processed, *self.seen])
            )
            file.write("\n")

    def validation_step(self, batch, batch_idx):
        pass

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Kill(Callback):
    """Ends its process without a word after some batches of this run."""

    def __init__(self, after):
        self.after = after

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.after -= 1
        if self.after == 0:
            os.kill(os.getpid(), signal.SIGKILL)


def noted(folder, ranks=1):
    """Step → [epoch, digests, indexes] of the global batch, what was noted last; of all ranks in turns."""
    of_ranks = []
    for rank in range(ranks):
        lines = [json.loads(line) for line in (folder / f"rank{rank}").read_text().splitlines() if line]
        of_ranks.append({step: rest for step, *rest in lines})
    return {
        step: [of_ranks[0][step][0], *([v for row in zip(*column, strict=True) for v in row] for column in columns)]
        for step in of_ranks[0]
        for columns in [[[of_rank[step][part] for of_rank in of_ranks] for part in (1, 2)]]
    }


def train(folder, source, notes, *, ranks=1, workers=0, kill=0, save="steps", resume=False, data=None, **settings):
    """Fit; ``data`` are settings of `latent_data`, and the others the Trainer's."""
    settings = {"max_epochs": 3} | settings
    every = {
        "each": {"every_n_train_steps": 1},
        "steps": {"every_n_train_steps": 3},
        "epochs": {"every_n_epochs": 1, "save_on_train_epoch_end": True},
    }[save]
    saving = ModelCheckpoint(notes, filename="saved", save_last=True, save_top_k=1, monitor=None, **every)
    model = Learner(notes)
    trainer = quiet_trainer(
        devices=ranks,
        strategy="ddp_fork" if ranks > 1 else "auto",
        enable_checkpointing=True,
        callbacks=[saving, *([Kill(kill)] if kill else [])],
        limit_val_batches=0,
        default_root_dir=notes,
        **settings,
    )
    last = notes / "last.ckpt"
    datamodule = latent_data(folder, source, batch_size=GLOBAL_BATCH // ranks, num_workers=workers, **data or {})
    trainer.fit(model, datamodule=datamodule, ckpt_path=str(last) if resume and last.exists() else None)


def forked(*arguments, **settings):
    """Train in a process of its own, which has imported all it needs already; returns how it ended."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            warnings.simplefilter("ignore")
            torch.set_num_threads(1)
            train(*arguments, **settings)
            code = 0
        except BaseException:
            traceback.print_exc()
        os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
