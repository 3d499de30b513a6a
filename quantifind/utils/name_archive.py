"""A tar of ``<Nationality>.txt`` files of whitespace-separated names, and its alphabet."""

import bz2
import gzip
import io
import lzma
import tarfile
import unicodedata
import zlib
from pathlib import Path, PurePosixPath

ARCHIVE = Path(__file__).parents[2] / "datasets" / "languagenames.tar"
LONGEST_NAME = 256
END_OF_TAR = bytes(1024)
DECOMPRESS = {
    b"\x1f\x8b\x08": gzip.decompress,
    b"BZh": bz2.decompress,
    b"\xfd7z": lzma.decompress,
}
DAMAGE = (tarfile.TarError, EOFError, OSError, ValueError, zlib.error, lzma.LZMAError)


def read_names(path: Path = ARCHIVE) -> dict[str, list[str]]:
    """Names by nationality, both sorted; a name counts once in each of its nationalities.

    Hidden files (the ``._Arabic.txt`` a Mac adds) and files that don't end in .txt are passed over.
    Names are composed (Unicode NFC), so one name has one spelling whatever system wrote it.
    Raises: ValueError, naming the archive and the entry, for an archive that is missing, truncated
    or unsafe (absolute path, ``..``, link), text that is not UTF-8, a nationality given twice,
    a file without names, a "name" of over 256 characters, fewer than two nationalities.
    """
    texts = _texts(Path(path))
    names: dict[str, list[str]] = {}
    for entry, text in sorted(texts.items()):
        nationality = unicodedata.normalize("NFC", PurePosixPath(entry).stem)
        if nationality in names:
            raise ValueError(f"{path}: {entry}: {nationality} stands in the archive twice")
        names[nationality] = sorted(set(unicodedata.normalize("NFC", text).split()))
        if not names[nationality]:
            raise ValueError(f"{path}: {entry}: no names in it")
        if len(longest := max(names[nationality], key=len)) > LONGEST_NAME:
            raise ValueError(
                f"{path}: {entry}: {longest[:20]!r}… is {len(longest)} characters long, "
                f"at most {LONGEST_NAME} are allowed: are the names separated by white space?"
            )
    if len(names) < 2:
        raise ValueError(f"{path}: {len(names)} <Nationality>.txt files, at least 2 are needed")
    return dict(sorted(names.items()))


def alphabet(names: dict[str, list[str]]) -> str:
    """Every character that occurs, sorted; character i has code i + 1, and 0 is padding."""
    return "".join(sorted(set().union(*(name for group in names.values() for name in group))))


def _texts(path: Path) -> dict[str, str]:
    """The text of each entry that holds names."""
    try:
        raw = path.read_bytes()
    except FileNotFoundError as error:
        raise ValueError(f"{path}: missing; it holds <Nationality>.txt files of names") from error
    try:
        raw = DECOMPRESS.get(raw[:3], bytes)(raw)
        with tarfile.open(fileobj=io.BytesIO(raw), mode="r:") as archive:
            files = [(m, archive.extractfile(m) if m.isfile() else None) for m in archive]
            contents = [(member, file.read() if file else b"") for member, file in files]
    except DAMAGE as error:
        raise ValueError(f"{path}: not a whole tar archive ({error})") from error
    # tarfile takes a file cut between two entries for a whole one: test_truncated_tar
    if not raw.endswith(END_OF_TAR):
        raise ValueError(f"{path}: truncated: the zeros that end a tar are missing")
    return {m.name: _text(m, content, path) for m, content in contents if _is_names(m, path)}


def _is_names(member: tarfile.TarInfo, path: Path) -> bool:
    entry = PurePosixPath(member.name.replace("\\", "/"))
    if entry.is_absolute() or ".." in entry.parts:
        raise ValueError(f"{path}: {member.name}: a path out of the archive is not allowed")
    if not (member.isfile() or member.isdir()):
        raise ValueError(f"{path}: {member.name}: only files and folders are allowed, no links")
    hidden = any(part.startswith(".") for part in entry.parts) or "__MACOSX" in entry.parts
    return member.isfile() and not hidden and entry.suffix == ".txt"


def _text(member: tarfile.TarInfo, content: bytes, path: Path) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: {member.name}: not UTF-8 ({error})") from error
