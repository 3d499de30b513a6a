"""Learning: nearer to the float network than before, on its grid, the same after a kill."""

import contextlib
import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, RandomSampler

from quantifind import learning
from quantifind.learning import learn
from quantifind.quantize import quantize, quantize_model
from quantifind.runtime import student as students
from quantifind.runtime.student import Student
from quantifind.strategy import Strategy, uniform_activations, uniform_strategy
from quantifind.utils import plugins
from quantifind.utils.batches import as_batch
from quantifind.utils.loaders import Tensors, batch_loader

SCHEMES = plugins.names("schemes")
CHOICES = [
    *({"scheme": scheme, "bits": 3} for scheme in SCHEMES),
    *({"scheme": scheme, "bits": 3, "axis": 0} for scheme in SCHEMES),
    {"scheme": "uniform", "levels": 3, "scale": "mse"},
    {"scheme": "uniform", "bits": 2, "half_integer": True},
    {"scheme": "uniform", "bits": 1},
    {"scheme": "uniform", "bits": 2, "axis": 0, "group": 5, "zero_point": True},
    {"scheme": "uniform", "bits": 3, "scale_dtype": "float16"},
    {"scheme": "uniform", "bits": 3, "axis": 0, "scale_dtype": "power_of_two"},
    {"scheme": "codebook", "bits": 3, "centres": "normal", "axis": 0},
    {"scheme": "codebook", "bits": 2, "axis": 0, "table_dtype": "float16"},
    {"scheme": "uniform", "bits": 2, "rounding": "gptq", "axis": 0},
]


@pytest.fixture(autouse=True)
def faster(monkeypatch):
    """So that a few dozen steps suffice."""
    monkeypatch.setattr("quantifind.learning.LEARNING_RATE", 3e-3)
    monkeypatch.setattr("quantifind.runtime.student.SCALE_LEARNING_RATE", 1e-2)


def network():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.5), nn.Linear(16, 4)
    )
    net[1].running_mean += torch.randn(16) * 0.1
    return net


def examples(seed, *, classes=True):
    x = torch.randn(256, 6, generator=torch.Generator().manual_seed(seed))
    return Tensors(x, x[:, :4].argmax(1) if classes else x[:, :4].tanh())


def training(*, classes=True):
    return batch_loader(examples(1, classes=classes), batch_size=32, shuffle=True, seed=2)


def weights_on(net, choice):
    """Weights of two axes on a grid, the rest in float."""
    return Strategy({n: choice if p.dim() > 1 else None for n, p in net.named_parameters()})


@torch.no_grad()
def distance(net, rounded, inputs, *, classes=True):
    outputs, wanted = rounded.eval()(inputs).float(), copy.deepcopy(net).eval()(inputs).float()
    if not classes:
        return F.mse_loss(outputs, wanted).item()
    pair = outputs.log_softmax(1), wanted.log_softmax(1)
    return F.kl_div(*pair, log_target=True, reduction="batchmean").item()


@pytest.mark.parametrize("choice", CHOICES, ids=str)
def test_outputs_of_unseen_inputs_come_nearer_on_every_grid(choice):
    net, (unseen, _) = network(), examples(9).tensors
    strategy, loader = weights_on(net, choice), training()
    start = quantize_model(net, strategy, list(training()))
    quantized = learn(net, strategy, loader, epochs=6)
    assert distance(net, quantize_model(net, quantized), unseen) < distance(net, start, unseen)
    for name, tensor in quantized.tensors.items():
        assert tensor.codes.dtype == torch.int32
        assert tensor.qparams.grid.lowest_code <= tensor.codes.min()
        assert tensor.codes.max() < tensor.qparams.grid.lowest_code + tensor.qparams.grid.levels
        if choice.get("axis") == 0 and "group" not in choice:
            for row in tensor.dequantize():
                assert len(row.unique()) <= tensor.qparams.grid.levels
        if "group" not in choice and "axis" not in choice:
            assert len(tensor.dequantize().unique()) <= tensor.qparams.grid.levels
        assert torch.equal(quantize_model(net, quantized).get_parameter(name), tensor.dequantize())
        unit = tensor.qparams.grid.table if tensor.qparams.scale is None else tensor.qparams.scale
        wanted = {"float16": torch.float16, "power_of_two": torch.float8_e8m0fnu}
        stored = choice.get("scale_dtype") or choice.get("table_dtype")
        assert unit.dtype == wanted.get(stored, torch.float32)


