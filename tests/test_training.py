"""Training, and checkpoints that survive a kill and execute nothing."""

import os
import pickle
import subprocess
from pathlib import Path

import pytest
import torch
from torch import nn

from quantifind.utils.loaders import Tensors, batch_loader
from quantifind.workflow.train_workflow import (
    load_train_context,
    save_train_context,
    train_network,
)
from stages.live import live


def make_context(hidden: int = 8):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, hidden), nn.ReLU(), nn.Dropout(0.3), nn.Linear(hidden, 3))
    return net, nn.CrossEntropyLoss(), torch.optim.Adam(net.parameters(), lr=0.01)


def make_loader(*, shuffle: bool = True):
    inputs = torch.randn(300, 6, generator=torch.Generator().manual_seed(1))
    return batch_loader(
        Tensors(inputs, inputs[:, :3].argmax(1)), batch_size=32, shuffle=shuffle, seed=5
    )


def test_training_learns_and_reports_each_epoch():
    net, criterion, optimizer = make_context()
    history = train_network(net, criterion, optimizer, make_loader(), make_loader(), epochs=6)
    assert history["epoch"].tolist() == list(range(1, 7))
    assert history["val_accuracy"].iloc[-1] > 0.8
    assert history["val_loss"].iloc[-1] < history["val_loss"].iloc[0]
    assert not net.training


def test_regression_has_no_accuracy_in_its_history():
    net = nn.Linear(2, 2)
    data = Tensors(torch.randn(20, 2), torch.randn(20, 2))
    loader = batch_loader(data, batch_size=8, shuffle=True, seed=0)
    optimizer = torch.optim.Adam(net.parameters())
    history = train_network(net, nn.MSELoss(), optimizer, loader, loader, epochs=1)
    assert list(history) == ["epoch", "train_loss", "val_loss"]


class KilledError(Exception):
    pass


class Killing(list):
    """Validation batches that end the training when they are read for the ``last`` time."""

    def __init__(self, loader, last):
        super().__init__(loader)
        self.left = last

    def __iter__(self):
        self.left -= 1
        if self.left == 0:
            raise KilledError
        return super().__iter__()


@pytest.mark.parametrize("decay", [False, True])
@pytest.mark.parametrize("killed_in_epoch", [2, 4])
def test_a_killed_training_goes_on_to_the_same_result(tmp_path, killed_in_epoch, decay):
    def train(context, val_loader, **options):
        return train_network(*context, make_loader(), val_loader, epochs=4, decay=decay, **options)

    uninterrupted, killed, resumed = make_context(), make_context(), make_context()
    val_loader = make_loader(shuffle=False)
    torch.manual_seed(3)
    whole = train(uninterrupted, val_loader)
    torch.manual_seed(3)
    with pytest.raises(KilledError):
        train(killed, Killing(val_loader, killed_in_epoch), checkpoints=tmp_path)
    (checkpoint,) = tmp_path.iterdir()
    assert checkpoint.name == f"checkpoint-000{killed_in_epoch - 1}.pt"
    assert train(resumed, val_loader, checkpoints=tmp_path).equals(whole)
    for name, tensor in uninterrupted[0].state_dict().items():
        assert torch.equal(tensor, resumed[0].state_dict()[name])


def test_learning_rate_falls_where_asked_and_comes_back():
    net, criterion, optimizer = make_context()
    rates: list[float] = []
    optimizer.register_step_post_hook(lambda o, *_: rates.append(o.param_groups[0]["lr"]))
    for decay in (False, True):
        loaders = make_loader(), make_loader()
        train_network(net, criterion, optimizer, *loaders, epochs=2, decay=decay)
        assert optimizer.param_groups[0]["lr"] == 0.01
    constant, falling = rates[:20], rates[20:]
    assert set(constant) == {0.01}
    assert falling == pytest.approx([0.01 * (1 - i / 20) for i in range(20)])


def test_losses_in_the_history_are_means_over_examples():
    net, _, optimizer = make_context()
    optimizer.param_groups[0]["lr"] = 0.0
    net[2].p = 0.0
    for reduction in ("mean", "sum"):
        loaders = make_loader(), make_loader()
        criterion = nn.CrossEntropyLoss(reduction=reduction)
        (row,) = train_network(net, criterion, optimizer, *loaders, epochs=1).to_dict("records")
        assert row["train_loss"] == pytest.approx(row["val_loss"], rel=1e-5)


