"""Other projects' units: each of the classes below is the published unit's maths in plain PyTorch, with the names that the project gives
its layers; `fuse` has to find it, and the fused one has to be it."""

import copy
import io
import pickle
import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn.utils import prune

import sk_fused
from sk_fused import FusedSelectiveKernelAttn, backends, functional, reference
from sk_fused.backends import use_backend
from sk_fused.backends.reference import layout_of
from sk_fused.families import FAMILIES, Family

from .parity import DTYPES, LAYOUTS, assert_parity, batches
from .test_parity import smooth_in_float16

MIRNET, SIMCLR, ATTENTION = "SKFF", "SelectiveKernel", "SKAttention"


class SKFF(nn.Module):
    """MIRNetv2, eq. 6: L = Σ L_m, s = GAP(L), z = leaky(W s), s_m = softmax_m(W_m z), U = Σ s_m·L_m."""

    def __init__(self, in_channels: int, height: int = 3, reduction: int = 8, bias: bool = False):
        super().__init__()
        self.height = height
        D = max(in_channels // reduction, 4)
        self.avg_pool = nn.AdaptiveAvgPool2d(1)
        self.conv_du = nn.Sequential(nn.Conv2d(in_channels, D, 1, bias=bias), nn.LeakyReLU(0.2))
        self.fcs = nn.ModuleList(nn.Conv2d(D, in_channels, 1, bias=bias) for _ in range(height))
        self.softmax = nn.Softmax(dim=1)

    def forward(self, inp_feats: list[Tensor]) -> Tensor:
        z = self.conv_du(self.avg_pool(sum(inp_feats)))
        exponentials = torch.stack([torch.exp(fc(z)) for fc in self.fcs])
        weights = exponentials / exponentials.sum(0)
        return (weights * torch.stack(list(inp_feats))).sum(0)


class SKAttention(nn.Module):
    """External-Attention-pytorch: u_k = relu(BN(conv_k x)), s = mean Σ u_k, z = W s + b, a_k = softmax_k(W_k z + b_k), v = Σ a_k·u_k."""

    def __init__(self, channel: int = 512, kernels: tuple[int, ...] = (1, 3, 5, 7), reduction: int = 16, group: int = 1, L: int = 32):
        super().__init__()
        self.d = max(L, channel // reduction)

        def path(k: int) -> nn.Sequential:
            conv = nn.Conv2d(channel, channel, k, padding=k // 2, groups=group)
            return nn.Sequential(OrderedDict(conv=conv, bn=nn.BatchNorm2d(channel), relu=nn.ReLU()))

        self.convs = nn.ModuleList(path(k) for k in kernels)
        self.fc = nn.Linear(channel, self.d)
        self.fcs = nn.ModuleList(nn.Linear(self.d, channel) for _ in kernels)
        self.softmax = nn.Softmax(dim=0)

    def forward(self, x: Tensor) -> Tensor:
        us = [conv(x) for conv in self.convs]
        z = self.fc(torch.einsum("kbchw->bc", torch.stack(us)) / (x.shape[2] * x.shape[3]))
        logits = torch.stack([fc(z) for fc in self.fcs])
        weights = torch.exp(logits - logits.logsumexp(0))
        return sum(weight[..., None, None] * u for weight, u in zip(weights, us))


class BatchNormRelu(nn.Sequential):
    def __init__(self, channels: int):
        super().__init__(nn.BatchNorm2d(channels), nn.ReLU())


class SelectiveKernel(nn.Module):
    """SimCLRv2: the two halves u_1, u_2 of relu(BN(w ∗ x)), s = mean (u_1 + u_2), a = softmax of the halves of W' relu(BN(W s)),
    v = a_1·u_1 + a_2·u_2."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, sk_ratio: float = 0.0625, min_dim: int = 32):
        super().__init__()
        conv = nn.Conv2d(in_channels, 2 * out_channels, 3, stride, 1, bias=False)
        D = max(int(out_channels * sk_ratio), min_dim)
        self.main_conv = nn.Sequential(conv, BatchNormRelu(2 * out_channels))
        layers = nn.Conv2d(out_channels, D, 1, bias=False), BatchNormRelu(D), nn.Conv2d(D, 2 * out_channels, 1, bias=False)
        self.mixing_conv = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        u1, u2 = self.main_conv(x).tensor_split(2, 1)
        l1, l2 = self.mixing_conv((u1 + u2).mean((2, 3), keepdim=True)).tensor_split(2, 1)
        total = torch.logaddexp(l1, l2)
        return torch.exp(l1 - total) * u1 + torch.exp(l2 - total) * u2


class OfParts(nn.Module):
    """For units that take a list: of an image's channels, in M parts."""

    def __init__(self, unit: nn.Module, M: int):
        super().__init__()
        self.unit, self.M = unit, M

    def forward(self, x: Tensor) -> Tensor:
        return self.unit([part.contiguous(memory_format=layout_of(x)) for part in x.chunk(self.M, 1)])


# Name, how to make it, channels of its input.
CASES: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "SKFF of 2": (lambda: OfParts(SKFF(20, height=2), 2), 40),
    "SKFF of 3": (lambda: OfParts(SKFF(40), 3), 120),
    "SKFF with biases": (lambda: OfParts(SKFF(20, height=2, bias=True), 2), 40),
    "SKAttention": (lambda: SKAttention(12, L=8), 12),
    "SKAttention, 2 groups": (lambda: SKAttention(12, kernels=(3, 5), L=8, group=2), 12),
    "SimCLRv2": (lambda: SelectiveKernel(16, 16, 1, min_dim=8), 16),
    "SimCLRv2, stride 2": (lambda: SelectiveKernel(16, 16, 2, min_dim=8), 16),
    "SimCLRv2, 6 to 10 channels": (lambda: SelectiveKernel(6, 10, 2, min_dim=7), 6),
}


def twins(case: str, dtype: torch.dtype, layout: str) -> tuple[nn.Module, nn.Module]:
    """Fused and not, with statistics and affine parameters that are not the initial ones."""
    torch.manual_seed(2)
    theirs = CASES[case][0]()
    for module in theirs.modules():
        # Of a branch; that of the attention, on values of its own, stays.
        if isinstance(module, nn.Sequential) and isinstance(module[-1], nn.ReLU) and module is not getattr(theirs, "mixing_conv", [None, None])[1]:
            module[-1] = smooth_in_float16(dtype)()
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.3)
            nn.init.normal_(module.running_mean, std=0.3)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    theirs = theirs.to(dtype=dtype, memory_format=LAYOUTS[layout])
    ours = copy.deepcopy(theirs)
    (entry,) = sk_fused.fuse(ours).units
    assert entry.fused and entry.reason is None
    assert not any(isinstance(module, Family) for module in theirs.modules())
    return ours, theirs


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_parity(backend: str, case: str, dtype: torch.dtype, layout: str, training: bool):
    ours, theirs = (unit.train(training) for unit in twins(case, dtype, layout))
    for name, module in (*ours.named_modules(), *theirs.named_modules()):
        # A bias before a batch-norm has the gradient zero: what is computed is nothing but rounding.
        if training and dtype != torch.float64 and name.startswith("convs") and isinstance(module, nn.Conv2d):
            module.bias.requires_grad_(False)
    assert_parity(ours, theirs, batches(3, (16, CASES[case][1], 9, 8), dtype, layout))


@pytest.mark.parametrize("case", CASES)
def test_eval_without_gradients(backend: str, case: str):
    ours, theirs = (unit.eval() for unit in twins(case, torch.float64, "contiguous"))
    x = batches(1, (3, CASES[case][1], 16, 16), torch.float64)[0]
    with torch.inference_mode():
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-12, atol=1e-12)


