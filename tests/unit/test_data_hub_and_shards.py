"""Data sets of the datasets package and tar shards, written by the tests: columns, splits, streams and their errors."""

import json
import sys
import tarfile

import datasets
import pytest
import torch
from PIL import Image
from running import add_file, quiet_datasets

from latentdm.batch import EPOCH
from latentdm.data import HuggingFaceData, SampleError, WebDatasetData
from latentdm.data.stream import own_share, stable_index

SIZE = 16
SIZES = ("original_size", "crop_top_left", "target_size")


def picture(number):
    """An image whose colour is its number."""
    return Image.new("RGB", (20, 24), (number, 255 - number, 7))


def level(pixels):
    """The number of a picture, read off its pixels."""
    assert (pixels[2] == 7).all()
    return int(pixels[0, 0, 0])


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """A data set of 40 pictures with masks, captions, a second image column and a number."""
    folder = tmp_path_factory.mktemp("rows") / "saved"
    content = {
        "photo": [picture(number) for number in range(40)],
        "mask": [Image.new("L", (20, 24), 2 + number) for number in range(40)],
        "text": [f"picture {number}" for number in range(40)],
        "depth": [picture(0)] * 40,
        "score": [number / 2 for number in range(40)],
    }
    images = {name: datasets.Image() for name in ("photo", "mask", "depth")}
    features = datasets.Features({**images, "text": datasets.Value("string"), "score": datasets.Value("float32")})
    with quiet_datasets():
        datasets.Dataset.from_dict(content, features).save_to_disk(folder, num_shards=4)
    return folder


def hub(path, **settings):
    defaults = {"size": SIZE, "batch_size": 4, "columns": {"image": "photo"}, "num_workers": 0}
    data = HuggingFaceData(str(path), **{**defaults, **settings})
    data.setup()
    return data


def test_a_batch_of_a_data_set(rows):
    batch = next(iter(hub(rows).train_dataloader()))
    assert set(batch) == {"pixels", "mask", "index", "name", "caption", "score", EPOCH, *SIZES}
    assert batch["pixels"].shape == (4, 3, SIZE, SIZE)
    assert batch["pixels"].dtype == batch["mask"].dtype == torch.uint8
    assert batch["score"].dtype.is_floating_point
    for row, index in enumerate(batch["index"].tolist()):
        assert level(batch["pixels"][row]) == index
        assert (batch["mask"][row] == 2 + index).all()
        assert batch["caption"][row] == f"picture {index}"
        assert batch["score"][row] == index / 2
        assert batch["name"][row] == f"train/{index}"


def test_rows_split_into_training_and_validation(rows):
    data = hub(rows, val_share=0.3)
    train, val = (set(map(int, s.rows)) for s in (data.train_set, data.val_set))
    assert train
    assert val
    assert train.isdisjoint(val)
    assert train | val == set(range(40)) == set(map(int, data.predict_set.rows))
    assert hub(rows, val_share=0).val_set is None


def test_splits_of_a_saved_dictionary(rows, tmp_path):
    with quiet_datasets():
        saved = datasets.load_from_disk(str(rows))
        datasets.DatasetDict(train=saved, held=saved.select(range(3))).save_to_disk(tmp_path / "both")
    data = hub(tmp_path / "both", val_split="held")
    assert len(data.train_set) == 40
    assert [sample["index"] for sample in data.val_set] == [40, 41, 42]
    with pytest.raises(ValueError, match=r"^HuggingFaceData: there is no split 'none' in .*; it has train, held$"):
        hub(tmp_path / "both", split="none")


def test_a_local_imagefolder(tmp_path, monkeypatch):
    folder = tmp_path / "folder"
    folder.mkdir()
    for number in range(3):
        picture(number).save(folder / f"{number}.png")
    lines = [json.dumps({"file_name": f"{number}.png", "text": f"picture {number}"}) for number in range(3)]
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    with quiet_datasets():
        data = hub(folder, columns={}, val_share=0)
        data.prepare_data()
    assert [(level(sample["pixels"]), sample["caption"]) for sample in data.predict_set] == [
        (number, f"picture {number}") for number in range(3)
    ]


