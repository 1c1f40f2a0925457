"""Texts about images: every caption as it was written, several of them, and what is wrong with one is that sample's."""

import csv
import io
import json
from collections import Counter
from itertools import count

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image
from running import quiet_datasets

from latentdm import LatentDataModule, PlainEncoder
from latentdm.batch import EPOCH
from latentdm.data import HuggingFaceData, ImageFolderData, SampleError
from latentdm.data.metadata import read_metadata, read_sidecar

NAMES = ("0.png", "1.png", "2.png")


@pytest.fixture
def root(tmp_path):
    """Three images."""
    for number, name in enumerate(NAMES):
        Image.new("RGB", (8, 8), (number, 0, 0)).save(tmp_path / name)
    return tmp_path


def loaded(root, **settings):
    data = ImageFolderData(root, **{"size": 8, "batch_size": 3, "val_share": 0, "max_skipped_share": 1, **settings})
    data.setup()
    return data


def samples(root, **settings):
    return {sample["name"]: sample for sample in loaded(root, **settings).predict_set}


def captions(root, **settings):
    return {name: sample.get("caption") for name, sample in samples(root, **settings).items()}


def skipped(root, **settings):
    """The names that an epoch under ``skip`` brings, and the report."""
    data = loaded(root, on_error="skip", **settings)
    seen = {name for batch in data.predict_dataloader() for name in batch["name"]}
    return seen, data.skips.report()


def json_lines(*rows):
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def written_csv(rows, **how):
    file = io.StringIO(newline="")
    writer = csv.writer(file, **how)
    writer.writerows(rows)
    return file.getvalue()


# -------------------------------------------------------------------- as they are written


LINE_BREAKS = "one\u2028two\u2029three\x85four\x0bfive\x0csix\x1cseven\reight\nnine\r\nten"


def test_no_line_break_but_a_line_feed_ends_a_row(root):
    rows = [{"file_name": name, "text": f"{number}: {LINE_BREAKS}"} for number, name in enumerate(NAMES)]
    (root / "metadata.jsonl").write_bytes(json_lines(*rows).encode())
    expected = {row["file_name"]: row["text"] for row in rows}
    assert captions(root) == expected
    (root / "metadata.jsonl").unlink()
    content = written_csv([["file_name", "text"], *(row.values() for row in rows)])
    (root / "metadata.csv").write_bytes(content.encode())
    assert captions(root) == expected


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_quoted_fields_of_csv(root, newline):
    lines = ["file_name,text,score", '0.png,"a, b",1', '1.png,"say ""a""', 'and b",2', '"2.png",5" nails,', ""]
    (root / "metadata.csv").write_bytes(newline.join(lines).encode())
    assert captions(root) == {"0.png": "a, b", "1.png": f'say "a"{newline}and b', "2.png": '5" nails'}
    assert [sample["score"] for sample in samples(root).values()] == ["1", "2", ""]


def test_a_field_of_csv_may_be_long(root):
    text = "word " * 100_000
    (root / "metadata.csv").write_text(written_csv([["file_name", "text"], ["0.png", text]]))
    before = csv.field_size_limit()
    assert captions(root)["0.png"] == text
    assert csv.field_size_limit() == before


def test_a_parquet_file_and_one_of_sd_scripts(root):
    rows = {"file_name": list(NAMES), "text": ["a", "b", None], "score": [0.5, 1.5, None]}
    table = pa.table({**rows, "image": [b"x"] * 3})
    pq.write_table(table, root / "metadata.parquet")
    found = samples(root)
    assert {name: (sample["caption"], sample["score"]) for name, sample in found.items()} == {
        "0.png": ("a", 0.5), "1.png": ("b", 1.5), "2.png": ("", None),
    }  # fmt: skip
    (root / "metadata.parquet").unlink()
    content = {
        "/data/train/0": {"caption": "a cat", "tags": "cat, grass", "train_resolution": [8, 8]},
        "C:\\train\\1.png": {"tags": "dog"},
        str(root / "2.png"): {"caption": "a bird"},
        "/data/train/9.png": {"caption": "of another folder"},
    }
    (root / "meta_cap.json").write_text(json.dumps(content))
    data = loaded(root)
    assert {s["name"]: s["caption"] for s in data.predict_set} == {
        "0.png": "a cat, cat, grass", "1.png": "dog", "2.png": "a bird",
    }  # fmt: skip
    assert "1 row of meta_cap.json on images that are not here (/data/train/9.png)" in data.notes()


