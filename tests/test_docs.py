"""README.md, docs/ and CONTRIBUTING.md are true: links, commands, tables, and code that runs."""

import ast
import importlib
import re

import matplotlib.pyplot as plt
import pandas as pd
import pytest
import torch
import yaml
from conftest import ROOT, run_block
from torch.utils.data import DataLoader

import quantifind
from benchmarks import architecture, artifacts, grids, readme, search
from quantifind import find_strategy, quantize_model, uniform_strategy
from quantifind.utils import plugins
from quantifind.utils.loaders import whole_split
from stages.params import read_params

README = (ROOT / "README.md").read_text(encoding="utf-8")
METHOD = (ROOT / "docs/method.md").read_text(encoding="utf-8")
EXTEND = (ROOT / "docs/extend.md").read_text(encoding="utf-8")
PAGES = [*grids.pages(), ROOT / "CONTRIBUTING.md"]
BLOCK = re.compile(r"```(?:py|python)\n(.*?)```", re.DOTALL)
# by path the complete files of docs/extend.md
FILES = dict(re.findall(r"`quantifind/(\w+/\w+\.py)`:\n\n```python\n(.*?)```", EXTEND, re.DOTALL))
for_every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
# the modules whose `markdown` writes a table
TABLES = ["coverage", "grids", "names", "peers.__main__", "rooms", "rounding_speed", "search"]
TABLES += [
    "artifacts",
    "fuzz",
    "recipes",
    "rotation",
    "effects",
    "ladders",
    "scale",
    "search_quality",
    "speed",
    "stability",
]
TABLES += ["strangers", "table"]


def test_the_readme_is_short():
    assert len(README.splitlines()) <= 150


@for_every_page
def test_links_are_there(page):
    text = page.read_text(encoding="utf-8")
    for link in re.findall(r"\]\((?!http)([^)#\s]+)[^)]*\)", text):
        assert (page.parent / link).exists(), link


@for_every_page
def test_commands_are_there(page):
    text = page.read_text(encoding="utf-8").replace("\n", " ")
    for module in re.findall(r"python -m (\w+[\w.]*)", text):
        if module.startswith(("benchmarks", "stages")):
            path = ROOT / module.replace(".", "/")
            assert path.with_suffix(".py").exists() or (path / "__main__.py").exists(), module
    assert not re.findall(r"python (?:benchmarks|stages)/", text)
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for target in re.findall(r"[`\s]make (\w+)(?:`|\s+#)", text):
        assert target in targets
    models = yaml.safe_load((ROOT / "params.yaml").read_text())["models"]
    for model in re.findall(r"model=(\w+)", text):
        assert model in models or f"  {model}:" in text or f" {model}:" in text, model


@for_every_page
def test_words_are_those_of_the_field(page):
    """Not ours of earlier days."""
    words = set(re.findall(r"\w+", page.read_text(encoding="utf-8").lower()))
    assert not words & {"menu", "menus", "site", "sites", "cliff", "rung", "dearer", "compensated"}


@for_every_page
def test_every_import_of_the_package_works(page):
    for block in BLOCK.findall(page.read_text(encoding="utf-8")):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and node.module.startswith("quantifind"):
                module = importlib.import_module(node.module)
                for alias in node.names:
                    if not hasattr(module, alias.name):
                        importlib.import_module(f"{node.module}.{alias.name}")


@for_every_page
def test_files_named_in_words_are_there(page):
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for name in re.findall(r"`((?:[\w.]+/)+[\w.]*\.(?:py|md|csv|yaml)|[a-z_]+\.py)`", text):
        if (
            name.startswith(("metrics/", "plots/", "out/"))
            or name.removeprefix("quantifind/") in FILES
        ):
            continue
        assert (ROOT / name).exists() or (ROOT / "quantifind" / name).exists(), name


@pytest.mark.parametrize("name", TABLES)
def test_table_is_what_its_command_measured(name):
    benchmark = importlib.import_module(f"benchmarks.{name}")
    measured = benchmark.markdown(pd.read_csv(benchmark.RESULTS))
    found = [
        found[0] for page in grids.pages() if (found := benchmark.MARKERS.search(page.read_text()))
    ]
    assert found == [measured]


def test_what_was_sealed_is_shown_as_it_was_judged():
    found = search.SEALED_MARKERS.search((ROOT / "docs/results.md").read_text(encoding="utf-8"))
    assert found is not None
    assert found[0] == search.markdown(pd.read_csv(search.SEALED))