def test_a_data_set_that_is_nowhere_is_answered_with_what_to_do(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    message = r"^HuggingFaceData: cannot load split 'train' of path='rows': .*no such folder here.*HF_HUB_OFFLINE=1"
    with pytest.raises(ValueError, match=message):
        HuggingFaceData("rows").prepare_data()
    (tmp_path / "rows").mkdir()
    with pytest.raises(ValueError, match=r"of path='rows': The directory at .*rows doesn't contain any data files\Z"):
        hub("rows")
    picture(0).save(tmp_path / "rows" / "0.png")
    with quiet_datasets(), pytest.raises(ValueError, match=r"cannot load split 'held' of path='rows': Unknown split"):
        hub("rows", split="held")


def test_a_folder_of_the_users_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "mine").mkdir()
    picture(7).save(tmp_path / "mine" / "0.png")
    with quiet_datasets():
        data = hub("~/mine", columns={}, val_share=0)
    assert level(data.predict_set[0]["pixels"]) == 7


def test_masks_may_be_left_out_and_missing_columns_are_named(rows):
    assert "mask" not in hub(rows, columns={"image": "photo", "mask": None}).train_set[0]
    message = r"^HuggingFaceData: no column 'image' for image in .*; it has photo, mask, text, depth, score: say which"
    with pytest.raises(ValueError, match=message):
        hub(rows, columns={})
    with pytest.raises(ValueError, match="no column 'prompt' for caption"):
        hub(rows, columns={"image": "photo", "caption": "prompt"})
    with pytest.raises(ValueError, match=r"columns: unknown name 'imge'; the names are image, mask, source, caption"):
        hub(rows, columns={"imge": "photo"})


@pytest.mark.parametrize("streaming", [False, True])
def test_columns_named_as_ours_are_left_out_with_a_word(tmp_path, streaming, caplog):
    texts = {"name": "cat", "index": "7", "latents": "0.5", "source": "a site", "author": "me"}
    content = {"image": [picture(number) for number in range(3)]} | {name: [text] * 3 for name, text in texts.items()}
    kinds = {"image": datasets.Image()} | {name: datasets.Value("string") for name in texts}
    with quiet_datasets():
        datasets.Dataset.from_dict(content, datasets.Features(kinds)).save_to_disk(tmp_path / "saved")
    with caplog.at_level("INFO"):
        data = hub(tmp_path / "saved", columns=None, batch_size=1, streaming=streaming, epoch_length=3)
    assert "columns index, latents, name, source are left out" in caplog.text
    batch = next(iter(data.train_dataloader()))
    assert batch["author"][0] == "me"
    assert not {"latents", "source"} & set(batch)
    assert batch["index"].dtype == torch.int64


@pytest.mark.parametrize("streaming", [False, True])
def test_a_row_without_an_image_is_named(tmp_path, streaming):
    features = datasets.Features({"image": datasets.Image()})
    with quiet_datasets():
        datasets.Dataset.from_dict({"image": [picture(0), picture(1), None]}, features).save_to_disk(tmp_path / "rows")
    data = hub(tmp_path / "rows", columns={}, val_share=0, streaming=streaming, epoch_length=3)
    where = "train/part 0 of 1/2" if streaming else "train/2"
    with pytest.raises(SampleError, match=rf"^HuggingFaceData: cannot read the image of {where}: it is None and"):
        list(data.train_dataloader())


# Streams


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """Three shards of 1, 5 and 9 pictures with masks, captions and columns."""
    folder = tmp_path_factory.mktemp("shards")
    number = 0
    for shard, count in enumerate((1, 5, 9)):
        with tarfile.open(folder / f"s-{shard}.tar", "w") as tar:
            for _ in range(count):
                add_file(tar, f"in/{number:03}.png", picture(number))
                add_file(tar, f"in/{number:03}.mask.png", Image.new("L", (20, 24), 2 + number))
                add_file(tar, f"in/{number:03}.txt", f" picture {number}\n")
                add_file(tar, f"in/{number:03}.json", {"width": 20, "tags": ["a", "b"]})
                number += 1
    return folder


def tars(folder, **settings):
    shards = settings.pop("shards", f"{folder}/s-{{0..2}}.tar")
    data = WebDatasetData(
        shards, **{"size": SIZE, "batch_size": 3, "epoch_length": 15, "shuffle_buffer": 4, **settings}
    )
    data.setup()
    return data


def epochs(data, ranks=1, count=1, loader="train"):
    """For each rank and epoch the batches of levels."""
    of_rank = []
    for rank in range(ranks):
        data.trainer = type(
            "Ranks",
            (),
            {"distributed_sampler_kwargs": {"num_replicas": ranks, "rank": rank}, "default_root_dir": "."},
        )()
        loaded = getattr(data, f"{loader}_dataloader")()
        of_rank.append([])
        for epoch in range(count):
            loaded.sampler.set_epoch(epoch)
            of_rank[-1].append([[level(pixels) for pixels in batch["pixels"]] for batch in loaded])
    return of_rank


