"""Samples of tar shards: which file is what, ids of their own, and a text that breaks no other sample."""

import json
import tarfile

import pytest
from PIL import Image
from running import add_file

from latentdm.data import SampleError, WebDatasetData

BAD_TEXTS = {
    "no JSON": ("json", b"{broken"),
    "no UTF-8": ("txt", b"caf\xe9"),
    "UTF-16": ("txt", "a caption".encode("utf-16")),
    "deep nesting": ("json", b"[" * 50_000),
    "a huge integer": ("json", b'{"n": ' + b"9" * 5000 + b"}"),
    "an integer of 65 bits": ("json", b'{"n": 18446744073709551616}'),
    "half a character": ("json", rb'"\ud83d"'),
    "a number": ("json", b"5"),
    "a caption that is none": ("json", b'{"caption": 5}'),
    "a class that is none": ("cls", b"cat"),
    "a class too large": ("cls", b"9" * 5000),
    "a class of 65 bits": ("cls", b"18446744073709551616"),
}


def add(tar, name, content):
    """Like `add_file`, for bytes too."""
    if isinstance(content, bytes):
        import io

        info = tarfile.TarInfo(name)
        info.size = len(content)
        tar.addfile(info, io.BytesIO(content))
    else:
        add_file(tar, name, content)


def picture(level, mode="RGB"):
    return Image.new(mode, (8, 8), (level,) * 3 if mode == "RGB" else level)


def write(path, files):
    with tarfile.open(path, "w") as tar:
        for name, content in files.items():
            add(tar, name, content)
    return str(path)


def loaded(*shards, **settings):
    usual = {"size": 8, "batch_size": 1, "epoch_length": 8, "shuffle_buffer": 0, "max_skipped_share": 1}
    data = WebDatasetData(list(shards), **{**usual, **settings})
    data.setup()
    return data


def samples(*shards, **settings):
    """The samples of one pass, by their names without the shard's."""
    batches = loaded(*shards, **settings).train_dataloader()
    return {batch["name"][0].rpartition("/")[2]: {key: value[0] for key, value in batch.items()} for batch in batches}


# -------------------------------------------------------------------- which file is what


