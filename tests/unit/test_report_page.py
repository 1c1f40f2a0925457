"""The page of a report, from what was found: charts that count right, texts that do nothing, files whole or not."""

import os

import pytest
import torch
from helpers import complains
from PIL import Image
from report_pages import check_form

from latentdm.preview.batch import Drawn
from latentdm.report import Findings, page, write
from latentdm.report.charts import histogram, rows, spread
from latentdm.report.page import SECTIONS, data_uri, visible

EVIL = "</pre><script>alert(1)</script>\u202e\u2066\x00\ud800 \"' {{ 1 }}"


def counts(chart):
    """Of each bar of a histogram."""
    return [int(bar.told.replace(",", "")) for bar in chart.bars]


@pytest.mark.parametrize(
    ("values", "settings"),
    [
        ([512], {"whole": True}),
        ([0, 0, 0], {"whole": True}),
        ([0.0, 100.0, 50.0, 99.99], {"limits": (0, 100)}),
        ([0.1 * n for n in range(101)], {}),
        (list(range(1000)), {"whole": True}),
        ([*range(100), 1_000_000], {"whole": True}),
        ([3.0, 3.0000001], {}),
        ([-5.5, 1e9], {}),
    ],
)
def test_every_value_is_in_a_bar_inside_the_chart(values, settings):
    chart = histogram("some", values, **settings)
    assert sum(counts(chart)) == len(values)
    assert len(chart.bars) <= 50
    assert [bar.end for bar in chart.bars] == [count / max(counts(chart)) for count in counts(chart)]
    assert {bar.start for bar in chart.bars} == {chart.zero} == {0}
    assert f"{len(values)} values" in chart.summary


def test_a_bar_holds_what_it_says():
    chart = histogram("some", [0, 4, 5, 5, 96, 100], "%", (0, 100))
    assert len(chart.bars) == 20
    held = {bar.name: bar.told for bar in chart.bars if bar.end}
    assert held == {"0 to 5%": "2", "5 to 10%": "2", "95 to 100%": "2"}


def test_few_that_are_far_away_do_not_flatten_the_rest():
    chart = histogram("characters", [*range(100), 1_000_000], whole=True)
    assert max(counts(chart)) < 30
    assert chart.bars[-1].name.endswith("and more")
    assert counts(chart)[-1] > 0
    assert "to 1,000,000" in chart.summary


def test_categories_have_rows_and_the_rarest_share_one():
    chart = rows("sizes", {f"{n} × {n}": n for n in range(1, 40)})
    assert len(chart.bars) == 24
    assert (chart.bars[-1].name, chart.bars[-1].told) == ("16 others", f"{sum(range(1, 17))}")
    assert max(bar.end for bar in chart.bars) == 1


@pytest.mark.parametrize("channels", [1, 4, 192])
def test_channels_lie_around_their_means(channels):
    mean, std = [0.5] * channels, [1.0] * channels
    chart = spread("latents", mean, std)
    assert len(chart.bars) == channels
    assert (chart.bars[-1].name, chart.bars[-1].told) == (f"channel {channels - 1}", "0.50 ± 1.00")
    assert chart.bars[0].start == pytest.approx(0.5 - 0.5 / 1.5 / 2)
    assert chart.bars[0].end == 1
    assert chart.bars[0].start < chart.zero < (chart.bars[0].start + chart.bars[0].end) / 2  # the mean is above 0


def test_channels_that_are_not_finite_have_no_bar():
    good, bad = spread("latents", [0.0, float("nan")], [1.0, float("inf")]).bars
    assert good.end > good.start
    assert (bad.start, bad.end, bad.told) == (0.5, 0.5, "nan ± inf")


def test_what_acts_unseen_is_written_out_and_scripts_keep_their_joiners():
    assert visible("a\u202eb\x00\ud800\u2069") == "a⟨U+202E⟩b⟨U+0000⟩⟨U+D800⟩⟨U+2069⟩"
    for text in ("a\nb\tc", "می\u200cخواهم", "אבג", "é — 😀"):
        assert visible(text) == text


def found(**settings):
    return Findings("train", 8, **settings)


def test_no_text_of_the_data_does_anything():
    drawn = Drawn(EVIL, {"image": torch.rand(1, 3, 8, 8)}, [EVIL], ["std 1"])
    texts = dict.fromkeys(("device", "ended", "summary", "notes"), EVIL)
    everything = found(
        **texts, drawn=[drawn], skipped={EVIL: EVIL}, said=[EVIL], alarms=[EVIL], on_error="raise", samples=1
    )
    text = page(everything, EVIL, EVIL)
    text.encode()
    parts = check_form(text)
    assert (
        "</pre><script>alert(1)</script>⟨U+202E⟩⟨U+2066⟩⟨U+0000⟩⟨U+D800⟩ \"' {{ 1 }}" in parts.sections["configuration"]
    )
    for name in ("check", "samples", "left-out", "costs", "versions"):
        assert "<script>" in parts.sections[name] or name == "costs", name


def test_a_name_that_is_written_from_the_right_does_not_turn_its_figures():
    drawn = Drawn("", {"image": torch.rand(1, 3, 8, 8)}, ["\u05d0\u05d1.png"], ["mask 20%"])
    assert "<h3><bdi>\u05d0\u05d1.png</bdi> · mask 20%</h3>" in page(found(drawn=[drawn], samples=1))


def test_a_text_of_any_length_is_cut():
    long = "x" * 1_000_000
    drawn = Drawn("", {"image": torch.rand(1, 3, 8, 8)}, [long], ["std 1"])
    assert len(page(found(drawn=[drawn], skipped={long: long}, said=[long], samples=1), "", "")) < 30_000


def test_every_section_is_there_though_nothing_was_found():
    parts = check_form(page(found(skipped={"a.png": "cannot read a.png"}, on_error="skip"), "seed: 0", "python 3"))
    assert list(parts.sections) == list(SECTIONS)
    told = {
        "samples": "none could be read",
        "masks": "No masks",
        "captions": "No captions",
        "latents": "Nothing was encoded",
        "left-out": "cannot read a.png",
        "costs": "nothing to estimate from",
    }
    for name, text in told.items():
        assert text in parts.sections[name]


def test_many_broken_samples_are_counted_and_the_first_are_told():
    parts = check_form(page(found(skipped={f"{n}.png": "no picture" for n in range(80)}, on_error="skip"), "", ""))
    assert parts.sections["left-out"].count("no picture") == 50
    assert "And 30 more." in parts.sections["left-out"]


def test_a_picture_is_as_short_as_it_can_be():
    flat, noise = Image.new("RGB", (64, 64), "red"), Image.effect_noise((64, 64), 90).convert("RGB")
    assert data_uri(flat).startswith("data:image/png;base64,")
    assert data_uri(noise).startswith("data:image/jpeg;base64,")


def test_a_page_is_written_whole_or_the_one_before_stays(tmp_path):
    path = tmp_path / "sub" / "report.html"
    write(path, "first\n")
    assert path.read_bytes() == b"first\n"
    if os.path.exists("/dev/full"):
        (path.parent / ".report.html.part").symlink_to("/dev/full")
        with complains(f"--output {path}: cannot write it: No space left on device"):
            write(path, "second" * 10_000)
        assert path.read_bytes() == b"first\n"
    assert os.listdir(path.parent) == ["report.html"]
    (tmp_path / "file").touch()
    with complains("cannot write it"):
        write(tmp_path / "file" / "report.html", "")