def flat(nested):
    return [item for part in nested for item in (flat(part) if isinstance(part, list) else [part])]


def test_a_batch_of_shards(shards):
    batch = next(iter(tars(shards).train_dataloader()))
    assert set(batch) == {"pixels", "mask", "index", "name", "caption", "width", "tags", EPOCH, *SIZES}
    for row in range(3):
        number = level(batch["pixels"][row])
        assert batch["name"][row].endswith(f".tar/in/{number:03}")
        assert batch["index"][row] == stable_index(batch["name"][row])
        assert batch["caption"][row] == f"picture {number}"
        assert (batch["mask"][row] == 2 + number).all()
        assert batch["tags"][row] == ["a", "b"]
    assert batch["index"].dtype == torch.int64
    assert batch["width"].tolist() == [20, 20, 20]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_shards_are_split_over_ranks_and_workers(shards, ranks, workers):
    data = tars(shards, num_workers=workers, shuffle_buffer=0, batch_size=1)
    seen = epochs(data, ranks, count=2)
    assert {len(epoch) for rank in seen for epoch in rank} == {15 // ranks}
    alone = epochs(tars(shards, shuffle_buffer=0, batch_size=1), count=2)[0]
    for epoch, order in enumerate(alone):
        assert sorted(flat(order)) == list(range(15))
        of_ranks = [flat(rank[epoch]) for rank in seen]
        assert flat(list(map(list, zip(*of_ranks, strict=True)))) == flat(order)[: 15 // ranks * ranks]
    parts = ranks * max(workers, 1)
    items = [list(data.train_set.items(part, parts, 7, True)) for part in range(parts)]
    assert sorted(item.name for part in items for item in part) == sorted(
        f"{shards}/s-{shard}.tar/in/{number:03}" for number, shard in enumerate([0] + [1] * 5 + [2] * 9)
    )


def test_epochs_of_a_stream_differ_and_repeat_with_the_seed(shards):
    one, again, other = (epochs(tars(shards, seed=seed), count=2)[0] for seed in (0, 0, 1))
    assert one == again
    assert one[0] != one[1]
    assert one != other


@pytest.mark.parametrize("workers", [0, 1])
def test_validation_of_a_stream_begins_at_the_beginning(shards, workers):
    data = tars(shards, val_shards=f"{shards}/s-1.tar", val_length=3, num_workers=workers)
    assert epochs(data, count=2, loader="val") == [[[[1, 2, 3]], [[1, 2, 3]]]]
    assert tars(shards).val_dataloader() == []


def test_a_pipe_and_a_list_of_shards(shards):
    urls = [f"pipe:cat {shards}/s-0.tar", f"file://{shards}/s-1.tar"]
    data = tars(shards, shards=urls, epoch_length=6, batch_size=6, allow_pipe=True)
    assert sorted(flat(epochs(data))) == [0, 1, 2, 3, 4, 5]


def test_other_endings(tmp_path):
    with tarfile.open(tmp_path / "s.tar", "w") as tar:
        add_file(tar, "a.image.png", picture(1))
        add_file(tar, "a.seg.png", Image.new("L", (20, 24), 9))
        add_file(tar, "a.en", "a caption")
        add_file(tar, "a.cls", "3")
    columns = {"image": "image.png", "mask": "seg.png", "caption": "en"}
    batch = next(
        iter(tars(tmp_path, shards=str(tmp_path / "s.tar"), columns=columns, epoch_length=1).train_dataloader())
    )
    assert batch["caption"] == ["a caption"]
    assert batch["cls"].tolist() == [3]
    assert (batch["mask"] == 9).all()


def test_broken_shards_and_samples_are_named_or_skipped(shards, tmp_path):
    whole = (shards / "s-2.tar").read_bytes()
    with tarfile.open(shards / "s-2.tar") as tar:
        cut = tar.getmember("in/008.png").offset_data + 20
    (tmp_path / "s-0.tar").write_bytes(whole[:cut])
    (tmp_path / "s-1.tar").write_bytes(b"no tar at all" * 100)
    with tarfile.open(tmp_path / "s-2.tar", "w") as tar:
        add_file(tar, "good.png", picture(50))
        add_file(tar, "without.txt", "no image")
        add_file(tar, "broken.png", "no image either")
    settings = {"on_error": "skip", "max_skipped_share": 1.0, "epoch_length": 12, "shuffle_buffer": 0}
    data = tars(tmp_path, **settings)
    batches = list(data.train_dataloader())
    assert [len(batch["index"]) for batch in batches] == [3] * 4
    assert 50 in {level(pixels) for batch in batches for pixels in batch["pixels"]}
    report = data.skips.report()
    for part in (
        r"cannot read the shard .*s-0.tar",
        "s-1.tar",
        "without: it has no image",
        "broken: its content is no",
    ):
        assert part.split(".*")[-1] in report
    for shard in ("s-0.tar", "s-1.tar", "s-2.tar"):
        with pytest.raises(SampleError, match=shard):
            list(tars(tmp_path, shards=f"{tmp_path}/{shard}").train_dataloader())


def test_a_shard_that_is_not_there(tmp_path):
    with pytest.raises(SampleError, match=r"^WebDatasetData: cannot read the shard .*none.tar: .*No such file"):
        list(tars(tmp_path, shards=f"{tmp_path}/none.tar").train_dataloader())


@pytest.mark.parametrize(("shards", "parts"), [(1, 1), (5, 2), (2, 5), (3, 3), (1, 4)])
def test_every_sample_is_in_one_part(shards, parts):
    def read(name):
        return ((name, sample) for sample in range(20))

    names = [f"{number}" for number in range(shards)]
    shares = [list(own_share(names, read, part, parts)) for part in range(parts)]
    assert all(shares)
    assert sorted(item for share in shares for item in share) == sorted((name, n) for name in names for n in range(20))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_data_set_as_a_stream(rows, ranks, workers):
    settings = {"streaming": True, "epoch_length": 40, "shuffle_buffer": 0, "num_workers": workers, "batch_size": 5}
    data = hub(rows, **settings)
    seen = epochs(data, ranks, count=2)
    for epoch in range(2):
        assert sorted(flat([rank[epoch] for rank in seen])) == list(range(40))
    assert seen == epochs(hub(rows, **settings), ranks, count=2)
    assert data.val_dataloader() == []


def test_files_of_a_stream_are_dealt_to_its_parts(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    features = datasets.Features({"photo": datasets.Image()})
    (tmp_path / "rows").mkdir()
    with quiet_datasets():
        for file in range(16):
            content = {"photo": [picture(2 * file), picture(2 * file + 1)]}
            datasets.Dataset.from_dict(content, features).to_parquet(tmp_path / "rows" / f"{file:02}.parquet")
    settings = {"streaming": True, "epoch_length": 32, "shuffle_buffer": 4, "batch_size": 4}
    data = hub(tmp_path / "rows", **settings)
    assert data.train_set.parts == 2
    alone = epochs(data, count=2)[0]
    for epoch in alone:
        assert sorted(flat(epoch)) == list(range(32))
    shared = epochs(hub(tmp_path / "rows", **{**settings, "batch_size": 2, "num_workers": 2}), ranks=2, count=2)
    for epoch in range(2):
        for whole, *of_ranks in zip(alone[epoch], shared[0][epoch], shared[1][epoch], strict=True):
            assert whole == flat([list(row) for row in zip(*of_ranks, strict=True)])


def test_the_index_of_a_streamed_sample_is_its_own(rows):
    def indices(**settings):
        data = hub(rows, streaming=True, epoch_length=40, **settings)
        batches = list(data.train_dataloader())
        return {level(p): int(i) for batch in batches for p, i in zip(batch["pixels"], batch["index"], strict=True)}

    assert indices() == indices(seed=3, shuffle_buffer=7)
    assert len(set(indices().values())) == 40


@pytest.mark.parametrize("make", [HuggingFaceData, WebDatasetData])
@pytest.mark.parametrize(
    ("setting", "least"),
    [("size", 1), ("max_pixels", 1), ("epoch_length", 1), ("val_length", 1), ("shuffle_buffer", 0), ("batch_size", 1)],
)
def test_settings_out_of_range_are_named(setting, least, make):
    make("rows", **{setting: least})
    with pytest.raises(
        ValueError, match=f"^{make.__name__}: {setting} must be an integer of at least {least}, got {least - 1}$"
    ):
        make("rows", **{setting: least - 1})
    with pytest.raises(
        ValueError, match=f"^{make.__name__}: {setting} must be an integer of at least {least}, got '8'$"
    ):
        make("rows", **{setting: "8"})


@pytest.mark.parametrize(("module", "make"), [("datasets", "huggingface"), ("webdataset", "webdataset")])
def test_a_missing_package_is_answered_with_its_extra(module, make, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    data = HuggingFaceData("rows") if make == "huggingface" else WebDatasetData("s.tar")
    with pytest.raises(ImportError, match=rf"Data needs the package '{module}'.*latentdm\[{make}\]"):
        data.setup()