def test_tables_are_learned_too():
    net, strategy = network(), weights_on(network(), {"scheme": "codebook", "bits": 2})
    start = quantize_model(net, strategy)
    learned = learn(net, strategy, training(), epochs=2).tensors["0.weight"].qparams.grid
    assert not torch.isin(learned.table, start[0].weight.detach()).any()
    assert (learned.table.diff() >= 0).all()


def test_everything_in_the_strategy_is_learned_biases_and_activations_included():
    net, (unseen, _) = network(), examples(9).tensors
    choices = uniform_strategy(net, 3).tensors
    strategy = Strategy(choices, uniform_activations(net, list(training()), 4))
    start = quantize_model(net, strategy, list(training()))
    quantized = learn(net, strategy, training(), epochs=6)
    assert distance(net, quantize_model(net, quantized), unseen) < distance(net, start, unseen)
    assert quantized.activations.keys() == strategy.activations.keys()


def test_regression():
    net, (unseen, _) = network(), examples(9).tensors
    strategy, far = weights_on(net, {"scheme": "uniform", "bits": 3}), {"classes": False}
    quantized = learn(net, strategy, training(**far), epochs=6)
    start = quantize_model(net, strategy)
    learned = quantize_model(net, quantized)
    assert distance(net, learned, unseen, **far) < 0.7 * distance(net, start, unseen, **far)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions(dtype):
    net = network().to(dtype)
    data = Tensors(*(t.to(dtype) if t.is_floating_point() else t for t in examples(1).tensors))
    loader = batch_loader(data, batch_size=32, shuffle=True, seed=2)
    strategy = weights_on(net, {"scheme": "uniform", "bits": 3})
    quantized = learn(net, strategy, loader, epochs=6)
    learned, unseen = quantize_model(net, quantized), examples(9).tensors[0].to(dtype)
    assert learned[0].weight.dtype == dtype
    assert distance(net, learned, unseen) < distance(net, quantize_model(net, strategy), unseen)


def test_whole_numbers_go_into_an_embedding_tied_to_the_head():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.head = nn.Embedding(12, 8), nn.Linear(8, 12)
            self.head.weight = self.embedding.weight

        def forward(self, codes):
            return self.head(self.embedding(codes).mean(1))

    torch.manual_seed(0)
    net, codes = Tied(), torch.randint(0, 12, (256, 4))
    loader = batch_loader(Tensors(codes, codes[:, 0]), batch_size=32, shuffle=True, seed=0)
    strategy = uniform_strategy(net, 3, rounding="gptq")
    start = quantize_model(net, strategy, list(loader))
    learned = quantize_model(net, learn(net, strategy, loader, epochs=8))
    assert learned.head.weight is learned.embedding.weight
    unseen = torch.randint(0, 12, (256, 4))
    assert distance(net, learned, unseen) < distance(net, start, unseen)


def test_parameters_over_the_same_memory_are_learned_as_one():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 6, bias=False), nn.ReLU(), nn.Linear(6, 6, bias=False))
    net[2].weight = nn.Parameter(net[0].weight.detach())
    learned = quantize_model(net, learn(net, uniform_strategy(net, 3), training(), epochs=1))
    assert torch.equal(learned[0].weight, learned[2].weight)


