"""Sparse codes: never more than asked for, the largest ones, and learned as others are."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_learning import distance, network, training, weights_on
from torch import Size, nn

from quantifind.learning import learn
from quantifind.quantize import quantize_model
from quantifind.tensor.qparams import Grid, QParams
from quantifind.tensor.sparsity import (
    falling,
    first_factor,
    shares,
    sparse_codes,
    sparse_through,
    threshold,
)
from quantifind.utils.loaders import Tensors, batch_loader

TERNARY = {"scheme": "uniform", "levels": 3, "storage": "coded"}
sizes = st.lists(st.tuples(st.integers(1, 40), st.integers(1, 40)), min_size=1, max_size=5)


@given(sizes, st.floats(0.001, 1))
def test_shares_add_up_to_the_density(sides, density):
    shapes = {str(i): Size(each) for i, each in enumerate(sides)}
    found = shares(shapes, density)
    total = sum(share * shapes[name].numel() for name, share in found.items())
    assert total == pytest.approx(density * sum(shape.numel() for shape in shapes.values()))
    assert all(0 < share <= 1 for share in found.values())
    # in proportion to the sum of the sides, but for those that are full
    each = {n: found[n] * shapes[n].numel() / sum(shapes[n]) for n in found if found[n] < 1}
    assert not each or max(each.values()) == pytest.approx(min(each.values()))


@given(st.floats(0.001, 1))
def test_the_share_falls_from_all_to_what_is_asked_for(share):
    times = [falling(share, done / 100) for done in range(101)]
    assert times[0] == pytest.approx(1)
    assert times[-1] == times[31] == share
    assert times == sorted(times, reverse=True)


@given(st.integers(0, 2**32), st.floats(0.001, 1), st.sampled_from([3, 4, 5, 8, 9]))
def test_the_largest_values_have_codes_and_no_more_of_them(seed, share, levels):
    values = torch.randn(7, 11, generator=torch.Generator().manual_seed(seed))
    qparams = QParams(Grid(levels), torch.tensor(0.3))
    codes = sparse_codes(values, qparams, threshold(values, share))
    assert (codes != 0).sum() == int(share * 77 + 0.5)
    zeros = values.abs()[codes == 0]
    if 0 < len(zeros) < 77:
        assert values.abs()[codes != 0].min() > zeros.max()
    kept = values[codes != 0]
    nearest = torch.round(kept / 0.3).clamp(-(levels // 2), levels - 1 - levels // 2)
    nearest = torch.where(nearest == 0, kept.sign(), nearest)
    assert torch.equal(codes[codes != 0], nearest)


def test_gradients_go_through_zeros_and_to_the_scale_of_the_codes():
    values = torch.tensor([[0.1, -0.2, 0.9, -1.4]], requires_grad=True)
    scale = torch.tensor(1.0, requires_grad=True)
    made = sparse_through(values, QParams(Grid(3), scale), torch.tensor(0.5))
    assert made.tolist() == [[0, 0, 1, -1]]
    (made * torch.tensor([1.0, 2, 3, 4])).sum().backward()
    assert values.grad.tolist() == [[1, 2, 3, 4]]
    assert scale.grad.item() == 3 - 4


def test_scales_begin_where_the_largest_values_are():
    latent = torch.tensor([0.1, -0.1, 2.0, -4.0])
    for levels, wanted in ((3, 3.0), (7, 3.0 / (0.6 * 3))):
        qparams = QParams(Grid(levels), torch.tensor(0.5))
        assert 0.5 * first_factor(latent, qparams, 0.5) == pytest.approx(wanted)
    assert first_factor(torch.zeros(4), qparams, 0.5) == 1


@pytest.fixture(scope="module")
def taught():
    """A trained network, its training data, and inputs that it has not seen."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(20, 32), nn.ReLU(), nn.Linear(32, 4))
    inputs, unseen = torch.randn(1024, 20), torch.randn(1024, 20)
    labels = inputs[:, :4].argmax(1)
    optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
    for _ in range(100):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(inputs), labels).backward()
        optimizer.step()
    return net, Tensors(inputs, labels), unseen


@pytest.mark.parametrize(
    ("levels", "axis", "classes"), [(3, None, True), (7, None, True), (7, 0, False)]
)
def test_learned_codes_are_as_sparse_as_asked_for(taught, levels, axis, classes):
    net, data, unseen = taught
    if not classes:
        data = Tensors(data.tensors[0], net(data.tensors[0]).detach())
    strategy, far = weights_on(net, TERNARY | {"levels": levels, "axis": axis}), []
    for epochs in (0.01, 8):
        loader = batch_loader(data, batch_size=64, shuffle=True, seed=2)
        learned = learn(net, strategy, loader, epochs=epochs, density=0.3, learning_rate=1e-2)
        wanted = shares({n: t.codes.shape for n, t in learned.tensors.items()}, 0.3)
        assert wanted.keys() == {"0.weight", "2.weight"}
        for name, tensor in learned.tensors.items():
            found = (tensor.codes != 0).sum().item()
            assert found == math.floor(wanted[name] * tensor.codes.numel() + 0.5)
            assert tensor.codes.abs().max() <= levels // 2
        far.append(distance(net, quantize_model(net, learned), unseen, classes=classes))
    assert far[1] < 0.7 * far[0]


def test_sparse_learning_goes_on_after_a_kill(tmp_path):
    net, strategy = network(), weights_on(network(), TERNARY)
    options = {"epochs": 2, "density": 0.3}
    whole = learn(net, strategy, training(), **options)

    def killed(loader):
        yield from list(loader)[:3]
        raise KeyboardInterrupt

    class Cut:
        def __init__(self):
            self.calls = 0
            self.loader = training()
            self.generator = self.loader.generator

        def __iter__(self):
            self.calls += 1
            return killed(self.loader) if self.calls == 3 else iter(self.loader)

        def __len__(self):
            return len(self.loader)

    with pytest.raises(KeyboardInterrupt):
        learn(net, strategy, Cut(), checkpoints=tmp_path, **options)
    with pytest.raises(ValueError, match="of another network, strategy or budget"):
        learn(net, strategy, training(), checkpoints=tmp_path, **options | {"density": 0.2})
    resumed = learn(net, strategy, training(), checkpoints=tmp_path, **options)
    for name, tensor in whole.tensors.items():
        assert torch.equal(tensor.codes, resumed.tensors[name].codes)


@pytest.mark.parametrize(
    ("density", "choice", "message"),
    [
        (0.0, TERNARY, "density is 0.0: a number above 0 is needed"),
        (1.5, TERNARY, "density is 1.5: at most 1 is needed"),
        (True, TERNARY, "density is True: a number"),
        (0.1, {"scheme": "uniform", "bits": 1}, "density is 0.1: it needs a weight on a uniform"),
        (0.1, {"scheme": "codebook", "bits": 2}, "density is 0.1: it needs a weight on a uniform"),
    ],
)
def test_densities_out_of_range(density, choice, message):
    net = network()
    with pytest.raises(ValueError, match=message):
        learn(net, weights_on(net, choice), training(), epochs=1, density=density)
