"""State dicts as people have them, written, read and resumed; what can't be is named."""

import io
import warnings

import pytest
import torch
from torch import nn

from quantifind.storage.states import check_plain, check_same_architecture, load_state
from quantifind.storage.store import fingerprint
from quantifind.utils.loaders import Tensors, batch_loader
from quantifind.workflow.train_workflow import train_network
from stages import networks

VALUES = torch.tensor([[0.0, 2.0, 0.0, 0.0], [0.0, 0.0, -1.0, 0.0]])
BUFFERS = {
    "of no axis": lambda: torch.tensor(3.0),
    "empty": lambda: torch.zeros(0, 3),
    "transposed": lambda: VALUES.T,
    "expanded": lambda: torch.ones(1).expand(5),
    "whole numbers": lambda: torch.tensor([2**60, -1]),
    "flags": lambda: torch.tensor([True, False]),
    "bfloat16": lambda: VALUES.bfloat16(),
    "coo": lambda: VALUES.to_sparse(),
    "coo, twice in one place": lambda: torch.sparse_coo_tensor([[1, 1]], [1.0, 2.0], (3,)),
    "coo, nothing in it": lambda: torch.zeros(2, 2).to_sparse(),
    "coo of rows": lambda: VALUES.to_sparse(1),
    "csr": lambda: VALUES.to_sparse_csr(),
    "csc": lambda: VALUES.to_sparse_csc(),
    "bsr": lambda: VALUES.to_sparse_bsr((2, 2)),
    "bsc": lambda: VALUES.to_sparse_bsc((1, 2)),
}
EXTRA = {"passes": 3, 5: (1, [None, 2.5]), "text": "é", "scale": torch.tensor([2.0])}


class Held(nn.Linear):
    """A layer with a buffer and extra state."""

    def __init__(self, buffer, extra=None):
        super().__init__(4, 4)
        self.register_buffer("held", buffer)
        self.extra = extra

    def get_extra_state(self):
        return self.extra

    def set_extra_state(self, extra):
        self.extra = extra


def network(buffer, extra=None):
    """Two layers, the second with the first one's weight."""
    net = nn.Sequential(Held(buffer, extra), nn.Linear(4, 4))
    net[1].weight = net[0].weight
    return net


def plain(value):
    """What can be compared."""
    if isinstance(value, torch.Tensor):
        dense = value.to_dense()
        return str(value.layout), str(value.dtype), dense.shape, dense.double().tolist()
    if isinstance(value, dict):
        return {key: plain(part) for key, part in value.items()}
    return value


@pytest.fixture(autouse=True)
def _sparse_layouts_are_new_to_torch():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse (CSR|CSC|BSR|BSC) tensor support is in beta")
        warnings.filterwarnings("ignore", "Sparse invariant checks are implicitly disabled")
        yield


@pytest.mark.parametrize("kind", BUFFERS)
def test_a_written_network_is_read_as_it_was(kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(1)
    written = network(BUFFERS[kind](), EXTRA)
    before = plain(dict(written.state_dict()))
    networks.write_network(written, "own", {})
    torch.manual_seed(2)
    empty = BUFFERS[kind]()
    fresh = network(torch.zeros_like(empty) if empty.layout == torch.strided else empty)
    monkeypatch.setattr(
        networks, "create_network", lambda *_: networks.Context(fresh, None, None, None, {})
    )
    read = networks.read_network().net
    assert plain(dict(read.state_dict())) == before
    assert read[1].weight is read[0].weight
    assert fingerprint(read) == fingerprint(written)
    assert plain(dict(written.state_dict())) == before


def test_a_csr_buffer_of_another_number_of_values_is_read():
    net = network(torch.zeros(2, 4).to_sparse_csr())
    load_state(net, network(VALUES.to_sparse_csr()).state_dict(), "file")
    assert torch.equal(net[0].held.to_dense(), VALUES)


def test_a_fingerprint_tells_sparse_values_apart():
    prints = {
        fingerprint(network(VALUES.to_sparse() * factor).requires_grad_(False)[0].held)
        for factor in (1, 2)
    }
    assert len(prints) == 2


def test_extra_state_is_in_a_fingerprint():
    nets = [network(torch.zeros(1), extra) for extra in (None, {"scale": 1}, {"scale": 2})]
    for net in nets[1:]:
        net.load_state_dict(nets[0].state_dict(), strict=False)
    nets[1][0].extra, nets[2][0].extra = {"scale": 1}, {"scale": 2}
    assert len(set(map(fingerprint, nets))) == 3


@pytest.mark.parametrize("extra", [io.BytesIO(b"x"), {"what": object()}, [len]])
def test_extra_state_that_is_not_plain_is_named_before_training(extra, tmp_path):
    net = nn.Sequential(nn.Linear(4, 4), network(torch.zeros(1), extra))
    loader = batch_loader(
        Tensors(torch.ones(8, 4), torch.ones(8, 4)), batch_size=4, shuffle=False, seed=0
    )
    before = net[0].weight.clone()
    with pytest.raises(
        ValueError, match=r"module '1\.0' \(extra state\): .*get_extra_state"
    ) as caught:
        train_network(
            net, nn.MSELoss(), torch.optim.SGD(net.parameters(), 0.1), loader, loader, epochs=1,
            checkpoints=tmp_path,
        )  # fmt: skip
    assert "\n" not in str(caught.value)
    assert torch.equal(net[0].weight, before)
    with pytest.raises(ValueError, match=r"module '1\.0'"):
        check_plain(net.state_dict())


def test_a_training_with_extra_state_and_sparse_buffers_is_resumed(tmp_path):
    def train(net, epochs, folder):
        torch.manual_seed(0)
        loader = batch_loader(
            Tensors(torch.linspace(-1, 1, 32).reshape(8, 4), torch.ones(8, 4)),
            batch_size=4, shuffle=True, seed=0,
        )  # fmt: skip
        optimizer = torch.optim.Adam(net.parameters(), 0.1)
        train_network(net, nn.MSELoss(), optimizer, loader, loader, epochs, checkpoints=folder)
        return plain(dict(net.state_dict()))

    def made(extra=None):
        torch.manual_seed(3)
        return network(VALUES.to_sparse(), extra)

    whole = train(made(EXTRA), 4, tmp_path / "whole")
    train(made(EXTRA), 2, tmp_path / "half")
    assert train(made(), 4, tmp_path / "half") == whole


def test_what_does_not_fit_is_named():
    net, state = network(torch.zeros(2)), network(torch.zeros(3)).state_dict()
    state["more"] = torch.zeros(1)
    del state["0.bias"]
    message = "w.pt: a checkpoint of another architecture: 0.bias is missing, not [4]; "
    message += "0.held is [3], not [2]; more is [1], not missing"
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        load_state(net, state, "w.pt")
    assert str(caught.value) == message


def test_one_name_of_a_shared_tensor_is_enough():
    net = network(torch.zeros(2))
    for name in ("0.weight", "1.weight"):
        state = {key: value for key, value in net.state_dict().items() if key != name}
        check_same_architecture(net, state, "file")
    del state["0.weight"]
    with pytest.raises(ValueError, match=r"0.weight is missing, not \[4, 4\]; 1.weight is missing"):
        check_same_architecture(net, state, "file")