def test_buffers_take_part_with_their_quantized_values():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(6, 4)
            self.register_buffer("gain", torch.linspace(0.1, 3, 6))

        def forward(self, x):
            return self.head(x * self.gain)

    torch.manual_seed(0)
    net, coarse = Scaled(), {"scheme": "uniform", "bits": 3}
    strategy = Strategy({"head.weight": coarse, "head.bias": coarse, "gain": coarse})
    quantized, (unseen, _) = learn(net, strategy, training(), epochs=4), examples(9).tensors
    learned = quantize_model(net, quantized)
    assert len(learned.gain.unique()) < 6
    assert distance(net, learned, unseen) < distance(net, quantize_model(net, strategy), unseen)


@pytest.mark.parametrize("train", [True, False])
def test_the_network_and_the_random_state_are_intact(train):
    net = network().train(train)
    net[1].eval()
    modes = [module.training for module in net.modules()]
    before, random = copy.deepcopy(net.state_dict()), torch.get_rng_state()
    learn(net, uniform_strategy(net, 4), training(), epochs=1)
    assert all(torch.equal(before[key], value) for key, value in net.state_dict().items())
    assert [module.training for module in net.modules()] == modes
    assert all(p.requires_grad and p.grad is None for p in net.parameters())
    assert torch.equal(torch.get_rng_state(), random)


class KilledError(Exception):
    pass


class Killing:
    """A loader that ends the learning in its epoch number ``last``."""

    def __init__(self, loader, last):
        self.loader, self.left, self.generator = loader, last, loader.generator

    def __len__(self):
        return len(self.loader)

    def __iter__(self):
        self.left -= 1
        for number, batch in enumerate(self.loader):
            if self.left == 0 and number == 2:
                raise KilledError
            yield batch


@pytest.mark.parametrize("calibrated", [True, False])
@pytest.mark.parametrize("choice", [{"zero_point": True}, {"rounding": "gptq"}], ids=str)
def test_resuming_gives_the_same_codes(tmp_path, choice, calibrated):
    net = network()
    strategy = uniform_strategy(net, 3, axis=0, **choice)
    calibration = list(training()) if calibrated else None
    options = {"epochs": 3, "calibration": calibration}
    whole = learn(net, strategy, training(), **options)
    # the loader's first batches may be the calibration
    loader = Killing(training(), 2 if calibrated else 3)
    with pytest.raises(KilledError):
        learn(net, strategy, loader, checkpoints=tmp_path, **options)
    (checkpoint,) = tmp_path.iterdir()
    assert checkpoint.name == "checkpoint-0001.pt"
    # with the same loader, the generator of which has moved on, and when all is done
    for _ in range(2):
        resumed = learn(net, strategy, loader.loader, checkpoints=tmp_path, **options)
        for name, tensor in whole.tensors.items():
            assert torch.equal(tensor.dequantize(), resumed.tensors[name].dequantize())
    assert len(list(tmp_path.iterdir())) == 1


class Noisy(Tensors):
    """Whose examples are drawn anew each time, of torch's own state."""

    def __getitems__(self, indices):
        inputs, targets = self[indices]
        return inputs + 0.1 * torch.randn_like(inputs), targets


LOADERS = {
    "own generator": training,
    "torch's generator": lambda: DataLoader(
        examples(1), batch_size=32, shuffle=True, collate_fn=list
    ),
    "drawn examples": lambda: DataLoader(
        Noisy(*examples(1).tensors), batch_size=32, shuffle=True, collate_fn=list
    ),
    "list": lambda: list(training()),
}