def test_what_is_used_is_the_fused_one(monkeypatch: pytest.MonkeyPatch):
    """And not the project's forward."""
    units = [make() for make, _ in CASES.values()]
    for unit in units:
        sk_fused.fuse(unit)
    for unit_class in (SKFF, SKAttention, SelectiveKernel):
        monkeypatch.setattr(unit_class, "forward", None)
    for ours, (_, channels) in zip(units, CASES.values()):
        ours(torch.randn(4, channels, 6, 6)).sum().backward()
        assert all(parameter.grad is not None for parameter in ours.parameters())


def test_fuse_and_back():
    net = nn.ModuleDict({name: unit for name, unit in (("a", SKFF(8)), ("b", SKAttention(8)), ("c", SelectiveKernel(8, 8, 1)))})
    classes, parameters, state = [type(m) for m in net.modules()], dict(net.named_parameters()), copy.deepcopy(net.state_dict())
    for _ in range(2):
        assert [(unit.name, unit.fused, unit.reason) for unit in sk_fused.fuse(net).units] == [(name, True, None) for name in "abc"]
    assert [type(unit) for unit in net.values()] == [FAMILIES[name] for name in (MIRNET, ATTENTION, SIMCLR)]
    assert all(parameter is parameters[name] for name, parameter in net.named_parameters())
    assert net.state_dict().keys() == state.keys() and all(torch.equal(value, state[name]) for name, value in net.state_dict().items())
    net.load_state_dict(state, strict=True)
    assert [(unit.name, unit.fused) for unit in sk_fused.unfuse(net).units] == [(name, False) for name in "abc"]
    assert [type(m) for m in net.modules()] == classes and all("unfused_class" not in vars(unit) for unit in net.values())


