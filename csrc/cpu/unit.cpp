// unit: the whole unit in eval, a few images at a time. Their branches are convolved into blocks that stay in cache, one cluster
// of channels each, and are selected from there: x is read once, and the output written once.

#ifdef SK_ISA

#include "plane.h"

// Tasks are (image, cluster, L pixels), or, where the outputs of a cluster would be scattered over a page for every pixel or two,
// (image, L pixels, cluster).
template <class T, Activation kAct>
void select_tasks(const Blocks& blocks, const Picture& out, int64_t M, float slope, const float* a, T* v, int64_t first, int64_t last) {
  constexpr int64_t L = kLanes<float>;
  const bool by_pixels = out.channels_last && out.C * sizeof(T) >= 2048;
  const Act<float, kAct> act{slope};
  const int64_t groups = (out.pixels() + L - 1) / L, in_image = groups * blocks.clusters;
  for (int64_t task = first; task < last; ++task) {
    const int64_t b = task / in_image, i = task % in_image, cluster = by_pixels ? i % blocks.clusters : i / groups,
                  p = (by_pixels ? i / blocks.clusters : i % groups) * L, pixels = clamp<L>(out.pixels() - p);
    const float* const z = blocks.z + (b * blocks.clusters + cluster) * M * out.pixels() * blocks.cluster;
    for (int64_t k = 0; k < blocks.cluster; k += L) {
      const int64_t c = cluster * blocks.cluster + k, lanes = clamp<L>(out.C - c);
      if (lanes == 0) break;
      // kBranches, or if that is 0 any number of them.
      const auto select = [&]<bool kWhole, int kBranches>() {
        Vec<float> weights[kMaxBranches];
        for (int64_t m = 0; m < M; ++m) weights[m] = load_some(a + (b * M + m) * out.C + c, lanes);
        Vec<float> total[L];
#pragma GCC unroll 16
        for (int j = 0; j < L; ++j) {
          total[j] = Vec<float>{};
          if (!kWhole && j >= pixels) continue;
          const float* from = z + (p + j) * blocks.cluster + k;
#pragma GCC unroll 2
          for (int64_t m = 0; m < (kBranches ? kBranches : M); ++m, from += out.pixels() * blocks.cluster) {
            prefetch_ahead(from);
            total[j] += weights[m] * act(load(from));
          }
        }
        store_pixels(v + out.offset(b, c), out, p, kWhole ? L : pixels, lanes, total);
      };
      if (pixels < L) select.template operator()<false, 0>();
      else if (M == 2) select.template operator()<true, 2>();
      else select.template operator()<true, 0>();
    }
  }
  fence_streams();
}

#else

#include "attend.h"
#include "convolutions.h"

#define SK_KERNELS "unit.cpp"
#include "foreach_isa.h"

namespace sk {

static thread_local Tensor kept_for_blocks;

Tensor unit_cpu(const Tensor& x, TensorList weights, int64_t stride, at::IntArrayRef dilations, int64_t groups,
                const OptionalTensors& norm_weights, const OptionalTensors& norm_biases, TensorList means, TensorList variances, double eps,
                const Tensor& fc_reduce, const std::optional<Tensor>& attn_weight, const std::optional<Tensor>& attn_bias,
                const Tensor& attn_mean, const Tensor& attn_var, double attn_eps, const Tensor& fc_select, c10::string_view activation,
                double negative_slope) {
  const Convolutions s = check_convolutions(x, weights, stride, dilations, groups);
  const auto [mean, r, scale, bias] = fold(norm_weights, norm_biases, means, variances, eps, at::kFloat);
  for (const auto& [name, array] : {std::pair<const char*, const Tensor&>{"mean", mean}, {"scale", scale}, {"bias", bias}})
    check_array(array, name, at::kFloat, {s.M, s.out.C});
  const Attention attention(at::kFloat, s.out.C, fc_reduce, attn_weight, attn_bias, fc_select);
  TORCH_CHECK_VALUE(attention.M == s.M, "fc_select: expected ", s.M, " * ", s.out.C, " rows, got ", fc_select.size(0));
  const Tensor attn_mean_in = attention.vector(attn_mean, "attn_mean", attention.D),
               attn_var_in = attention.vector(attn_var, "attn_var", attention.D);
  const int64_t cluster = s.winograd() ? cluster_of_winograd(s) : cluster_of_direct(s), clusters = (s.out.C + cluster - 1) / cluster;
  const int64_t channels = clusters * cluster, values = s.M * channels * s.out.pixels();
  // Of the branches in flight.
  const int64_t bytes = at::get_num_threads() * kCacheBytes, most = std::clamp<int64_t>(bytes / (values * 4), 1, s.B);
  const int64_t rounds = (s.B + most - 1) / most, images = (s.B + rounds - 1) / rounds;
  const auto array = [&](int64_t of_image) { return at::empty({images, of_image}, at::kFloat); };
  const Tensor z = scratch_of(kept_for_blocks, images * values, bytes), pooled = array(2 * channels), descriptors = array(s.out.C),
               reduced = array(attention.D), hidden = array(attention.D), a = array(s.M * s.out.C);
  const float *const centres = mean.const_data_ptr<float>(), *const scales = scale.const_data_ptr<float>(),
                     *const biases = bias.const_data_ptr<float>();
  std::vector<float> shift(s.M * channels);
  for (int64_t m = 0; m < s.M; ++m)
    for (int64_t c = 0; c < s.out.C; ++c) {
      const int64_t i = m * s.out.C + c;
      shift[m * channels + c] = biases[i] - centres[i] * scales[i];
    }
  const Blocks blocks{clusters, cluster, shift.data(), z.data_ptr<float>(), pooled.data_ptr<float>()};
  const Tensor packed = s.winograd() ? Tensor() : pack_weights(s, weights, channels, scales), v = output_like(s, x);
  Picture out = s.out;
  out.streamed = beyond_caches(v.nbytes());
  for (int64_t image = 0; image < s.B; image += images) {
    Convolutions part = s;
    part.B = std::min(images, s.B - image);
    const Tensor of_part = x.narrow(0, image, part.B);
    if (s.winograd()) unit_branches_winograd(part, of_part, weights, scales, blocks, activation, negative_slope);
    else unit_branches_direct(part, of_part, packed, blocks, activation, negative_slope);
    const Attended<float> of{part.B, descriptors.data_ptr<float>(), reduced.data_ptr<float>(), hidden.data_ptr<float>(),
                             a.data_ptr<float>()};
    attention.attend<float>(of, blocks.pooled, 2, channels, s.out.pixels(), false, attn_mean_in.data_ptr<float>(),
                            attn_var_in.data_ptr<float>(), attn_eps, 0, nullptr);
    dispatch_convolution(x.scalar_type(), activation, [&]<class T, Activation kAct>() {
      const int64_t L = SK_PICK(lanes)(), tasks = part.B * ((s.out.pixels() + L - 1) / L) * clusters;
      const auto kernel = SK_PICK(select_tasks<T, kAct>);
      at::parallel_for(0, tasks, grain(s.M * L * cluster), [&](int64_t first, int64_t last) {
        kernel(blocks, out, s.M, static_cast<float>(negative_slope), of.a, v.data_ptr<T>() + s.out.offset(image, 0), first, last);
      });
    });
  }
  return v;
}

}  // namespace sk

#endif