@pytest.mark.parametrize("last", [3, 13])
@pytest.mark.parametrize("kind", LOADERS)
def test_resuming_within_an_epoch_gives_the_same_codes(tmp_path, monkeypatch, kind, last):
    """With a loader of its own, whatever was drawn before, as in another process."""
    monkeypatch.setattr(learning, "SECONDS", 0.0)
    net, strategy = network(), uniform_strategy(network(), 3, axis=0)
    calibration, options = list(training()), {"epochs": 2, "label_weight": 0.5}
    whole = learn(net, strategy, LOADERS[kind](), calibration=calibration, **options)
    backward, left = Student.backward, last

    def killed(student, batch):
        nonlocal left
        left -= 1
        if left < 0:
            raise KilledError
        return backward(student, batch)

    options |= {"calibration": calibration, "checkpoints": tmp_path}
    with monkeypatch.context() as patch:
        patch.setattr(Student, "backward", killed)
        with pytest.raises(KilledError):
            learn(net, strategy, LOADERS[kind](), **options)
    done = []
    monkeypatch.setattr(Student, "backward", lambda *given: (done.append(0), backward(*given))[1])
    torch.manual_seed(99)
    resumed = learn(net, strategy, LOADERS[kind](), **options)
    assert len(done) == 2 * 8 - last
    for name, tensor in whole.tensors.items():
        assert torch.equal(tensor.dequantize(), resumed.tensors[name].dequantize())


def test_what_draws_its_own_order_is_kept_epoch_by_epoch(tmp_path, monkeypatch):
    monkeypatch.setattr(learning, "SECONDS", 0.0)
    other = DataLoader(
        examples(1),
        batch_size=32,
        sampler=RandomSampler(range(256), generator=torch.Generator()),
        collate_fn=list,
    )
    for number, loader in enumerate((Killing(training(), 9), other)):
        folder = tmp_path / str(number)
        learn(network(), uniform_strategy(network(), 3), loader, epochs=2, checkpoints=folder)
        assert [path.name for path in folder.iterdir()] == ["checkpoint-0002.pt"]


@pytest.mark.parametrize("change", ["network", "strategy", "budget", "label weight", "seed"])
def test_checkpoints_of_other_work_are_refused(tmp_path, change):
    net, bits, options = network(), 3, {"epochs": 1, "checkpoints": tmp_path}
    learn(net, uniform_strategy(net, bits), training(), **options)
    if change == "network":
        net[1].running_var[0] += 1
    bits += change == "strategy"
    options |= {
        "budget": {"epochs": 2},
        "label weight": {"label_weight": 1},
        "seed": {"seed": 1},
    }.get(change, {})
    with pytest.raises(
        ValueError, match=r"checkpoint-0001.pt: of another network, strategy or bud"
    ):
        learn(net, uniform_strategy(net, bits), training(), **options)


def test_checkpoints_of_something_else_are_refused(tmp_path):
    torch.save({"net": {}}, tmp_path / "checkpoint-0001.pt")
    with pytest.raises(ValueError, match=r"checkpoint-0001.pt: not a whole checkpoint"):
        learn(network(), uniform_strategy(network(), 3), training(), epochs=1, checkpoints=tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": 0}, "epochs is 0: a number above 0"),
        ({"epochs": float("nan")}, "epochs is nan: a number above 0"),
        ({"epochs": "3"}, "epochs is '3': a number above 0"),
        ({"epochs": 1, "label_weight": -1}, "label_weight is -1: a number of 0 or more"),
    ],
)
def test_budgets_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        learn(network(), uniform_strategy(network(), 3), training(), **options)


def test_nothing_to_learn_from_or_to_learn():
    with pytest.raises(ValueError, match="no batches"):
        learn(network(), uniform_strategy(network(), 3), [], epochs=1)
    with pytest.raises(ValueError, match="every parameter in float"):
        learn(network(), weights_on(network(), None), training(), epochs=1)


def test_outputs_that_are_not_finite_are_an_error(tmp_path):
    """In the first epoch, however few its batches are; no checkpoint is left."""
    net = nn.Sequential(nn.Linear(6, 4))
    net[0].bias.data[0] = torch.inf
    strategy = Strategy({"0.weight": {"scheme": "uniform", "bits": 3}, "0.bias": None})
    with pytest.raises(ValueError, match="the loss became nan by batch 8"):
        learn(net, strategy, training(), epochs=1, checkpoints=tmp_path)
    assert not list(tmp_path.iterdir())


