"""Every data set, and an archive of names in all the shapes it comes in."""

import gzip
import hashlib
import io
import shutil
import subprocess
import sys
import tarfile

import pytest
import torch
from conftest import ROOT
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    RandomSampler,
    SequentialSampler,
    Subset,
    SubsetRandomSampler,
)

from quantifind.data import language_names, mnist_data
from quantifind.utils import plugins
from quantifind.utils.loaders import (
    Tensors,
    batch_loader,
    create_dataloaders,
    random_split,
    sample,
    whole_split,
)
from quantifind.utils.name_archive import alphabet, read_names
from stages.prepare import describe

DATA = plugins.names("data")
SIZES = {"mnist_data": (54_000, 6_000, 10_000), "simple_dense_data": (38_400, 4_800, 4_800)}


@pytest.mark.parametrize("name", DATA)
def test_every_data_set(name):
    create = plugins.load("data", name, "create_dataloaders")
    state = torch.get_rng_state()
    loaders = create()
    assert torch.equal(state, torch.get_rng_state())
    again = create()
    for loader, same in zip(loaders, again, strict=True):
        for tensor, equal in zip(whole_split(loader), whole_split(same), strict=True):
            assert torch.equal(tensor, equal)
    sizes = tuple(len(loader.dataset) for loader in loaders)
    assert sizes == SIZES.get(name, sizes)
    inputs, targets = next(iter(loaders[0]))
    assert len(inputs) == len(targets) == loaders[0].batch_size
    examples = sum(len(labels) for _, labels in loaders[0])
    assert examples == sizes[0]
    other = create(seed=1)
    assert not torch.equal(whole_split(other[0])[0], whole_split(loaders[0])[0])


def test_mnist_is_as_published():
    train, val, test = mnist_data.create_dataloaders()
    images, digits = whole_split(test)
    assert images.shape == (10_000, 1, 28, 28)
    assert (images.min(), images.max()) == (0, 1)
    assert digits[:10].tolist() == [7, 2, 1, 0, 4, 1, 4, 9, 5, 9]
    counts = torch.cat([whole_split(train)[1], whole_split(val)[1]]).bincount().tolist()
    assert counts == [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]


def test_mnist_raw_files_are_the_original_ones(root):
    published = {
        "train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
        "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
        "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
        "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
    }
    for name, md5 in published.items():
        raw = gzip.decompress((root / "datasets/MNIST/raw" / f"{name}.gz").read_bytes())
        assert hashlib.md5(raw).hexdigest() == md5


def names_are_ours() -> bool:
    """False where someone put an archive of their own in its place."""
    folder = ROOT / "datasets"
    digest = hashlib.sha256((folder / "languagenames.tar").read_bytes()).hexdigest()
    return digest in (folder / "SHA256SUMS").read_text()


def test_checksums_cover_all_raw_files(root):
    listed = dict(
        reversed(line.split()) for line in (root / "datasets/SHA256SUMS").read_text().splitlines()
    )
    assert len(listed) == 5
    for name, digest in listed.items():
        if name == "languagenames.tar" and not names_are_ours():
            continue
        assert hashlib.sha256((root / "datasets" / name).read_bytes()).hexdigest() == digest


@pytest.mark.parametrize("harm", ["missing", "truncated", "altered"])
def test_harmed_mnist_names_the_file(root, tmp_path, harm):
    shutil.copytree(root / "datasets", tmp_path, dirs_exist_ok=True)
    file = tmp_path / "MNIST/raw/t10k-labels-idx1-ubyte.gz"
    raw = file.read_bytes()
    if harm == "missing":
        file.unlink()
    else:
        file.write_bytes(raw[:-9] if harm == "truncated" else raw[:-9] + b"x" + raw[-8:])
    with pytest.raises(ValueError, match=r"t10k-labels-idx1-ubyte.gz: (missing|truncated or alt)"):
        mnist_data.create_dataloaders(root=tmp_path)


