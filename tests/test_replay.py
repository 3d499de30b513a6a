"""A replay from a changed tensor gives what a whole pass does; what can't be replayed is named."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from quantifind.network.modules import own_tensors
from quantifind.runtime.replay import NotReplayable, Replay

EXAMPLES = 5


class Net(nn.Module):
    """The layers that are given by name, and a forward that takes them and the inputs."""

    def __init__(self, forward, **parts):
        super().__init__()
        self.run = forward
        for name, part in parts.items():
            if isinstance(part, nn.Module | nn.Parameter):
                setattr(self, name, part)
            else:
                self.register_buffer(name, part)

    def forward(self, x):
        return self.run(self, x)


def mlp(*, inplace=False):
    activations = [nn.ReLU(inplace) for _ in range(2)]
    layers = [nn.Linear(6, 8), activations[0], nn.Linear(8, 4), activations[1], nn.Linear(4, 3)]
    return nn.Sequential(*layers)


def convolutional():
    body = [nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.MaxPool2d(2)]
    return nn.Sequential(*body, nn.Conv2d(4, 3, 2), nn.Dropout(), nn.Flatten(), nn.Linear(12, 3))


def residual(net, x):
    identity = net.shortcut(x)
    out = net.norm(net.conv(identity).relu_())
    out += identity
    return net.head(out.relu_().flatten(1))


def attention(net, x):
    q, k, v = net.project(x).chunk(3, dim=-1)
    mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()
    heads = [F.scaled_dot_product_attention(q, k, v, attn_mask=m) for m in (mask, None)]
    return net.head(torch.cat([*heads, x], dim=-1)).mean(1)


def masked(net, x):
    mask = torch.zeros(x.shape[-1])
    mask[1:] = 1
    mask.mul_(2).masked_fill_(mask == 2, 3)
    return net.second(torch.where(x > 0, net.first(x) * mask, 0.0)[:, mask > 0])


def tied(net, x):
    return F.linear(net.mix(net.embedding(x) + net.places), net.embedding.weight).mean(1)


def filled(net, x):
    """What is there before is a constant, and is followed once a tensor has a part in it."""
    total = x * 0
    total += net.first(x)
    total.mul_(total)
    return net.second(total)


def transformer(mask=None, *, causal=False):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 2)

    def run(net, x):
        square = nn.Transformer.generate_square_subsequent_mask(x.shape[1]) if causal else None
        return net.head(net.encoder(net.embedding(x), square, src_key_padding_mask=mask)).mean(1)

    return Net(run, embedding=nn.Embedding(7, 8), encoder=encoder, head=nn.Linear(8, 3))


def recurrent(net, x):
    return net.head(net.lstm(x)[0][:, -1])


def numbers(*shape):
    return torch.randn(EXAMPLES, *shape, generator=torch.Generator().manual_seed(1))


def words(length=6):
    return torch.randint(7, (EXAMPLES, length), generator=torch.Generator().manual_seed(1))


def linear(**more):
    return {"first": nn.Linear(6, 6), "second": nn.Linear(6, 3)} | more


NETWORKS = {
    "mlp": lambda: (mlp(), numbers(6)),
    "in place": lambda: (mlp(inplace=True), numbers(6)),
    "convolutional": lambda: (convolutional(), numbers(2, 8, 8)),
    "residual": lambda: (
        Net(
            residual,
            shortcut=nn.Conv2d(2, 4, 1),
            conv=nn.Conv2d(4, 4, 3, padding=1),
            norm=nn.BatchNorm2d(4),
            head=nn.Linear(64, 3),
        ),
        numbers(2, 4, 4),
    ),
    "attention": lambda: (
        Net(attention, project=nn.Linear(6, 12), head=nn.Linear(14, 3)),
        numbers(5, 6),
    ),
    "masked": lambda: (
        Net(masked, first=nn.Linear(6, 6), second=nn.Linear(5, 3)),
        numbers(6),
    ),
    "filled": lambda: (Net(filled, **linear()), numbers(6)),
    "tied": lambda: (
        Net(
            tied,
            embedding=nn.Embedding(7, 8),
            mix=nn.Linear(8, 8),
            places=torch.arange(48.0).view(6, 8).sin(),
        ),
        words(),
    ),
    "turned weight": lambda: (
        Net(lambda net, x: (net.weight.t() @ x.t()).t().relu() @ net.weight.view(3, 6),
            weight=nn.Parameter(torch.randn(6, 3))),
        numbers(6),
    ),
    "data": lambda: (
        Net(lambda net, x: net.second(net.first(x) + net.first.bias.data).data * 2, **linear()),
        numbers(6),
    ),
    "table": lambda: (
        Net(lambda net, x: net.second(net.first(x)[:, net.order] + net.table[net.order]),
            order=torch.arange(6).flip(0), table=torch.arange(6.0), **linear()),
        numbers(6),
    ),
    "batch's own statistics": lambda: (
        nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4, track_running_stats=False)),
        numbers(6),
    ),
    "dropout of nothing": lambda: (
        Net(lambda net, x: net.second(F.dropout(net.first(x), 0.5, net.training)), **linear()),
        numbers(6),
    ),
    "transformer": lambda: (transformer(), words()),
    "causal transformer": lambda: (transformer(causal=True), words()),
    "attention without weights": lambda: (
        Net(lambda net, x: net.inner(x, x, x, need_weights=False)[0].mean(1),
            inner=nn.MultiheadAttention(8, 2, batch_first=True)),
        numbers(4, 8),
    ),
}  # fmt: skip
RECURRENT = {
    "lstm": lambda: nn.LSTM(4, 5, 2, batch_first=True),
    "gru": lambda: nn.GRU(4, 5, batch_first=True),
    "bidirectional": lambda: nn.LSTM(4, 5, bidirectional=True),
}
FUSED = ("transformer", "causal transformer", "attention without weights")


def network(name):
    torch.manual_seed(0)
    net, inputs = NETWORKS[name]()
    with torch.no_grad():
        for tensor in own_tensors(net).values():
            if tensor.is_floating_point():
                tensor += 0.1 * torch.rand_like(tensor)
    return net.eval(), inputs


def whole(net, inputs, name, value):
    changed = copy.deepcopy(net)
    with torch.no_grad():
        own_tensors(changed)[name].copy_(value)
    with torch.inference_mode():
        return changed(inputs)


def other(tensor, seed=0):
    values = torch.rand(tensor.shape, generator=torch.Generator().manual_seed(seed)) / 2
    return (tensor.detach() + values).to(tensor.dtype)


def assert_same(case, name, found, wanted):
    """But for a bias, which shifts a product's output, bit by bit."""
    assert found.shape == wanted.shape
    if case in (*FUSED, *RECURRENT) or name.endswith("bias"):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    else:
        assert torch.equal(found, wanted)