def test_every_marker_has_a_command_that_fills_it():
    markers = [importlib.import_module(f"benchmarks.{name}").MARKERS for name in TABLES]
    markers += [artifacts.LINE, search.SEALED_MARKERS]
    markers += [readme.SUMMARY_MARKERS, readme.RECOMMENDATION_MARKERS, readme.EXAMPLE_MARKERS]
    text = "".join(page.read_text(encoding="utf-8") for page in grids.pages())
    assert all(len(marker.findall(text)) == 1 for marker in markers)
    assert len(re.findall(r"<!-- (?!end)", text)) == text.count("<!-- end -->") == len(markers)


def test_line_of_files_is_what_was_measured():
    found = artifacts.LINE.search(README)
    assert found is not None
    assert found[0] == artifacts.line(pd.read_csv(artifacts.RESULTS))


def test_summary_of_the_readme_is_what_was_measured():
    results = [pd.read_csv(one.RESULTS) for one in (readme.search, readme.peers, readme.table)]
    found = readme.SUMMARY_MARKERS.search(README)
    assert found is not None
    assert found[0] == readme.summary(*results)
    assert found[0].count("\n") == 2 + 4


def test_recommendation_of_the_readme_is_the_beginning_of_the_file():
    lines = [f"line {i}" for i in range(20)]
    quoted = readme.recommendation("\n".join(lines)).splitlines()
    assert quoted == [f"> {line}" for line in lines[readme.FIRST : readme.LAST]]
    assert readme.recommendation("# title\n\nall\n\nof it\n") == "> all\n> of it\n"


def test_example_of_the_readme_has_what_it_prints():
    printed = readme.printed("print(1 + one)", {"one": 1})
    assert printed == "```text\n2\n```\n"
    found = readme.EXAMPLE_MARKERS.search(README)
    assert found is not None
    assert re.search(
        r"mean_bits +model_bytes +(?:criterion|calibrated)_ratio +chosen\n.*True",
        found[0],
        re.DOTALL,
    )


def test_a_table_is_put_between_the_markers_of_its_page(tmp_path, monkeypatch):
    (tmp_path / "docs").mkdir()
    page, other = tmp_path / "docs/page.md", tmp_path / "README.md"
    page.write_text("before\n<!-- command -->\nold\n<!-- end -->\nafter\n")
    other.write_text("<!-- other -->\nold\n<!-- end -->\n")
    monkeypatch.setattr(grids, "ROOT", tmp_path)
    grids.write_table(grids.markers("command"), "new\n")
    assert page.read_text() == "before\n<!-- command -->\nnew\n<!-- end -->\nafter\n"
    assert "old" in other.read_text()


def test_python_of_the_readme(monkeypatch, capsys, tmp_path):
    """The notebook block first: the others go on with its network and loaders."""
    search, _, notebook = re.findall(r"```py\n(.*?)```", README, re.DOTALL)
    names = run_block(notebook, monkeypatch)
    assert names["result"]
    plt.close("all")
    monkeypatch.chdir(tmp_path)  # where a file and a ledger are left
    exec(search.replace("crit)", "crit, limit=3.0, widths=[4])"), names)
    assert names["found"].candidates["chosen"].sum() == 1
    original, small = (names[net].state_dict() for net in ("net", "small_net"))
    assert not torch.equal(original["0.0.weight"], small["0.0.weight"])

    judge, ternary, choices = re.findall(r"```py\n(.*?)```", METHOD, re.DOTALL)
    exec(judge, names)
    assert "certified" in capsys.readouterr().out
    exec(ternary, names)
    assert 1.6 < names["bits"] < 1.65
    assert len(names["small_net"][0][0].weight[0].unique()) <= 3
    exec(choices, names)
    assert names["same"] == names["strategy"]


def sentences(net, count, seed):
    """A loader of dicts, whose labels are a float network's answers, a few of them changed."""
    generator = torch.Generator().manual_seed(seed)
    words = torch.randint(60, (count, 8), generator=generator)
    mask = (torch.arange(8) < 6).long().expand_as(words)
    with torch.no_grad():
        labels = net(input_ids=words, attention_mask=mask).logits.argmax(1)
    labels[::5] = torch.randint(3, labels[::5].shape, generator=generator)
    parts = zip(words, mask, labels, strict=True)
    names = ("input_ids", "attention_mask", "labels")
    examples = [dict(zip(names, part, strict=True)) for part in parts]
    return DataLoader(examples, batch_size=16)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_a_hugging_face_encoder_of_the_readme(capsys):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.BertConfig(vocab_size=60, intermediate_size=32, num_labels=3, **sizes)
    encoder = transformers.BertForSequenceClassification(config).eval()
    with torch.no_grad():  # as a trained one, which is sure of its answers
        encoder.classifier.weight.mul_(60)
    names = {"train_loader": 64, "val_loader": 200, "test_loader": 200}
    names = {name: sentences(encoder, n, n + len(name)) for name, n in names.items()}
    _, block, _ = re.findall(r"```py\n(.*?)```", README, re.DOTALL)
    assert len(block.strip().splitlines()) <= 10
    names |= {"encoder": encoder}
    exec(block.replace("limit=1.05", "limit=1.5, widths=[3, 8]"), names)
    assert "bits per parameter" in capsys.readouterr().out
    batch = next(iter(names["test_loader"]))
    del batch["labels"]
    assert names["small_encoder"](**batch).logits.shape == (16, 3)