@pytest.mark.skipif("not names_are_ours()")
def test_committed_names_and_the_script_that_made_them(root, tmp_path):
    names = read_names()
    assert len(names) >= 18
    assert min(map(len, names.values())) >= 100
    assert sum(map(len, names.values())) >= 15_000
    assert alphabet(names).isascii()
    assert alphabet(names).isalpha()
    counted = f"{sum(map(len, names.values())):,} surnames of {len(names)} nationalities"
    assert counted in (root / "datasets/README.md").read_text(encoding="utf-8")
    shared = set(names["Czech"]) & set(names["Slovak"])
    assert len(shared) > 20
    script = shutil.copy(root / "datasets/make_languagenames.py", tmp_path)
    subprocess.run([sys.executable, script], check=True, capture_output=True)
    made = (tmp_path / "languagenames.tar").read_bytes()
    assert made == (root / "datasets/languagenames.tar").read_bytes()


def test_name_codes_tell_the_names():
    names = read_names()
    letters = alphabet(names)
    parts = [whole_split(loader) for loader in language_names.create_dataloaders()]
    codes, labels = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    pairs = {
        ("".join(letters[code - 1] for code in row if code), label)
        for row, label in zip(codes.tolist(), labels.tolist(), strict=True)
    }
    assert pairs == {(name, i) for i, group in enumerate(names.values()) for name in group}
    ended = codes == language_names.PADDING
    assert (ended.int().diff(dim=1) >= 0).all()  # padding comes last


def make_tar(path, files, mode="w", kind=tarfile.REGTYPE):
    with tarfile.open(path, mode) as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.type = kind
            member.size = len(content) if kind == tarfile.REGTYPE else 0
            member.linkname = "elsewhere"
            archive.addfile(member, io.BytesIO(content))
    return path


GOOD = {"Greek.txt": "Αβαγιανός Ότσος\nΈψιμος".encode(), "Arabic.txt": "أشجع  أفغاني".encode()}


@pytest.mark.parametrize("mode", ["w", "w:gz", "w:bz2", "w:xz"])
def test_a_users_own_archive(tmp_path, mode):
    files = {
        "./._Arabic.txt": b"\x00\x05\x16\x07Mac OS X",
        "names/Greek.txt": "Αβαγιανός Ότσος\nΈψιμος Ότσος".encode(),
        "names/Arabic.txt": b"\xef\xbb\xbf" + "أشجع  أفغاني".encode(),
        "names/Chinese.txt": "王 李\t張\r\n".encode(),
        "__MACOSX/Greek.txt": b"\xff\xfe",
        ".DS_Store": b"\xff",
        "README.md": b"no names",
    }
    names = read_names(make_tar(tmp_path / "own.tar", files, mode))
    assert {nationality: len(group) for nationality, group in names.items()} == {
        "Arabic": 2,
        "Chinese": 3,
        "Greek": 3,
    }


def test_one_name_has_one_spelling_on_every_system(tmp_path):
    composed, decomposed = "Nováková", "Nova\u0301kova\u0301"
    files = {"A.txt": f"{composed} {decomposed}".encode(), "B.txt": b"x"}
    assert read_names(make_tar(tmp_path / "own.tar", files))["A"] == [composed]


def test_classes_and_vocabulary_follow_the_archive(tmp_path):
    many = {f"N{i}.txt": " ".join(f"{chr(0x4E00 + i)}{j}" for j in range(20)) for i in range(5)}
    path = make_tar(tmp_path / "own.tar", {name: text.encode() for name, text in many.items()})
    loaders = language_names.create_dataloaders(archive=path)
    splits = {
        name: dict(zip(("inputs", "targets"), whole_split(loader), strict=True))
        for name, loader in zip(("train", "val", "test"), loaders, strict=True)
    }
    facts = describe(splits)
    assert facts["classes"] == 5
    assert facts["vocabulary"] == len(alphabet(read_names(path))) + 1 == 5 + 10 + 1
    transformer = plugins.load("models", "language_transformer_model", "create_model_context")
    net, *_ = transformer(classes=5, vocabulary=facts["vocabulary"])
    assert net.cpu()(splits["test"]["inputs"]).shape == (10, 5)


