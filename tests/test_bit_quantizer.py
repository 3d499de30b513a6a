"""BitQuantizer on the tensors, networks and loaders that people have."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from quantifind.utils.loaders import Tensors, batch_loader
from quantifind.workflow.quantize_workflow import BitQuantizer


@pytest.mark.parametrize("bit_depth", [2, 3, 8, 16, 32])
def test_edges(bit_depth):
    quantize = BitQuantizer(bit_depth).quantize
    assert quantize(torch.empty(0, 3)).shape == (0, 3)
    assert quantize(torch.tensor(0.3)).item() == pytest.approx(0.3)
    assert torch.equal(quantize(torch.full((4,), -2.5)), torch.full((4,), -2.5))
    assert torch.equal(quantize(torch.zeros(5)), torch.zeros(5))
    integers = torch.tensor([3, -1, 7])
    assert torch.equal(quantize(integers), integers)
    assert quantize(integers) is not integers
    assert torch.equal(quantize(torch.tensor([True, False])), torch.tensor([True, False]))
    half = torch.linspace(-1, 1, 50, dtype=torch.float16)
    assert quantize(half).dtype == torch.float16
    assert len(quantize(half).unique()) <= 2**bit_depth


def test_gradients_of_the_original_are_not_touched():
    weight = nn.Parameter(torch.randn(3))
    assert not BitQuantizer(4).quantize(weight).requires_grad
    assert weight.requires_grad


@pytest.mark.parametrize("bit_depth", [1, 33, 0, -4, 2.5, None])
def test_depth_out_of_range(bit_depth):
    with pytest.raises(ValueError, match="2 to 32"):
        BitQuantizer(bit_depth)


def test_quantize_model_leaves_the_original(classifier):
    net, _, _ = classifier
    before = copy.deepcopy(net.state_dict())
    quantized = BitQuantizer(2).quantize_model(net)
    assert all(torch.equal(before[name], tensor) for name, tensor in net.state_dict().items())
    for name, parameter in quantized.named_parameters():
        assert len(parameter.unique()) <= 4
        assert torch.equal(parameter, BitQuantizer(2).quantize(before[name]))


def test_loader_quantizes_inputs_only_and_keeps_every_option():
    data = Tensors(torch.randn(100, 5), torch.randn(100))
    loader = DataLoader(
        data,
        batch_size=8,
        shuffle=True,
        drop_last=True,
        num_workers=0,
        generator=torch.Generator().manual_seed(3),
        collate_fn=list,
    )
    quantized = BitQuantizer(3).quantized_dataloader(loader)
    for option in ("batch_size", "drop_last", "num_workers", "generator", "sampler", "dataset"):
        assert getattr(quantized, option) is getattr(loader, option)
    state = loader.generator.get_state()
    plain = list(loader)
    loader.generator.set_state(state)
    rounded = list(quantized)
    assert len(plain) == len(rounded) == 12
    for (inputs, labels), (few, same) in zip(plain, rounded, strict=True):
        assert torch.equal(labels, same)
        assert not torch.equal(inputs, few)
    assert len(torch.cat([few for few, _ in rounded]).unique()) <= 8


def test_loader_has_one_scale_whatever_the_batch_size():
    data = Tensors(torch.randn(64, 5), torch.zeros(64))
    wholes = [
        torch.cat([inputs for inputs, _ in BitQuantizer(4).quantized_dataloader(loader)])
        for loader in (
            batch_loader(data, batch_size=size, shuffle=False, seed=0) for size in (1, 7, 64)
        )
    ]
    assert torch.equal(wholes[0], wholes[1])
    assert torch.equal(wholes[0], wholes[2])


def test_loader_passes_integer_inputs_and_draws_no_random_number():
    data = TensorDataset(torch.arange(10).reshape(5, 2), torch.zeros(5))
    loader = DataLoader(data, batch_size=2, shuffle=True)
    state = torch.get_rng_state()
    quantized = BitQuantizer(2).quantized_dataloader(loader)
    assert torch.equal(state, torch.get_rng_state())
    inputs = torch.cat([inputs for inputs, _ in quantized])
    assert sorted(inputs.flatten().tolist()) == list(range(10))


def test_loader_with_workers():
    data = TensorDataset(torch.randn(10, 2), torch.zeros(10))
    loader = DataLoader(data, batch_size=4, num_workers=1)
    inputs = torch.cat([inputs for inputs, _ in BitQuantizer(2).quantized_dataloader(loader)])
    assert len(inputs.unique()) <= 4