def test_a_diverging_last_step_is_an_error_and_leaves_no_checkpoint(tmp_path):
    net, criterion, _ = make_context()
    optimizer = torch.optim.SGD(net.parameters(), lr=3e38)
    loader = batch_loader(make_loader().dataset, batch_size=300, shuffle=False, seed=0)
    with pytest.raises(ValueError, match="after epoch 1, on validation data: training diverged"):
        train_network(net, criterion, optimizer, loader, loader, epochs=1, checkpoints=tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_checkpoint_of_someone_else_is_named(tmp_path):
    net, criterion, optimizer = make_context()
    save_train_context(tmp_path, net, optimizer)
    loaders = make_loader(), make_loader()
    with pytest.raises(ValueError, match=r"its checkpoint is not one of train_network\(\)"):
        train_network(net, criterion, optimizer, *loaders, checkpoints=tmp_path)


def test_a_loader_without_batches_is_an_error():
    with pytest.raises(ValueError, match="no batches"):
        train_network(*make_context(), [], make_loader())


@pytest.mark.parametrize("where", ["inputs", "rate"])
def test_a_diverging_loss_stops_at_once_and_says_where(where):
    net, criterion, optimizer = make_context()
    loader = make_loader()
    if where == "inputs":
        loader.dataset.tensors[0][7] = torch.nan
    else:
        optimizer.param_groups[0]["lr"] = 1e30
    with pytest.raises(ValueError, match=r"the loss became (nan|inf) in epoch 1 by batch 10: tra"):
        train_network(net, criterion, optimizer, loader, loader, epochs=3)


def test_no_epoch_is_an_error():
    with pytest.raises(ValueError, match="epochs is 0"):
        train_network(*make_context(), make_loader(), make_loader(), epochs=0)


def test_most_recent_checkpoint_is_loaded(tmp_path):
    folder = tmp_path / "not" / "there"
    net, _, optimizer = make_context()
    for value in range(12):
        nn.init.constant_(net[0].bias, value)
        save_train_context(folder, net, optimizer, extra={"value": value})
    other, _, other_optimizer = make_context()
    assert load_train_context(folder, other, other_optimizer) == {"value": 11}
    assert (other[0].bias == 11).all()


def test_optimizer_state_comes_back(tmp_path):
    net, criterion, optimizer = make_context()
    train_network(net, criterion, optimizer, make_loader(), make_loader(), epochs=1)
    save_train_context(tmp_path, net, optimizer)
    other, _, other_optimizer = make_context()
    load_train_context(tmp_path, other, other_optimizer)
    ours, theirs = optimizer.state_dict()["state"], other_optimizer.state_dict()["state"]
    assert torch.equal(ours[0]["exp_avg"], theirs[0]["exp_avg"])


def test_another_architecture_is_named_and_nothing_is_loaded(tmp_path):
    net, _, optimizer = make_context(hidden=8)
    path = save_train_context(tmp_path, net, optimizer)
    other, _, other_optimizer = make_context(hidden=9)
    before = {name: tensor.clone() for name, tensor in other.state_dict().items()}
    message = rf"{path.name}: .*another architecture: 0.bias is \[8\], not \[9\].*3.weight"
    with pytest.raises(ValueError, match=message):
        load_train_context(tmp_path, other, other_optimizer)
    assert all(torch.equal(before[name], t) for name, t in other.state_dict().items())


def test_another_optimizer_is_named(tmp_path):
    net, _, optimizer = make_context()
    save_train_context(tmp_path, net, optimizer)
    with pytest.raises(ValueError, match="its optimizer is another one"):
        load_train_context(tmp_path, net, torch.optim.Adam(net[0].parameters()))


def test_an_empty_folder_has_no_checkpoint(tmp_path):
    net, _, optimizer = make_context()
    with pytest.raises(ValueError, match=r"no checkpoint"):
        load_train_context(tmp_path, net, optimizer)


@pytest.mark.parametrize("harm", ["truncated", "empty", "text"])
def test_a_harmed_checkpoint_is_named(tmp_path, harm):
    net, _, optimizer = make_context()
    path = save_train_context(tmp_path, net, optimizer)
    raw = path.read_bytes()
    path.write_bytes({"truncated": raw[: len(raw) // 2], "empty": b"", "text": b"hello"}[harm])
    with pytest.raises(ValueError, match=r"checkpoint-0001.pt: not a whole checkpoint"):
        load_train_context(tmp_path, net, optimizer)


class Attack:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


@pytest.mark.parametrize("save", [torch.save, lambda value, path: path.write_bytes(value)])
def test_nothing_in_a_checkpoint_is_executed(tmp_path, save):
    net, _, optimizer = make_context()
    attack = {"net": Attack(tmp_path / "owned"), "optimizer": {}, "extra": {}}
    save(attack if save is torch.save else pickle.dumps(attack), tmp_path / "checkpoint-0001.pt")
    with pytest.raises(ValueError, match="not a whole checkpoint"):
        load_train_context(tmp_path, net, optimizer)
    assert not (tmp_path / "owned").exists()


def test_curves_grow_wherever_a_stage_runs(tmp_path, monkeypatch):
    """In a repository without a commit, too; a curve without a point has its header."""
    monkeypatch.chdir(tmp_path)
    subprocess.run(["git", "init", "--quiet"], check=True)
    folder = Path("plots/training")
    for _ in range(2):
        with live(folder, ["loss", "other"], step="epoch") as log:
            for epoch in (1, 2):
                log({"epoch": epoch, "loss": 1 / epoch, "unnamed": 3})
                rows = (folder / "loss.tsv").read_text(encoding="utf-8").splitlines()
                assert rows[-1] == f"{epoch}\t{1 / epoch}"
        assert rows == ["step\tloss", "1\t1.0", "2\t0.5"]
        assert (folder / "other.tsv").read_text(encoding="utf-8") == "step\tother\n"
    assert {file.name for file in folder.iterdir()} == {"loss.tsv", "other.tsv"}
