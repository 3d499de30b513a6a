"""Every network in quantifind/models/, and the transformer's padding."""

from functools import cache

import pytest
import torch
from conftest import ROOT

from quantifind import export, quantize_model, uniform_strategy
from quantifind.data import language_names, mnist_data
from quantifind.models import language_transformer_model
from quantifind.utils import plugins
from quantifind.utils.devices import device_of
from quantifind.utils.loaders import Tensors, batch_loader
from quantifind.workflow.train_workflow import train_network
from stages.params import read_params

MODELS = plugins.names("models")
PARAMETERS = {
    "conv_mnist_model": 104_202,
    "dense_mnist_model": 669_706,
    "simple_dense_model": 65_792,
}
OURS = [*PARAMETERS, "language_transformer_model"]


def create(name: str):
    torch.manual_seed(0)
    return plugins.load("models", name, "create_model_context")()


@cache
def few_examples(name: str):
    """The first test examples of the data that params.yaml pairs the network with."""
    entries = read_params(ROOT / "params.yaml").models.values()
    data = next(entry.data for entry in entries if entry.network == name)
    loaders = plugins.load("data", data, "create_dataloaders")(batch_size=5)
    return next(iter(loaders[-1]))


@pytest.mark.parametrize("name", MODELS)
def test_every_model_learns_on_the_data_it_is_paired_with(name):
    net, criterion, optimizer = create(name)
    inputs, targets = (tensor.to(device_of(net)) for tensor in few_examples(name))
    first = criterion(net.eval()(inputs), targets)
    for _ in range(3):
        optimizer.zero_grad()
        criterion(net(inputs), targets).backward()
        optimizer.step()
    assert criterion(net(inputs), targets) < first


@pytest.mark.parametrize("name", OURS)
def test_sizes_and_optimizer(name):
    net, _, optimizer = create(name)
    parameters = sum(parameter.numel() for parameter in net.parameters())
    assert parameters == PARAMETERS.get(name, parameters)
    assert isinstance(optimizer, torch.optim.Adam)
    assert optimizer.param_groups[0]["lr"] == 0.001
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(parameter) for parameter in net.parameters()}


@pytest.mark.parametrize("name", OURS)
def test_outputs_are_logits(name):
    """No softmax at the end: rows don't add up to 1, values may be negative."""
    net, *_ = create(name)
    outputs = net.eval()(few_examples(name)[0].to(device_of(net)))
    assert (outputs < 0).any()
    assert not torch.allclose(outputs.sum(1), torch.ones(len(outputs), device=outputs.device))


@pytest.mark.parametrize("name", OURS)
@torch.no_grad()
def test_every_model_is_exported(name, tmp_path):
    """Whatever the number of examples, and where they end."""
    net, inputs = create(name)[0].eval().cpu(), few_examples(name)[0].cpu()
    strategy = uniform_strategy(net, 8, axis=0)
    copy = quantize_model(net, strategy)
    export(net, strategy, tmp_path / "net.pt2", inputs)
    program = torch.export.load(tmp_path / "net.pt2").module()
    for some in (inputs, inputs[:2], inputs[1:2]):
        assert torch.allclose(program(some), copy(some), atol=1e-4)


def test_an_epoch_on_few_digits_reaches_a_stated_accuracy():
    """Falls below where training, the network or the data are broken."""
    train, val, _ = mnist_data.create_dataloaders()
    few = Tensors(*(tensor[:6_000] for tensor in train.dataset.tensors))
    loader = batch_loader(few, batch_size=32, shuffle=True, seed=0)
    history = train_network(*create("dense_mnist_model"), loader, val, epochs=1)
    assert history["val_accuracy"].iloc[-1] > 0.88


@pytest.fixture
def transformer():
    torch.manual_seed(0)
    net, *_ = language_transformer_model.create_model_context(classes=4, vocabulary=9, width=16)
    return net.eval().cpu()


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
    millions = round(sum(parameter.numel() for parameter in net.parameters()) / 1e6)
    assert f"{millions} million parameters" in (ROOT / "params.yaml").read_text()