def changed(unit: nn.Module, change: Callable[[nn.Module], object]) -> nn.Module:
    change(unit)
    return unit


# Of the same name, with other layers.
OTHERS = {
    "its layers are none, not avg_pool": type("SKFF", (nn.Module,), {})(),
    "its layers are paths, not main_conv": changed(type("SelectiveKernel", (nn.Module,), {})(), lambda m: m.add_module("paths", nn.Identity())),
    # MIRNet, the first.
    "conv_du.0 has hooks": changed(SKFF(8), lambda m: prune.l1_unstructured(m.conv_du[0], "weight", 0.5)),
    "a copy of it does not run as the published unit does: cannot pickle": changed(SKFF(8), lambda m: setattr(m, "lock", threading.Lock())),
    "conv_du is not a convolution and ReLU, LeakyReLU or Identity": changed(SKFF(8), lambda m: setattr(m, "conv_du", nn.Sequential(m.conv_du[0], nn.PReLU()))),
    "there are 3 fcs for a height of 2": changed(SKFF(8), lambda m: setattr(m, "height", 2)),
    "softmax is not over dimension 1": changed(SKFF(8), lambda m: setattr(m, "softmax", nn.Softmax(dim=2))),
    "fcs.1 is not Linear or a 1 × 1 convolution": changed(SKFF(8), lambda m: m.fcs.__setitem__(1, nn.Conv2d(4, 8, 3))),
    "only some of fcs have a bias": changed(SKAttention(8), lambda m: m.fcs.__setitem__(0, nn.Linear(32, 8, bias=False))),
    "convs.2 is not a convolution, BatchNorm2d": changed(SKAttention(8), lambda m: m.convs[2].__setitem__(1, nn.GroupNorm(2, 8))),
    "the branches' batch-norms differ": changed(SKAttention(8), lambda m: setattr(m.convs[0].bn, "eps", 0.1)),
    # DistAug's and others' of this family.
    "main_conv.1 is not BatchNorm2d": changed(SelectiveKernel(8, 8, 1), lambda m: m.main_conv[1].__setitem__(0, nn.GroupNorm(2, 16))),
    "main_conv.0 is not a 3 × 3 convolution": changed(SelectiveKernel(8, 8, 1), lambda m: m.main_conv.__setitem__(0, nn.Conv2d(8, 16, 5, padding=2, bias=False))),
    "mixing_conv.0 is not Linear or a 1 × 1 convolution without bias": changed(SelectiveKernel(8, 8, 1), lambda m: m.mixing_conv.__setitem__(0, nn.Conv2d(8, 32, 1))),
    # Of the same layers, with another forward.
    "its forward does not give what the published unit gives": type(MIRNET, (SKFF,), {"forward": lambda self, us: SKFF.forward(self, us) + us[0]})(8),
    "a copy of it does not run as the published unit does": type(ATTENTION, (SKAttention,), {"forward": lambda self, x, y: (x, y)})(8),
}  # fmt: skip