BAD_ARCHIVES = {
    "absolute": ({"/etc/Greek.txt": b"a", **GOOD}, "/etc/Greek.txt: a path out of the archive"),
    "parent": ({"names/../../Greek.txt": b"a", **GOOD}, r"\.\./Greek.txt: a path out"),
    "empty": ({"Greek.txt": b" \n ", "Arabic.txt": b"a"}, "Greek.txt: no names"),
    "not UTF-8": ({"Greek.txt": b"\xe1\xe2", "Arabic.txt": b"a"}, "Greek.txt: not UTF-8"),
    "twice": ({"a/Greek.txt": b"a", "b/Greek.txt": b"b"}, "Greek stands in the archive twice"),
    "one": ({"Greek.txt": b"a b c"}, "1 <Nationality>.txt files, at least 2"),
    "none": ({"README": b"a b c"}, "0 <Nationality>.txt files"),
    "run together": ({"Greek.txt": b"a" * 300, "Arabic.txt": b"a"}, "300 characters long"),
}


@pytest.mark.parametrize("case", BAD_ARCHIVES)
def test_bad_archive_names_the_entry(tmp_path, case):
    files, message = BAD_ARCHIVES[case]
    with pytest.raises(ValueError, match=rf"own\.tar: .*{message}") as caught:
        read_names(make_tar(tmp_path / "own.tar", files))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE])
def test_links_and_devices_are_refused(tmp_path, kind):
    with pytest.raises(ValueError, match="no links"):
        read_names(make_tar(tmp_path / "own.tar", {"Greek.txt": b""}, kind=kind))