def test_captions_by_the_names_of_images(root):
    (root / "metadata.json").write_text(json.dumps({"0.png": "a", "1": "b"}))
    assert captions(root) == {"0.png": "a", "1.png": "b", "2.png": ""}


@pytest.mark.parametrize("mask", ["x" * 5000, "a\0b", "no.png", ["a.png"], "in", {"a": 1}])
def test_a_mask_that_is_none_is_its_image_s_error(root, mask):
    (root / "in").mkdir()
    rows = [{"file_name": name, "text": "a", **({"mask": mask} if name == "0.png" else {})} for name in NAMES]
    (root / "metadata.jsonl").write_text(json_lines(*rows))
    with pytest.raises(ValueError, match=r"metadata.jsonl, line 1 names the mask .*, which does not exist") as caught:
        loaded(root)
    assert len(str(caught.value)) < 600
    seen, report = skipped(root)
    assert seen == {"1.png", "2.png"}
    assert "names the mask" in report


def test_json_that_describes_no_images_is_left_out(root):
    (root / "metadata.json").write_text(json.dumps({"info": {"year": 2024}, "licenses": {}}))
    (root / "meta_data.json").write_text("[1, 2]")
    data = loaded(root, on_error="skip")
    assert "left out: 1 .json (metadata.json)" in data.notes()
    assert data.problems() == [
        f"{root}/meta_data.json, row {n}: a row must have a column 'file_name', got {n}; correct or remove it"
        for n in (1, 2)
    ]


def test_a_json_file_with_the_name_of_an_image_is_of_that_image(root):
    (root / "0.png").rename(root / "meta_0.png")
    (root / "meta_0.json").write_text(json.dumps({"text": "of one"}))
    assert captions(root)["meta_0.png"] == "of one"


@pytest.mark.parametrize("ending", ["txt", "TXT", "caption", "png.txt"])
def test_text_files(root, ending):
    (root / f"0.{ending}").write_bytes("\ufeff  two\nlines\u2028 \n".encode())
    assert captions(root) == {"0.png": "two\nlines", "1.png": "", "2.png": ""}


def test_labelme_is_recognised(root):
    polygon = {"shapes": [{"label": "cat", "points": [[0, 0], [1, 1], [1, 0]]}], "imagePath": "0.png", "imageData": "x"}
    for number in range(3):
        (root / f"{number}.json").write_text(json.dumps(polygon))
    data = loaded(root)
    assert data.notes() == "left out: 3 files (0.json) of labelme, whose polygons are not read (export masks)"
    assert set(data.predict_set[0]) == {
        "pixels", "index", "name", "original_size", "crop_top_left", "target_size",
    }  # fmt: skip
    assert read_sidecar(root / "0.json", "0.json") == {}


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "latin-1"])
@pytest.mark.parametrize("name", ["metadata.jsonl", "metadata.csv", "0.txt", "0.json"])
def test_another_encoding_is_named(root, name, encoding):
    content = {"metadata.jsonl": json_lines({"file_name": "0.png", "text": "Schloß"}), "0.json": '"Schloß"'}
    text = content.get(name, "file_name,text\n0.png,Schloß\n")
    (root / name).write_bytes(text.encode(encoding))
    with pytest.raises(ValueError, match=rf"ImageFolderData: .*{name}.*(UTF-8|no CSV|no JSON|must have a column)"):
        list(loaded(root).predict_set)