@pytest.mark.parametrize("reason", OTHERS)
def test_others_of_the_name_are_left_alone(reason: str):
    unit = OTHERS[reason]
    unit_class = type(unit)
    (entry,) = sk_fused.fuse(unit).units
    assert type(unit) is unit_class and not entry.fused
    assert entry.reason.startswith(f"not the {unit_class.__name__} that is known: {reason}")


@pytest.mark.parametrize("listen", [lambda layer: layer.register_forward_hook, lambda _: nn.modules.module.register_module_forward_hook])
def test_fuse_calls_no_hook_and_goes_on(listen: Callable):
    net, calls = nn.Sequential(SKFF(8), SKFF(8)), []
    handle = listen(net[0].conv_du)(lambda *_: calls.append(1))
    first, _ = sk_fused.fuse(net).units
    assert not calls and not first.fused and type(net[0]) is SKFF and "hooks" in first.reason
    handle.remove()
    assert [unit.fused for unit in sk_fused.fuse(net).units] == [True, True]


@pytest.mark.parametrize("forced", [None, "native", "triton"])
def test_fuse_leaves_the_backend_of_other_threads(forced: str | None, monkeypatch: pytest.MonkeyPatch):
    """What is forced is, for them, while the copy is run by the reference; and so it is afterwards."""
    chosen, fused = [], FAMILIES[MIRNET]._fused

    def look(self: Family, us: list[Tensor]) -> Tensor:
        with ThreadPoolExecutor(1) as another:
            chosen.append((backends.choose(us), another.submit(lambda: backends._forced or backends.choose(us).__name__).result()))
        return fused(self, us)

    monkeypatch.setattr(FAMILIES[MIRNET], "_fused", look)
    with use_backend(forced):
        assert sk_fused.fuse(SKFF(8)).units[0].fused
        assert backends._forced == forced
    assert chosen == [(backends.reference, forced or backends.native.__name__)]


def test_fuse_draws_no_random_number_and_changes_no_mode():
    unit = SKAttention(8, L=4)
    state = torch.get_rng_state()
    counted, (entry,) = copy.deepcopy(unit.state_dict()), sk_fused.fuse(unit).units
    assert entry.fused and torch.equal(torch.get_rng_state(), state)
    assert unit.training and all(torch.equal(value, counted[name]) for name, value in unit.state_dict().items())
    with torch.device("meta"):
        (entry,) = sk_fused.fuse(SKAttention(8, L=4)).units
    assert entry.fused


def test_the_argument_has_the_projects_own_name():
    unit, us = SKFF(20, height=2), [torch.randn(2, 20, 6, 5) for _ in range(2)]
    expected = unit(inp_feats=us)
    sk_fused.fuse(unit)
    torch.testing.assert_close(unit(inp_feats=us), expected)
    with pytest.raises(TypeError, match="inp_feats"):
        unit()


