"""The report says what the tables say, comes out whatever they lack, and asks nobody."""

import base64
import io
import json
import math
import os
import re
import shutil
from collections import Counter
from dataclasses import replace
from html.parser import HTMLParser
from itertools import combinations, pairwise, takewhile
from pathlib import Path

import hypothesis.strategies as st
import jinja2
import numpy as np
import pandas as pd
import pytest
from conftest import ROOT
from hypothesis import given
from matplotlib.image import imread
from reported import alter, leave, page
from torch import nn

from quantifind.certification import digits
from quantifind.certification.measures import MEASURES
from quantifind.quantize import mean_bits, quantize
from quantifind.strategy import Strategy, uniform_strategy
from quantifind.utils import palette
from stages import common, files, findings, report_changed, report_charts, report_tensors
from stages.alone import cost_grid
from stages.comparison import certified_bits, comparison
from stages.evidence import FACTS, TABLES, read_evidence
from stages.pages import TEMPLATES
from stages.params import read_params
from stages.report import report
from stages.tensors import tensor_table

VOID = {"meta", "link", "input", "br", "img", "wbr"}
HOSTILE = "<img src=x onerror=alert(1)>&amp;\"'</script>{{ 7 * 7 }}"
CASES = {
    "usual": {},
    "200 tensors": {"names": [f"layer.{n}.weight" for n in range(200)]},
    "names of 120 characters": {"names": ["deep." * 23 + f"part{n}" for n in range(3)]},
    "one tensor": {"names": ["weight"]},
    "html in names": {"names": [HOSTILE, "b"]},
    "regression": {"measure": "relative_error", "accuracy": False},
    "no certificate": {"lost": (0.02, 0.03, 0.04)},
    "no answer changed": {"turned": (0.0, 0.0)},
    "one step": {"lost": (0.001,)},
    "what gains": {"lost": (-0.3, -0.2, 0.4)},
    "no predictions": {"predicted": False},
    "nothing measured alone": {"sensitive": False},
    "activations": {"activations": ["0", "1.0"]},
    "pictures and texts": {
        "shown": [
            {
                "was": 3,
                "became": 5,
                "target": 3,
                "kind": "picture",
                "shape": "2x3x1",
                "input": base64.b64encode(bytes(range(0, 240, 40))).decode(),
            },
            {"was": 5, "became": 3, "target": 3, "kind": "text", "input": json.dumps(HOSTILE)},
            {"kind": "text", "input": '"NA"', "loss": np.inf},
        ]
    },
    "no examples": {"shown": []},
    "no numbers": {"lost": (0.001, np.nan, np.inf)},
    "nothing measured": {"lost": (np.nan, np.nan, np.inf)},
}


class Page(HTMLParser):
    """The elements of a page, and its words; fails where a tag is not closed."""

    def __init__(self, html):
        super().__init__()
        self.open, self.tags, self.words = [], [], []
        self.feed(html)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "script" not in self.open and "style" not in self.open:
            self.words.append(data)


@pytest.fixture(autouse=True)
def _folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("case", CASES)
def test_report_is_well_formed(case):
    """Every tensor is named, nothing is asked from elsewhere, and what is missing is no `nan`."""
    leave(**CASES[case])
    html = page()
    assert len(html) < 3_000_000
    found = Page(html)
    words = " ".join(found.words)
    # test_names_are_escaped
    assert all(name in words for name in CASES[case].get("names", ["0.weight", "2.bias"]))
    assert not re.search(r"\b(nan|None|NaN|inf)\b", words)
    asked = [value for _, a in found.tags for key in ("src", "href") if (value := a.get(key))]
    pictures = [one["src"] for tag, one in found.tags if tag == "img"]
    assert asked == ["data:,", *pictures]
    for one in pictures:
        raw = base64.b64decode(one.removeprefix("data:image/png;base64,"), validate=True)
        assert imread(io.BytesIO(raw)).shape[2] in (3, 4)
    assert "url(" not in html
    assert "@import" not in html
    ids = Counter(a["id"] for _, a in found.tags if "id" in a)
    assert set(ids.values()) == {1}
    labels = {a[key] for _, a in found.tags for key in ("aria-labelledby",) if key in a}
    assert labels <= ids.keys()
    headings = [tag for tag, _ in found.tags if re.fullmatch("h[1-6]", tag)]
    assert headings == ["h1"] + ["h2"] * 7 + ["h3", "h2"]