def used(net):
    return {name: t for name, t in own_tensors(net).items() if t.is_floating_point()}


def replays(net, inputs):
    return {name: Replay(net, inputs, name) for name in used(net)}


def assert_replayed(net, inputs, case=""):
    """From every tensor, in inference mode; a case of FUSED or RECURRENT up to rounding."""
    with torch.inference_mode():
        for name, replay in replays(net, inputs).items():
            value = other(used(net)[name])
            assert_same(case, name, replay.outputs(value), whole(net, inputs, name, value))


@pytest.mark.parametrize("case", NETWORKS)
def test_a_replay_gives_what_a_whole_pass_does(case):
    """Again and again, in any order, with nothing that was recorded changed."""
    net, inputs = network(case)
    before = copy.deepcopy(net.state_dict())
    with torch.inference_mode():
        replayed = replays(net, inputs)
        recorded = {
            name: {place: value.clone() for place, value in replay.values.items()}
            for name, replay in replayed.items()
        }
        for seed in range(3):
            names = list(used(net))[:: 1 if seed else -1]
            for name in names:
                value = other(used(net)[name], seed)
                given = value.clone()
                found = replayed[name].outputs(value)
                assert_same(case, name, found, whole(net, inputs, name, value))
                assert torch.equal(value, given)
        for name, replay in replayed.items():
            assert all(torch.equal(replay.values[at], was) for at, was in recorded[name].items())
    assert all(torch.equal(before[name], tensor) for name, tensor in net.state_dict().items())


@pytest.mark.parametrize("context", [torch.no_grad, torch.enable_grad])
@pytest.mark.parametrize("case", NETWORKS)
def test_outside_of_inference_mode_too(case, context):
    net, inputs = network(case)
    with context():
        for name, replay in replays(net, inputs).items():
            value = other(used(net)[name])
            wanted = whole(net, inputs, name, value)
            torch.testing.assert_close(replay.outputs(value), wanted)