@pytest.mark.parametrize("name", ["metadata.jsonl", "metadata.csv", "0.txt", "0.json"])
@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be"])
def test_utf_16_without_a_mark_is_told_by_its_zeros(root, name, encoding):
    content = {"metadata.jsonl": json_lines({"file_name": "0.png", "text": "a cat"}), "0.json": '"a cat"'}
    (root / name).write_bytes(content.get(name, "file_name,text\n0.png,a cat\n").encode(encoding))
    with pytest.raises(ValueError, match=rf"{name}.*(UTF-16; save it as UTF-8|no JSON)"):
        list(loaded(root).predict_set)
    (root / name).unlink()
    (root / "0.txt").write_bytes(b"a\0b")  # an odd character, and one only
    assert loaded(root).predict_set[0]["caption"] == "a\0b"


@pytest.mark.parametrize(("name", "content"), [("metadata.csv", "file_name,text\n"), ("metadata.jsonl", "\n")])
def test_metadata_without_rows_are_told(root, name, content):
    (root / name).write_text(content)
    assert loaded(root).notes() == f"{name} has no rows"


# -------------------------------------------------------------------- round trips


unicode_texts = st.text(st.characters(exclude_categories=["Cs"]))
fast = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
numbers = count()


@fast
@given(st.lists(unicode_texts, min_size=1, max_size=5))
@example(["\ufeff", "\u2028", '"', "\r", "\n", "\0", "\x1a", ""])
@example([LINE_BREAKS, '""', ",", "'", "\\", " ", "\ud7ff\ue000\U0010ffff"])
def test_every_caption_comes_through_json_lines_and_csv(tmp_path, texts):
    rows = [{"file_name": f"{number}.png", "text": text} for number, text in enumerate(texts)]
    lines, table, ascii_lines = tmp_path / "a.jsonl", tmp_path / "a.csv", tmp_path / "b.jsonl"
    lines.write_bytes(json_lines(*rows).encode())
    ascii_lines.write_bytes("".join(json.dumps(row) + "\n" for row in rows).encode())
    table.write_bytes(written_csv([["file_name", "text"], *(row.values() for row in rows)]).encode())
    for path in (lines, ascii_lines, table):
        found = list(read_metadata(path))
        assert [row.problem for row in found] == [""] * len(texts)
        assert [row.name for row in found] == [row["file_name"] for row in rows]
        assert [row.columns["caption"] for row in found] == texts


@fast
@given(unicode_texts)
@example(LINE_BREAKS)
def test_every_caption_comes_through_a_file_of_its_own(tmp_path, text):
    for ending, content in {"txt": text, "json": json.dumps(text), "caption": f"\ufeff{text}"}.items():
        path = tmp_path / f"a.{ending}"
        path.write_bytes(content.encode())
        expected = text if ending == "json" else text.removeprefix("\ufeff" if ending == "txt" else "").strip()
        assert read_sidecar(path, path.name)["caption"] == expected
        assert read_sidecar(content.encode(), path.name) == read_sidecar(path, path.name)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(texts=st.lists(unicode_texts.filter(bool), min_size=3, max_size=3))
def test_every_caption_comes_through_a_folder(tmp_path_factory, texts):
    root = tmp_path_factory.mktemp("captions")
    rows = [["file_name", "text"], *([name, text] for name, text in zip(NAMES, texts, strict=True))]
    (root / "metadata.csv").write_bytes(written_csv(rows).encode())
    for name in NAMES:
        Image.new("RGB", (2, 2)).save(root / name)
    assert list(captions(root, size=2).values()) == texts


# -------------------------------------------------------------------- several captions


def drawn(data, position, epochs=range(60)):
    return [data.train_set[position, epoch]["caption"] for epoch in epochs]