@pytest.mark.parametrize("case", ["SKFF of 2", "SKAttention", "SimCLRv2"])
def test_what_cannot_be_fused_runs_as_the_project_has_it(case: str):
    ours, theirs = twins(case, torch.float32, "contiguous")
    x, calls = torch.randn(4, CASES[case][1], 6, 6), []
    name, layer = next((name, module) for name, module in ours.named_modules() if isinstance(module, nn.Conv2d))
    handle = layer.register_forward_hook(lambda *_: calls.append(1))
    called = "the SKFF unit" if case == "SKFF of 2" else f"a {SIMCLR if case == 'SimCLRv2' else ATTENTION}"
    with pytest.warns(RuntimeWarning, match=f"sk_fused runs {called} unfused: {name.removeprefix('unit.')} has hooks"):
        v = ours(x)
    assert torch.equal(v, theirs(x)) and calls == [1]
    handle.remove()
    torch.testing.assert_close(ours(x), theirs(x))
    assert ours(x[:0]).shape == theirs(x[:0]).shape


def test_wrong_inputs():
    ours = SKFF(8)
    sk_fused.fuse(ours)
    u = torch.randn(2, 8, 5, 5)
    with pytest.raises(ValueError, match="inp_feats: expected 3 tensors, got 2"):
        ours([u, u])
    with pytest.raises(ValueError, match="branches: expected one shape and device"):
        ours([u, u, u[..., 1:]])
    with pytest.raises(TypeError, match="x: expected torch.float32, the dtype of the weights, got torch.float64"):
        ours([u.double()] * 3)


def test_copies_and_scripts():
    net = nn.Sequential(SKAttention(8, L=4), SelectiveKernel(8, 8, 1, min_dim=4)).eval()
    sk_fused.fuse(net)
    x, file = torch.randn(2, 8, 6, 6), io.BytesIO()
    torch.save(net, file)
    file.seek(0)
    for twin in (copy.deepcopy(net), pickle.loads(pickle.dumps(net)), torch.load(file, weights_only=False)):
        assert isinstance(twin[0], Family) and torch.equal(twin(x), net(x))
        sk_fused.unfuse(twin)
        assert type(twin[0]) is SKAttention
    compiled = torch.compile(net, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), net(x))
    traced = fx.symbolic_trace(nn.Sequential(net))
    assert [node.target for node in traced.graph.nodes if node.op == "call_module"] == ["0.0", "0.1"] and torch.equal(traced(x), net(x))


def test_fx_of_a_unit_that_takes_a_list():
    net = OfParts(SKFF(8, height=2), 2)
    sk_fused.fuse(net)

    class Sums(nn.Module):
        def __init__(self):
            super().__init__()
            self.unit = net.unit

        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return self.unit([a, a + b])

    a, b = torch.randn(2, 2, 8, 5, 5)
    assert torch.equal(fx.symbolic_trace(Sums())(a, b), Sums()(a, b))


def test_torchscript():
    unit = SelectiveKernel(8, 8, 1).eval()
    x = torch.randn(2, 8, 6, 6)
    sk_fused.fuse(unit)
    script = torch.jit.script(unit)
    torch.testing.assert_close(script(x), unit(x))


# The attention alone.


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("M", [1, 2, 3])
def test_attention_of_listed_and_of_stacked_branches(backend: str, M: int, training: bool):
    """Against its formula."""
    attn = FusedSelectiveKernelAttn(8, M, 6).double().train(training)
    nn.init.uniform_(attn.bn.weight, 0.5, 1.5)
    nn.init.normal_(attn.bn.bias)
    us = [u.requires_grad_() for u in batches(M, (5, 8, 4, 3), torch.float64)]
    g, parameters = torch.randn(5, M, 8, 1, 1, dtype=torch.float64), [*attn.parameters()]
    twin = copy.deepcopy(attn)
    ours = attn(us)
    assert torch.equal(twin(torch.stack(us, 1)), ours)
    assert torch.equal(twin.bn.running_mean, attn.bn.running_mean)
    s = sum(us).mean((2, 3)) @ attn.fc_reduce.weight[..., 0, 0].t()
    mean, var = (s.mean(0), s.var(0, correction=0)) if training else (torch.zeros(6).double(), torch.ones(6).double())
    h = ((s - mean) / (var + attn.bn.eps).sqrt() * attn.bn.weight + attn.bn.bias).clamp(min=0)
    theirs = (h @ attn.fc_select.weight[..., 0, 0].t()).view(5, M, 8, 1, 1).softmax(1)
    torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-12)
    for a, b in zip(*(torch.autograd.grad(output, [*us, *parameters], g) for output in (ours, theirs))):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)
    with pytest.raises(ValueError, match=f"x: expected {M} tensors of one shape"):
        attn([*us, us[0]])