def test_names_are_escaped():
    leave(names=[HOSTILE, "b"], activations=[HOSTILE])
    tags = Counter(tag for tag, _ in Page(page()).tags)
    leave(names=["a", "b"], activations=["a"])
    assert tags == Counter(tag for tag, _ in Page(page()).tags)


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("no certificate", "Nothing is certified"),
        ("no certificate", "The strategy chosen on validation data, shown below, is “following”"),
        ("no predictions", "has no candidate with both"),
        ("nothing measured alone", "plots/sensitivity.csv has no rows"),
        ("usual", "needs 4.250 bits per parameter, 7.5 times fewer than float32: with 97.5%"),
        (
            "usual",
            "needs 4.25 bits; plain rounding to one width for all needs 8, judged alike: 1.9 times",
        ),
        ("usual", "Of 2 networks with random widths"),
        ("usual", "Calibrated ratio: the mean loss of the quantized network over"),
        ("usual", "1.005 6.500 8 1.01 4.250 8 1.02 4.250 8"),
        ("usual", "Of 1,000 answers 3 became wrong and 2 became right"),
        ("no answer changed", "No answer of 1,000 became wrong or right"),
        ("pictures and texts", "right to wrong answer 3 → 5, truth 3 loss 0.1 → 0.4 example 7"),
        ("pictures and texts", "wrong to right answer 5 → 3, truth 3"),
        ("no examples", "plots/changed.csv has no rows"),
        ("usual", "within a factor of 1.2 for half of 2 candidates"),
    ],
)
def test_report_says_what_there_is(case, words):
    leave(**CASES[case])
    assert words in re.sub(r"\s+", " ", " ".join(Page(page()).words))


@given(values=st.lists(st.integers(1, 10**6), min_size=1, max_size=40))
def test_the_strip_says_how_many_it_does_not_name(values):
    names = [f"layer.{place}" for place in range(len(values))]
    table = pd.DataFrame({"name": names, "values": values}).assign(
        kind="tensors", bits=2.0, becomes="2 bits"
    )
    found = report_tensors.strip(table)
    drawn = jinja2.Environment(loader=jinja2.FileSystemLoader(TEMPLATES)).from_string(
        '{% import "parts.html" as parts %}{{ parts.strip(s, "") }}'
    )
    assert found["thin"] == len(values) - drawn.render(s=found).count("<b>")
    assert (found["thin"] == len(values)) == (max(values) <= 0.04 * sum(values))


@pytest.mark.parametrize(("flips", "words"), [(0, "No answer changed"), (1, "other answers first")])
def test_the_cards_say_which_examples_they_are(flips, words):
    leave(**CASES["pictures and texts"])
    changed = read_evidence().tables["changed"]
    if not flips:
        changed = changed.assign(became=changed["was"])
    assert words in report_changed.note(changed)


def test_the_mark_of_the_predictions_is_what_is_certified():
    leave()
    evidence = read_evidence()
    shown = report_charts.predicted(evidence)
    assert shown["mean_bits"][shown["marked"]].tolist() == [evidence.best["mean_bits"]]
    assert "certified" in _key_of_predictions(page())
    alter("candidates.csv", lambda table: table.assign(predicted_fidelity=[0.1, np.nan, 0.1]))
    assert "certified" not in _key_of_predictions(page())


