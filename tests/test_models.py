"""Every network in quantifind/models/, and the transformer's padding."""

import pytest
import torch
from torch import nn

from quantifind import plugins
from quantifind.data import language_names
from quantifind.models import language_transformer_model

MODELS = plugins.names("models")
PARAMETERS = {
    "conv_mnist_model": 104_202,
    "dense_mnist_model": 669_706,
    "simple_dense_model": 65_792,
}
INPUTS = {
    "conv_mnist_model": torch.rand(5, 1, 28, 28),
    "dense_mnist_model": torch.rand(5, 1, 28, 28),
    "simple_dense_model": torch.randn(5, 256),
    "language_transformer_model": torch.tensor([[3, 1, 2, 0], [5, 0, 0, 0], [1, 2, 3, 4]]),
}


@pytest.mark.parametrize("name", MODELS)
def test_every_model_can_be_trained(name):
    torch.manual_seed(0)
    net, criterion, optimizer = plugins.load("models", name).create_model_context()
    parameters = sum(parameter.numel() for parameter in net.parameters())
    assert parameters == PARAMETERS.get(name, parameters)
    assert isinstance(optimizer, torch.optim.Adam)
    assert optimizer.param_groups[0]["lr"] == 0.001
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(parameter) for parameter in net.parameters()}
    inputs = INPUTS[name].to(next(net.parameters()).device)
    outputs = net(inputs)
    regression = isinstance(criterion, nn.MSELoss)
    targets = torch.zeros_like(outputs) if regression else torch.zeros(len(inputs)).long()
    before = criterion(outputs, targets.to(outputs.device))
    before.backward()
    optimizer.step()
    assert criterion(net.eval()(inputs), targets.to(outputs.device)) < before


@pytest.mark.parametrize("name", MODELS)
def test_outputs_are_logits(name):
    """No softmax at the end: rows don't add up to 1, values may be negative."""
    torch.manual_seed(0)
    net, *_ = plugins.load("models", name).create_model_context()
    outputs = net.eval()(INPUTS[name])
    assert (outputs < 0).any()
    assert not torch.allclose(outputs.sum(1), torch.ones(len(outputs)))


@pytest.fixture
def transformer():
    torch.manual_seed(0)
    net, *_ = language_transformer_model.create_model_context(classes=4, vocabulary=9, width=16)
    return net.eval()


def test_padding_changes_nothing(transformer):
    names = [[3, 1, 2], [5], [1, 2, 3, 4]]
    alone = torch.cat([transformer(torch.tensor([name])) for name in names])
    for length in (4, 9):
        codes = torch.zeros(3, length, dtype=torch.long)
        for row, name in zip(codes, names, strict=True):
            row[: len(name)] = torch.tensor(name)
        torch.testing.assert_close(transformer(codes), alone)


def test_order_of_letters_matters(transformer):
    assert not torch.allclose(
        transformer(torch.tensor([[1, 2, 3]])), transformer(torch.tensor([[3, 2, 1]]))
    )


def test_transformer_follows_the_names_by_default():
    net, *_ = language_transformer_model.create_model_context()
    train, _, _ = language_names.create_dataloaders()
    codes, labels = train.dataset.tensors
    assert net.embedding.num_embeddings == codes.max() + 1
    assert net.head.out_features == labels.max() + 1


def test_original_size_is_reachable():
    with torch.device("meta"):
        net = language_transformer_model.LanguageTransformer(
            18, 65_535, width=512, layers=32, heads=4, dropout=0.1, neighbours=False
        )
    assert net.embedding.weight.shape == (65_535, 512)
    assert len(net.encoder.layers) == 32
