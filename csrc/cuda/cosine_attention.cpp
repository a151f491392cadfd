// cosine_attention and matching_log_probs on CUDA tensors: how the work is cut into blocks, what they get, and the launches: one forward, one or
// two backward, and one more forward where few queries meet very many supports. The kernels are in cosine_attention.cu.

#include "cuda/cosine_attention.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <limits>
#include <tuple>

#include "cuda/launch.h"

namespace fastmeta {
namespace {

// With fewer blocks than this the stream of a block is cut into parts, of kPartTiles tiles at least. A number of its own, not that of the
// processors of the device: the bits of a result are the same on every device of an architecture.
constexpr int64_t kEnoughBlocks = 256, kPartTiles = 4;
constexpr int64_t kTileShared = 48 * 1024;  // bytes of shared memory of a block that has a tile: at least four blocks on a processor

struct Kernels {
  Kernel forward, backward, episode_forward, episode_backward, merge;
};
#define FASTMETA_KERNELS(name, tiles, rest)                                                          \
  Kernels { FASTMETA_KERNEL(name##_forward_##tiles), FASTMETA_KERNEL(name##_backward_##tiles),       \
            FASTMETA_KERNEL(name##_episode_forward_##rest), FASTMETA_KERNEL(name##_episode_backward_##rest), FASTMETA_KERNEL(name##_merge_##rest) }

template <typename T, bool kValues> Kernels kernels_for(bool tensor_cores) {
  if constexpr (sizeof(T) == 8)
    return kValues ? FASTMETA_KERNELS(cosine_attention, double, double) : FASTMETA_KERNELS(matching_log_probs, double, double);
  else if (tensor_cores)
    return kValues ? FASTMETA_KERNELS(cosine_attention, tensor_core, float) : FASTMETA_KERNELS(matching_log_probs, tensor_core, float);
  else
    return kValues ? FASTMETA_KERNELS(cosine_attention, float, float) : FASTMETA_KERNELS(matching_log_probs, float, float);
}

// The arguments of an operation, in the order of its schema.
struct Arguments {
  const Tensor &query, &support, &third;
  const Optional &mask, &scales;
  double scale;
  int64_t normalize, eps_mode;
  double eps;
  int64_t columns;
};

View view(const Tensor& t) {
  View v{t.const_data_ptr(), {0, 0, 0}};
  for (int64_t i = 0; i < t.dim(); ++i) v.strides[i] = t.stride(i);
  return v;
}

Element element(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Double: return kDouble;
    case ScalarType::Half: return kHalf;
    case ScalarType::BFloat16: return kBFloat16;
    default: return kFloat;
  }
}

template <typename T> void describe(const Arguments& a, Attention<T>& p) {
  p.batch = small(a.query.size(0)), p.queries = small(a.query.size(1)), p.supports = small(a.support.size(1)), p.features = small(a.query.size(2));
  p.columns = small(a.columns), p.normalize = int32_t(a.normalize), p.eps_mode = int32_t(a.eps_mode), p.element = element(a.query);
  p.query = view(a.query), p.support = view(a.support), p.third = view(a.third), p.mask = a.mask ? view(*a.mask) : View{};
  p.scales = a.scales ? static_cast<const T*>(a.scales->const_data_ptr()) : nullptr, p.scales_stride = a.scales ? a.scales->stride(0) : 0;
  p.scale = T(a.scale), p.eps = std::max(T(a.eps), std::numeric_limits<T>::min());
}

// Bytes of shared memory of an episode that is one block's alone; 0 where it is to be cut into tiles.
template <template <typename, bool> class Memory, bool kValues, typename T> int64_t episode_shared(const Attention<T>& p, const Device& device) {
  using S = Tile<T>;
  if (p.supports > S::kOwn || p.features > S::kEpisodeColumns || p.columns > (kValues ? S::kEpisodeColumns : S::kEpisodeClasses)) return 0;
  if (p.queries > 2 * S::kOther && p.batch < kEnoughBlocks / 4) return 0;  // many queries and few episodes: more blocks are faster
  Arena arena;
  Memory<T, kValues>(arena, S::episode_stride(p.features), kValues ? S::episode_stride(p.columns) : S::class_stride(p.columns));
  return arena.used() <= device.shared_limit() ? arena.used() : 0;
}

template <typename Memory, typename... Arguments> int64_t shared_bytes(const Arguments&... arguments) {
  Arena arena;
  Memory(arena, arguments...);
  return arena.used();
}

// Into how many parts the `tiles` of a stream are cut, that `blocks` blocks have.
int64_t parts_of(int64_t tiles, int64_t blocks) { return std::clamp<int64_t>(kEnoughBlocks / std::max<int64_t>(blocks, 1), 1, std::max<int64_t>(tiles / kPartTiles, 1)); }

template <typename T> bool use_tensor_cores(const Attention<T>& p, const Device& device) {
  return (p.element == kHalf || p.element == kBFloat16) && device.has_tf32();
}

template <typename T, bool kValues> std::tuple<Tensor, Tensor> forward(const Arguments& a) {
  using S = Tile<T>;
  const Device device(a.query);
  Forward<T> p{};
  describe(a, p);
  const Kernels kernels = kernels_for<T, kValues>(use_tensor_cores(p, device));
  Tensor result = device.empty({p.batch, p.queries, p.columns}, a.query.scalar_type());
  std::vector<int64_t> log_shape{p.batch, p.queries};
  if (!kValues) log_shape.push_back(p.columns);
  Tensor log_sums = device.empty(log_shape, kScalarType<T>);
  p.result = data<void>(result), p.log_sums = data<T>(log_sums);

  if (const int64_t shared = episode_shared<EpisodeForwardMemory, kValues>(p, device)) {
    device.launch(kernels.episode_forward, p.queries ? p.batch : 0, kThreads, shared, p);
    return {result, log_sums};
  }
  p.query_tiles = int32_t(ceil_divide(p.queries, S::kOwn));
  const int64_t blocks = int64_t(p.batch) * p.query_tiles;
  p.parts = int32_t(parts_of(ceil_divide(p.supports, S::kOther), blocks));
  Optional state;
  if (p.parts > 1 || shared_bytes<ForwardMemory<T, kValues>>(p) > kTileShared) {
    state = device.empty({blocks * p.parts * state_size<T>(kValues, p.columns)}, kScalarType<T>);
    p.state = data<T>(*state);
  }
  device.launch(kernels.forward, blocks * p.parts, kThreads, shared_bytes<ForwardMemory<T, kValues>>(p), p);
  if (p.parts > 1) device.launch(kernels.merge, blocks, kThreads, shared_bytes<MergeMemory<T>>(), p);
  return {result, log_sums};
}

// A gradient and its parts.
template <typename T> struct Target {
  Tensor tensor;
  Optional parts;
  int64_t count;

  Target(const Device& device, const Tensor& like, bool wanted, int64_t count)
      : tensor(device.empty(wanted ? std::vector<int64_t>{like.size(0), like.size(1), like.size(2)} : std::vector<int64_t>{0}, like.scalar_type())),
        count(count) {
    if (count > 1) parts = device.empty({count * tensor.numel()}, kScalarType<T>);
  }
  Gradient<T> gradient() const { return {data<void>(tensor), parts ? data<T>(*parts) : nullptr, nullptr}; }
  typename Reduce<T>::Sum sum() const {
    if (!parts) return {};
    return {data<T>(*parts), data<void>(tensor), count, tensor.numel()};
  }
};

template <typename T, bool kValues>
std::tuple<Tensor, Tensor, Tensor, Tensor> backward(const Arguments& a, const Tensor& grad, int64_t needs, const Tensor& result, const Tensor& log_sums) {
  using S = Tile<T>;
  const Device device(a.query);
  Backward<T> p{};
  describe(a, p);
  const Tensor contiguous_sums = device.contiguous(log_sums);
  p.grad = view(grad), p.result = view(result), p.log_sums = data<T>(contiguous_sums);
  const bool needs_query = needs & kNeedsQuery, needs_support = needs & kNeedsSupport, needs_scales = a.scales && needs & kNeedsScales;
  const bool needs_values = kValues && needs & kNeedsValues;
  const Kernels kernels = kernels_for<T, kValues>(use_tensor_cores(p, device));
  Tensor to_scales = device.empty({needs_scales ? p.batch : 0}, needs_scales ? kScalarType<T> : a.query.scalar_type());

  if (const int64_t shared = episode_shared<EpisodeBackwardMemory, kValues>(p, device)) {
    const Target<T> query(device, a.query, needs_query, 1), support(device, a.support, needs_support, 1);
    Tensor values = device.empty(needs_values ? std::vector<int64_t>{p.batch, p.supports, p.columns} : std::vector<int64_t>{0}, a.query.scalar_type());
    p.of_query = query.gradient(), p.of_support = support.gradient(), p.of_values.to = data<void>(values);
    p.to_scales = data<T>(to_scales);
    device.launch(kernels.episode_backward, needs ? p.batch : 0, kThreads, shared, p);
    return {query.tensor, support.tensor, values, to_scales};
  }

  p.query_tiles = needs_query || needs_scales ? int32_t(ceil_divide(p.queries, S::kOwn)) : 0;
  p.support_tiles = needs_support || needs_values ? int32_t(ceil_divide(p.supports, S::kOwn)) : 0;
  const int64_t query_stream = ceil_divide(p.supports, S::kOther), support_stream = ceil_divide(p.queries, S::kOther);
  int64_t query_blocks = int64_t(p.batch) * p.query_tiles, support_blocks = int64_t(p.batch) * p.support_tiles;
  p.support_parts = int32_t(parts_of(query_stream, query_blocks)), p.query_parts = int32_t(parts_of(support_stream, support_blocks));
  query_blocks *= p.support_parts, support_blocks *= p.query_parts;

  const Target<T> query(device, a.query, needs_query, p.support_parts), support(device, a.support, needs_support, p.query_parts);
  const Target<T> values(device, kValues ? a.third : a.query, needs_values, p.query_parts);
  p.of_query = query.gradient(), p.of_support = support.gradient(), p.of_values = values.gradient();

  // Where a part of the stream is more than one strip the sums between are kept, in the gradient itself if it holds them exactly.
  Optional of_query, of_support, of_values;
  auto keep_between = [&](Optional& kept, Gradient<T>& gradient, const Tensor& tensor, int64_t stream, int64_t parts) {
    if (!gradient.to || gradient.parts || ceil_divide(stream, parts) <= S::kStrip / S::kOther) return;
    if (tensor.scalar_type() != kScalarType<T>) kept = device.empty({tensor.numel()}, kScalarType<T>);
    gradient.between = kept ? data<T>(*kept) : static_cast<T*>(gradient.to);
  };
  keep_between(of_query, p.of_query, query.tensor, query_stream, p.support_parts);
  keep_between(of_support, p.of_support, support.tensor, support_stream, p.query_parts);
  keep_between(of_values, p.of_values, values.tensor, support_stream, p.query_parts);

  Reduce<T> reduce{};
  reduce.sums[0] = query.sum(), reduce.sums[1] = support.sum(), reduce.sums[2] = values.sum();
  reduce.batch = p.batch, reduce.scale_parts = int64_t(p.query_tiles) * p.support_parts, reduce.element = p.element;
  Optional scale_parts;
  if (needs_scales) {
    if (reduce.scale_parts == 1) {
      p.scale_parts = data<T>(to_scales);
    } else {
      scale_parts = device.empty({p.batch * reduce.scale_parts}, kScalarType<T>);
      p.scale_parts = data<T>(*scale_parts), reduce.scales = p.scale_parts, reduce.to_scales = data<T>(to_scales);
    }
  }
  device.launch(kernels.backward, query_blocks + support_blocks, kThreads, shared_bytes<BackwardMemory<T, kValues>>(), p);

  int64_t most = reduce.to_scales ? p.batch : 0;
  for (const auto& sum : reduce.sums) most = std::max(most, sum.size);
  const Kernel adds = sizeof(T) == 8 ? FASTMETA_KERNEL(cosine_attention_reduce_double) : FASTMETA_KERNEL(cosine_attention_reduce_float);
  device.launch(adds, std::min<int64_t>(ceil_divide(most, kThreads), 1024), kThreads, 0, reduce);
  return {query.tensor, support.tensor, values.tensor, to_scales};
}

std::tuple<Tensor, Tensor> cosine_attention(Tensor query, Tensor support, Tensor values, Optional mask, Optional scales, double scale,
                                            int64_t normalize, int64_t eps_mode, double eps) {
  const Arguments a{query, support, values, mask, scales, scale, normalize, eps_mode, eps, values.size(2)};
  return for_dtype(query, [&](auto zero) { return forward<decltype(zero), true>(a); });
}

std::tuple<Tensor, Tensor, Tensor, Tensor> cosine_attention_backward(Tensor grad, int64_t needs, Tensor query, Tensor support, Tensor values,
                                                                     Optional mask, Optional scales, double scale, int64_t normalize,
                                                                     int64_t eps_mode, double eps, Tensor result, Tensor log_sums) {
  const Arguments a{query, support, values, mask, scales, scale, normalize, eps_mode, eps, values.size(2)};
  return for_dtype(query, [&](auto zero) { return backward<decltype(zero), true>(a, grad, needs, result, log_sums); });
}

std::tuple<Tensor, Tensor> matching_log_probs(Tensor query, Tensor support, Tensor labels, Optional mask, Optional scales, double scale,
                                              int64_t normalize, int64_t eps_mode, double eps, int64_t num_classes) {
  const Arguments a{query, support, labels, mask, scales, scale, normalize, eps_mode, eps, num_classes};
  return for_dtype(query, [&](auto zero) { return forward<decltype(zero), false>(a); });
}

std::tuple<Tensor, Tensor, Tensor, Tensor> matching_log_probs_backward(Tensor grad, int64_t needs, Tensor query, Tensor support, Tensor labels,
                                                                       Optional mask, Optional scales, double scale, int64_t normalize,
                                                                       int64_t eps_mode, double eps, int64_t num_classes, Tensor result,
                                                                       Tensor log_sums) {
  const Arguments a{query, support, labels, mask, scales, scale, normalize, eps_mode, eps, num_classes};
  return for_dtype(query, [&](auto zero) { return backward<decltype(zero), false>(a, grad, needs, result, log_sums); });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastmeta, CUDA, module) {
  module.impl("cosine_attention", TORCH_BOX(&cosine_attention));
  module.impl("cosine_attention_backward", TORCH_BOX(&cosine_attention_backward));
  module.impl("matching_log_probs", TORCH_BOX(&matching_log_probs));
  module.impl("matching_log_probs_backward", TORCH_BOX(&matching_log_probs_backward));
}

}  // namespace fastmeta