@pytest.mark.parametrize("recorded", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("case", NETWORKS)
def test_a_value_may_have_another_layout(case, recorded):
    net, inputs = network(case)
    if inputs.dim() == 4:
        net = net.to(memory_format=recorded)
    with torch.inference_mode():
        for name, replay in replays(net, inputs).items():
            value = other(used(net)[name]).contiguous()
            turned = value.transpose(0, -1).contiguous().transpose(0, -1)
            wanted = whole(net, inputs, name, value)
            for one in (value, turned):
                assert_same(case, name, replay.outputs(one), wanted)


@pytest.mark.parametrize("inplace", [False, True])
def test_what_lies_before_a_tensor_is_not_computed_again(inplace):
    net = mlp(inplace=inplace).eval()
    with torch.inference_mode():
        replayed = replays(net, numbers(6))
    for name, replay in replayed.items():
        products = [step for step in replay.steps if "linear" in str(step.operation)]
        products += [step for step in replay.steps if "addmm" in str(step.operation)]
        layer, bias = int(name[0]), name.endswith("bias")
        assert len(products) == (6 - layer) // 2 - bias


@pytest.mark.parametrize("case", FUSED[:2])
def test_of_a_fused_layer_only_the_part_that_follows_is_replayed(case):
    net, inputs = network(case)

    def fused_and_products(name):
        with torch.inference_mode():
            steps = Replay(net, inputs, f"encoder.layers.{name}").steps
        operations = [str(step.operation) for step in steps]
        return tuple(
            sum(kind in one for one in operations) for kind in ("layer_fwd", "aten.linear")
        )

    for layer, after in ((0, 1), (1, 0)):
        # with the head's; what begins a layer is followed by all of it, which is faster fused
        for name, wanted in {
            "self_attn.in_proj_weight": (after + 1, 1),
            "self_attn.in_proj_bias": (after + 1, 1),
            "self_attn.out_proj.weight": (after, 4),
            "linear1.weight": (after, 3),
            "linear1.bias": (after, 2),
            "linear2.weight": (after, 2),
            "norm2.weight": (after, 1),
        }.items():
            assert fused_and_products(f"{layer}.{name}") == wanted, (layer, name)
    assert torch.backends.mha.get_fastpath_enabled()


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_nested_inputs_are_replayed_fused():
    """A layer that is given nested tensors can't be taken apart, which torch says by asserting."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 8, batch_first=True)
    padding = torch.arange(4) >= torch.tensor([4, 2, 3, 1, 4])[:, None]
    net = Net(
        lambda net, x: net.head(net.encoder(x, src_key_padding_mask=padding)[:, 0]),
        encoder=nn.TransformerEncoder(layer, 2),
        head=nn.Linear(8, 3),
    ).eval()
    inputs, name = numbers(4, 8), "encoder.layers.0.linear2.weight"
    with torch.inference_mode():
        replay, value = Replay(net, inputs, name), other(used(net)[name])
        assert any("layer_fwd" in str(step.operation) for step in replay.steps)
        torch.testing.assert_close(replay.outputs(value), whole(net, inputs, name, value))
    assert torch.backends.mha.get_fastpath_enabled()


def test_a_tensor_that_is_not_used_leaves_the_outputs_as_they_are():
    net, inputs = network("mlp")
    net.register_buffer("idle", torch.ones(3))
    with torch.inference_mode():
        replay = Replay(net, inputs, "idle")
        assert torch.equal(replay.outputs(torch.zeros(3)), net(inputs))
    assert replay.steps == []


@pytest.mark.parametrize("inplace", [False, True])
def test_what_is_kept_is_in_front_of_the_tensors(inplace):
    """The network's own tensors and the inputs aside, be they a part of a larger tensor."""
    net, inputs = mlp(inplace=inplace).eval(), numbers(2, 6)[:, 0]
    with torch.inference_mode():
        replayed = replays(net, inputs)
    given = [tensor.data_ptr() for tensor in (*own_tensors(net).values(), inputs)]
    for name, wanted in {"0.weight": [], "0.bias": [8], "2.weight": [8], "2.bias": [4]}.items():
        kept = [v.shape[1] for v in replayed[name].values.values() if v.data_ptr() not in given]
        assert kept == wanted, name


def halves_in_place(net, x):
    left, right = net.first(x).chunk(2, dim=1)
    left += right
    return net.second(torch.cat([left, right], 1))


def constant_edited_after_use(net, x):
    shift = torch.ones(6)
    hidden = net.first(x) + shift
    shift[2] += 1
    return net.second(hidden + shift)


def followed_after_use(net, x):
    shift = torch.ones(6)
    hidden = net.first(x) + shift
    shift += net.first.bias
    return net.second(hidden + shift)


def by_numpy(net, x):
    return net.second(torch.from_numpy(net.first(x).detach().numpy()))


def branching(net, x):
    return net.second(net.first(x) if net.first.weight.sum() > 0 else x)


def counting(net, x):
    net.calls += 1
    return net.second(net.first(x)) + net.calls


def edited_weight(net, x):
    net.first.weight.view(-1).mul_(2)
    return net.second(net.first(x))


REFUSED = {
    "branch": (branching, "course of the pass depends on values"),
    "item": (lambda net, x: net.second(net.first(x) * net.first(x).max().item()), "values .*item"),
    "nonzero": (lambda net, x: net.second(x)[net.first(x)[:, 0].nonzero()[:, 0]], "nonzero"),
    "mask": (lambda net, x: net.second(x)[net.first(x)[:, 0] > 0], "values .*index"),
    "masked select": (
        lambda net, x: net.first(x).masked_select(net.first(x) > 0).sum() + net.second(x),
        "masked_select",
    ),
    "unique": (lambda net, x: net.second(net.first(x).unique().expand(1, -1)[:, :6]), "unique"),
    "equal": (lambda net, x: net.second(x) * torch.equal(net.first(x), x), "equal"),
    "dropout": (lambda net, x: net.second(F.dropout(net.first(x), training=True)), "at random"),
    "noise": (lambda net, x: net.second(net.first(x) + torch.randn(6)), "randn.* at random"),
    "view in place": (halves_in_place, "add_.* works in place on memory that is shared"),
    "constant edited": (constant_edited_after_use, "add_.* works in place"),
    "constant followed": (followed_after_use, "add_.* works in place"),
    "out": (lambda net, x: net.second(torch.relu(net.first(x)).sign_()
                                      + torch.add(net.first(x), 1, out=torch.empty(5, 6))),
            "add.out works in place"),
    "buffer in place": (counting, "add_.* works in place"),
    "weight in place": (edited_weight, "mul_.* works in place"),
    "numpy": (by_numpy, "origin is not seen"),
    "constant": (lambda net, x: x * 2, "outputs do not follow"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_replayed_is_named(case):
    forward, message = REFUSED[case]
    net = Net(forward, calls=torch.zeros(1), **linear()).eval()
    before = copy.deepcopy(net.state_dict())
    with torch.inference_mode(), pytest.raises(NotReplayable, match=message):
        replays(net, numbers(6))
    assert all(torch.equal(before[name], tensor) for name, tensor in net.state_dict().items())


@pytest.mark.parametrize(
    "forward",
    [
        lambda net, x: net.second(x[x[:, 0] > 0]) + net.first(x).mean(),
        lambda net, x: net.second(net.first(x)[x[:, 0] > 0]),
        lambda net, x: net.second(net.first(x).masked_select(x > 0).sum() + x),
        lambda net, x: net.second(net.first(x)) if x.sum() < 100 else x,
        lambda net, x: net.second(net.first(x)) * x.abs().max().item(),
        lambda net, x: net.second(net.first(x)[:, net.first(x).argmax(0)]),
    ],
)  # fmt: skip
def test_the_course_may_depend_on_the_inputs(forward):
    assert_replayed(Net(forward, **linear()).eval(), numbers(6)[:5])


@pytest.mark.parametrize("case", RECURRENT)
def test_recurrent_networks_are_replayed(case):
    torch.manual_seed(0)
    layer = RECURRENT[case]()
    head = nn.Linear(10 if layer.bidirectional else 5, 3)
    assert_replayed(Net(recurrent, lstm=layer, head=head).eval(), numbers(6, 4), case)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_a_padded_transformer_is_replayed_unless_torch_nests_its_inputs():
    net = transformer(torch.arange(6).expand(EXAMPLES, 6) > 3).eval()
    with torch.inference_mode(), pytest.raises(NotReplayable, match="_nested_tensor_from_mask"):
        Replay(net, words(), "head.weight")
    net.encoder.use_nested_tensor = False
    assert_replayed(net, words(), "transformer")


def test_what_works_in_place_is_replayed():
    """On what it found there: neither on what it left, nor on what it did the time before."""
    steps = [lambda x: x.mul_(3), lambda x: x.sub_(1), lambda x: x.abs_(), lambda x: x.mul_(x)]

    def forward(net, x):
        hidden = net.first(x)
        for step in steps:
            hidden = step(hidden) if step is steps[0] else step(hidden).add_(net.shift)
        return net.second(hidden)

    net, inputs = Net(forward, shift=torch.ones(6), **linear()).eval(), numbers(6)
    with torch.inference_mode():
        replayed = replays(net, inputs)
        for name in [*used(net), *reversed(used(net))]:
            for seed in range(2):
                value = other(used(net)[name], seed)
                found = replayed[name].outputs(value)
                assert_same("", name, found, whole(net, inputs, name, value))