def several(root, how):
    rows = [{"file_name": "0.png", "text": text, "number": number} for number, text in enumerate("abc")]
    if how == "rows":
        (root / "metadata.jsonl").write_text(json_lines(*rows))
    elif how == "csv":
        (root / "metadata.csv").write_text(written_csv([["file_name", "text"], *(["0.png", t] for t in "abca")]))
    elif how == "a list":
        (root / "metadata.jsonl").write_text(json_lines({"file_name": "0.png", "text": ["a", "b", "c"]}))
    elif how == "two files":
        (root / "metadata.jsonl").write_text(json_lines(rows[0]))
        (root / "metadata.csv").write_text(written_csv([["file_name", "text"], ["0.png", "b"], ["0.png", "c"]]))
    elif how == "files beside":
        (root / "0.txt").write_text("a")
        (root / "0.caption").write_text("b")
        (root / "0.json").write_text(json.dumps({"caption": ["c", "a"]}))
    else:
        (root / "metadata.jsonl").write_text(json_lines(*rows[:2]))
        (root / "0.txt").write_text("c")
    return loaded(root)


HOWS = ["rows", "csv", "a list", "two files", "files beside", "rows and a file"]


@pytest.mark.parametrize("how", HOWS)
def test_several_captions_are_kept_and_one_is_drawn(root, how):
    data = several(root, how)
    seen = Counter(drawn(data, 0))
    assert set(seen) == {"a", "b", "c"}
    assert min(seen.values()) >= 8
    assert drawn(data, 0) == drawn(loaded(root), 0)  # by seed, epoch and index
    assert drawn(data, 0) != drawn(loaded(root, seed=1), 0)
    first = {data.predict_set[0, epoch]["caption"] for epoch in range(20)}
    assert len(first) == 1  # nothing is drawn outside training
    assert set(drawn(data, 1)) == {""}


def test_a_caption_comes_with_the_columns_of_its_row(root):
    data = several(root, "rows")
    for epoch in range(20):
        sample = data.train_set[0, epoch]
        assert "abc"[sample["number"]] == sample["caption"]


def test_the_draw_is_the_sample_s_own(root):
    for name in NAMES:
        with (root / "metadata.jsonl").open("a") as file:
            file.write(json_lines(*({"file_name": name, "text": text} for text in "abcdefgh")))
    data = loaded(root)
    assert len({tuple(drawn(data, position)) for position in range(3)}) == 3
    batches = [
        dict(zip(batch["name"], batch["caption"], strict=True))
        for workers in (0, 1)
        for batch in loaded(root, num_workers=workers).train_dataloader()
    ]
    assert batches[0] == batches[1]


def test_several_captions_of_a_data_set(tmp_path):
    images = [Image.new("RGB", (8, 8))] * 2
    features = datasets.Features(
        {"image": datasets.Image(), "caption": datasets.Sequence(datasets.Value("string")), "n": datasets.Value("int8")}
    )
    with quiet_datasets():
        content = {"image": images, "caption": [["a", "b"], []], "n": [1, 2]}
        datasets.Dataset.from_dict(content, features).save_to_disk(tmp_path / "rows")
    data = HuggingFaceData(str(tmp_path / "rows"), size=8, val_share=0)
    data.setup()
    assert set(drawn(data, 0)) == {"a", "b"}
    assert {data.predict_set[0, epoch]["caption"] for epoch in range(9)} == {"a"}
    assert data.train_set[1]["caption"] is None


def test_rows_of_one_image_with_different_masks_are_an_error(root):
    for name in ("a", "b"):
        Image.new("L", (8, 8)).save(root / f"{name}.tif")
    rows = [{"file_name": "0.png", "mask": f"{name}.tif", "text": name} for name in "ab"]
    rows += [{"file_name": name, "mask": "a.tif"} for name in NAMES[1:]]
    (root / "metadata.jsonl").write_text(json_lines(*rows))
    message = r"metadata.jsonl, line 2 names another mask of 0.png than .*metadata.jsonl, line 1 does, b.tif and not a"
    with pytest.raises(ValueError, match=message):
        loaded(root)
    seen, report = skipped(root)
    assert "0.png" not in seen
    assert "names another mask of 0.png" in report