def _key_of_predictions(text):
    return re.search(r'id="prediction".*?</ul>', text, re.DOTALL).group()


@given(st.sampled_from(sorted(MEASURES)), st.integers(0, 10**7))
def test_a_limit_is_shown_as_it_is(measure, parts):
    most = MEASURES[measure].lossless + parts / 10**7
    words = digits.limit(measure, most)
    shown = float(words.split()[0].rstrip("%").replace(",", ""))
    assert shown / MEASURES[measure].scale == pytest.approx(most, abs=1e-12)


def test_what_is_called_measured_was():
    """Though another rounding was predicted to cost less."""
    rows = [("nearest", 100, 0.5), ("gptq", 0, 0.1)]
    table = pd.DataFrame(rows, columns=["rounding", "examples", "loss_increase"]).assign(
        kind="tensors", name="a", bits=2.0, original_criterion=1.0
    )
    assert "50% of the loss" in findings.sensitivity(table)
    assert "was not measured" in findings.sensitivity(table.iloc[1:])


def test_marks_say_their_strategy():
    leave()
    marks = [a.get("aria-label", "") for _, a in Page(page()).tags]
    random = [one for one in marks if one.startswith("random widths: 9.5 bits")]
    assert random
    assert all(one.endswith("on validation data; tensors by bits: 1 × 3, 3 × 8") for one in random)
    assert any(one.startswith("following 1 epochs: 4.25 bits") and " × " in one for one in marks)


def test_a_budget_is_said():
    leave()
    alter("recommendation.json", lambda found: found | {"budget": {"mean_bits": 2.5}})
    words = " ".join(Page(page()).words)
    assert "the least loss with mean bits ≤ 2.5" in words
    assert "more than was searched for: with mean bits ≤ 2.5 nothing is certified" in words
    alter("recommendation.json", lambda found: found | {"budget": {"mean_bits": 4.5}})
    assert "Within mean bits ≤ 4.5, conv_mnist needs 4.250 bits" in " ".join(Page(page()).words)


@pytest.mark.parametrize("name", [*TABLES, *FACTS])
@pytest.mark.parametrize("fault", ["missing", "empty", "older"])
def test_a_table_that_cannot_be_used_is_named_with_the_stage(name, fault):
    leave()
    table = name in TABLES
    stage, columns = (TABLES if table else FACTS)[name]
    path = files.PLOTS / f"{name}.csv" if table else files.METRICS / f"{name}.json"
    if fault == "missing":
        path.unlink()
    elif fault == "empty":
        path.write_text("")
    else:
        drop = columns[-1]
        lacking = "drop" if table else "pop"
        alter(path.name, lambda found: _without(found, drop, lacking))
    with pytest.raises(ValueError, match=re.escape(str(path))) as caught:
        read_evidence()
    message = str(caught.value)
    assert "\n" not in message
    assert stage in message or "run dvc repro" in message
    assert fault != "older" or columns[-1] in message


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("bit_depths.csv", lambda t: t.drop(columns="calibrated_ratio"), "lacks calibrated_ratio"),
        (
            "bit_depths.csv",
            lambda t: t.drop(columns="calibrated_ratio_look_bound"),
            "lacks calibrated_ratio_look_bound",
        ),
        ("candidates.csv", lambda t: t.drop(columns="calibrated_ratio"), "lacks calibrated_ratio"),
        ("recommendation.json", lambda a: a | {"limit": 1.01}, "limit is 1.01, none by measure"),
        ("recommendation.json", lambda a: a | {"certified": {}}, "lacks certified mean_bits"),
        ("recommendation.json", lambda a: a | {"look": 3}, "lacks look k"),
        ("recommendation.json", lambda a: a | {"certified": None}, "of another run"),
        ("frontier.csv", lambda t: t.iloc[1:], "of another run"),
        ("frontier.csv", lambda t: t.assign(mean_bits=1.0), "of another run"),
        ("tensors.csv", lambda t: t[t["step"] != 1], "of another run"),
    ],
)
def test_what_does_not_belong_together_is_one_line(name, change, said):
    """Tables of an earlier version, or of another run than the answer's."""
    leave()
    alter(name, change)
    with pytest.raises(ValueError, match=re.escape(said)) as caught:
        page()
    assert "\n" not in str(caught.value)
    assert "run dvc repro --force" in str(caught.value)


