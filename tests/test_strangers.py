"""The data and the table of benchmarks/strangers.py, whose packages need not be installed."""

import math
import re

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import stranger_data, strangers


@given(pitch=st.floats(60, 1200), seed=st.integers(0, 2**31))
def test_tones_have_their_pitch(pitch, seed):
    """By the distance of the peaks of their autocorrelation; the bin of the target is nearest."""
    generator = torch.Generator().manual_seed(seed)
    (sound,) = stranger_data.tones(torch.full((1, 8192), pitch), generator).double()
    power = torch.fft.rfft(sound, n=2 * len(sound)).abs() ** 2
    alike = torch.fft.irfft(power)[: len(sound) // 2]
    period = stranger_data.RATE / pitch
    # several periods, to tell them to less than a sample
    count = max(1, int(2000 / period))
    near = torch.arange(round(count * period - period / 3), round(count * period + period / 3) + 1)
    found = near[alike[near].argmax()].item() / count
    assert found == pytest.approx(period, abs=1.01 / count)

    best = stranger_data.pitch_targets(torch.tensor([pitch]))[0].argmax().item()
    cents = stranger_data.FIRST_CENTS + stranger_data.CENTS_PER_BIN * best
    assert abs(1200 * math.log2(pitch / 10) - cents) <= stranger_data.CENTS_PER_BIN / 2 + 0.01


def test_reactions_are_different_and_well_formed():
    made = stranger_data.reactions(4000, seed=1)
    assert len(set(made)) == 4000
    assert made == stranger_data.reactions(4000, seed=1) != stranger_data.reactions(4000, seed=2)
    for reaction in made:
        assert reaction.count(">>") == 1
        assert "".join(stranger_data.TOKEN.findall(reaction)) == reaction
        for molecule in re.split(r">>|\.", reaction):
            plain = re.sub(r"\[[^\]]+\]", "", molecule)
            assert plain.count("(") == plain.count(")")
            assert all(plain.count(ring) % 2 == 0 for ring in "12345")


def test_sentences_are_many_and_plain():
    sentences = stranger_data.sentences()
    assert len(set(sentences)) == len(sentences) > 500


def test_spoken_clips_overlap_and_have_both_kinds():
    pytest.importorskip("espeakng_loader")
    parts = {"frames": 24, "parts": (4, 4, 4), "batch_size": 4, "seed": 3}
    for loader in stranger_data.spoken_clips(**parts):
        ((heard, voiced),) = loader
        assert heard.shape == (4, 24, 576)
        assert torch.equal(heard[:, 1:, :64], heard[:, :-1, -64:])
        assert 0 < voiced.mean() < 1
        # where there is speech, it is louder
        assert heard.std(2)[voiced == 1].mean() > heard.std(2)[voiced == 0].mean()


def test_rows_take_the_place_of_those_of_the_same_storage(tmp_path, monkeypatch):
    """Also where the table is from before there were two."""
    monkeypatch.setattr(strangers, "RESULTS", tmp_path / "strangers.csv")
    values = {"kind": "net", "parameters": 8, "measure": "relative_error", "limit": 0.05}
    values |= {"bytes": 3, "float_bytes": 32, "passes": 1, "seconds": 60, "peak_megabytes": 1}
    values |= {"uniform_bits": 8, "adapter_lines": 0}
    one, other, third = list(strangers.STRANGERS)[:3]
    before = pd.DataFrame([{"network": n, **values, "mean_bits": 4.0} for n in (other, one)])
    before.to_csv(strangers.RESULTS, index=False)
    rows = [
        (one, "coded", 2.0),
        (other, "coded", np.nan),
        (one, "packed", 3.0),
        (third, "packed", 5),
    ]
    for network, storage, bits in rows:
        row = {"network": network, "storage": storage, **values, "mean_bits": bits}
        results = strangers.write_rows(pd.DataFrame([row]))
    found = results[["network", "storage", "mean_bits"]].fillna(0).to_numpy().tolist()
    assert found == [
        [one, "packed", 3], [one, "coded", 2], [other, "packed", 4], [other, "coded", 0],
        [third, "packed", 5],
    ]  # fmt: skip
    cells = [line.split(" | ")[4:6] for line in strangers.markdown(results).splitlines()[2:]]
    assert cells == [["**3.000**", "2.000"], ["**4.000**", "none"], ["**5.000**", "–"]]


def test_a_network_that_gave_no_answer_has_no_line():
    rows = [{"network": "one", "kind": "of a kind", "note": "no answer"}]
    table = strangers.markdown(pd.DataFrame(rows, columns=strangers.COLUMNS))
    assert len(table.splitlines()) == 2
