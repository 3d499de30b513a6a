"""Searches of large networks on a GPU, without learning: what they take and find.

    python -m benchmarks.gpu [--tiny] [--into FILE]

The transformer of the original study (params.yaml: 134 million parameters) on names, and
torchvision's resnet18 on digits, each trained briefly and then searched, in a process of its own,
within 8 minutes in all. Prints a row of comma-separated values for each network:

- parameters, tensors: of the network;
- train_seconds, loss: of the training, and the loss on validation data after it;
- seconds, passes: of the search;
- peak_megabytes, host_megabytes: of the GPU, and of the whole process on the other side;
- mean_bits, criterion_ratio: of what is found, on validation data, at a limit of 1.05;
- note: what was left out, or why there is no answer.

Without a GPU it says so, and does nothing. ``--tiny`` goes the same way with networks of a few
thousand weights, on whatever there is.
"""

import argparse
import json
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import torch.nn.functional as F
import torchvision
import yaml
from torch import nn
from torchvision.models.resnet import BasicBlock

from quantifind import find_strategy
from quantifind.data import language_names, mnist_data
from quantifind.models import language_transformer_model
from quantifind.utils.devices import device, evaluating
from quantifind.utils.loaders import Loaders, Tensors, split_loaders, whole_split
from quantifind.utils.naming import first_line

ROOT = Path(__file__).parent.parent
LIMIT = {"criterion_ratio": 1.05}
WIDTHS, TINY_WIDTHS = (2, 3, 4, 6, 8), (3, 6)
# by network: seconds for all of it, of which so many at most for training
SECONDS = {"language_transformer_original": (300, 75), "resnet18": (160, 20)}
# to start a process, to end a search that is interrupted, and to end one that does not
START, INTERRUPTED, ENDED = 20, 15, 5
EPOCHS = 4
# train, validation and test examples
EXAMPLES, TINY = (8_192, 1_024, 1), (128, 64, 1)
COLUMNS = ["network", "device", "parameters", "tensors", "train_seconds", "loss", "seconds"]
COLUMNS += ["passes", "peak_megabytes", "host_megabytes", "mean_bits", "criterion_ratio", "note"]


def names_transformer(tiny: bool) -> tuple[nn.Module, Loaders]:
    params = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))
    options = params["models"]["language_transformer_original"]["options"]
    if tiny:
        options |= {"vocabulary": 300, "width": 8, "layers": 1}
    net, _, _ = language_transformer_model.create_model_context(**options)
    return net, cut(language_names.create_dataloaders(), TINY if tiny else EXAMPLES)


def digits_resnet(tiny: bool) -> tuple[nn.Module, Loaders]:
    if tiny:
        first = [nn.Conv2d(3, 4, 3, stride=2, bias=False), nn.BatchNorm2d(4), nn.ReLU()]
        last = [nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, 10)]
        net: nn.Module = nn.Sequential(*first, BasicBlock(4, 4), *last)
    else:
        net = torchvision.models.resnet18(num_classes=10)
    loaders = []
    for loader in cut(mnist_data.create_dataloaders(), TINY if tiny else EXAMPLES):
        images, labels = whole_split(loader)
        loaders.append(Tensors(F.pad(images, (2, 2, 2, 2)).repeat(1, 3, 1, 1), labels))
    return net.to(device()), split_loaders(*loaders, batch_size=128)


NETWORKS = {"language_transformer_original": names_transformer, "resnet18": digits_resnet}


def cut(loaders: Iterable[Any], counts: tuple[int, int, int]) -> Loaders:
    """The first examples of each split, of which the order was drawn."""
    sets = [
        Tensors(*(tensor[:count] for tensor in whole_split(loader)))
        for loader, count in zip(loaders, counts, strict=True)
    ]
    return split_loaders(*sets, batch_size=128)