@pytest.mark.parametrize("mode", ["w", "w:gz", "w:bz2", "w:xz"])
def test_truncated_tar(tmp_path, mode):
    path = make_tar(tmp_path / "own.tar", GOOD, mode)
    raw = path.read_bytes()
    inside = (700, 1024, 1536, 2048) if mode == "w" else (len(raw) // 2, len(raw) - 5)
    lengths = (10, *inside)
    for length in lengths:
        path.write_bytes(raw[:length])
        with pytest.raises(ValueError, match=r"own\.tar: (not a whole tar|truncated)"):
            read_names(path)


@pytest.mark.parametrize("mode", ["w", "w:gz", "w:bz2", "w:xz"])
def test_an_altered_tar_is_read_or_named(tmp_path, mode):
    path = make_tar(tmp_path / "own.tar", GOOD, mode)
    raw = path.read_bytes()
    errors = []
    for place in range(0, len(raw), 1 + len(raw) // 150):
        path.write_bytes(raw[:place] + bytes([raw[place] ^ 0x10]) + raw[place + 1 :])
        try:
            read_names(path)
        except ValueError as error:
            errors.append(str(error))
    assert errors
    assert all("own.tar: " in error for error in errors)


def test_missing_tar(tmp_path):
    with pytest.raises(ValueError, match=r"own\.tar: missing"):
        read_names(tmp_path / "own.tar")


def test_split_is_a_partition():
    data = Tensors(torch.arange(100), torch.arange(100))
    loaders = create_dataloaders(data, fractions=(0.5, 0.3, 0.2), seed=3)
    parts = [whole_split(loader)[0] for loader in loaders]
    assert [len(part) for part in parts] == [50, 30, 20]
    assert sorted(torch.cat(parts).tolist()) == list(range(100))


def test_impossible_splits():
    data = Tensors(torch.arange(4), torch.arange(4))
    with pytest.raises(ValueError, match="add up to"):
        create_dataloaders(data, fractions=(0.5, 0.5, 0.5))
    with pytest.raises(ValueError, match=r"cannot split 4 examples into \[4, 0, 0\]"):
        create_dataloaders(data)
    with pytest.raises(ValueError, match="cannot split"):
        random_split(data, [1, 1])


def test_description_names_the_split_with_bad_values():
    good = {"inputs": torch.ones(2, 1), "targets": torch.ones(2)}
    bad = {"inputs": torch.tensor([[1.0], [torch.nan]]), "targets": torch.ones(2)}
    with pytest.raises(ValueError, match="the val split: 1 NaN or infinite inputs"):
        describe({"train": good, "val": bad})
    with pytest.raises(ValueError, match="the val split has no examples"):
        describe({"train": good, "val": {"inputs": torch.ones(0), "targets": torch.ones(0)}})


def test_a_sampler_that_chooses_examples_is_refused():
    data = Tensors(torch.arange(10), torch.arange(10))
    loader = DataLoader(data, sampler=SubsetRandomSampler([1, 2]))
    with pytest.raises(ValueError, match="SubsetRandomSampler: give each split a data set"):
        whole_split(loader)


def numbered(examples):
    return Tensors(torch.arange(examples), torch.arange(examples) + 100)


def drawn(batches):
    """The inputs of all batches, whose targets are checked."""
    for inputs, targets in batches:
        assert torch.equal(inputs + 100, targets)
    return torch.cat([inputs for inputs, _ in batches]).tolist()


LOADERS = {
    "shuffled": lambda data: batch_loader(data, batch_size=8, shuffle=True, seed=5),
    "sequential": lambda data: batch_loader(data, batch_size=8, shuffle=False, seed=5),
    "plain": lambda data: DataLoader(data, batch_size=8, shuffle=True),
    "dropping": lambda data: DataLoader(data, batch_size=8, drop_last=True),
    "pairs": lambda data: DataLoader(list(zip(*data.tensors, strict=True)), batch_size=8),
    "part": lambda data: DataLoader(Subset(data, range(len(data))), 8, collate_fn=list),
}


@pytest.mark.parametrize("kind", LOADERS)
@pytest.mark.parametrize("examples", [1, 8, 13, 50, 51, 1_000])
def test_a_sample_is_of_the_seed_alone(kind, examples):
    loader = LOADERS[kind](numbered(50))
    first = sample(loader, examples, seed=3)
    assert [len(inputs) for inputs, _ in first[:-1]] == [8] * (len(first) - 1)
    found = drawn(first)
    assert len(found) == len(set(found)) == min(examples, 50)
    assert set(found) <= set(range(50))
    list(loader)  # its own generator moves on
    torch.rand(3)
    assert drawn(sample(loader, examples, seed=3)) == found
    assert drawn(sample(LOADERS["sequential"](numbered(50)), examples, seed=3)) == found
    if examples > 8:
        assert drawn(sample(loader, examples, seed=4)) != found


@pytest.mark.parametrize("kind", LOADERS)
def test_a_sample_leaves_the_loaders_generator_alone(kind):
    loader = LOADERS[kind](numbered(50))
    state = None if loader.generator is None else loader.generator.get_state()
    sample(loader, 20)
    if state is not None:
        assert torch.equal(loader.generator.get_state(), state)
        assert drawn(list(loader)) == drawn(list(LOADERS[kind](numbered(50))))


def test_a_sample_leaves_the_global_random_state_alone():
    state = torch.get_rng_state()
    sample(LOADERS["shuffled"](numbered(50)), 20)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("examples", [1, 4, 6, 1_000])
def test_a_sample_stays_within_the_loaders_subset(examples):
    subset = [1, 5, 9, 12, 33, 40, 41]
    loader = DataLoader(numbered(50), 2, sampler=SubsetRandomSampler(subset), collate_fn=list)
    found = drawn(sample(loader, examples))
    assert set(found) <= set(subset)
    assert len(found) == len(set(found)) >= min(examples, 7)
    loader = DataLoader(
        numbered(50), 2, sampler=RandomSampler(numbered(50), num_samples=7), collate_fn=list
    )
    assert min(examples, 7) <= len(drawn(sample(loader, examples))) <= examples + 1
    held = Tensors(*(part[subset] for part in numbered(50).tensors))
    assert set(drawn(sample(LOADERS["shuffled"](held), examples))) <= set(subset)


def test_a_sample_of_a_subset_is_of_the_seed_alone():
    sampler = SubsetRandomSampler(range(30))
    loader = DataLoader(numbered(50), 2, sampler=sampler, collate_fn=list)
    assert drawn(sample(loader, 10)) == drawn(sample(loader, 10))


def test_a_sample_stays_within_what_a_batch_sampler_draws():
    batches = BatchSampler(SubsetRandomSampler([1, 5, 9]), 2, drop_last=False)
    loader = DataLoader(numbered(50), batch_sampler=batches, collate_fn=list)
    assert isinstance(loader.sampler, SequentialSampler)
    assert set(drawn(sample(loader, 20))) <= {1, 5, 9}
