"""The benchmarks' runner: rows found in every module, and how they are printed. What they measure takes minutes."""

import json
import os
import sys
from contextlib import nullcontext

import pytest
import torch

import benchmarks.gpu
import benchmarks.run
from benchmarks import encoder, models
from benchmarks.peers import InpaintScript
from benchmarks.rows import ROWS, Row, interleaved, own_processes, row
from latentdm.frozen.weights import computes_bfloat16


@pytest.fixture
def command(monkeypatch, capsys):
    """Runs a script of the benchmarks in this process; its exit status, what it printed and what it complained of."""

    def run(script, *arguments):
        monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", *arguments])
        status = 0
        try:
            script.main()
        except SystemExit as ended:
            status = ended.code
        return status, *capsys.readouterr()

    return run


def test_rows_of_all_modules_are_found(command):
    status, printed, _ = command(benchmarks.run, "--list")
    assert status == 0
    assert "callbacks_overhead_pct" in printed.splitlines()


def test_an_unknown_row_is_answered_with_those_there_are(command):
    status, _, complaint = command(benchmarks.run, "--only", "speed")
    assert status == 2
    assert "no row 'speed'" in complaint
    assert "callbacks_overhead_pct" in complaint


def test_a_row_is_a_line_of_json():
    line = Row("decode_ms", "ms", "the same in float32", lambda quick: 1.23456 if quick else 2.0).line(quick=True)
    assert json.loads(line) == {"name": "decode_ms", "value": 1.235, "unit": "ms", "versus": "the same in float32"}
    assert "\n" not in line


def test_each_row_has_the_threads_that_torch_began_with():
    threads = torch.get_num_threads()

    def measure(quick):
        torch.set_num_threads(threads + 1)
        return 1.0

    Row("one", "s", "nothing", measure).line(quick=True)
    assert torch.get_num_threads() == threads


def test_names_are_given_once(monkeypatch):
    monkeypatch.setattr("benchmarks.rows.ROWS", rows := {})
    register = row("one_ms", "ms", "nothing")
    assert register(len) is len
    assert list(rows) == ["one_ms"]
    with pytest.raises(ValueError, match="two rows are called 'one_ms'"):
        register(len)
    assert "one_ms" not in ROWS


def test_functions_take_turns():
    order = []
    seconds = interleaved({"a": lambda: order.append("a"), "b": lambda: order.append("b") or 7.0}, rounds=3)
    assert order == ["a", "b", "b", "a", "a", "b"]
    assert seconds["b"] == [7.0] * 3
    assert all(0 <= second < 1 for second in seconds["a"])


def test_a_batch_is_as_the_data_modules_yield_it():
    batch = models.batch(2, 64)
    assert {name: tuple(value.shape) for name, value in batch.items()} == {
        "pixels": (2, 3, 64, 64),
        "mask": (2, 1, 64, 64),
        "index": (2,),
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_script_encodes_in_its_own_precision(dtype):
    autoencoder = models.demo()
    script = InpaintScript(autoencoder, models.batch(2, 32), dtype)
    seen = []
    script.vae.encoder.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    latents, masked, mask = script.inpaint()
    assert [images.dtype for images in seen] == [dtype] * 2  # two calls
    assert latents.shape == masked.shape == (2, 4, 4, 4)
    assert mask.shape == (2, 1, 4, 4)
    assert next(autoencoder.parameters()).dtype == torch.float32  # the other ways encode with it


@pytest.mark.parametrize(
    ("default", "others", "expected"),
    [
        (2, {}, 1.0),  # the default is one of those that it is compared with
        (2, {"8": 0.5}, 0.5),
        (2, {"8": 2.0}, 1.0),
        (3, {}, 1.0),  # and here it is none of them
        (3, {"8": 0.5}, 0.5),
    ],
)
def test_the_default_chunk_is_compared_with_the_best(default, others, expected, monkeypatch):
    def made_up(ways, rounds):
        seconds = {way: 1.0 if way == str(default) else 1.5 for way in ways} | others
        return {way: [seconds[way]] * rounds for way in ways}

    monkeypatch.setattr("benchmarks.encoder.interleaved", made_up)
    monkeypatch.setattr("benchmarks.encoder.own_processes", nullcontext)
    monkeypatch.setattr("benchmarks.encoder.default_chunk", lambda dtype, side: default)
    assert encoder.chunk_ratio.__wrapped__("inpaint", "float32", 128, 3) == pytest.approx(expected)


def process_told_apart():
    """Made in a process of its own, where it compares that process with the one that it was told of."""
    made_in = os.getpid()

    def run():
        assert os.getpid() == made_in != int(os.environ["ASKED_FROM"])

    return run


def test_each_way_is_made_and_run_in_a_process_of_its_own(monkeypatch):
    monkeypatch.setenv("ASKED_FROM", str(os.getpid()))
    with own_processes({"a": process_told_apart}) as ways:
        assert all(seconds >= 0 for seconds in interleaved(ways, 3)["a"])


def test_the_gpu_script_runs_dry(command):
    status, printed, complaint = command(benchmarks.gpu, "--dry")
    assert status == 0, complaint
    rows = {row["name"]: row["value"] for row in map(json.loads, printed.splitlines())}
    assert 0 < rows["accuracy_eager_64"] < 0.02 or not computes_bfloat16(torch.device("cpu"))
