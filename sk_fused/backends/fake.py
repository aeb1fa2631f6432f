"""What the operators of a backend return, but for the values: so that torch.compile can trace through them."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .reference import accumulate_dtype, empty_branch


def constant(function: Callable) -> Callable:
    """Marks what the compiler is to ask as it traces, and not to trace: torch.compiler.assume_constant_result, without importing the
    compiler, which takes most of a second."""
    function._dynamo_marked_constant = True
    return function


def branch_statistics(ys):
    shape, dtype = (len(ys), ys[0].shape[1]), accumulate_dtype(ys[0].dtype)
    return ys[0].new_empty(shape, dtype=dtype), ys[0].new_empty(shape, dtype=dtype)


def branch(x, weights, stride, dilations, groups, statistics=True):
    shape = (len(weights), weights[0].shape[0]) if statistics else (0,)
    mean, var = (x.new_empty(shape, dtype=accumulate_dtype(x.dtype)) for _ in range(2))
    return [empty_branch(x, weights, stride) for _ in weights], mean, var


def squeeze(parts: Callable[[Sequence[Tensor], int], int]):
    """The operator of a backend whose P is `parts(ys, sums)`."""

    def squeeze(ys, norm_weights, norm_biases, means, variances, eps, activation, negative_slope, sums):
        like = means[0].new_empty((), dtype=accumulate_dtype(ys[0].dtype))
        (B, C), M = ys[0].shape[:2], len(ys)
        folded, K = ([like.new_empty(shape) for _ in range(count)] for shape, count in (((M, C), 4), ((B, M, C), sums - 1)))
        return *folded, like.new_empty((B, parts(ys, sums), C)), K

    return squeeze


def attend(pooled, pixels, fc_reduce, weight, bias, mean, var, eps, activation, negative_slope, fc_select, select_bias):
    (B, _, C), D = pooled.shape, fc_reduce.shape[0]
    return tuple(pooled.new_empty(shape) for shape in ((B, fc_select.shape[0] // C, C), (B, C), (B, D), (D,), (D,)))


def select(ys, mean, scale, bias, a, activation, negative_slope):
    return torch.empty_like(ys[0])


def unit(x, weights, stride, *arguments):
    return empty_branch(x, weights, stride)


def select_backward_sums(g, ys, mean, scale, bias, activation, negative_slope):
    return tuple(mean.new_empty((ys[0].shape[0], *mean.shape)) for _ in range(3))


def attend_backward(da, a, s, reduced, fc_reduce, weight, bias, mean, var, eps, training, activation, negative_slope, fc_select):
    return tuple(s.new_empty(shape) for shape in (s.shape, fc_reduce.shape, mean.shape, mean.shape, fc_select.shape, fc_select.shape[:1]))


def fold_backward(a, ds, pixels, R1, R2, K1, K2, r, scale, count):
    return torch.empty_like(ds), *(torch.empty_like(r) for _ in range(4))


def select_backward(g, ys, mean, scale, bias, a, t, p, q, activation, negative_slope):
    return [torch.empty_like(y) for y in ys]


def branch_backward(layout: Callable[[Tensor], torch.memory_format]):
    """The operator of a backend whose dw have the `layout(x)`."""

    def branch_backward(g, x, weights, stride, dilations, groups, ys, mean, scale, bias, a, t, p, q, activation, negative_slope, needs):
        dx = torch.empty_like(x) if needs[0] else x.new_empty(0)
        return dx, [torch.empty_like(w, memory_format=layout(x)) for w in weights] if needs[1] else []

    return branch_backward
