"""A training run that writes down what every step saw: ``python tests/witness.py '{"source": "folder", …}'``.

It is started in processes that are killed, stopped and told to stop, and started again, where it goes on from its last
checkpoint. What it writes can be compared: one line of JSON a step and rank with a digest of each sample, as it came
from the data module, and one with a digest of the final weights.
"""

import faulthandler
import gc
import json
import multiprocessing
import os
import signal
import socket
import sys
import tempfile
import warnings
from dataclasses import asdict, dataclass
from datetime import timedelta
from hashlib import blake2b
from pathlib import Path

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from PIL import Image
from torch import nn

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent.parent))

from helpers import tiny_kl
from running import add_file, box_mask, quiet_datasets

from latentdm import Captions, FrozenVAE, InpaintEncoder, LatentDataModule
from latentdm.augment import Augment
from latentdm.callbacks import GracefulStop
from latentdm.checkpoints import WholeCheckpoints
from latentdm.data import HuggingFaceData, ImageFolderData, WebDatasetData
from latentdm.errors import UserError
from latentdm.masks import RandomMask

SOURCES = ("folder", "buckets", "huggingface", "webdataset")
IMAGES, SHARDS, EPOCH_LENGTH, SIZE = 27, 3, 24, 32
TROUBLES = ("exception", "disk", "SIGTERM", "SIGINT", "SIGKILL", "SIGSTOP")
END_OF_STEP = {kind: kind for kind in TROUBLES}
WITHIN_STEP = {f"{kind} within": kind for kind in TROUBLES}
WATCH_EVERY = 20
"""Steps from one look at memory and descriptors to the next."""
SHOW_STACKS = signal.SIGUSR1
"""Lets a process print what each of its threads is doing."""
FULL_AT = 12_000
"""Bytes of a file on a disk that is full: more than what the witness writes, less than a checkpoint."""


@dataclass(frozen=True)
class Run:
    """The settings of one run.

    Args:
        source: one of ``SOURCES``.
        data: the folder that `write_data` filled.
        folder: where the run writes; with a checkpoint in it, it goes on.
        ranks: processes a node.
        nodes: machines, or what stands for them.
        batch: samples a batch, on all ranks together.
        workers: processes that read images, on each rank.
        steps: after which it ends; -1: after the epochs.
        epochs: after which it ends; -1: after the steps.
        save_every: steps from one checkpoint to the next; 0: at the end of each epoch.
        timeout_s: for which a rank waits for another.
        strategy: Lightning's, or ``"fsdp2"``; None: alone, or DDP.
        accelerator: Lightning's.
        trouble: one of ``TROUBLES``, or one ``within`` the step that follows: what happens …
        trouble_step: … at the end of this step …
        trouble_rank: … on this rank, or on all (-1).
    """

    source: str
    data: str
    folder: str
    ranks: int = 1
    nodes: int = 1
    batch: int = 4
    workers: int = 0
    steps: int = -1
    epochs: int = -1
    save_every: int = 0
    timeout_s: int = 60
    strategy: str | None = None
    accelerator: str = "cpu"
    trouble: str | None = None
    trouble_step: int = -1
    trouble_rank: int = -1

    def command(self):
        """The command that runs it."""
        return [sys.executable, "-W", "ignore", __file__, json.dumps(asdict(self))]


# ---------------------------------------------------------------- the data


def write_data(folder):
    """The same noisy images, with masks and captions, in a folder, as a data set and in shards."""
    import datasets

    folder = Path(folder)
    (folder / "photos").mkdir(parents=True)
    (folder / "shards").mkdir()
    generator = np.random.default_rng(0)
    rows = {"image": [], "mask": [], "caption": []}
    for number in range(IMAGES):
        height, width = generator.integers(SIZE, 2 * SIZE, 2).tolist()
        image = Image.fromarray(generator.integers(0, 256, (height, width, 3), dtype=np.uint8))
        rows["image"].append(image)
        rows["mask"].append(box_mask(image.size))
        rows["caption"].append(f"number {number}")
        image.save(folder / "photos" / f"{number:02}.png")
        rows["mask"][-1].save(folder / "photos" / f"{number:02}-mask.png")
        (folder / "photos" / f"{number:02}.txt").write_text(rows["caption"][-1])
    _write_shards(folder / "shards", rows)
    features = {"image": datasets.Image(), "mask": datasets.Image(), "caption": datasets.Value("string")}
    with quiet_datasets():
        datasets.Dataset.from_dict(rows, datasets.Features(features)).save_to_disk(folder / "dataset")