@pytest.fixture
def extended(tmp_path, monkeypatch):
    """The package with the files of docs/extend.md."""
    assert {path.split("/")[0] for path in FILES} == {"models", "data", "schemes", "costs"}
    for path, text in FILES.items():
        file = tmp_path / path
        file.parent.mkdir()
        file.write_text(text, encoding="utf-8")
        package = importlib.import_module(f"quantifind.{file.parent.name}")
        monkeypatch.setattr(package, "__path__", [*package.__path__, str(file.parent)])
    yield
    for path in FILES:
        package, name = path.removesuffix(".py").split("/")
        module = f"quantifind.{package}.{name}"
        monkeypatch.delitem(importlib.sys.modules, module, raising=False)


@pytest.mark.usefixtures("extended")
def test_a_model_of_ones_own(tmp_path):
    params = yaml.safe_load((ROOT / "params.yaml").read_text())
    block = re.search(r"```yaml\n(.*?)```", EXTEND, re.DOTALL)
    assert block is not None
    params["models"] |= yaml.safe_load(block[1])
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(params | {"model": "thin_mnist"}))
    entry = read_params(tmp_path / "params.yaml").entry
    assert entry.network in plugins.names("models")
    net, _, optimizer = plugins.load("models", entry.network, "create_model_context")(
        classes=7, **entry.options
    )
    images = torch.zeros(2, 1, 28, 28, device=next(net.parameters()).device)
    assert net(images).shape == (2, 7)
    assert len(net[1].bias) == 32
    assert isinstance(optimizer, torch.optim.Adam)


@pytest.mark.usefixtures("extended")
def test_a_data_set_of_ones_own():
    create = plugins.load("data", "rings_data", "create_dataloaders")
    train, val, test = create(seed=3)
    assert [len(loader.dataset) for loader in (train, val, test)] == [3200, 400, 400]
    again = create(seed=3)[0]
    assert torch.equal(whole_split(train)[0], whole_split(again)[0])
    points, outside = next(iter(train))
    assert torch.equal(outside, (points.norm(dim=1) > 1.2).long())


@pytest.mark.usefixtures("extended")
def test_a_scheme_of_ones_own(classifier):
    net, *_ = classifier
    small = quantize_model(net, uniform_strategy(net, 3, scheme="squares"))
    weight = small[0].weight.detach()
    steps = (weight / weight.abs().max()).unique()
    assert len(steps) <= 7
    assert all(
        min(abs(step - square / 9) for square in (0, 1, 4, 9)) < 1e-6 for step in steps.abs()
    )


@pytest.mark.usefixtures("extended")
def test_a_cost_of_ones_own(classifier):
    net, criterion, (train, val, _) = classifier
    budget = {"download_seconds": 0.0009}
    found = find_strategy(net, train, val, criterion, budget=budget, widths=[2, 6])
    chosen = found.candidates[found.candidates["chosen"]].iloc[0]
    assert 0 < chosen["download_seconds"] <= 0.0009
    assert chosen["download_seconds"] == pytest.approx(8e-6 * chosen["model_bytes"])


def test_every_room_of_the_contract_is_in_the_picture():
    """Drawn, described, and above what it imports."""
    floors = architecture.floors()
    height = {room: -number for number, rooms in enumerate(floors) for room in rooms}
    assert set(architecture.PLACES) == set(height)
    text = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    assert all(room in text for room in height)
    for upper, lower in architecture.arrows().items():
        assert all(height[upper] > height[room] for room in lower), upper


def test_reduced_arrows_reach_as_far():
    given = {"a": {"b", "c"}, "b": {"c", "d"}, "c": {"d"}}
    assert architecture.reduced(given) == {"a": {"b"}, "b": {"c"}, "c": {"d"}}


def test_the_face_is_what_the_pages_import():
    """A page that imports a name from the package itself imports one of its face."""
    for page in PAGES:
        for block in BLOCK.findall(page.read_text(encoding="utf-8")):
            for node in ast.walk(ast.parse(block)):
                if isinstance(node, ast.ImportFrom) and node.module == "quantifind":
                    assert {alias.name for alias in node.names} <= set(quantifind.__all__)