@torch.no_grad()
def label_loss(net, data, *, classes=True):
    inputs, targets = data.tensors
    outputs = copy.deepcopy(net).eval()(inputs)
    return (F.cross_entropy if classes else F.mse_loss)(outputs, targets).item()


def learned_with(net, classes=True, **options):
    """A network with 2-bit weights, learned for some epochs."""
    strategy = weights_on(net, {"scheme": "uniform", "bits": 2, "half_integer": True})
    quantized = learn(
        net, strategy, training(classes=classes), epochs=8, learning_rate=3e-3, **options
    )
    return quantize_model(net, quantized)


@pytest.mark.parametrize("classes", [True, False])
def test_labels_are_followed_where_they_count(classes):
    """A network that was never trained teaches nothing of them; the more they weigh, the nearer are
    the outputs to them, and the further from the network's."""
    net, far = network(), {"classes": classes}
    nets = [learned_with(net, classes, label_weight=labels) for labels in (0, 1, 10)]
    for data in (examples(1, **far), examples(9, **far)):
        ignored, equal, mostly = (label_loss(one, data, **far) for one in nets)
        assert mostly < equal < ignored
    unseen = examples(9).tensors[0]
    assert distance(net, nets[0], unseen, **far) < distance(net, nets[2], unseen, **far)


def test_labels_of_no_weight_change_nothing():
    net, (unseen, _) = network(), examples(9).tensors
    one, other = learned_with(net), learned_with(net, label_weight=0.0)
    assert torch.equal(one.eval()(unseen), other.eval()(unseen))


@pytest.mark.parametrize("shape", [(), (4,), (2, 2)])
def test_labels_of_a_regression_have_any_shape(shape):
    class Shaped(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(6, max(math.prod(shape), 1))

        def forward(self, x):
            return self.layer(x).reshape(len(x), *shape)

    torch.manual_seed(0)
    net, x = Shaped(), torch.randn(256, 6)
    data = Tensors(x, x[:, : math.prod(shape)].reshape(256, *shape))
    loader = batch_loader(data, batch_size=32, shuffle=True, seed=2)
    strategy = weights_on(net, {"scheme": "uniform", "bits": 4, "axis": 0})
    options = {"epochs": 8, "learning_rate": 3e-2}
    losses = [
        label_loss(
            quantize_model(net, learn(net, strategy, loader, label_weight=labels, **options)),
            data,
            classes=False,
        )
        for labels in (0, 10)
    ]
    assert losses[1] < losses[0]


def test_labels_of_several_positions():
    """They are followed at each of them, as those of one position are."""
    torch.manual_seed(0)
    net, x = nn.Conv1d(6, 4, 1), torch.randn(64, 6, 5)
    data = Tensors(x, x[:, :4].argmax(1))
    loader = batch_loader(data, batch_size=32, shuffle=True, seed=2)
    strategy = weights_on(net, {"scheme": "uniform", "bits": 3})
    options = {"epochs": 30, "learning_rate": 3e-2}
    ignored, followed = (
        label_loss(
            quantize_model(net, learn(net, strategy, loader, label_weight=weight, **options)), data
        )
        for weight in (0, 10)
    )
    assert followed < 0.9 * ignored


def test_a_larger_rate_moves_further():
    net = network()
    strategy = weights_on(net, {"scheme": "uniform", "bits": 4})
    start = quantize_model(net, strategy)
    moved = []
    for rate in (1e-6, 3e-3):
        learned = quantize_model(
            net, learn(net, strategy, training(), epochs=2, learning_rate=rate)
        )
        moved.append((learned[4].weight - start[4].weight).norm().item())
    assert moved[0] < moved[1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"label_weight": -1}, "label_weight is -1: a number of 0 or more is needed"),
        ({"label_weight": float("nan")}, "label_weight is nan: a number of 0 or more is needed"),
        ({"label_weight": float("inf")}, "label_weight is inf: a number of 0 or more is needed"),
        ({"label_weight": "1"}, "label_weight is '1': a number of 0 or more is needed"),
        ({"label_weight": None}, "label_weight is None: a number of 0 or more is needed"),
        ({"learning_rate": 0}, "learning_rate is 0: a number above 0"),
        ({"learning_rate": -1e-3}, "learning_rate is -0.001: a number above 0"),
        ({"learning_rate": float("nan")}, "learning_rate is nan: a number above 0"),
        ({"learning_rate": float("inf")}, "learning_rate is inf: a number above 0"),
        ({"learning_rate": "1"}, "learning_rate is '1': a number above 0"),
    ],
)
def test_labels_and_rates_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        learn(network(), uniform_strategy(network(), 3), training(), epochs=1, **options)


