"""A backend is a module with the functions of `reference`, `why_not(branches)`, the reason why it cannot take these
branches, or None, and `why_not_convolve(...)`, the same for the convolutions that make them."""

import contextlib
import threading
import warnings
from collections.abc import Iterator, Sequence
from types import ModuleType

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import native, reference, triton
from .fake import constant

# In the order in which they are tried: a call of the native kernels takes less of the host's time than one of Triton's.
BACKENDS: dict[str, ModuleType] = {"native": native, "triton": triton, "reference": reference}

_forced: str | None = None
_said: set[str] = set()


class _Thread(threading.local):
    takes_reference = False


_thread = _Thread()


class use_backend:
    """Forces the backend `name`, one of `BACKENDS`; None goes back to the automatic choice.

    Holds from the call on, or, as a context manager, inside the `with`, for all threads. A forced backend that cannot take a call raises
    a RuntimeError that says why.

    Raises:
        ValueError: there is no backend of this name.
    """

    def __init__(self, name: str | None):
        global _forced
        if name is not None and name not in BACKENDS:
            raise ValueError(f"name: expected None or one of {', '.join(BACKENDS)}, got {name!r}")
        self._name, self._before, _forced = name, _forced, name

    def __enter__(self) -> None:
        global _forced
        _forced = self._name

    def __exit__(self, *_) -> None:
        global _forced
        _forced = self._before


@contextlib.contextmanager
def reference_in_this_thread() -> Iterator[None]:
    """Whatever is forced for all."""
    _thread.takes_reference = True
    try:
        yield
    finally:
        _thread.takes_reference = False


@constant
def _takes_reference() -> bool:
    return _thread.takes_reference


def only_pytorch() -> str | None:
    """The reason why this call has to be made of PyTorch's own operators, whatever the backend, or None."""
    if torch.compiler.is_compiling():
        if torch.onnx.is_in_onnx_export():
            return "ONNX has no operators of sk_fused"
    elif torch._C._get_tracing_state() is not None:
        return "a trace (TorchScript, ONNX) is to run without sk_fused"
    if _transformed():
        return "torch.func transforms and forward-mode derivatives take PyTorch's own operators only"
    return None


@constant
def _transformed() -> bool:
    """By torch.func; under torch.compile, as it compiles, which is done for each transform anew."""
    return torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0


def choose(branches: Sequence[Tensor]) -> ModuleType:
    """The forced backend, or the first that can take the branches.

    Raises:
        RuntimeError: the forced one cannot.
    """
    if _takes_reference():
        return reference
    plain = only_pytorch()
    if _forced is not None:
        reason = (_forced != "reference" and plain) or BACKENDS[_forced].why_not(branches)
        if reason:
            raise RuntimeError(f"the backend {_forced!r} was forced, but {reason}")
        return BACKENDS[_forced]
    reasons = [plain] if plain else []
    for backend in [reference] if plain else BACKENDS.values():
        reason = backend.why_not(branches)
        if reason is None:
            break
        reasons.append(reason)
    if backend is reference:
        warn_once(f"sk_fused runs its plain PyTorch reference, because {'; '.join(reasons)}")
    return backend


@constant
def warn_once(sentence: str) -> None:
    """A RuntimeWarning, the first time that this sentence comes up in the process; under torch.compile, as it compiles."""
    if sentence not in _said:
        _said.add(sentence)
        warnings.warn(sentence, RuntimeWarning, stacklevel=3)