def _write_shards(folder, rows):
    import tarfile

    for shard in range(SHARDS):
        with tarfile.open(folder / f"{shard}.tar", "w") as tar:
            for number in range(shard, IMAGES, SHARDS):
                add_file(tar, f"{number:02}.png", rows["image"][number])
                add_file(tar, f"{number:02}.mask.png", rows["mask"][number])
                add_file(tar, f"{number:02}.txt", rows["caption"][number])


def pixels(run):
    """The data module of a source."""
    data = Path(run.data)
    shared = {"size": SIZE, "batch_size": run.batch // (run.ranks * run.nodes), "num_workers": run.workers, "seed": 5}
    if run.source == "huggingface":
        return HuggingFaceData(str(data / "dataset"), val_share=0, **shared)
    if run.source == "webdataset":
        shards = [str(path) for path in sorted((data / "shards").iterdir())]
        return WebDatasetData(shards, epoch_length=EPOCH_LENGTH, shuffle_buffer=8, **shared)
    buckets = {"area": SIZE * SIZE, "step": 8} if run.source == "buckets" else None
    return ImageFolderData(data / "photos", val_share=0, buckets=buckets, index_dir=data / "index", **shared)


def datamodule(run):
    """Everything that draws: crops, flips, captions that are dropped, random masks, noise."""
    encoder = InpaintEncoder(FrozenVAE(tiny_kl(), dtype="float32"))
    settings = {"masks": RandomMask(), "augment": Augment(flip=0.5), "captions": Captions(dropout=0.3)}
    return LatentDataModule(pixels(run), encoder, keep_pixels=True, seed=5, **settings)


# ---------------------------------------------------------------- the model and its witness


def digest(*values):
    """A short hash of tensors and of what JSON knows."""
    hasher = blake2b(digest_size=8)
    for value in values:
        if isinstance(value, torch.Tensor):
            hasher.update(f"{value.dtype}{list(value.shape)}".encode())
            hasher.update(value.detach().cpu().contiguous().numpy().tobytes())
        else:
            hasher.update(repr(value).encode())
    return hasher.hexdigest()


class Model(LightningModule):
    """Fills in what is masked, with weights and an optimizer to which every step adds."""

    def __init__(self, seed=0):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.layer = nn.Sequential(nn.Conv2d(5, 16, 3, padding=1), nn.GELU(), nn.Conv2d(16, 4, 3, padding=1))

    def configure_model(self):
        if self.device_mesh is not None:
            from torch.distributed.fsdp import fully_shard

            fully_shard(self.layer, mesh=self.device_mesh["data_parallel"])

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-2)

    def training_step(self, batch, batch_idx):
        seen = torch.cat([batch["masked_latents"], batch["latent_mask"]], dim=1)
        return (self.layer(seen) - batch["latents"]).square().mean()


class Witness(Callback):
    """Writes ``seen.<rank>.jsonl``: digests of samples, memory and descriptors, final weights."""

    def __init__(self, run):
        self.run = run

    def write(self, trainer, **row):
        with (Path(self.run.folder) / f"seen.{trainer.global_rank}.jsonl").open("a") as file:
            file.write(json.dumps({"step": trainer.global_step} | row) + "\n")

    def on_train_start(self, trainer, pl_module):
        gc.freeze()  # so that collecting what came since takes no time, and memory shows what is held

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        exact = sorted(batch.keys() - {"latents", "masked_latents"})  # whose bits depend on the batch's shape
        samples, drawn = (
            [digest(*(batch[key][row] for key in keys)) for row in range(len(batch["latents"]))]
            for keys in (sorted(batch), exact)
        )
        self.write(trainer, index=batch["index"].tolist(), samples=samples, drawn=drawn)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step % WATCH_EVERY == 0:
            gc.collect()
            resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") // 1024
            self.write(trainer, resident_kib=resident, descriptors=len(os.listdir("/proc/self/fd")))
        self.make_trouble(trainer, END_OF_STEP)

    def on_before_backward(self, trainer, pl_module, loss):
        self.make_trouble(trainer, WITHIN_STEP)

    def make_trouble(self, trainer, kinds):
        run = self.run
        if trainer.global_step != run.trouble_step or run.trouble_rank not in (-1, trainer.global_rank):
            return
        kind = kinds.get(run.trouble)
        if kind == "exception":
            raise ArithmeticError(f"trouble on rank {trainer.global_rank}")
        if kind == "disk":
            import resource

            resource.setrlimit(resource.RLIMIT_FSIZE, (FULL_AT, FULL_AT))
        elif kind:
            os.kill(os.getpid(), signal.Signals[kind])

    def on_train_end(self, trainer, pl_module):
        whole = [getattr(weight, "full_tensor", lambda weight=weight: weight)() for weight in pl_module.parameters()]
        self.write(trainer, weights=digest(*whole))

    def teardown(self, trainer, pl_module, stage):
        if self.run.strategy == "ddp_spawn":  # gloo's threads may end a process by SIGABRT that leaves them behind
            torch.distributed.destroy_process_group()


