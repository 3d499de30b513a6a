"""What calibration examples tell, with torch's own convolution and unfolding as oracles."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from quantifind.network.calibration import (
    calibration_batches,
    input_rows,
    second_moments,
)
from quantifind.network.moments import layer_moments
from quantifind.network.products import visiting
from quantifind.network.trace import trace, weight_uses
from quantifind.tensor.matrices import Matrices

SETTINGS = [
    {},
    {"padding": 2},
    {"padding": "same", "dilation": 3},
    {"padding": "valid", "stride": 2},
    {"stride": 3, "padding": 1, "dilation": 2, "groups": 2},
    {"groups": 4, "bias": False},
    *({"padding": 1, "padding_mode": mode} for mode in ("reflect", "replicate", "circular")),
    {"padding": "same", "padding_mode": "circular"},
]
CONVOLUTIONS = [nn.Conv1d, nn.Conv2d, nn.Conv3d]


def all_moments(net, name, batches, **options):
    ((_, found),) = layer_moments(net, [name], batches, trace(net, batches), **options)
    return found


@pytest.mark.parametrize("layer", CONVOLUTIONS)
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("kernel", [1, 2, 3])
@pytest.mark.parametrize("examples", [2, None], ids=["batch", "one example"])
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
def test_rows_times_the_weight_are_the_convolution(layer, settings, kernel, examples):
    torch.manual_seed(0)
    net = layer(4, 8, kernel, **settings).double()
    axes = int(layer.__name__[-2])
    inputs = torch.randn(4, *(9, 8, 7)[:axes], dtype=torch.double)
    inputs = inputs if examples is None else torch.stack([inputs, -inputs.flip(-1)])
    seen = []

    def visit(product):
        (chunk,) = input_rows(product)  # (groups, positions, inputs)
        groups = len(chunk)
        parts = torch.einsum(
            "gpi,goi->pgo", chunk, net.weight.flatten(1).unflatten(0, (groups, -1))
        )
        seen.append(parts.flatten(1))
        return product.compute(*product.operands)

    with torch.no_grad(), visiting(net, visit):
        outputs = net(inputs)
    if net.bias is not None:
        outputs = outputs - net.bias.reshape(-1, *(1,) * axes)
    wanted = outputs.movedim(-1 - axes, -1).reshape(-1, 8)
    torch.testing.assert_close(seen[0], wanted)


@pytest.mark.parametrize("settings", [{}, {"stride": 2, "padding": 1, "dilation": 2}], ids=str)
@pytest.mark.parametrize("groups", [1, 2])
def test_moments_of_a_convolution_are_those_of_torch_unfold(settings, groups):
    torch.manual_seed(0)
    net = nn.Conv2d(4, 6, 3, groups=groups, **settings).double()
    batches = [(torch.randn(n, 4, 8, 7, dtype=torch.double),) for n in (3, 2)]
    moments = all_moments(net, "weight", batches)
    patches = torch.cat(
        [F.unfold(x, 3, **settings).movedim(1, -1).flatten(0, 1) for x, *_ in batches]
    ).unflatten(1, (groups, -1))
    rows = [(g * 6 // groups, (g + 1) * 6 // groups) for g in range(groups)]
    assert list(moments) == [Matrices.rows(net.weight.shape, *ends) for ends in rows]
    for group, found in enumerate(moments.values()):
        x = patches[:, group]
        weight = net.weight.detach().flatten(1).unflatten(0, (groups, -1))[group]
        torch.testing.assert_close(found.inputs, x.T @ x)
        torch.testing.assert_close(found.outputs, weight @ x.T @ x)
        assert found.positions == len(x)


def test_chunks_add_up(monkeypatch):
    torch.manual_seed(0)
    net, batches = nn.Conv1d(2, 3, 2), [(torch.randn(7, 2, 6),)]
    (whole,) = all_moments(net, "weight", batches).values()
    monkeypatch.setattr("quantifind.network.sums.WAITING", 50)
    monkeypatch.setattr("quantifind.network.meetings.CHUNK", 50)
    (parts,) = all_moments(net, "weight", batches).values()
    torch.testing.assert_close(parts.inputs, whole.inputs, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(parts.outputs, whole.outputs, rtol=1e-6, atol=1e-6)
    assert parts.positions == whole.positions


def test_moments_of_a_linear_map_used_twice_are_of_both_uses():
    torch.manual_seed(0)
    layer = nn.Linear(3, 3).double()
    net, x = nn.Sequential(layer, layer), torch.randn(5, 3, dtype=torch.double)
    (found,) = all_moments(net, "0.weight", [(x,)]).values()
    inputs = torch.cat([x, layer(x).detach()])
    torch.testing.assert_close(found.inputs, inputs.T @ inputs)
    assert found.positions == 10


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_summed_in_full(dtype):
    net = nn.Linear(2, 2).to(dtype)
    (found,) = all_moments(net, "weight", [(torch.full((40_000, 2), 3.0, dtype=dtype),)]).values()
    assert (found.inputs == 360_000).all()


class Cross(nn.Module):
    """Attention from the first letters to all of them."""

    def __init__(self, batch_first=True):
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=batch_first)

    def forward(self, x):
        return self.attention(x[:, :2], x, x.clone())[0]


def test_packed_projections_have_moments_by_their_rows():
    torch.manual_seed(0)
    x = torch.randn(3, 5, 4)
    moments = all_moments(Cross(), "attention.in_proj_weight", [(x,)])
    letters = {"query": x[:, :2], "key": x, "value": x}
    assert list(moments) == [Matrices.rows((12, 4), first, first + 4) for first in (0, 4, 8)]
    for found, seen in zip(moments.values(), letters.values(), strict=True):
        rows = seen.reshape(-1, 4).double()
        torch.testing.assert_close(found.inputs, rows.T @ rows, rtol=1e-6, atol=1e-5)
        assert found.positions == len(rows)


def test_second_moments_broadcast_against_their_weights():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 2))
    codes = torch.tensor([[1, 1, 3], [1, 0, 3]])
    moments = second_moments(net, [(codes,)])
    seen = moments["0.weight"].flatten()
    assert (seen / seen.max()).tolist() == pytest.approx([1 / 3, 1, 0, 2 / 3, 0])
    power = net[0](codes).detach().double().square().sum((0, 1))
    found = moments["1.weight"].expand(2, 4)
    torch.testing.assert_close(found[1] / found.sum() * 2, power / power.sum())


def test_uses_are_in_the_order_of_the_pass():
    net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    net = nn.Sequential(net[1], net[0], net[1], nn.Linear(2, 2))
    assert list(weight_uses(trace(net, [(torch.randn(1, 2),)])).items()) == [
        ("0.weight", (2,)),
        ("1.weight", (1,)),
        ("3.weight", (1,)),
    ]


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        (None, "no examples"),
        ([], "no examples"),
        ([(torch.zeros(0, 3),)], "no examples"),
        (torch.zeros(2, 3), r"a tensor of shape \[2, 3\]: a list of batches"),
        ([(torch.tensor([[1.0, torch.nan]]),)], "calibration inputs: 1 are NaN or infinite"),
    ],
)
def test_batches_that_tell_nothing_are_refused(batches, message):
    with pytest.raises(ValueError, match=message):
        calibration_batches(batches, nn.Linear(3, 2))


def test_empty_batches_among_others_are_left_out():
    kept = calibration_batches(
        iter([(torch.zeros(0, 3),), (torch.zeros(2, 3), 7)]), nn.Linear(3, 2)
    )
    assert [len(batch) for batch in kept] == [2]


@pytest.mark.parametrize("net", [nn.Linear(3, 2), nn.Conv2d(3, 2, 3), nn.Embedding(3, 2)])
def test_inputs_that_do_not_fit_are_named(net):
    with pytest.raises(ValueError, match=r"does not take a batch of \[\d, 7\]: "):
        trace(net, [(torch.full((4, 7), 3),)])


@pytest.mark.parametrize("rounded", [False, True])
def test_what_changes_in_place_is_taken_before(rounded):
    class Again(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x):
            x = x + 0
            for _ in range(2):
                x += self.layer(x).tanh_()
            return x

    torch.manual_seed(0)
    net, inputs = Again().eval(), torch.randn(50, 4)
    work = copy.deepcopy(net)
    if rounded:
        with torch.no_grad():
            work.layer.weight.mul_(4).round_().div_(4)
    (found,) = all_moments(net, "layer.weight", [(inputs,)], work=work).values()
    with torch.no_grad():
        wanted, seen, x, y = [], [], inputs, inputs
        for _ in range(2):
            wanted.append(net.layer(x) - net.layer.bias)
            seen.append(y)
            x, y = x + net.layer(x).tanh(), y + work.layer(y).tanh()
    wanted, seen = torch.cat(wanted).double(), torch.cat(seen).double()
    torch.testing.assert_close(found.inputs, seen.T @ seen, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.outputs, wanted.T @ seen, rtol=1e-5, atol=1e-5)
