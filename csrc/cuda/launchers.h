// What bindings.cpp calls: each launches the kernels of one operator and returns. No PyTorch here, and no CUDA header. Pointers
// are of the dtype that is written beside them: T is that of the branches, A what their sums are computed in, float, or double
// for double. A launch that fails throws a std::runtime_error that names the kernel, its grid and the shape.
#pragma once

#include <cstdint>
#include <functional>

struct CUstream_st;

namespace sk::cuda {

constexpr int kMostBranches = 8;

enum class Type : int { float32, float64, float16, bfloat16 };

enum class Activation : int { relu, leaky_relu, identity, silu };

struct Act {
  Activation kind;
  double negative_slope;
};

// An operand of any type; null if it is not there.
struct Array {
  const void* data;
  Type type;
};

// M branches of shape (B, C, H, W), all dense in one layout.
struct Branches {
  const void* y[kMostBranches];
  Type type;
  int M;
  int64_t B, C, HW;
  bool channels_last;
};

struct Queue {
  int device;
  CUstream_st* stream;
};

// How many parts branch_statistics sums first, and how many squeeze and select_backward_sums.
int64_t statistics_parts(const Branches& ys);
int64_t squeeze_parts(const Branches& ys);

// counts, means, squares: A (statistics_parts, M, C), scratch. mean, var: A (M, C).
void branch_statistics(const Branches& ys, void* counts, void* means, void* squares, void* mean, void* var, Queue queue);

struct Norms {
  Array weight[kMostBranches], bias[kMostBranches], mean[kMostBranches], var[kMostBranches];
  double eps;
};

// Three sums over the pixels, A (B, M, C), and their parts, A (B, M, squeeze_parts, C), scratch; where there is one part alone, they are
// the sums.
struct Sums {
  void *parts[3], *sums[3];
};

// mean, r, scale, bias: A (M, C). out: all three, or, if `count` is 1, the first.
void squeeze(const Branches& ys, const Norms& norms, Act act, void* mean, void* r, void* scale, void* bias, const Sums& out, int64_t count,
             Queue queue);

// mean, scale, bias: A (M, C).
void select_backward_sums(const void* g, const Branches& ys, const void* mean, const void* scale, const void* bias, Act act,
                          const Sums& out, Queue queue);

// All A: a, R1, R2, K1, K2 (B, M, C); ds, t (B, C); r, scale, dweight, dbias, p, q (M, C).
struct FoldBackward {
  Type type;
  int64_t B, M, C, pixels, count;
  const void *a, *ds, *R1, *R2, *K1, *K2, *r, *scale;
  void *t, *dweight, *dbias, *p, *q;
};
void fold_backward(const FoldBackward& f, Queue queue);

// mean, scale, bias: A (M, C); a: A (B, M, C); v: T like a branch.
void select(const Branches& ys, const void* mean, const void* scale, const void* bias, const void* a, Act act, void* v, Queue queue);

// g: T like a branch; t: A (B, C); p, q: A (M, C); dys: T, M like the branches.
void select_backward(const void* g, const Branches& ys, const void* mean, const void* scale, const void* bias, const void* a, const void* t,
                     const void* p, const void* q, Act act, void* const* dys, Queue queue);

// A: pooled (B, P, C), s (B, C), reduced and hidden, scratch, (B, D), mean and var (D,), a (B, M, C). given_mean and given_var are
// both there or both not.
struct Attend {
  Type type;
  int64_t B, P, C, D, M, pixels;
  Array fc_reduce, weight, bias, given_mean, given_var, fc_select, select_bias;
  double eps, slope;
  const void* pooled;
  void *s, *reduced, *hidden, *mean, *var, *a;
};
void attend(const Attend& f, Queue queue);

// A: da, a and dlogits, scratch, (B, M, C); s, ds (B, C); reduced and hidden, scratch, (B, D); dreduced, scratch, (2, B, D); mean, var,
// dweight, dbias (D,); dfc_reduce (D, C); dfc_select (M * C, D); dselect_bias (M * C,).
struct AttendBackward {
  Type type;
  int64_t B, C, D, M;
  Array fc_reduce, weight, bias, fc_select;
  double eps, slope;
  bool training;
  const void *da, *a, *s, *reduced, *mean, *var;
  void *dlogits, *dreduced, *hidden, *ds, *dfc_reduce, *dweight, *dbias, *dfc_select, *dselect_bias;
};
void attend_backward(const AttendBackward& f, Queue queue);

// The whole unit with given statistics, in float16 or bfloat16, all in channels_last. x: (B, H, W, channels); M weights
// (C, 3, 3, inputs), inputs being of a group; split: every branch has its own part of x's channels. `inputs` is a multiple of 16, or 4 or 8
// and as many as there are outputs of a group; C is a multiple of 8. attention: its operands and sizes, and none of its results.
// v: (B, H', W', C).
struct Unit {
  Type type;
  Act act;
  int64_t B, H, W;
  int channels, C, inputs, groups, M, stride, dilations[kMostBranches];
  bool split;
  const void *x, *weights[kMostBranches];
  Norms norms;
  Attend attention;
  void* v;
};
// `allocate` gives memory of the device, of so many bytes and at a multiple of 16, that is nobody else's until the kernel ends; it is
// asked at most once.
void unit(const Unit& f, const std::function<void*(int64_t)>& allocate, Queue queue);

}  // namespace sk::cuda
