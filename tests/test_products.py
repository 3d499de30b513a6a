"""Every product of a pass is seen, and seeing changes nothing."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules import module as hooks

from quantifind.network.products import Product, visiting
from quantifind.tensor.matrices import Matrices


def look(model, *inputs, visit=lambda product: product.compute(*product.operands), **options):
    """What ``model`` returns, and the products seen on the way."""
    seen: list[Product] = []

    def note(product):
        seen.append(product)
        return visit(product)

    with torch.no_grad(), visiting(model, note):
        return model(*inputs, **options), seen


def check_the_same(model, *inputs, **options):
    """Plain and seen pass agree; returns the products."""
    with torch.no_grad():
        plain = model(*inputs, **options)
    seen_output, seen = look(model, *inputs, **options)
    torch.testing.assert_close(seen_output, plain, rtol=1e-5, atol=1e-6)
    assert seen
    for product in seen:
        assert len(product.operands) == len(product.activations)
    return seen


class Calls(nn.Module):
    """A function of an input and a weight as a network."""

    def __init__(self, function, *shape):
        super().__init__()
        self.function, self.weight = function, nn.Parameter(torch.randn(*shape))

    def forward(self, x):
        return self.function(x, self.weight)


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("cross", ["self", "key is value", "all differ"])
@pytest.mark.parametrize("options", [{}, {"bias": False}, {"add_bias_kv": True}])
def test_attention(batch_first, need_weights, cross, options):
    torch.manual_seed(0)
    net = nn.MultiheadAttention(8, 2, batch_first=batch_first, **options).eval()
    query, key, value = torch.randn(4, 3, 8), torch.randn(4, 3, 8), torch.randn(4, 3, 8)
    inputs = {
        "self": (query, query, query),
        "key is value": (query, key, key),
        "all differ": (query, key, value),
    }[cross]
    seen = check_the_same(net, *inputs, need_weights=need_weights)
    rows = {
        "self": [(0, 24)],
        "key is value": [(0, 8), (8, 24)],
        "all differ": [(0, 8), (8, 16), (16, 24)],
    }
    packed = [p.matrices for p in seen if p.weight == "in_proj_weight"]
    assert packed == [Matrices.rows((24, 8), first, last) for first, last in rows[cross]]
    assert [p.kind for p in seen[len(packed) :]] == ["matrix_product", "matrix_product", "linear"]


def test_attention_with_widths_of_its_own():
    torch.manual_seed(0)
    net = nn.MultiheadAttention(8, 2, kdim=5, vdim=6, batch_first=True).eval()
    seen = check_the_same(net, torch.randn(2, 3, 8), torch.randn(2, 4, 5), torch.randn(2, 4, 6))
    assert [p.weight for p in seen] == [
        *("q_proj_weight", "k_proj_weight", "v_proj_weight", None, None, "out_proj.weight")
    ]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("norm_first", [True, False])
def test_transformer_encoder_is_seen_inside_its_fast_path_too(training, norm_first):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(
        8, 2, 16, dropout=0.0, batch_first=True, norm_first=norm_first
    )
    net = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).train(training)
    padding = torch.tensor([[False, False, True], [False, False, False]])
    seen = check_the_same(net, torch.randn(2, 3, 8), src_key_padding_mask=padding)
    assert [site for p in seen for site in p.activations][:7] == [
        "layers.0.self_attn.in_proj_weight",
        *(f"layers.0.self_attn.product.{i}.{side}" for i in (0, 1) for side in ("left", "right")),
        "layers.0.self_attn.out_proj.weight",
        "layers.0.linear1.weight",
    ]
    assert len(seen) == 2 * 6


BOOLEAN = torch.tensor([[True, False, True, True, False], [False] * 5, [True] * 5])


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"attn_mask": BOOLEAN},
        {"attn_mask": torch.where(BOOLEAN, 0.5, -torch.inf)},
        {"is_causal": True},
        {"scale": 0.3},
        {"enable_gqa": True},
    ],
    ids=["plain", "bool mask", "float mask", "causal", "scale", "grouped queries"],
)
def test_scaled_dot_product_attention(options):
    torch.manual_seed(0)
    heads = 2 if options.get("enable_gqa") else 4
    key, value = torch.randn(2, heads, 5, 6), torch.randn(2, heads, 5, 6)
    net = Calls(lambda x, _: F.scaled_dot_product_attention(x, key, value, **options), 1)
    assert len(check_the_same(net, torch.randn(2, 4, 3, 6))) == 2


@pytest.mark.parametrize("layer", [nn.Conv1d, nn.Conv2d, nn.Conv3d])
@pytest.mark.parametrize("transposed", [False, True])
def test_convolutions(layer, transposed):
    torch.manual_seed(0)
    if transposed:
        layer = getattr(nn, layer.__name__.replace("v", "vTranspose"))
    net = layer(4, 6, 3, stride=2, padding=1, dilation=2, groups=2)
    axes = int(layer.__name__[-2])
    (product,) = check_the_same(net, torch.randn(2, 4, *(9,) * axes))
    assert product.kind == "transposed_" * transposed + "convolution"
    assert (product.weight, product.bias_name, product.spatial) == ("weight", "bias", axes)


def test_a_weight_that_was_computed_is_an_operand():
    net = Calls(lambda x, w: F.conv1d(x, w.tanh()), 2, 3, 2)
    (product,) = check_the_same(net, torch.randn(2, 3, 4))
    assert product.activations == ("product.0.left", "product.0.right")
    assert product.weight is None


SQUARE = torch.randn(3, 3, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    "function",
    [
        lambda x, w: x @ w,
        lambda x, w: w @ x,
        lambda x, w: x.matmul(w),
        lambda x, w: torch.mm(x, mat2=w),
        lambda x, w: torch.mm(input=x, mat2=w),
        lambda x, w: torch.linalg.matmul(x, w),
        lambda x, w: torch.inner(x, w),
        lambda x, w: torch.tensordot(x, w, dims=1),
        lambda x, w: torch.einsum("ij,jk->ik", x, w),
        lambda x, w: torch.einsum("ij,jk->ik", [x, w]),
        lambda x, w: torch.addmm(SQUARE, x, w, beta=0.5, alpha=2),
        lambda x, w: torch.addmm(SQUARE, mat1=x, mat2=w),
        lambda x, w: SQUARE.addmm(x, w),
        lambda x, w: torch.addmv(SQUARE[0], w, x[0]),
        lambda x, w: torch.bmm(x[None], w[None]),
        lambda x, w: torch.baddbmm(SQUARE[None], x[None], w[None], beta=2),
        lambda x, w: torch.addbmm(SQUARE, x[None], w[None]),
        lambda x, w: F.linear(x, w.t()),
        lambda x, w: x[0] @ w[0],
        lambda x, w: torch.mv(w, x[0]),
    ],
)
def test_functional_products(function):
    """With a weight one operand is left, named like it; without, there are two."""
    (product,) = check_the_same(Calls(function, 3, 3), torch.randn(3, 3))
    assert (product.weight, product.activations) == ("weight", ("weight",))
    free = Calls(lambda x, _: function(x, SQUARE), 1)
    (product,) = check_the_same(free, torch.randn(3, 3))
    assert product.activations == ("product.0.left", "product.0.right")


def test_doubling_an_operand_doubles_the_product():
    net = Calls(lambda x, w: torch.addmm(SQUARE, x, w), 3, 3)
    x = torch.randn(3, 3)
    doubled, _ = look(net, x, visit=lambda p: p.compute(2 * p.operands[0]))
    torch.testing.assert_close(doubled, net(2 * x))


def test_a_buffer_is_a_weight_too():
    class Fixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("kernel", torch.randn(2, 1, 3))

        def forward(self, x):
            return F.conv1d(x, self.kernel)

    (product,) = check_the_same(Fixed(), torch.randn(4, 1, 5))
    assert product.weight == "kernel"


def test_an_embedding_and_a_head_tied_to_it():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.head = nn.Embedding(5, 4), nn.Linear(4, 5)
            self.head.weight = self.embedding.weight

        def forward(self, codes):
            return self.head(self.embedding(codes))

    seen = check_the_same(Tied(), torch.tensor([[1, 4], [0, 0]]))
    assert [(p.kind, p.weight) for p in seen] == [
        ("embedding", "embedding.weight"),
        ("linear", "embedding.weight"),
    ]


def test_parameters_that_are_parts_of_one_memory_keep_their_names():
    memory = torch.randn(2, 3, 3)
    net = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
    net[0].weight, net[1].weight = nn.Parameter(memory[0]), nn.Parameter(memory[1])
    seen = check_the_same(net, torch.randn(2, 3))
    whole = Matrices.rows((3, 3))
    assert [(p.weight, p.matrices) for p in seen] == [("0.weight", whole), ("1.weight", whole)]


def test_a_module_used_twice_numbers_its_products():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = Calls(lambda x, _: x @ x, 1)

        def forward(self, x):
            return self.inner(self.inner(x)) @ x

    seen = check_the_same(Twice(), torch.randn(3, 3))
    assert [p.activations[0] for p in seen] == [
        "inner.product.0.left",
        "inner.product.1.left",
        "product.0.left",
    ]


def test_each_pass_counts_its_products_from_0():
    net, seen = Calls(lambda x, _: x @ x, 1), []

    def visit(product):
        seen.append(product.activations[0])
        return product.compute(*product.operands)

    with visiting(net, visit):
        for _ in range(3):
            net(torch.randn(3, 3))
    assert seen == ["product.0.left"] * 3


@pytest.mark.parametrize("fails", [False, True])
def test_nothing_is_left_behind(fails):
    net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2 + fails, 2))
    before = len(hooks._global_forward_hooks), len(hooks._global_forward_pre_hooks)
    seen: list[Product] = []
    try:
        with visiting(net, lambda p: (seen.append(p), p.compute(*p.operands))[1]):
            net(torch.randn(1, 2))
    except RuntimeError:
        assert fails
    assert (len(hooks._global_forward_hooks), len(hooks._global_forward_pre_hooks)) == before
    seen.clear()
    net[0](torch.randn(1, 2))
    assert seen == []