def train(run):
    """Run it, from its last checkpoint if there is one."""
    torch.set_num_threads(1)
    Path(run.folder).mkdir(parents=True, exist_ok=True)
    by_step = {"every_n_train_steps": run.save_every} if run.save_every else {"save_on_train_epoch_end": True}
    checkpoint = ModelCheckpoint(
        run.folder, filename="last", enable_version_counter=False, save_on_exception=True, **by_step
    )
    several, timeout = run.ranks * run.nodes > 1, timedelta(seconds=run.timeout_s)
    strategy = run.strategy or (DDPStrategy(timeout=timeout) if several else "auto")
    if strategy == "fsdp2":
        strategy = ModelParallelStrategy(run.ranks * run.nodes, 1, save_distributed_checkpoint=False, timeout=timeout)
    trainer = Trainer(
        accelerator=run.accelerator,
        devices=run.ranks,
        num_nodes=run.nodes,
        strategy=strategy,
        max_steps=run.steps,
        max_epochs=run.epochs,
        limit_val_batches=0,
        callbacks=[Witness(run), GracefulStop(), checkpoint],
        plugins=[WholeCheckpoints()],
        default_root_dir=run.folder,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    saved = Path(run.folder) / "last.ckpt"
    trainer.fit(Model(), datamodule=datamodule(run), ckpt_path=str(saved) if saved.exists() else None)


# ---------------------------------------------------------------- its processes

context = multiprocessing.get_context("forkserver")  # where torch is imported once, in a process that does nothing else
context.set_forkserver_preload(["witness"])


def start(run):
    """Start the processes of all ranks of a run; each prints into ``output.<rank>.txt`` in the run's folder."""
    Path(run.folder).mkdir(parents=True, exist_ok=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    paths = [str(Path(__file__).parent), str(Path(__file__).parent.parent), os.environ.get("PYTHONPATH", "")]
    os.environ |= {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}  # for the server
    processes = [context.Process(target=rank_process, args=(run, rank, port)) for rank in range(run.ranks)]
    for process in processes:
        process.start()
    return processes


def rank_process(run, rank, port):
    """What the process of a rank does: train as if Lightning had launched it.

    Its loader forks its workers, as in any script: those of a server outlive a rank that is killed, as they look
    whether the process that started them lives. Ctrl+C counts, where the tests run in the background of a shell too.
    """
    multiprocessing.set_start_method("fork", force=True)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    output = os.open(Path(run.folder) / f"output.{rank}.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    faulthandler.register(SHOW_STACKS, all_threads=True)
    warnings.simplefilter("ignore")
    if run.ranks > 1:
        os.environ |= {"LOCAL_RANK": str(rank), "NODE_RANK": "0", "WORLD_SIZE": str(run.ranks)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    train(run)
    if run.ranks > 1:
        torch.distributed.destroy_process_group()


def save_for_ever(path, temporary):
    """Write a checkpoint over and over, with the system's temporary folder in another place."""
    tempfile.tempdir = temporary
    state = {"weights": torch.zeros(2**23)}
    while True:
        state["weights"] += 1
        WholeCheckpoints().save_checkpoint(state, path)


# ---------------------------------------------------------------- what was written


def rows(run):
    """All that a run's ranks wrote, in order: (rank, row)."""
    files = sorted(Path(run.folder).glob("seen.*.jsonl"))
    return [(rank, json.loads(line)) for rank, file in enumerate(files) for line in file.read_text().splitlines()]


def steps_seen(run, what="samples"):
    """(rank, step) → the digests of all samples that it saw then, one list for each time that it was run.

    ``what="drawn"`` leaves the latents out, whose bits depend on the shape of the batch, and ``"index"`` is the ids.
    """
    seen = {}
    for rank, row in rows(run):
        if what in row:
            seen.setdefault((rank, row["step"]), []).append(row[what])
    return seen


def weights(run):
    """The digests of the final weights, one a rank."""
    return [row["weights"] for _, row in rows(run) if "weights" in row]


if __name__ == "__main__":
    try:
        train(Run(**json.loads(sys.argv[1])))
    except UserError as error:  # as the example tells it
        sys.exit(f"{type(error).__name__}: {error}")
