"""Recurrent layers are seen as their products, with torch's own layers and loops as oracles."""

import itertools

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

from quantifind.network.calibration import second_moments
from quantifind.network.moments import layer_moments
from quantifind.network.products import visiting
from quantifind.network.trace import macs, trace
from quantifind.quantize import quantize, quantize_model
from quantifind.strategy import Strategy, uniform_activations
from quantifind.tensor.choice import per_tensor

KINDS = {
    "LSTM": lambda *a, **o: nn.LSTM(*a, **o),
    "projected LSTM": lambda *a, **o: nn.LSTM(*a, proj_size=2, **o),
    "GRU": lambda *a, **o: nn.GRU(*a, **o),
    "tanh": lambda *a, **o: nn.RNN(*a, **o),
    "relu": lambda *a, **o: nn.RNN(*a, nonlinearity="relu", **o),
}
LENGTHS = torch.tensor([3, 6, 1, 6])
pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")


def look(net, *inputs):
    seen = []

    def visit(product):
        seen.append(product)
        return product.compute(*product.operands)

    with torch.no_grad(), visiting(net, visit):
        return net(*inputs), seen


def flat(outputs):
    if isinstance(outputs, torch.Tensor):
        return [outputs]
    if isinstance(outputs, PackedSequence):
        return [outputs.data, outputs.batch_sizes]
    return [tensor for part in outputs for tensor in flat(part)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", ["padded", "packed", "one example"])
def test_outputs_are_torchs(kind, form):
    options = itertools.product((1, 2), (False, True), (False, True), (False, True), (False, True))
    for number, (layers, both, bias, first, given) in enumerate(options):
        torch.manual_seed(number)
        named = {"num_layers": layers, "bidirectional": both, "bias": bias, "batch_first": first}
        net = KINDS[kind](3, 4, dropout=0.5 * (layers > 1), **named).eval()
        x = torch.randn(*((4, 6) if first else (6, 4)), 3)
        if form == "packed":
            x = pack_padded_sequence(x, LENGTHS, batch_first=first, enforce_sorted=False)
        elif form == "one example":
            x = torch.randn(6, 3)
        examples = () if form == "one example" else (4,)
        sizes = [getattr(net, "proj_size", 0) or 4, 4][: 1 + isinstance(net, nn.LSTM)]
        states = tuple(torch.randn(layers * (1 + both), *examples, size) for size in sizes)
        start = (states if len(states) > 1 else states[0],) if given else ()
        with torch.no_grad():
            wanted = net(x, *start)
        found, seen = look(net, x, *start)
        for one, other in zip(flat(found), flat(wanted), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
        weights = {name for name, tensor in net.named_parameters() if tensor.dim() > 1}
        assert {product.weight for product in seen} == weights
        # the inputs of all steps at once, the states step by step
        uses = [sum(p.weight == name for p in seen) for name in ("weight_ih_l0", "weight_hh_l0")]
        assert uses == [1, 6]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    "make",
    [nn.LSTMCell, nn.GRUCell, nn.RNNCell, lambda *a: nn.RNNCell(*a, nonlinearity="relu")],
)
def test_cells_are_torchs(make, bias):
    torch.manual_seed(0)
    net, x = make(3, 4, bias), torch.randn(5, 3)
    with torch.no_grad():
        first = net(x)
        wanted = net(x, first)
    found, seen = look(net, x, first)
    for one, other in zip(flat(found), flat(wanted), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    assert [p.weight for p in seen] == ["weight_ih", "weight_hh"]
    assert [p.bias_name for p in seen] == (["bias_ih", "bias_hh"] if bias else [None, None])


class Packed(nn.Module):
    """Letters of examples, 0 after the last, to what is known at the last one."""

    def __init__(self):
        super().__init__()
        self.letters, self.gru = nn.Embedding(9, 5), nn.GRU(5, 6, bidirectional=True)
        self.head = nn.Linear(12, 2)

    def forward(self, codes):
        lengths = (codes > 0).sum(1).cpu()
        packed = pack_padded_sequence(self.letters(codes.T), lengths, enforce_sorted=False)
        return self.head(self.gru(packed)[1].movedim(0, 1).flatten(1))


def letters(examples):
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(1, 9, (examples, 7), generator=generator)
    lengths = torch.randint(1, 8, (examples, 1), generator=generator)
    return codes * (torch.arange(7) < lengths)


def states_met(net, codes):
    """What the state's weight of the GRU meets forwards, example by example by torch's own GRU."""
    met = []
    for example in codes:
        x = net.letters(example[example > 0])
        outputs = net.gru(x)[0][:, :6]
        met.append(torch.cat([torch.zeros(1, 6), outputs[:-1]]))
    return torch.cat(met).detach().double()


def test_moments_of_a_packed_sequence_are_those_of_a_loop_over_its_examples():
    torch.manual_seed(0)
    net, codes = Packed().eval(), letters(20)
    batches = [(codes[:13],), (codes[13:],)]
    names = ["gru.weight_ih_l0", "gru.weight_hh_l0"]
    moments = dict(layer_moments(net, names, batches, trace(net, batches)))
    x = net.letters(codes[codes > 0]).detach().double()
    for name, met in (("gru.weight_ih_l0", x), ("gru.weight_hh_l0", states_met(net, codes))):
        (found,) = moments[name].values()
        assert found.positions == len(met) == (codes > 0).sum()
        torch.testing.assert_close(found.inputs, met.T @ met, rtol=1e-5, atol=1e-5)
        weight = net.get_parameter(name).detach().double()
        torch.testing.assert_close(found.outputs, weight @ met.T @ met, rtol=1e-4, atol=1e-4)
        power = met.square().mean(0)
        importance = second_moments(net, batches)[name]
        wanted = (power / power.mean()).expand(18, -1)
        torch.testing.assert_close(importance, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("scale", ["max_abs", "output_mse"])
def test_compensated_states_lose_less(scale):
    torch.manual_seed(0)
    net, codes = Packed().eval(), letters(60)
    met, name = states_met(net, codes), "gru.weight_hh_l0"
    error = {}
    for rounding in ("nearest", "gptq"):
        choice = {"scheme": "uniform", "bits": 2, "axis": 0, "rounding": rounding}
        own = {"scale": scale} if rounding == "gptq" else {}
        tensors = {n: choice | own if n == name else None for n, _ in net.named_parameters()}
        rounded = quantize(net, Strategy(tensors), [(codes,)]).tensors[name].dequantize()
        lost = met @ (rounded - net.get_parameter(name).detach()).double().T
        error[rounding] = lost.square().sum().item()
    assert error["gptq"] < error["nearest"]


def test_all_of_a_recurrent_network_compensated_is_nearer_to_it():
    torch.manual_seed(0)
    net, codes = Packed().eval(), letters(200)
    with torch.no_grad():
        wanted, error = net(codes), {}
        for rounding in ("nearest", "gptq"):
            choice = {"scheme": "uniform", "bits": 3, "axis": 0, "rounding": rounding}
            tensors = {
                n: choice if p.dim() > 1 else per_tensor_of(choice)
                for n, p in net.named_parameters()
            }
            rounded = quantize_model(net, Strategy(tensors), [(codes[:100],), (codes[100:],)])
            error[rounding] = (rounded(codes) - wanted).square().mean().item()
    assert error["gptq"] < error["nearest"]


def per_tensor_of(choice):
    return per_tensor(Strategy({"w": choice}).tensors["w"])


def test_macs_of_recurrent_layers():
    net = nn.LSTM(3, 4, num_layers=2, bidirectional=True, proj_size=2, batch_first=True)
    counted = {p.name: p.macs for p in macs(net, torch.randn(5, 7, 3))}
    for layer, width in ((0, 3), (1, 4)):
        for end in ("", "_reverse"):
            assert counted[f"weight_ih_l{layer}{end}"] == 7 * 16 * width
            assert counted[f"weight_hh_l{layer}{end}"] == 7 * 16 * 2
            assert counted[f"weight_hr_l{layer}{end}"] == 7 * 4 * 2


def test_states_are_put_on_levels():
    torch.manual_seed(0)
    net, codes = Packed().eval(), letters(30)
    activations = uniform_activations(net, [(codes,)], 2)
    assert "gru.weight_hh_l0_reverse" in activations
    tensors = dict.fromkeys(dict(net.named_parameters()))
    coarse = quantize_model(net, Strategy(tensors, activations), [(codes,)])
    seen = []

    def visit(product):
        operands = coarse.rounded(product).operands
        if product.weight == "gru.weight_hh_l0":
            seen.append(operands[0])
        return product.compute(*operands)

    with torch.no_grad(), visiting(coarse.model, visit):
        found = coarse.model(codes)
    assert len(torch.cat(seen).unique()) <= 4
    with torch.no_grad():
        torch.testing.assert_close(coarse(codes), found)