@pytest.mark.parametrize("measure", ["accuracy_drop", "flips"])
def test_axes_are_in_the_unit_of_the_words(measure, monkeypatch):
    leave(measure=measure)
    found, chart = [], report_charts.frontier_chart

    def noted(series, levels, **how):
        found.append((series, levels, how))
        return chart(series, levels, **how)

    monkeypatch.setattr(report_charts, "frontier_chart", noted)
    svg = re.findall(r"<svg.*?</svg>", page(), re.DOTALL)[0]
    assert f"{MEASURES[measure].words} {MEASURES[measure].unit}" in svg
    series, levels, how = found[0]
    assert [level.y for level in levels] == [0, pytest.approx(1)]
    assert how["domain"][1] > 1
    ladder = next(s.points for s in series if s.joined and s.shape == "circle")
    assert ladder["y"].tolist() == pytest.approx([0.1, 0.4, 3.0])


def test_a_command_is_quoted():
    leave()
    params = read_params(ROOT / "params.yaml")
    models = {**params.models, "a;rm -rf ~": params.entry}
    html = report(read_evidence(), replace(params, model="a;rm -rf ~", models=models))
    assert "dvc exp run -S &#39;model=a;rm -rf ~&#39;" in html


def test_names_do_not_turn_what_is_around_them():
    leave(["live.\u202ethgiew", "b"])
    assert "\u202e" not in page()


def _without(found, key, how):
    return (
        found.drop(columns=key) if how == "drop" else {k: v for k, v in found.items() if k != key}
    )


def test_names_that_look_like_numbers_come_back():
    names = ["0", "0.10", "NA", "nan", "1e5"]
    leave(names=names)
    evidence = read_evidence()
    assert evidence.tensors["name"].tolist() == names
    assert list(cost_grid(evidence.tables["sensitivity"]).index) == names


@given(
    rows=st.lists(
        st.tuples(st.integers(1, 10**9), st.sampled_from([1.0, 1.6, 2.0, 8.0, 32.0])),
        min_size=1,
        max_size=30,
    )
)
def test_heading_of_the_strip_names_the_largest_and_the_widest(rows):
    table = pd.DataFrame(rows, columns=["values", "bits"])
    table = table.assign(kind="tensors", becomes="x", name=[f"<{n}>" for n in range(len(rows))])
    text = findings.where(table)
    named = [int(name) for name in re.findall(r"<(\d+)>", text)]
    most = max(values for values, _ in rows)
    assert rows[named[0]][0] == most
    assert digits.percent(most / sum(values for values, _ in rows)) in text
    if len(named) == 2:
        assert rows[named[1]][1] == max(bits for _, bits in rows)


def test_table_of_tensors_counts_what_a_network_stores():
    net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    strategies = [uniform_strategy(net, bits) for bits in (8, 3)]
    floats = Strategy(dict.fromkeys(strategies[0].tensors))
    strategies.append(floats)
    made = [quantize(net, strategy) for strategy in strategies]
    table = tensor_table(net, strategies, made)
    parameters = sum(p.numel() for p in net.parameters())
    for step, rows in table.groupby("step"):
        assert rows["name"].tolist() == [name for name, _ in net.named_parameters()]
        assert rows["values"].sum() == parameters
        assert rows["stored_bits"].sum() / parameters == pytest.approx(mean_bits(net, made[step]))


