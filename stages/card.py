"""What is taken along in words: the file of a network, those for other runtimes, and a card."""

from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

# by kind of file, how it is loaded
LOADED_BY = {
    "onnx": 'onnxruntime.InferenceSession("{path}")',
    "pt2": 'torch.export.load("{path}").module()',
}


def file_in_words(file: Mapping[str, Any]) -> str:
    """Where a network is, and how to load it.

    file: its ``path`` and ``bytes``, and with all codes ``packed``, or all ``coded``.
    """
    return (
        f"It is in `{file['path']}`, {file['bytes']:,} bytes; with a network of the same "
        f'architecture, `quantifind.load("{file["path"]}", net)` gives it back. With all '
        f"codes packed it takes {file['packed']:,} bytes, coded {file['coded']:,} (`storage`)."
    )


def export_in_words(kind: str, file: Mapping[str, Any]) -> str:
    """Where a network for another runtime is, and how to load it.

    kind: the ending of the file.
    file: its ``path`` and ``bytes``; or the ``reason`` why there is none.
    """
    if "reason" in file:
        return f"There is no .{kind} of it: {file['reason']}."
    loads = LOADED_BY[kind].format(**file)
    return f"For other runtimes it is in `{file['path']}`, {file['bytes']:,} bytes: `{loads}`."


def card(answer: Mapping[str, Any], name: str, words: str) -> str:
    """What stands beside the file of a network, as a page of Markdown.

    answer: what `stages.answers.in_words` is given, with a file.
    name: of the network.
    words: those of the answer without files, as a page of Markdown.
    """
    best = answer["certified"] or answer["chosen"]
    file = answer["file"]
    path = PurePath(file["path"])
    own, header = path.name, file["bytes"] - best["model_bytes"]
    lines = [
        f"# {name}, quantized",
        "",
        f"`{own}` is a network of {best['mean_bits']:.3f} bits per parameter: "
        f"{best['model_bytes']:,} bytes, and a header of {header:,}. "
        "Quantifind found how few bits each tensor needs, on validation data, and judged it on "
        "test data that took no part in choosing anything.",
        "",
        "```py",
        "import quantifind",
        "",
        f'net = quantifind.load("{own}", net)  # a network of this architecture, any weights',
        "```",
        "",
        "It is in the safetensors format; nothing in it is executed.",
        "",
    ]
    for kind, other in answer.get("exports", {}).items():
        if "path" in other:
            other = {**other, "path": PurePath(other["path"]).relative_to(path.parent).as_posix()}
        lines += [export_in_words(kind, other), ""]
    lines += ["## What it was judged on", "", f"{best['examples']:,} test examples.", ""]
    return "\n".join([*lines, *words.splitlines()[2:]]) + "\n"
