"""torch.compile: one graph, compiled once, with eager's results; and what the compiler is told of the operators."""

import copy
import warnings
from collections.abc import Iterator
from functools import partial

import pytest
import torch
from torch import Tensor, fx, nn

import sk_fused
from sk_fused.backends import native

from . import test_convolutions, test_operators
from .parity import LAYOUTS, assert_parity, assert_within, batches, freeze, pair

# The two roads: convolutions of PyTorch's, and of the package's own.
UNITS = {"split": dict(in_channels=8), "groups": dict(in_channels=16, groups=4, split_input=False)}


@pytest.fixture(autouse=True)
def _compiler() -> Iterator[None]:
    """No graph from another test. A second compilation of the same code is an error: everything here is to compile once."""
    torch._dynamo.reset()
    # The compiler does not know the filling of empty memory, and its own kernels are deterministic here.
    torch.use_deterministic_algorithms(False)
    with torch._dynamo.config.patch(error_on_recompile=True):
        yield


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", UNITS)
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_forward_and_backward(name: str, mode: str, layout: str):
    ours, theirs = pair(layout=layout, **UNITS[name])
    ours.train(mode == "train").compile(fullgraph=True)
    theirs.train(mode == "train")
    xs = batches(3, (3, UNITS[name]["in_channels"], 9, 7), layout=layout)
    assert_parity(ours, theirs, xs)
    assert ours(xs[0].requires_grad_()).is_contiguous(memory_format=LAYOUTS[layout])


@pytest.mark.parametrize("name", UNITS)
def test_reference_backend(name: str):
    ours, theirs = pair(**UNITS[name])
    ours.compile(fullgraph=True)
    with sk_fused.use_backend("reference"):
        assert_parity(ours, theirs, batches(2, (3, UNITS[name]["in_channels"], 9, 7)))


@pytest.mark.parametrize("name", UNITS)
def test_batch_of_any_size(name: str):
    ours, theirs = pair(**UNITS[name])
    ours.compile(fullgraph=True, dynamic=True)
    C = UNITS[name]["in_channels"]
    assert_parity(ours, theirs, [torch.randn(B, C, 9, 7) for B in (3, 5, 2)])


@pytest.mark.parametrize("name", UNITS)
def test_inference(name: str):
    ours, theirs = pair(**UNITS[name])
    ours.eval().compile(fullgraph=True)
    (x,) = batches(1, (3, UNITS[name]["in_channels"], 9, 7))
    with torch.no_grad():
        assert_within("output", ours(x), theirs.eval()(x), theirs.double()(x.double()))


@pytest.mark.parametrize("trained", [None, "attn.fc_select.weight", "paths.1.bn.bias"])
def test_a_unit_without_a_backward_is_one_operator(trained: str | None):
    """With gradients enabled: whether there is one depends on what is trained."""
    ours, _ = pair(**UNITS["groups"])
    ours.eval().requires_grad_(False)
    if trained:
        ours.get_parameter(trained).requires_grad_()
    x, called = torch.randn(3, 16, 9, 7), []

    def look(graph: fx.GraphModule, _) -> fx.GraphModule:
        called.extend(node.target for node in graph.graph.nodes)
        return graph

    v = torch.compile(ours, fullgraph=True, backend=look)(x)
    assert (native.unit in called) == (trained is None) == (not v.requires_grad)
    torch.testing.assert_close(v, ours(x))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", UNITS)
def test_freezing(name: str, layout: str):
    ours, theirs = pair(layout=layout, **UNITS[name])
    ours.eval().compile(fullgraph=True)
    (x,) = batches(1, (3, UNITS[name]["in_channels"], 9, 7), layout=layout)
    with torch.no_grad(), torch._inductor.config.patch(freezing=True):
        v = ours(x)
        assert_within("output", v, theirs.eval()(x), theirs.double()(x.double()))
        assert v.is_contiguous(memory_format=LAYOUTS[layout])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(dtype: torch.dtype):
    ours, theirs = pair(in_channels=8)
    ours.compile(fullgraph=True)
    assert_parity(ours, theirs, batches(2, (3, 8, 9, 7)), autocast=partial(torch.autocast, "cpu", dtype=dtype))


def test_momentum_none_is_no_reason_to_compile_again():
    ours, theirs = pair(in_channels=8, norm_layer=partial(nn.BatchNorm2d, momentum=None))
    ours.compile(fullgraph=True)
    assert_parity(ours, theirs, batches(3, (3, 8, 9, 7)))


@pytest.mark.filterwarnings("ignore:sk_fused")
@pytest.mark.parametrize("name", UNITS)
def test_vmap_is_compiled_of_pytorchs_operators(name: str):
    unit, theirs = (unit.eval() for unit in pair(**UNITS[name]))
    (x,) = batches(1, (6, UNITS[name]["in_channels"], 9, 7))
    stacked = x.unflatten(0, (3, 2))
    with torch.no_grad():
        v = torch.compile(torch.vmap(lambda images: unit(images)), fullgraph=True)(stacked)
        assert_within("vmap", v.flatten(0, 1), theirs(x), copy.deepcopy(theirs).double()(x.double()))