# Machado et al. 2009 (doi:10.1109/TVCG.2009.113), severity 1
BLIND = {
    "none": np.eye(3),
    "protan": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216],
               [-0.003882, -0.048116, 1.051998]],
    "deutan": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413],
               [-0.011820, 0.042940, 0.968881]],
    "tritan": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602],
               [0.004733, 0.691367, 0.303900]],
}  # fmt: skip
PICTURES = {
    "limits": palette.LIMITS,
    "frontier": (
        *(palette.UNIFORM, palette.FOUND, palette.FLOAT, palette.LIMITS[0], palette.RANDOM),
    ),
    "history": (palette.TRAIN, palette.UNIFORM),
    "prediction": (*(colour for colour, _ in palette.ORIGINS.values()), palette.FOUND),
}


def lab(colour, kind):
    """CIELAB of a colour as people see it."""
    xyz_of = np.array(
        [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]
    )
    seen = np.clip(np.array(BLIND[kind]) @ palette.linear(colour), 0, 1)
    xyz = xyz_of @ seen / (0.9505, 1.0, 1.089)
    f = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


@pytest.mark.parametrize("kind", BLIND)
@pytest.mark.parametrize("picture", PICTURES)
def test_colours_of_a_picture_are_told_apart_by_everyone(picture, kind):
    """About 2.3 is a difference that is just seen."""
    for one, other in combinations(PICTURES[picture], 2):
        assert np.linalg.norm(lab(one, kind) - lab(other, kind)) > 10, (one, other)


@pytest.mark.parametrize("kind", BLIND)
def test_wider_codes_are_darker_for_everyone(kind):
    lightness = [lab(colour, kind)[0] for colour in palette.WIDTHS.values()]
    assert all(wide < narrow - 2 for narrow, wide in pairwise(lightness))


def test_each_width_has_its_own_colour():
    colours = [palette.of_width(bits) for bits in (1, 1.585, *range(2, 33))]
    assert len({*colours, palette.FLOAT}) == len(colours) + 1


@pytest.mark.parametrize("colour", [palette.of_width(bits) for bits in (1, 1.585, *range(2, 33))])
def test_bits_on_their_colour_are_read(colour):
    light, ink = (palette.luminance(c) for c in (colour, palette.ink_on(colour)))
    assert (max(light, ink) + 0.05) / (min(light, ink) + 0.05) > 4.5


def beside(tmp_path, **named):
    """By name what runs left in folders of their own."""
    found = {}
    for name, case in named.items():
        (tmp_path / str(len(found))).mkdir()
        os.chdir(tmp_path / str(len(found)))
        leave(**case)
        found[name] = read_evidence()
    return found


def test_comparison_says_what_the_tables_say(tmp_path):
    cases = {HOSTILE: {"names": [HOSTILE, "a.bias"]}, "loose": {"lost": (0.0, 0.001, 0.002)}}
    cases |= {"without": CASES["no certificate"]}
    found = beside(tmp_path, **cases)
    html = comparison(found)
    words = re.sub(r"\s+", " ", " ".join(Page(html).words))
    assert "img" not in {tag for tag, _ in Page(html).tags}
    assert "loose needs the fewest bits per parameter, 2.5, and " in words
    assert "4.25: 1.7 times as many; nothing is certified for without" in words
    assert f"1.9 ({HOSTILE}) to 3.2 (loose) times the bits of mixed widths" in words
    assert not re.search(r"\b(nan|None|inf)\b", words)
    assert [value for _, a in Page(html).tags if (value := a.get("src") or a.get("href"))] == [
        "data:,"
    ]