@pytest.mark.parametrize("options", [{"label_weight": 1.0}, {"learning_rate": 1e-4}], ids=str)
def test_checkpoints_with_other_labels_or_rate_are_refused(tmp_path, options):
    net = network()
    learn(net, uniform_strategy(net, 3), training(), epochs=1, checkpoints=tmp_path)
    with pytest.raises(ValueError, match=r"checkpoint-0001.pt: of another network, strategy or"):
        learn(net, uniform_strategy(net, 3), training(), epochs=1, checkpoints=tmp_path, **options)


@pytest.mark.parametrize("change", ["codes", "scales"])
def test_checkpoints_of_other_codes_are_refused(tmp_path, change):
    net = network()
    strategy = uniform_strategy(net, 3)
    fitted = quantize(net, strategy)
    other = fitted.with_scales({"0.weight": 2 * fitted.tensors["0.weight"].qparams.scale})
    if change == "codes":
        moved = net.state_dict() | {"0.weight": net[0].weight.detach().flip(0)}
        flipped = network()
        flipped.load_state_dict(moved)
        other = quantize(flipped, strategy)
    learn(net, fitted, training(), epochs=1, checkpoints=tmp_path)
    with pytest.raises(ValueError, match=r"checkpoint-0001.pt: of another network, strategy or"):
        learn(net, other, training(), epochs=1, checkpoints=tmp_path)