def train(net: nn.Module, loader: Iterable[Any], seconds: float) -> None:
    """For some epochs, or so many seconds, after a rise of the rate: a deep transformer with norms
    after its residual sums needs one."""
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-4, weight_decay=0.01)
    batches = [[part.to(device()) for part in batch] for batch in loader]
    steps, started, share = EPOCHS * len(batches), time.monotonic(), 0.0
    net.train()
    for step in range(steps):
        share = max(step / steps, (time.monotonic() - started) / seconds)
        if share >= 1:
            break
        for group in optimizer.param_groups:
            group["lr"] = 3e-4 * min(share / 0.2, (1 - share) / 0.8)
        inputs, labels = batches[step % len(batches)]
        optimizer.zero_grad()
        F.cross_entropy(net(inputs), labels).backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
    net.eval()


def loss_on(net: nn.Module, loader: Iterable[Any]) -> float:
    """The mean over examples."""
    with evaluating(net):
        both = [
            (F.cross_entropy(net(x.to(device())), y.to(device())).item(), len(y)) for x, y in loader
        ]
    return sum(loss * count for loss, count in both) / sum(count for _, count in both)


def searched(name: str, tiny: bool) -> dict[str, Any]:
    """A row of the table."""
    torch.manual_seed(0)
    whole, training = SECONDS[name]
    began = time.monotonic()
    net, (train_loader, val_loader, _) = NETWORKS[name](tiny)
    started = time.monotonic()
    train(net, train_loader, training)
    loss = loss_on(net, val_loader)
    trained = time.monotonic()
    on_gpu = device().type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    left = whole - START - INTERRUPTED - ENDED - (trained - began)
    options: dict[str, Any] = {"limit": LIMIT, "widths": TINY_WIDTHS if tiny else WIDTHS}
    options["seconds"] = max(left, 0.001)
    answer: dict[str, Any]
    try:
        found = find_strategy(net, train_loader, val_loader, nn.CrossEntropyLoss(), **options)
        answer = {"passes": found.passes.taken, "mean_bits": found.mean_bits}
        answer["criterion_ratio"] = found.chosen["criterion_ratio"]
        answer["note"] = "; ".join(found.passes.left_out)
    except ValueError as error:
        answer = {"note": first_line(error)}
    seconds = time.monotonic() - trained
    peak = torch.cuda.max_memory_allocated() / 1e6 if on_gpu else None
    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {
        "network": name,
        "device": torch.cuda.get_device_name() if on_gpu else "CPU",
        "parameters": sum(parameter.numel() for parameter in net.parameters()),
        "tensors": len(list(net.parameters())),
        "train_seconds": trained - started,
        "loss": loss,
        "seconds": seconds,
        "peak_megabytes": peak,
        "host_megabytes": host / (1e6 if sys.platform == "darwin" else 1e3),
    } | answer


def measured(name: str, tiny: bool) -> dict[str, Any]:
    """`searched`, in a process that is interrupted, and then ended, where it takes too long."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "row.json"
        command = [sys.executable, "-m", "benchmarks.gpu", "--network", name, "--row", str(file)]
        process = subprocess.Popen([*command, *(["--tiny"] if tiny else [])], cwd=ROOT)
        try:
            process.wait(SECONDS[name][0] - INTERRUPTED - ENDED)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGINT)
            try:
                process.wait(INTERRUPTED)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        if file.is_file():
            row: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
            return row
    late = process.returncode in (-signal.SIGKILL, -signal.SIGINT, 130)
    why = f"no answer within {SECONDS[name][0]} seconds" if late else "failed: see above"
    return {"network": name, "note": why}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--tiny", action="store_true", help="a test of the script itself")
    parser.add_argument("--into", type=Path, help="a file for the rows, beside printing them")
    parser.add_argument("--network", choices=NETWORKS, help="by default all of them")
    parser.add_argument("--row", type=Path, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.row is not None:
        row = searched(chosen.network, chosen.tiny)
        chosen.row.write_text(json.dumps(row, default=float), encoding="utf-8")
        return
    if not torch.cuda.is_available() and not chosen.tiny:
        print("Left out: no CUDA device is here")
        return
    rows = [
        measured(name, chosen.tiny) for name in ([chosen.network] if chosen.network else NETWORKS)
    ]
    table = pd.DataFrame(rows).reindex(columns=COLUMNS).to_csv(index=False, float_format="%.6g")
    print(table, end="")
    if chosen.into is not None:
        chosen.into.write_text(table, encoding="utf-8")


if __name__ == "__main__":
    main()