def test_comparison_says_no_more_than_it_compares(tmp_path):
    """Networks at other limits, at the same bits, with activations, with wide scales."""
    cases = {"a": {"names": ["w"], "activations": ["0"]}, "b": {"names": ["w"]}}
    found = beside(tmp_path, **cases)
    assert common.answer(found) == "a and b need 4.25 bits per parameter each"
    assert "Each network's tensors have one width." in common.sentences(found)
    error = {"measure": "relative_error", "accuracy": False, "lost": (0.0, 0.001, 0.002)}
    (tmp_path / "more").mkdir()
    other = beside(tmp_path / "more", a={}, c=error)
    for sentence in (common.answer(other), common.uniform(other)):
        assert "each at its own limits" in sentence
    for name, one in found.items():
        times = findings.frontier(one).rpartition(": ")[2].removesuffix(" as many")
        assert f"{times.removesuffix(' times')}" in common.sentences({name: one})[0]


@given(
    bounds=st.lists(st.sampled_from([1.0, 1.005, 1.02, math.nan]), min_size=1, max_size=6),
    limit=st.sampled_from([1.0, 1.01, 1.05]),
)
def test_certified_bits_are_of_the_last_step_before_one_fails(bounds, limit):
    ladder = pd.DataFrame({"criterion_ratio_bound": bounds})
    ladder["mean_bits"] = np.arange(len(bounds), 0, -1.0)
    kept = list(takewhile(lambda bound: bound <= limit, bounds))
    expected = len(bounds) - len(kept) + 1 if kept else None
    assert certified_bits(ladder, {"criterion_ratio": limit}) == expected


@pytest.fixture(scope="module")
def browser():
    api = pytest.importorskip("playwright.sync_api")
    path = shutil.which("chromium") or shutil.which("google-chrome")
    if path is None:
        pytest.skip("no chromium or google-chrome is installed")
    with api.sync_playwright() as driver:
        started = driver.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.mark.parametrize("case", ["usual", "html in names", "names of 120 characters"])
def test_report_in_a_browser(browser, tmp_path, case):
    """On a phone and a wide screen, light and dark: nothing is asked or told, nothing overflows.

    AXE_CORE, where it is set, is the path of axe.min.js, by which the page is checked, too.
    """
    leave(**CASES[case])
    path = tmp_path / "report.html"
    files.write_text(path, page())
    shown, told = browser.new_context(offline=True).new_page(), []
    shown.on("console", lambda message: told.append(message.text))
    shown.on("pageerror", lambda error: told.append(str(error)))
    shown.on("request", lambda request: told.append(request.url))
    for width, scheme in ((390, "light"), (390, "dark"), (1440, "dark"), (1440, "light")):
        shown.set_viewport_size({"width": width, "height": 900})
        shown.emulate_media(color_scheme=scheme)
        shown.goto(path.as_uri())
        assert shown.evaluate("document.documentElement.scrollWidth") <= width
        back = shown.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (back == "rgb(255, 255, 255)") == (scheme == "light")
        if axe := os.environ.get("AXE_CORE"):
            open_all = "all => all.forEach((one) => { one.open = true })"
            shown.locator("details").evaluate_all(open_all)
            shown.evaluate(Path(axe).read_text(encoding="utf-8"))
            found = shown.evaluate("axe.run()")["violations"]
            assert [(one["id"], one["nodes"][0]["html"]) for one in found] == []
    assert [one for one in told if not one.startswith(("file:", "data:,"))] == []
    names = list(CASES[case].get("names", ["0.weight", "0.bias", "2.weight", "2.bias"]))
    rows = shown.locator("#table tbody tr:visible")
    assert rows.locator("th").all_inner_texts() == names
    shown.get_by_role("button", name="values").click()
    order = [int(n.replace(",", "")) for n in rows.locator("td:nth-child(3)").all_inner_texts()]
    assert order == sorted(order)
    assert shown.locator("[aria-sort=ascending]").count() == 1
    shown.get_by_label("Filter").fill(names[0])
    assert rows.locator("th").all_inner_texts() == [names[0]]
    mark = shown.locator("svg:visible [role=graphics-symbol]").last
    mark.hover()
    assert shown.locator("#tip").inner_text() == mark.get_attribute("aria-label")