# What the core has for them.


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("biases", [True, False])
@pytest.mark.parametrize("attn_activation", functional.ATTN_ACTIVATIONS)
def test_core(backend: str, attn_activation: str, biases: bool, training: bool):
    """Values and gradients, with and without norm and biases, against the unit step by step."""
    M, C, D = 3, 6, 5
    branches = batches(M, (4, C, 5, 4), torch.float64)
    leaves = [*branches, torch.randn(D, C).double(), torch.randn(M * C, D).double(), *torch.randn(2, D).double(), torch.randn(M * C).double()]
    leaves = [leaf.requires_grad_() for leaf in leaves]
    *branches, fc_reduce, fc_select, weight, bias, select_bias = leaves
    if training:
        norm = functional.BatchNorm(weight, bias, None, None, True)
    else:
        norm = functional.without_norm(D, branches[0], bias if biases else None)
    acts = "identity", 0.0, attn_activation, 0.2, select_bias if biases else None
    identity = [functional.without_norm(C, branches[0])] * M
    outputs = [unit(branches, identity, fc_reduce, norm, fc_select, *acts) for unit in (functional.selective_kernel, reference.selective_kernel)]
    torch.testing.assert_close(*outputs, rtol=1e-11, atol=1e-12)
    g = torch.randn_like(outputs[0])
    for ours, theirs in zip(*(torch.autograd.grad(output, leaves, g, allow_unused=True) for output in outputs)):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-10)
    s = torch.randn(4, C).double()
    attentions = [unit.attend(s, fc_reduce, norm, fc_select, *acts[2:]) for unit in (functional, reference)]
    torch.testing.assert_close(*attentions, rtol=1e-11, atol=1e-12)


def test_gradients_of_gradients_of_the_core():
    fc_reduce, fc_select, bias, select_bias = (torch.randn(shape).double().requires_grad_() for shape in ((3, 2), (4, 3), (3,), (4,)))
    branches = [u.requires_grad_() for u in batches(2, (3, 2, 2, 2), torch.float64)]

    def unit(*leaves: Tensor) -> Tensor:
        *us, reduce, select, b, select_b = leaves
        norm = functional.without_norm(3, us[0], b)
        return functional.selective_kernel(us, [functional.without_norm(2, us[0])] * 2, reduce, norm, select, "identity", 0.0, "leaky_relu", 0.2, select_b)

    with use_backend("native"):
        assert torch.autograd.gradgradcheck(unit, (*branches, fc_reduce, fc_select, bias, select_bias))


def test_wrong_arguments_of_the_core():
    s, norm = torch.randn(4, 6), functional.without_norm(5, torch.randn(1))
    with pytest.raises(ValueError, match="attn_activation: expected one of relu, leaky_relu, identity, got 'silu'"):
        functional.attend(s, torch.randn(5, 6), norm, torch.randn(12, 5), "silu")
    with pytest.raises(ValueError, match=r"select_bias: expected shape \(12,\) on cpu, got \(6,\) on cpu"):
        functional.attend(s, torch.randn(5, 6), norm, torch.randn(12, 5), select_bias=torch.randn(6))