class Two(nn.Module):
    """Outputs in two tensors, of one weight that is met twice."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 6)

    def forward(self, x):
        hidden = self.layer(x)
        return hidden, self.layer(hidden.relu()).tanh()


def labels_with_padding(*shape):
    labels = torch.randint(4, shape)
    return labels.masked_fill(torch.rand(shape) < 0.2, -100)


DIVIDED = {
    "labels": lambda: (network(), torch.randn(33, 6), torch.randint(4, (33,))),
    "positions": lambda: (nn.Conv1d(6, 4, 3), torch.randn(33, 6, 7), labels_with_padding(33, 5)),
    "numbers": lambda: (network(), torch.randn(33, 6), torch.randn(33, 4)),
    "several outputs": lambda: (Two(), torch.randn(33, 6), torch.randn(33, 6)),
    "names": lambda: (nn.Embedding(9, 4), torch.randint(9, (33, 3)), torch.randn(33, 3, 4)),
}


@pytest.mark.parametrize("name", DIVIDED)
def test_parts_of_a_batch_give_what_the_batch_gives(name):
    """The blends are those of the whole batch, too."""
    torch.manual_seed(0)
    net, *data = DIVIDED[name]()
    start = quantize(net, uniform_strategy(net, 3, axis=0))
    found = []
    for size in (None, 1, 7, 16, 33, 100):
        one = Student(net, start, 0.5, size)
        torch.manual_seed(1)
        loss = one.backward(as_batch(data, net))
        gradients = [t.grad for t in (*one.latents.values(), *one.log_factors.values())]
        found.append((loss, gradients))
    (loss, gradients), *others = found
    assert any(gradient.abs().max() > 1e-4 for gradient in gradients)
    for other, parts in others:
        torch.testing.assert_close(other, loss, rtol=1e-5, atol=1e-7)
        for part, gradient in zip(parts, gradients, strict=True):
            scale = gradient.abs().max().item()
            torch.testing.assert_close(part, gradient, rtol=0, atol=1e-5 * scale + 1e-9)


class Sized(nn.Linear):
    """Has memory for so many examples in a pass with gradients."""

    most, seen = 10**6, 0

    def forward(self, x):
        if torch.is_grad_enabled():
            if len(x) > Sized.most:
                raise torch.OutOfMemoryError("out")
            Sized.seen = max(Sized.seen, len(x))
        return super().forward(x)


@pytest.mark.parametrize("most", [32, 20, 7, 1])
@pytest.mark.parametrize("given", [True, False])
def test_where_memory_runs_out_batches_are_taken_in_parts(monkeypatch, capsys, most, given):
    torch.manual_seed(0)
    net = nn.Sequential(Sized(6, 16), nn.ReLU(), nn.Linear(16, 4))
    strategy = uniform_strategy(net, 4)
    whole = learn(net, strategy, training(), epochs=2)
    monkeypatch.setattr(Sized, "seen", 0)
    monkeypatch.setattr(Sized, "most", most)
    divided = learn(net, strategy, training(), epochs=2, micro_batch=most if given else None)
    assert Sized.seen == (most if given else 2 ** int(math.log2(most)))
    said = capsys.readouterr().err
    assert said.count("Out of memory") == (0 if given else 5 - int(math.log2(most)))
    for name, tensor in whole.tensors.items():
        codes = divided.tensors[name].codes
        assert (tensor.codes != codes).float().mean() < 0.02
        torch.testing.assert_close(
            divided.tensors[name].qparams.scale, tensor.qparams.scale, rtol=1e-3, atol=0
        )


def test_out_of_memory_with_one_example_is_an_error(monkeypatch):
    monkeypatch.setattr(Sized, "most", 0)
    with pytest.raises(torch.OutOfMemoryError):
        learn(Sized(6, 4), uniform_strategy(Sized(6, 4), 3), training(), epochs=1)


def test_a_batch_that_counts_as_one_is_not_divided(monkeypatch):
    class Centred(Sized):
        def forward(self, x):
            return super().forward(x - x.mean(0))

    net = Centred(6, 4)
    with pytest.raises(ValueError, match="micro_batch is 5: an example's outputs depend on"):
        learn(net, uniform_strategy(net, 3), training(), epochs=1, micro_batch=5)
    monkeypatch.setattr(Sized, "most", 31)
    with pytest.raises(torch.OutOfMemoryError):
        learn(net, uniform_strategy(net, 3), training(), epochs=1)


@pytest.mark.parametrize("size", [0, -1, 2.0, True, "4"])
def test_parts_out_of_range(size):
    net = network()
    with pytest.raises(ValueError, match=r"micro_batch is .*: a whole number above 0 is needed"):
        learn(net, uniform_strategy(net, 3), training(), epochs=1, micro_batch=size)


def test_the_students_passes_alone_are_of_less_precision(monkeypatch):
    """Tried with what a CPU has; by default there is none on it."""
    assert isinstance(students._precision(torch.device("cpu")), contextlib.nullcontext)
    seen = set()

    class Noted(nn.Linear):
        def forward(self, x):
            outputs = super().forward(x)
            seen.add((torch.is_grad_enabled(), outputs.dtype))
            return outputs

    torch.manual_seed(0)
    net = nn.Sequential(Noted(6, 16), nn.ReLU(), nn.Linear(16, 4))
    monkeypatch.setattr(
        students, "_precision", lambda device: torch.autocast(device.type, torch.bfloat16)
    )
    strategy, (unseen, _) = weights_on(net, {"scheme": "uniform", "bits": 3}), examples(9).tensors
    learned = quantize_model(net, learn(net, strategy, training(), epochs=6))
    assert seen == {(True, torch.bfloat16), (False, torch.float32)}
    assert distance(net, learned, unseen) < distance(net, quantize_model(net, strategy), unseen)
    assert seen == {(True, torch.bfloat16), (False, torch.float32)}
