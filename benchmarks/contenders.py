"""Who takes part: each contender makes of timm's module, in place, what is called instead of it."""

import copy
from collections.abc import Callable, Collection, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

import sk_fused
from sk_fused.backends import BACKENDS

from . import harness
from .harness import LAYOUTS, OURS, PEER, Entry, Step


Call = Callable[[Tensor], Tensor]


class Contender(NamedTuple):
    """`prepare` takes timm's module, laid out and in its mode, and an input. What it raises is listed beside the others'
    figures."""

    prepare: Callable[[nn.Module, Tensor], Call]
    # Of the parity rule; None: something else is computed.
    factor: float | None = PEER
    modes: Collection[str] = ("eval", "train")
    layouts: Collection[str] = tuple(LAYOUTS)
    # It does not compute on PyTorch's threads.
    own_threads: bool = False

    def in_layouts(self, layouts: Collection[str]) -> "Contender":
        """In those of these alone."""
        return self._replace(layouts=[layout for layout in self.layouts if layout in layouts])


class Convolutions(nn.Module):
    """The branches' convolutions of a unit and nothing else."""

    def __init__(self, unit: nn.Module):
        super().__init__()
        self.split_input = unit.split_input
        self.convs = nn.ModuleList(path.conv for path in unit.paths)

    def forward(self, x: Tensor) -> list[Tensor]:
        xs = x.split(x.shape[1] // len(self.convs), 1) if self.split_input else [x] * len(self.convs)
        return [conv(x_m) for conv, x_m in zip(self.convs, xs)]


def eager(module: nn.Module, x: Tensor) -> Call:
    return module


def compiled(**options) -> Callable[[nn.Module, Tensor], Call]:
    def prepare(module: nn.Module, x: Tensor) -> Call:
        # The copies of a race share their code: a second layout is no reason for dynamic shapes, nor many for falling back to
        # eager in silence.
        torch._dynamo.config.recompile_limit = 64
        torch._dynamo.config.fail_on_recompile_limit_hit = True
        return torch.compile(module, dynamic=False, **options)

    return prepare


def fused(module: nn.Module, x: Tensor) -> Call:
    report = sk_fused.fuse(module)
    unfused = [unit for unit in report.units if not unit.fused or unit.reason]
    if unfused or not report.units:
        raise RuntimeError(f"not fused wholly: {unfused or report}")
    return module


def fused_compiled(module: nn.Module, x: Tensor) -> Call:
    return compiled()(fused(module, x), x)


def frozen(module: nn.Module, x: Tensor) -> Call:
    """Compiled for serving: the parameters become constants, and what depends on them alone is computed once. Dynamo looks at the
    global setting only; the option keeps the code apart from that of a module that was compiled without."""
    call = compiled(options={"freezing": True})(module, x)
    with torch.inference_mode(), torch._inductor.config.patch(freezing=True):
        call(x)
    return call


def fused_frozen(module: nn.Module, x: Tensor) -> Call:
    return frozen(fused(module, x), x)


def forced(backend: str) -> Callable[[nn.Module, Tensor], Call]:
    def prepare(module: nn.Module, x: Tensor) -> Call:
        fused(module, x)

        def call(x: Tensor) -> Tensor:
            with sk_fused.use_backend(backend):
                return module(x)

        return call

    return prepare


def onnx_runtime(module: nn.Module, x: Tensor) -> Call:
    import onnxruntime

    _float32_on_cpu(x)
    program = torch.onnx.export(module, (x,), dynamo=True, verbose=False)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(program.model_proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda x: torch.from_numpy(session.run(None, {name: x.numpy()})[0])


def open_vino(module: nn.Module, x: Tensor) -> Call:
    import openvino

    _float32_on_cpu(x)
    # Without the hint it would compute in bfloat16 where the CPU can.
    options = {"INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": torch.get_num_threads()}
    model = openvino.Core().compile_model(openvino.convert_model(module, example_input=x), "CPU", options)
    return lambda x: torch.from_numpy(model(x.numpy())[0])


def _float32_on_cpu(x: Tensor) -> None:
    if x.device.type != "cpu" or torch.is_autocast_enabled("cpu"):
        raise NotImplementedError("compared in float32 on the CPU only")


CONTENDERS: dict[str, Contender] = {
    "timm": Contender(eager),
    "timm:compile": Contender(compiled()),
    "timm:max-autotune": Contender(compiled(mode="max-autotune-no-cudagraphs")),
    "timm:freezing": Contender(frozen, modes=("eval",)),
    "onnxruntime": Contender(onnx_runtime, modes=("eval",), layouts=("contiguous",), own_threads=True),
    "openvino": Contender(open_vino, modes=("eval",), layouts=("contiguous",), own_threads=True),
    "sk_fused": Contender(fused, OURS),
    # A compiler takes other convolutions, so that what it makes of ours is held to what is asked of peers.
    "sk_fused:compile": Contender(fused_compiled),
    "sk_fused:freezing": Contender(fused_frozen, modes=("eval",)),
    **{f"sk_fused:{name}": Contender(forced(name), OURS) for name in BACKENDS},
    "convolutions": Contender(lambda module, x: Convolutions(module), None),
}

# What a network is compared with beside the contenders: its twin without SK units.
TWINS: dict[str, Contender] = {
    "plain": Contender(eager, None),
    "plain:compile": Contender(compiled(), None),
    "plain:freezing": Contender(frozen, None, modes=("eval",)),
}


class Settings(NamedTuple):
    """How the contenders are run. A network gets images, which need no gradient, and its parameters' gradients are checked
    as one vector; a unit's are checked one by one, with that of its input."""

    device: torch.device
    precision: str = "float32"
    network: bool = False


def step(contender: Contender, module: nn.Module, x: Tensor, g: Tensor, mode: str, settings: Settings) -> Step:
    """Evaluation, or forward and backward from fresh gradients, of a copy of the module in x's layout and dtype."""
    layout = torch.contiguous_format if x.is_contiguous() else torch.channels_last
    module = copy.deepcopy(module).to(x.device, x.dtype, memory_format=layout).train(mode == "train")
    # In float64 it is the oracle.
    precision = "float32" if x.dtype == torch.float64 else settings.precision
    with harness.precision(precision, settings.device):
        call = contender.prepare(module, x)

    def evaluate() -> Tensor:
        with torch.inference_mode(), harness.precision(precision, settings.device):
            return call(x)

    if mode == "eval":
        return Step(evaluate, lambda output: [output])
    leaf = x.detach().clone().requires_grad_(not settings.network)

    def train() -> Tensor:
        module.zero_grad(set_to_none=True)
        leaf.grad = None
        with harness.precision(precision, settings.device):
            output = call(leaf)
        outputs = output if isinstance(output, list) else [output]
        torch.autograd.backward(outputs, [g.to(y.dtype) for y in outputs])
        return output

    def collect(output: Tensor) -> list[Tensor]:
        gradients = [p.grad for p in module.parameters()]
        return [output, torch.cat([grad.flatten() for grad in gradients])] if settings.network else [output, leaf.grad, *gradients]

    return Step(train, collect)


def graphed(make: Callable[[], Step]) -> Step:
    """The step as one CUDA graph."""
    inner = make()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            inner.run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = inner.run()

    # The graph reads the memory of the step's tensors, and does not keep them.
    def run(kept: Step = inner) -> object:
        graph.replay()
        return output

    return Step(run, inner.collect)


def entries(
    contenders: Mapping[str, Contender], module: nn.Module, x: Tensor, g: Tensor, mode: str, settings: Settings
) -> dict[tuple[str, str], Entry]:
    """The contenders that know this mode, in each of their layouts, for `harness.race`; on a GPU also as CUDA graphs."""
    torch.compiler.reset()
    entries = {}
    for side, contender in contenders.items():
        for layout in contender.layouts if mode in contender.modes else ():

            def make(contender=contender, layout=LAYOUTS[layout]) -> Step:
                laid_out = (t.to(memory_format=layout) if t.dim() == 4 else t for t in (x, g))
                return step(contender, module, *laid_out, mode, settings)

            entries[side, layout] = Entry(make, contender.factor, contender.own_threads)
            if settings.device.type == "cuda":
                entries[f"{side}:graph", layout] = Entry(lambda make=make: graphed(make), contender.factor)
    return entries


def away_from_kinks(unit: nn.Module, x: Tensor, g: Tensor) -> tuple[nn.Module, Tensor]:
    """A unit and g such that a training step does not hang on the derivative of ReLU at values near 0. There a rounding error
    decides it, in any implementation; of the millions of values of a large batch a few always are, and each changes every
    gradient of its channel's weights. So g is 0 where in float64 a branch is within 1e-3 of 0 before its activation; and the
    attention is a thousand times flatter than it was, so that what comes back through it is within the rounding error."""
    near, unit = [], copy.deepcopy(unit)
    with torch.no_grad():
        unit.attn.fc_select.weight *= 1e-3
        precise = copy.deepcopy(unit).double().train()
        for path in precise.paths:
            path.bn.act.register_forward_pre_hook(lambda _, inputs: near.append(inputs[0].abs() < 1e-3))
        precise(x.double())
    return unit, g.masked_fill(torch.stack(near).any(0), 0.0)


def exact(module: nn.Module, x: Tensor, g: Tensor, mode: str, settings: Settings) -> list[Tensor]:
    """What timm's module gives in float64."""
    oracle = step(CONTENDERS["timm"], module, x.double(), g.double(), mode, settings)
    return [tensor.detach() for tensor in oracle.collect(oracle.run())]


def kept(contender: Contender, module: nn.Module, x: Tensor, settings: Settings) -> int:
    """Bytes that a training forward keeps for its backward, beside the input and the weights."""
    module = copy.deepcopy(module).train()
    call = contender.prepare(module, x)
    with harness.precision(settings.precision, settings.device):
        return harness.bytes_kept(lambda: call(x), module, x)


def passes(contender: Contender, module: nn.Module, x: Tensor, g: Tensor, mode: str, settings: Settings, size: int) -> dict[str, float]:
    """Operators called beside the convolutions, and their passes over a branch of `size` values."""
    counted = step(contender, module, x, g, mode, settings)
    with harness.Passes(size) as counter:
        counted.run()
    return {"operators": counter.operators, "passes": counter.passes}
