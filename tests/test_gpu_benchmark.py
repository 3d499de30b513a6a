"""The code path of benchmarks/gpu.py, on whatever there is."""

import math
import sys

import pytest
import torch

from benchmarks import gpu


def test_a_tiny_row_has_every_column():
    row = gpu.searched("resnet18", tiny=True)
    assert row.keys() == set(gpu.COLUMNS)
    assert 0 < row["mean_bits"] < 32
    assert row["criterion_ratio"] <= 1.05
    assert row["parameters"] > 500
    assert 1 < row["passes"] < 300


def test_a_search_without_an_answer_says_why(monkeypatch):
    monkeypatch.setitem(gpu.SECONDS, "resnet18", (0, 1))
    row = gpu.searched("resnet18", tiny=True)
    assert row["note"].startswith("seconds is 0.001: over before any candidate kept the goal")
    assert row["loss"] > 0
    assert "mean_bits" not in row


def test_what_takes_too_long_is_interrupted_and_said(monkeypatch):
    whole = gpu.INTERRUPTED + gpu.ENDED + 0.2
    monkeypatch.setitem(gpu.SECONDS, "resnet18", (whole, 1))
    note = f"no answer within {whole} seconds"
    assert gpu.measured("resnet18", tiny=True) == {"network": "resnet18", "note": note}


def test_both_networks_fit_within_eight_minutes():
    assert math.fsum(seconds for seconds, _ in gpu.SECONDS.values()) + gpu.START <= 480


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
def test_without_a_gpu_one_line_says_so(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["gpu"])
    gpu.main()
    assert capsys.readouterr().out == "Left out: no CUDA device is here\n"