# -------------------------------------------------------------------- what is wrong with one text is that sample's

DEEP = "[" * 50_000 + "]" * 50_000
BROKEN_ROWS = {
    "a huge integer": ('{"file_name": "0.png", "text": "a", "n": 99999999999999999999}', "has more than 64 bits"),
    "a huger one": (f'{{"file_name": "0.png", "text": "a", "n": {"9" * 5000}}}', "has more than 64 bits"),
    "2 to the 63rd": ('{"file_name": "0.png", "text": "a", "n": [9223372036854775808]}', "has more than 64 bits"),
    "half a character": (r'{"file_name": "0.png", "text": "a\ud83d"}', "half a character"),
    "half a character in a key": (r'{"file_name": "0.png", "\udc00": "a"}', "half a character"),
    "half a character in a name": (r'{"file_name": "0.png\ud83d"}', "half a character"),
    "half a character deep inside": (r'{"file_name": "0.png", "x": [{"y": "\ud83d"}]}', "half a character"),
    "deep nesting": (f'{{"file_name": "0.png", "x": {DEEP}}}', "nested too deep"),
    "nesting": (f'{{"file_name": "0.png", "x": {"[" * 40}{"]" * 40}}}', "nested more than 32 levels"),
    "a key twice": ('{"file_name": "0.png", "text": "a", "text": "b"}', "'text' is there twice"),
    "no JSON": ('{"file_name": "0.png", "text": a}', "is no JSON"),
    "a number for a caption": ('{"file_name": "0.png", "text": 5}', "must be a text or a list of texts, got 5"),
    "an object for a caption": ('{"file_name": "0.png", "text": {"en": "a"}}', "must be a text or a list of texts"),
    "a list with another one": ('{"file_name": "0.png", "text": ["a", null]}', "must be a text or a list of texts"),
    "no object": ('["0.png", "a"]', "a row must have a column 'file_name'"),
    "no name": ('{"file_name": null, "text": "a"}', "a row must have a column 'file_name'"),
}


@pytest.mark.parametrize(("row", "message"), BROKEN_ROWS.values(), ids=BROKEN_ROWS)
def test_a_broken_row(root, row, message):
    good = {"file_name": "1.png", "text": "good"}, {"file_name": "2.png", "text": "good as well"}
    (root / "metadata.jsonl").write_text(json_lines(good[0]) + row + "\n" + json_lines(good[1]))
    with pytest.raises(ValueError, match=rf"^ImageFolderData: .*metadata.jsonl, line 2.*{message}") as caught:
        loaded(root)
    assert len(str(caught.value)) < 600  # what it quotes is cut
    data = loaded(root, on_error="skip")
    batches = list(data.predict_dataloader())
    told = {n: text for batch in batches for n, text in zip(batch["name"], batch["caption"], strict=True)}
    assert told.items() >= {"1.png": "good", "2.png": "good as well"}.items()
    assert message in data.skips.report()
    if '"file_name": "0.png",' in row:
        assert "0.png" not in told
    else:
        assert told["0.png"] == ""  # nobody knows whose row it is


OF_ONE = {
    what: ("0.json", row.replace('"file_name": "0.png", ', "").encode(), message)
    for what, (row, message) in BROKEN_ROWS.items()
    if '"file_name": "0.png",' in row
}
OF_ONE["no UTF-8"] = ("0.txt", b"caf\xe9", "it is not UTF-8")


@pytest.mark.parametrize(("name", "content", "message"), OF_ONE.values(), ids=OF_ONE)
def test_a_broken_file_beside_an_image(root, name, content, message):
    (root / name).write_bytes(content)
    with pytest.raises(SampleError, match=rf"^ImageFolderData: cannot read .*{name}: .*{message}"):
        list(loaded(root).predict_set)
    seen, report = skipped(root)
    assert seen == {"1.png", "2.png"}
    assert message in report