@pytest.mark.filterwarnings("ignore:sk_fused")
@pytest.mark.parametrize("name", UNITS)
def test_gradients_per_image_are_compiled(name: str):
    unit, theirs = (unit.eval() for unit in pair(**UNITS[name]))
    (x,) = batches(1, (3, UNITS[name]["in_channels"], 9, 7))

    def loss(parameters: dict[str, Tensor], image: Tensor, of: nn.Module) -> Tensor:
        return torch.func.functional_call(of, parameters, (image[None],)).square().sum()

    gradients = []
    for of, dtype, compiler in ((unit, torch.float32, partial(torch.compile, fullgraph=True)), (theirs, torch.float32, lambda f: f), (copy.deepcopy(theirs).double(), torch.float64, lambda f: f)):
        parameters = {key: parameter.detach() for key, parameter in of.named_parameters()}
        per_image = compiler(torch.vmap(torch.func.grad(partial(loss, of=of)), (None, 0)))
        gradients.append(per_image(parameters, x.to(dtype)))
    for key, ours in gradients[0].items():
        assert_within(key, ours, gradients[1][key], gradients[2][key])


def test_a_network_has_no_graph_break():
    units = [pair(**arguments)[0] for arguments in (UNITS["split"], UNITS["groups"], dict(in_channels=16, stride=2, act_layer=nn.SiLU))]
    network = nn.Sequential(units[0], nn.Conv2d(8, 16, 1), *units[1:], freeze(pair(in_channels=16)[0]))
    for training in (True, False):
        explained = torch._dynamo.explain(network.train(training))(torch.randn(3, 8, 9, 7))
        assert explained.graph_break_count == 0 and explained.graph_count == 1, explained.break_reasons


def test_a_unit_that_is_not_fused_is_compiled_and_says_so_once():
    ours, theirs = pair(in_channels=8, act_layer=nn.GELU)
    ours.compile(fullgraph=True)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        assert_parity(ours, theirs, batches(2, (3, 8, 9, 7)))
    assert [str(warning.message) for warning in said if "sk_fused" in str(warning.message)] == [
        "sk_fused fuses only the attention of a SelectiveKernel: paths.0 has the activation GELU"
    ]


def test_operators_get_the_strides_they_were_traced_with():
    """Branches that the compiler makes itself, in channels_last, after an elementwise operation that it could restride."""
    ours, _ = pair(in_channels=8)
    bns = [*(path.bn for path in ours.paths), ours.attn.bn]
    norms = [sk_fused.functional.BatchNorm.of(bn.eval()) for bn in bns]

    def unit(x: Tensor) -> Tensor:
        branches = [(x * factor).contiguous(memory_format=torch.channels_last) for factor in (1, 2)]
        return sk_fused.functional.selective_kernel(branches, norms[:2], ours.attn.fc_reduce.weight, norms[2], ours.attn.fc_select.weight)

    x = torch.randn(3, 8, 5, 6)
    with torch.no_grad():
        v = torch.compile(unit, fullgraph=True)(x)
        assert v.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(v, unit(x))
    for name in OPERATORS:
        assert torch.Tag.needs_exact_strides in getattr(torch.ops.sk_fused, name).default.tags, name


OPERATORS = (*test_operators.OPERATORS, *test_convolutions.OPERATORS)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(dtype: torch.dtype, layout: str):
    """Of the operators that take convolutions or parameters; tests/test_operators.py has the others."""
    M, B, C, D, act = 2, 3, 16, 5, ("relu", 0.0)
    x = torch.randn(B, C, 7, 5).to(dtype=dtype, memory_format=LAYOUTS[layout])
    weights = [torch.randn(C, 4, 3, 3).to(dtype=dtype, memory_format=LAYOUTS[layout]) for _ in range(M)]
    mean, var, scale, bias, p, q = torch.rand(6, M, C)
    a, s, t, da = torch.rand(B, M, C).softmax(1), torch.randn(B, C), torch.randn(B, C), torch.randn(B, M, C)
    weight, attn_bias, attn_mean, attn_var = torch.rand(4, D)
    fc_reduce, fc_select = torch.randn(D, C, 1, 1, dtype=dtype), torch.randn(M * C, D, 1, 1, dtype=dtype)
    convolution = weights, 2, [1, 2], 4
    norms = [None, weight[:1].expand(C)], [torch.randn(C, dtype=dtype), None], [*mean.to(dtype)], [*var], 1e-5
    ys = [torch.randn(B, C, 4, 3).to(dtype=dtype, memory_format=LAYOUTS[layout]) for _ in range(M)]
    for operator, arguments in {
        native.squeeze: (ys, *norms, *act, 3),
        native.branch: (x, *convolution, False),
        native.branch_backward: (ys[0] + 1, x, *convolution, ys, mean, scale, bias, a, t, p, q, *act, (True, False)),
        native.unit: (x, *convolution, *norms, fc_reduce, weight, None, attn_mean, attn_var, 1e-5, fc_select, *act),
        native.attend: (s[:, None], 1, fc_reduce, None, attn_bias.to(dtype), None, None, 1e-5, *act, fc_select, None),
        native.attend_backward: (da, a, s, s @ fc_reduce.flatten(1).float().t(), fc_reduce, weight, None, attn_mean, attn_var, 1e-5, True, *act, fc_select),
    }.items():
        torch.library.opcheck(operator, arguments)