def test_two_pictures_of_one_name_are_an_error_until_columns_say_which(tmp_path):
    files = {f"{n}.{ending}": picture(n + 50 * (ending == "png")) for n in range(4) for ending in ("jpg", "png")}
    shard = write(tmp_path / "s.tar", files)
    message = (
        r"^WebDatasetData: cannot read .*s.tar/0: its files png and jpg may both be its image; say which is, as in"
    )
    with pytest.raises(SampleError, match=message + r" columns=\{image: png\}$"):
        samples(shard)
    with pytest.raises(RuntimeError, match="columns="):  # none is left
        samples(shard, on_error="skip", epoch_length=2)
    for columns in ({"image": "jpg", "mask": "png"}, {"mask": "png"}):
        found = samples(shard, columns=columns, epoch_length=4)
        assert {int(sample["pixels"].max()) // 10 for sample in found.values()} == {0}
        assert {int(sample["mask"].max()) for sample in found.values()} == {50, 51, 52, 53}
    assert all("mask" not in sample for sample in samples(shard, columns={"image": "png"}).values())


@pytest.mark.parametrize("ending", ["mask.png", "masklabel.png", "masks.tif", "MASK.PNG"])
def test_usual_endings_of_masks(tmp_path, ending):
    shard = write(tmp_path / "s.tar", {"0.jpg": picture(9), f"0.{ending}": picture(70, "L")})
    assert int(samples(shard, epoch_length=1)["0"]["mask"].max()) == 70


def test_two_masks_are_an_error(tmp_path):
    shard = write(tmp_path / "s.tar", {"0.jpg": picture(9), "0.mask.png": picture(1), "0.masks.png": picture(1)})
    with pytest.raises(SampleError, match=r"its files mask.png and masks.png may both be its mask"):
        samples(shard)


@pytest.mark.parametrize("name", ["1-mask", "1_mask", "1_seg", "masks/1", "1_mask_2"])
def test_a_mask_with_a_name_of_its_own_is_never_trained_on(tmp_path, name):
    files = {"0.png": picture(1), "1.png": picture(2), f"{name}.png": picture(70), "2.png": picture(3)}
    for order in (files, dict(sorted(files.items()))):
        shard = write(tmp_path / "s.tar", order)
        with pytest.raises(
            SampleError, match=rf"s.tar/{name}: it is called like a mask .* of 1; call it 1.mask.png to"
        ):
            samples(shard)
        assert set(samples(shard, on_error="skip")) == {"0", "1", "2"}
    data = loaded(shard, columns={"image": "png"})
    assert {int(batch["pixels"].max()) for batch in data.train_dataloader()} == {1, 2, 3, 70}


def test_files_that_are_left_out_are_told_once(tmp_path, caplog):
    files = {f"{n}.{ending}": picture(n) for n in range(3) for ending in ("png", "depth.png", "npy", "mask.png")}
    shard = write(tmp_path / "s.tar", {**files, "2.__key__": b"x", "2.__twice__": b"y"})
    with caplog.at_level("INFO"):
        assert set(samples(shard, columns={"depth": "depth.exr"})) == {"0", "1", "2"}
    told = [line for line in caplog.messages if "left out" in line]
    assert told == [
        f"WebDatasetData: left out of shards: files ending in .{ending}"
        for ending in ("depth.png", "npy", "__key__", "__twice__")
    ]


def test_a_gas_mask_in_a_shard(tmp_path):
    shard = write(tmp_path / "s.tar", {"0.png": picture(1), "gas_mask.png": picture(2)})
    assert set(samples(shard)) == {"0", "gas_mask"}


def test_captions(tmp_path):
    files = {
        "bom.png": picture(1), "bom.txt": "\ufeff a caption \n".encode(),
        "sd.png": picture(2), "sd.caption": "another",
        "all.png": picture(3), "all.txt": "a", "all.json": {"caption": ["b", "a"], "text": "c", "latents": 1, "n": 7},
        "none.png": picture(4),
    }  # fmt: skip
    shard = write(tmp_path / "s.tar", files)
    found = samples(shard, epoch_length=4)
    assert found["bom"]["caption"] == "a caption"
    assert found["sd"]["caption"] == "another"
    assert (found["all"]["text"], int(found["all"]["n"])) == ("c", 7)
    assert "latents" not in found["all"]
    assert "caption" not in found["none"]
    data = loaded(shard, epoch_length=4)
    loader, drawn = data.train_dataloader(), set()
    for epoch in range(20):
        loader.sampler.set_epoch(epoch)
        drawn |= {batch["caption"][0] for batch in loader if batch["name"][0].endswith("/all")}
    assert drawn == {"a", "b"}
    assert samples(shard, columns={"caption": "json"}, epoch_length=4)["all"]["caption"] in ("a", "b")
    assert samples(shard, columns={"caption": "caption"}, epoch_length=4).keys() == found.keys()


# -------------------------------------------------------------------- ids


def test_names_that_begin_anew_in_each_shard_have_ids_of_their_own(tmp_path):
    files = {f"{n:03}.png": picture(n) for n in range(3)}
    shards = [write(tmp_path / f"s-{n}.tar", files) for n in range(2)]
    (tmp_path / "other").mkdir()
    shards.append(write(tmp_path / "other" / "s-0.tar", files))
    ids = [int(batch["index"]) for batch in loaded(*shards, epoch_length=9).train_dataloader()]
    assert len(set(ids)) == 9
    again = [int(batch["index"]) for batch in loaded(*shards, epoch_length=9, seed=3, num_workers=1).train_dataloader()]
    assert set(again) == set(ids)


# -------------------------------------------------------------------- one text


@pytest.mark.parametrize(("ending", "content"), BAD_TEXTS.values(), ids=BAD_TEXTS)
def test_a_broken_text_is_its_sample_s_alone(tmp_path, ending, content):
    files = {}
    for number in range(5):
        files |= {f"{number}.png": picture(number), f"{number}.{ending}": content if number == 1 else "7"}
        if ending == "json" and number != 1:
            files[f"{number}.json"] = {"caption": "good"}
    shard = write(tmp_path / "s.tar", files)
    with pytest.raises(SampleError, match=rf"^WebDatasetData: cannot read .*s.tar/1\.{ending}: ") as caught:
        samples(shard, epoch_length=5)
    assert len(str(caught.value)) < 400
    data = loaded(shard, epoch_length=5, on_error="skip")
    names = [batch["name"][0].rpartition("/")[2] for batch in data.train_dataloader()]
    assert names == ["0", "2", "2", "3", "4"]  # one replaces it, and comes in its own turn as well
    assert list(data.skips.read()) == [next(iter(data.skips.read().values()))]
    assert f"1.{ending}" in data.skips.report()


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("broken", [{1, 2}, {0, 1, 3}, {2, 3, 4}])
def test_samples_in_a_row_that_cannot_be_read_are_each_replaced_by_the_next_that_can(tmp_path, broken, workers):
    files = {f"{number}.png": b"no image" if number in broken else picture(number) for number in range(7)}
    shard = write(tmp_path / "s.tar", files)
    data = loaded(shard, epoch_length=6, on_error="skip", num_workers=workers)
    names = [int(batch["name"][0].rpartition("/")[2]) for batch in data.train_dataloader()]
    assert names == [min(set(range(number, 7)) - broken) for number in range(6)]
    assert len(data.skips.read()) == len(broken)


def test_a_file_twice_is_its_sample_s_alone(tmp_path):
    with tarfile.open(tmp_path / "s.tar", "w") as tar:
        for name in ("0.png", "1.png", "1.PNG", "2.png"):
            add(tar, name, picture(1))
        add(tar, "3.txt", json.dumps("of no image"))
        add(tar, "4.png", picture(1))
    data = loaded(str(tmp_path / "s.tar"), epoch_length=5, on_error="skip")
    assert [batch["name"][0][-1] for batch in data.train_dataloader()] == ["0", "2", "2", "4", "4"]
    assert "s.tar/1: it has two files ending in .png; remove one" in data.skips.report()
    assert "s.tar/3: it has no image" in data.skips.report()