def test_more_cells_than_names(root):
    (root / "metadata.csv").write_text("file_name,text\n0.png,a, b\n1.png,good\n2.png\n")
    with pytest.raises(ValueError, match=r"metadata.csv, line 2 has 3 cells where the first line names 2; put quotes"):
        loaded(root)
    data = loaded(root, on_error="skip")
    told = {n: t for batch in data.predict_dataloader() for n, t in zip(batch["name"], batch["caption"], strict=True)}
    assert told == {"1.png": "good", "2.png": ""}
    assert "line 2 has 3 cells" in data.skips.report()
    assert all(None not in sample for sample in data.predict_set)


def test_quotes_that_do_not_match(root):
    (root / "metadata.csv").write_text('file_name,text\n0.png,"a" b\n1.png,good\n2.png,"never ends\n')
    with pytest.raises(ValueError, match=r"metadata.csv, line 2: it is no CSV \(.*\); repair it, with quotes in pairs"):
        loaded(root)
    data = loaded(root, on_error="skip")
    assert data.predict_set[1]["caption"] == "good"
    assert ["line 2:" in problem or "line 4:" in problem for problem in data.problems()] == [True, True]


def test_the_head_of_a_csv_file(root):
    (root / "metadata.csv").write_text("file_name;text\n0.png;a\n")
    with pytest.raises(ValueError, match=r"line 2: a row must have a column 'file_name', .*separate columns by commas"):
        loaded(root)
    (root / "metadata.csv").write_text("file_name,text,text\n0.png,a,b\n")
    with pytest.raises(ValueError, match=r"line 1: two columns have the name 'text'; rename one"):
        loaded(root)
    (root / "metadata.csv").write_text("image_path, prompt\n.\\0.png, a\n")
    assert captions(root, columns={"image": "image_path", "caption": "prompt"})["0.png"] == " a"


def test_latin_1_in_one_row_of_csv(root):
    (root / "metadata.csv").write_bytes(b"file_name,text\n0.png,caf\xe9\n1.png,good\n")
    with pytest.raises(ValueError, match=r"metadata.csv, line 2: it is not UTF-8"):
        loaded(root)
    seen, report = skipped(root)
    assert seen == {"1.png", "2.png"}
    assert "line 2: it is not UTF-8" in report


# -------------------------------------------------------------------- columns with names of ours


@pytest.mark.parametrize(
    "column", ["latents", "name", "index", "pixels", "noise_mask", "crop_top_left", EPOCH, "cached", ""]
)
@pytest.mark.parametrize("where", ["metadata.csv", "0.json"])
def test_a_column_with_a_name_of_ours_is_left_out_with_a_word(root, vae, column, where):
    if where == "0.json":
        (root / where).write_text(json.dumps({"text": "a", column: "theirs", "other": "kept"}))
    else:
        rows = [["file_name", "text", column, "other"], ["0.png", "a", "theirs", "kept"]]
        (root / where).write_text(written_csv(rows))
    data = loaded(root, on_error="skip")
    sample = data.predict_set[0]
    assert (sample["name"], sample["index"], sample["caption"], sample["other"]) == ("0.png", 0, "a", "kept")
    assert isinstance(sample["pixels"], torch.Tensor)
    assert "theirs" not in sample.values()
    if where != "0.json":
        assert f"columns '{column}', whose names a batch has for something else" in data.notes()
    latents = LatentDataModule(data, PlainEncoder(vae))
    assert latents.process(next(iter(data.predict_dataloader())), "cpu")["latents"].ndim == 4
    if column:
        mine = loaded(root, columns={"mine": column}).predict_set[0]
        assert mine["mine"] == "theirs"


def test_a_column_of_a_user_s_beside_the_usual_one(root):
    (root / "metadata.jsonl").write_text(json_lines({"file_name": "0.png", "caption": "a", "prompt": "b"}))
    sample = samples(root, columns={"caption": "prompt"})["0.png"]
    assert sample["caption"] == "b"
    assert "prompt" not in sample
