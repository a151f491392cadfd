// cosine_attention and matching_log_probs, forward and backward. The mathematics is in fastmeta/reference/cosine_attention.py, the contract of
// the operations in fastmeta/schemas/cosine_attention.py.
//
// A task is a range of the queries and a range of the supports of one episode. It packs its queries once, scaled to norm 1, in panels of
// kLanes queries that lie side by side: everything that follows is vector code over queries. Supports stream through in blocks
// that stay in the cache, packed likewise, padding left out. For each (block, panel) one product gives a tile of scores, which is consumed
// at once; the full matrix of scores never exists.
//
// How the work is cut into tasks depends on the sizes alone and partial results are added in a fixed order, so the bits of a result do
// not depend on the number of threads.
//
// Scaling before the product keeps every product of finite rows finite. With x^ = x / a' and a' about |x|, c = u (q^ . k^), where u is 1 but
// for eps_mode `add` and `sqrt`, and with ds the gradient of the loss by a score,
//     dq_i = scale / a'_i (sum_j ds_ij u_ij k^_j  -  q^_i sum_j ds_ij v_ij (q^_i . k^_j))
// and the same for k_j with the sums over i; v is 1, u^2 or u^3 for `clamp`, `add`, `sqrt`, and 0 for a side that is not divided by its norm.

#include <torch/csrc/stable/library.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "cpu/simd.h"
#include "cpu/tensor.h"

namespace fastmeta {
namespace {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;

// ---- memory -----------------------------------------------------------------------------------------------------------------------

// A tensor of up to three dimensions in its own dtype and with its own strides (in elements).
struct View {
  const char* data = nullptr;
  ScalarType dtype = ScalarType::Float;
  int64_t strides[3] = {0, 0, 0};

  View() = default;
  explicit View(const Tensor& t) : data(static_cast<const char*>(t.const_data_ptr())), dtype(t.scalar_type()) {
    for (int64_t i = 0; i < t.dim(); ++i) strides[i] = t.stride(i);
  }
  template <typename X> const X& at(int64_t i, int64_t j) const {
    return reinterpret_cast<const X*>(data)[i * strides[0] + j * strides[1]];
  }
};

template <typename X, typename T> FASTMETA_INLINE void convert_row(const X* from, int64_t stride, int64_t count, T* to) {
  if (stride == 1)
    for (int64_t i = 0; i < count; ++i) to[i] = static_cast<T>(from[i]);
  else
    for (int64_t i = 0; i < count; ++i) to[i] = static_cast<T>(from[i * stride]);
}

// Row (b, i) of a [B, rows, count] tensor, in the accumulation type, zeros up to `padded`.
template <typename T> FASTMETA_INLINE void read_row(const View& v, int64_t b, int64_t i, int64_t count, int64_t padded, T* to) {
  switch (v.dtype) {
    case ScalarType::Double: convert_row(&v.at<double>(b, i), v.strides[2], count, to); break;
    case ScalarType::Half: convert_row(&v.at<Half>(b, i), v.strides[2], count, to); break;
    case ScalarType::BFloat16: convert_row(&v.at<BFloat16>(b, i), v.strides[2], count, to); break;
    default: convert_row(&v.at<float>(b, i), v.strides[2], count, to);
  }
  for (int64_t d = count; d < padded; ++d) to[d] = T(0);
}

// `count` numbers to a contiguous result at element `offset`. A gradient too large for float16 is cut to its largest number: the slope of a
// row of zeros is 1 / eps, and infinity must not come out of finite input.
template <typename T>
FASTMETA_INLINE void write_row(const T* from, int64_t count, bool gradient, ScalarType dtype, char* data, int64_t offset) {
  switch (dtype) {
    case ScalarType::Double:
      for (int64_t i = 0; i < count; ++i) reinterpret_cast<double*>(data)[offset + i] = static_cast<double>(from[i]);
      break;
    case ScalarType::Half:
      for (int64_t i = 0; i < count; ++i) {
        T x = from[i];
        if (gradient) x = x > T(65504) ? T(65504) : x < T(-65504) ? T(-65504) : x;
        reinterpret_cast<Half*>(data)[offset + i] = Half(static_cast<float>(x));
      }
      break;
    case ScalarType::BFloat16:
      for (int64_t i = 0; i < count; ++i) reinterpret_cast<BFloat16*>(data)[offset + i] = BFloat16(static_cast<float>(from[i]));
      break;
    default:
      for (int64_t i = 0; i < count; ++i) reinterpret_cast<float*>(data)[offset + i] = static_cast<float>(from[i]);
  }
}

// ---- the problem, and how it is cut -----------------------------------------------------------------------------------------------------

struct Range {
  int64_t begin, end;
  int64_t size() const { return end - begin; }
};

// Part `i` of `parts` of [0, size), with borders on multiples of `unit`.
Range part_of(int64_t size, int64_t unit, int64_t i, int64_t parts) {
  const int64_t units = ceil_divide(size, unit);
  return {std::min(size, units * i / parts * unit), std::min(size, units * (i + 1) / parts * unit)};
}

template <typename T> struct Problem {
  int64_t batch, queries, supports, features, columns;  // B, Q, S, D, C
  View query, support, third;                           // third: values, or labels
  View mask;                                            // data is null where there is none
  const T* scales;
  int64_t scales_stride;
  T scale, eps;
  int64_t normalize, eps_mode;
  bool values;       // cosine_attention, not matching_log_probs
  int64_t row;       // numbers in a packed row: D, to a multiple of kLanes
  int64_t value_row; // the same of C
  int64_t block;     // supports in a block
  int64_t query_parts, support_parts;
  ScalarType dtype;

  int64_t classes() const { return values ? 1 : columns; }  // sets of supports that are summed up apart
  bool separable() const { return normalize == kNone || eps_mode == kClamp; }  // u = 1
  T scale_of(int64_t b) const { return scales ? scale * scales[b * scales_stride] : scale; }
  int64_t tasks() const { return batch * query_parts * support_parts; }
  // A fork and join of threads costs some microseconds: not for work of that size.
  int64_t grain() const { return batch * queries * supports * (features + 8) < 400000 ? std::max<int64_t>(tasks(), 1) : 1; }

  struct Task {
    int64_t b, query_part, support_part;
    Range queries, supports;
  };
  Task task(int64_t i) const {
    const int64_t s = i % support_parts, q = i / support_parts % query_parts, b = i / support_parts / query_parts;
    return {b, q, s, part_of(queries, kLanes<T>, q, query_parts), part_of(supports, 1, s, support_parts)};
  }
};

constexpr int64_t kEnoughTasks = 16;

template <typename T>
Problem<T> make_problem(const Tensor& query, const Tensor& support, const Tensor& third, const std::optional<Tensor>& mask,
                        const std::optional<Tensor>& scales, double scale, int64_t normalize, int64_t eps_mode, double eps, int64_t columns,
                        bool values) {
  Problem<T> p{};
  p.batch = query.size(0), p.queries = query.size(1), p.supports = support.size(1), p.features = query.size(2), p.columns = columns;
  p.query = View(query), p.support = View(support), p.third = View(third);
  if (mask) p.mask = View(*mask);
  if (scales) p.scales = static_cast<const T*>(scales->const_data_ptr()), p.scales_stride = scales->stride(0);
  p.scale = T(scale), p.eps = std::max(T(eps), std::numeric_limits<T>::min());
  p.normalize = normalize, p.eps_mode = eps_mode, p.values = values;
  p.dtype = query.scalar_type();
  p.row = ceil_divide(p.features, kLanes<T>) * kLanes<T>;
  if (p.row % (4096 / int64_t(sizeof(T)) / 4) == 0) p.row += kLanes<T>;  // rows a power of two apart share their few places in the cache
  p.value_row = ceil_divide(columns, kLanes<T>) * kLanes<T>;
  p.block = std::clamp<int64_t>(262144 / int64_t(sizeof(T)) / std::max<int64_t>(p.row, 1) / kTileRows, 4, 42) * kTileRows;
  p.query_parts = p.support_parts = 1;
  return p;
}

// Forward: a part of the queries packs all its supports again, a part of the supports leaves a state of each query to be merged.
template <typename T> void cut_forward(Problem<T>& p) {
  const int64_t large = ceil_divide(p.queries, 1024);
  p.query_parts = std::max<int64_t>(1, p.batch * large >= kEnoughTasks ? large : ceil_divide(p.queries, 128));
  const int64_t wanted = ceil_divide(kEnoughTasks, std::max<int64_t>(p.batch * p.query_parts, 1));
  p.support_parts = std::clamp<int64_t>(std::min(p.supports / 1024, p.supports / (4 * std::max<int64_t>(p.columns, 1))), 1, wanted);
}

// Backward: a part of one side leaves a whole gradient of the other side to be added up, so the longer side is cut, and into few parts.
template <typename T> void cut_backward(Problem<T>& p) {
  const int64_t wanted = ceil_divide(kEnoughTasks / 2, std::max<int64_t>(p.batch, 1));
  (p.supports >= p.queries ? p.support_parts : p.query_parts) = std::clamp<int64_t>(std::max(p.supports, p.queries) / 256, 1, wanted);
}

// ---- packing -----------------------------------------------------------------------------------------------------------------------

// What each of some rows was multiplied with, 1 / a', and its norm by that measure, |x| / a'; `active` is 0 where the norm has no derivative.
template <typename T> struct Scaling {
  T *inverse, *norm, *active;
};

template <typename T> FASTMETA_INLINE Vector<T> sums_of_squares(const T* row, int64_t length) {
  Vector<T> sums{};
  for (int64_t d = 0; d < length; d += kLanes<T>) {
    const Vector<T> x = load(row + d);
    sums += x * x;
  }
  return sums;
}

template <typename T> FASTMETA_INLINE void multiply(T* row, int64_t length, T factor) {
#pragma omp simd
  for (int64_t d = 0; d < length; ++d) row[d] *= factor;
}

// Divides up to kLanes packed rows by their norms, in place. Side by side: a root and a division take as long for one row as for all.
template <typename T> FASTMETA_INLINE void normalize_rows(const Problem<T>& p, int count, T* rows, const Scaling<T>& to) {
  constexpr int L = kLanes<T>;
  constexpr T kTiny = kSmallestNorm<T>;
  T parts[L * L] = {}, across[L * L], squares[L] = {}, before[L], factor[L];
  for (int r = 0; r < count; ++r) store(parts + r * L, sums_of_squares(rows + r * p.row, p.row));
  transpose(L, L, parts, L, across, L);
  for (int i = 0; i < L; ++i) FASTMETA_EACH_LANE squares[l] += across[i * L + l];
  FASTMETA_EACH_LANE before[l] = T(1);
  for (int r = 0; r < count; ++r) {
    if ((squares[r] > kTiny * kTiny && squares[r] < T(1) / (kTiny * kTiny)) || squares[r] != squares[r]) continue;
    // Out of range, or zeros: first divide by the largest element.
    T* row = rows + r * p.row;
    T largest = 0;
    for (int64_t d = 0; d < p.features; ++d) largest = std::max(largest, std::abs(row[d]));
    if (!(largest > 0 && largest <= std::numeric_limits<T>::max())) continue;
    before[r] = T(1) / std::max(largest, std::numeric_limits<T>::min() * 4);
    multiply(row, p.row, before[r]);
    store(parts, sums_of_squares(row, p.row));
    squares[r] = 0;
    for (int i = 0; i < L; ++i) squares[r] += parts[i];
  }
  const T smallest = p.eps_mode == kClamp ? p.eps : kTiny;
  FASTMETA_EACH_LANE {
    const T scaled = std::sqrt(squares[l]), least = smallest * before[l];  // |x| * before
    const T divisor = scaled < least ? least : scaled;
    factor[l] = T(1) / divisor;
    squares[l] = scaled / divisor;
    before[l] /= divisor;
    parts[l] = scaled < least ? T(0) : T(1);
  }
  for (int r = 0; r < count; ++r) {
    multiply(rows + r * p.row, p.row, factor[r]);
    to.inverse[r] = before[r], to.norm[r] = squares[r], to.active[r] = parts[r];
  }
}

// A side that is not divided by its norm.
template <typename T> FASTMETA_INLINE void leave_rows(int count, const Scaling<T>& to) {
  std::fill_n(to.inverse, count, T(1)), std::fill_n(to.norm, count, T(1)), std::fill_n(to.active, count, T(0));
}

// kLanes queries side by side.
template <typename T> struct Panel {
  T* columns;          // [D][kLanes]
  T* rows;             // [kLanes][row]
  Scaling<T> scaling;  // [kLanes]
};

// The packed panels of a task. Where all supports are one block a panel is used once, and there is one place for all of them.
template <typename T> class Queries {
 public:
  Queries(const Problem<T>& p, const typename Problem<T>::Task& task)
      : count_(ceil_divide(task.queries.size(), kLanes<T>)), slots_(task.supports.size() <= p.block ? 1 : count_),
        each_((p.row * 2 + 3) * kLanes<T>), row_(p.row), data_(slots_ * each_) {}
  int64_t count() const { return count_; }
  Panel<T> operator[](int64_t i) const {
    T* at = data_.get() + i % slots_ * each_;
    T* scaling = at + 2 * row_ * kLanes<T>;
    return {at, at + row_ * kLanes<T>, {scaling, scaling + kLanes<T>, scaling + 2 * kLanes<T>}};
  }

 private:
  int64_t count_, slots_, each_, row_;
  Buffer<T> data_;
};

// The queries of panel `i` of a task.
template <typename T> Range panel_range(const typename Problem<T>::Task& task, int64_t i) {
  const int64_t begin = task.queries.begin + i * kLanes<T>;
  return {begin, std::min(begin + kLanes<T>, task.queries.end)};
}

template <typename T> FASTMETA_INLINE void pack_panel(const Problem<T>& p, int64_t b, Range queries, const Panel<T>& panel) {
  const int count = int(queries.size());
  for (int l = 0; l < count; ++l) read_row(p.query, b, queries.begin + l, p.features, p.row, panel.rows + l * p.row);
  std::fill_n(panel.rows + count * p.row, (kLanes<T> - count) * p.row, T(0));
  leave_rows(kLanes<T>, panel.scaling);
  if (p.normalize == kBoth) normalize_rows(p, count, panel.rows, panel.scaling);
  transpose(kLanes<T>, p.row, panel.rows, p.row, panel.columns, kLanes<T>);
}

// Up to `block` supports, padding left out.
template <typename T> struct Block {
  int64_t count = 0;
  Buffer<T> rows;                   // [count][row]
  Buffer<T> inverse, norm, active;  // [count]
  Buffer<T> values;                 // [count][value_row]
  Buffer<int64_t> labels, index;    // [count]: class; position in the support

  explicit Block(const Problem<T>& p)
      : rows(p.block * p.row), inverse(p.block), norm(p.block), active(p.block), values(p.values ? p.block * p.value_row : 0),
        labels(p.values ? 0 : p.block), index(p.block) {}
  Scaling<T> scaling(int64_t j) const { return {inverse.get() + j, norm.get() + j, active.get() + j}; }
};

// Fills `block` from support `next` on; returns where the next block begins.
template <typename T> FASTMETA_INLINE int64_t pack_supports(const Problem<T>& p, int64_t b, int64_t next, int64_t end, Block<T>& block) {
  int64_t count = 0;
  for (; next < end && count < p.block; ++next) {
    if (p.mask.data && !p.mask.template at<bool>(b, next)) continue;
    read_row(p.support, b, next, p.features, p.row, block.rows.get() + count * p.row);
    if (p.values)
      read_row(p.third, b, next, p.columns, p.value_row, block.values.get() + count * p.value_row);
    else
      block.labels.get()[count] = p.third.template at<int64_t>(b, next);
    block.index.get()[count++] = next;
  }
  leave_rows(int(count), block.scaling(0));
  if (p.normalize != kNone)
    for (int64_t j = 0; j < count; j += kLanes<T>)
      normalize_rows(p, int(std::min<int64_t>(kLanes<T>, count - j)), block.rows.get() + j * p.row, block.scaling(j));
  block.count = count;
  return next;
}

// tile[j][l] = k^_j . q^_l, in pieces of D of which a panel stays in the first cache.
template <typename T> FASTMETA_INLINE void dot_tile(const Problem<T>& p, const Block<T>& block, const Panel<T>& panel, T* tile) {
  constexpr int64_t kPiece = 256;
  for (int64_t d = 0; d == 0 || d < p.features; d += kPiece)
    product<T, Left::kRows>(block.count, std::min(kPiece, p.features - d), block.rows.get() + d, p.row, panel.columns + d * kLanes<T>, kLanes<T>,
                            tile, kLanes<T>, d > 0);
}

// tile[j][l] = s of support j and query l.
template <typename T>
FASTMETA_INLINE void score_tile(const Problem<T>& p, T scale, const Block<T>& block, const Panel<T>& panel, T* tile) {
  constexpr int L = kLanes<T>;
  dot_tile(p, block, panel, tile);
  for (int64_t j = 0; j < block.count; ++j) {
    T* s = tile + j * L;
    if (p.separable())
      FASTMETA_EACH_LANE s[l] *= scale;
    else
      FASTMETA_EACH_LANE
        s[l] *= scale * cosine_factor(p.eps_mode, p.eps, block.norm.get()[j] * panel.scaling.norm[l], block.inverse.get()[j] * panel.scaling.inverse[l]);
  }
}

// ---- forward -----------------------------------------------------------------------------------------------------------------------

// What is known of a panel after some of the supports: for each class (for cosine_attention there is one) the largest score and
// the sum of exponentials about it, and for cosine_attention the values weighted with these exponentials.
template <typename T> struct State {
  T *peak, *sum;  // [classes][kLanes]
  T* values;      // [C][kLanes]
};

template <typename T> class States {
 public:
  States(const Problem<T>& p, int64_t panels)
      : rows_(p.values ? 1 : p.value_row), each_((2 * rows_ + (p.values ? p.value_row : 0)) * kLanes<T>), data_(panels * each_) {
    for (int64_t i = 0; i < panels; ++i) {
      std::fill_n((*this)[i].peak, rows_ * kLanes<T>, -std::numeric_limits<T>::infinity());
      std::fill_n((*this)[i].sum, each_ - rows_ * kLanes<T>, T(0));
    }
  }
  State<T> operator[](int64_t i) const {
    T* at = data_.get() + i * each_;
    return {at, at + rows_ * kLanes<T>, at + 2 * rows_ * kLanes<T>};
  }

 private:
  int64_t rows_, each_;
  Buffer<T> data_;
};

// sum[l] *= exp(before[l] - now[l]), where nothing was summed yet it stays 0.
template <typename T> FASTMETA_INLINE T shrink(T before, T now) {
  return before == now ? T(1) : exp_nonpositive(before - now);
}

// Adds a tile of scores to the state of its panel. `touched` lists the classes of the block; none for the first block, before which there are no
// sums to bring to the new peaks. `before` is working space, a row of kLanes for each of these classes.
template <typename T>
FASTMETA_INLINE void add_tile(const Problem<T>& p, const Block<T>& block, const std::vector<int64_t>& touched, T* tile, T* before,
                              const State<T>& state) {
  constexpr int L = kLanes<T>;
  const int64_t* labels = p.values ? nullptr : block.labels.get();
  for (size_t t = 0; t < touched.size(); ++t) std::memcpy(before + t * L, state.peak + touched[t] * L, 64);
  for (int64_t j = 0; j < block.count; ++j) {
    T* peak = state.peak + (labels ? labels[j] : 0) * L;
    const T* s = tile + j * L;
    FASTMETA_EACH_LANE peak[l] = s[l] > peak[l] ? s[l] : peak[l];
  }
  for (size_t t = 0; t < touched.size(); ++t) {
    T* sum = state.sum + touched[t] * L;
    const T* peak = state.peak + touched[t] * L;
    T* factor = before + t * L;
    FASTMETA_EACH_LANE factor[l] = shrink(factor[l], peak[l]);
    FASTMETA_EACH_LANE sum[l] *= factor[l];
  }
  if (p.values && !touched.empty())
    for (int64_t c = 0; c < p.columns; ++c)
      FASTMETA_EACH_LANE state.values[c * L + l] *= before[l];
  for (int64_t j = 0; j < block.count; ++j) {
    const int64_t c = labels ? labels[j] : 0;
    T *s = tile + j * L, *sum = state.sum + c * L;
    const T* peak = state.peak + c * L;
    FASTMETA_EACH_LANE s[l] = exp_nonpositive(s[l] - peak[l]);
    FASTMETA_EACH_LANE sum[l] += s[l];
  }
  if (p.values)
    product<T, Left::kColumns>(p.columns, block.count, block.values.get(), p.value_row, tile, L, state.values, L, true);
}

template <typename T> FASTMETA_INLINE void forward_task(const Problem<T>& p, int64_t i, const States<T>& states) {
  const auto task = p.task(i);
  const T scale = p.scale_of(task.b);
  const Queries<T> queries(p, task);
  Block<T> block(p);
  const int64_t most = p.values ? 1 : std::min(p.columns, p.block);
  const Buffer<T> tile(p.block * kLanes<T>), before(most * kLanes<T>);
  std::vector<int64_t> touched;
  bool first = true;
  for (int64_t next = task.supports.begin; next < task.supports.end; first = false) {
    next = pack_supports(p, task.b, next, task.supports.end, block);
    if (!first && p.values) {
      touched.assign(1, 0);
    } else if (!first) {
      touched.assign(block.labels.get(), block.labels.get() + block.count);
      std::sort(touched.begin(), touched.end());
      touched.erase(std::unique(touched.begin(), touched.end()), touched.end());
    }
    for (int64_t k = 0; k < queries.count(); ++k) {
      if (first) pack_panel(p, task.b, panel_range<T>(task, k), queries[k]);
      score_tile(p, scale, block, queries[k], tile.get());
      add_tile(p, block, touched, tile.get(), before.get(), states[k]);
    }
  }
}

// Merges the state of later supports into that of earlier ones.
template <typename T> FASTMETA_INLINE void merge(const Problem<T>& p, const State<T>& into, const State<T>& from) {
  constexpr int L = kLanes<T>;
  T ours[L], theirs[L];
  for (int64_t c = 0; c < p.classes(); ++c) {
    T *peak = into.peak + c * L, *sum = into.sum + c * L;
    FASTMETA_EACH_LANE {
      const T other = from.peak[c * L + l], now = other > peak[l] ? other : peak[l];
      ours[l] = shrink(peak[l], now), theirs[l] = shrink(other, now);
      peak[l] = now;
      sum[l] = sum[l] * ours[l] + from.sum[c * L + l] * theirs[l];
    }
  }
  if (p.values)
    for (int64_t c = 0; c < p.columns; ++c)
      FASTMETA_EACH_LANE into.values[c * L + l] = into.values[c * L + l] * ours[l] + from.values[c * L + l] * theirs[l];
}

// The result of a panel from its state, in place of it; and its log-sums: of each query, or of each class of each query. `rows` is
// [kLanes][value_row] of working space.
template <typename T>
FASTMETA_INLINE void finish_panel(const Problem<T>& p, int64_t b, Range queries, const State<T>& state, T* rows, char* result, T* log_sums) {
  constexpr int L = kLanes<T>;
  T *values = state.values, *peak = state.peak;
  if (p.values) {
    T inverse[L];
    FASTMETA_EACH_LANE inverse[l] = state.sum[l] == T(0) ? T(0) : T(1) / state.sum[l];  // no support: 0
    for (int64_t c = 0; c < p.columns; ++c)
      FASTMETA_EACH_LANE values[c * L + l] *= inverse[l];
    FASTMETA_EACH_LANE peak[l] += log_of(state.sum[l]);
    std::copy_n(peak, queries.size(), log_sums + b * p.queries + queries.begin);
  } else {
    T top[L], total[L];
    std::fill_n(top, L, -std::numeric_limits<T>::infinity()), std::fill_n(total, L, T(0));
    for (int64_t c = 0; c < p.columns; ++c)
      FASTMETA_EACH_LANE top[l] = peak[c * L + l] > top[l] ? peak[c * L + l] : top[l];
    for (int64_t c = 0; c < p.columns; ++c)
      FASTMETA_EACH_LANE total[l] += state.sum[c * L + l] * shrink(peak[c * L + l], top[l]);
    FASTMETA_EACH_LANE total[l] = log_of(total[l]);
    values = state.sum;
    for (int64_t c = 0; c < p.columns; ++c)
      FASTMETA_EACH_LANE {
        // Relative to the largest score, so that large scores do not round the small differences away.
        const T log_sum = log_of(state.sum[c * L + l]);
        const bool absent = log_sum == -std::numeric_limits<T>::infinity();
        values[c * L + l] = absent ? log_sum : (peak[c * L + l] - top[l]) + (log_sum - total[l]);
        peak[c * L + l] += log_sum;
      }
    transpose(p.value_row, L, peak, L, rows, p.value_row);
    for (int64_t q = queries.begin; q < queries.end; ++q)
      std::copy_n(rows + (q - queries.begin) * p.value_row, p.columns, log_sums + (b * p.queries + q) * p.columns);
  }
  transpose(p.value_row, L, values, L, rows, p.value_row);
  for (int64_t q = queries.begin; q < queries.end; ++q)
    write_row(rows + (q - queries.begin) * p.value_row, p.columns, false, p.dtype, result, (b * p.queries + q) * p.columns);
}

// The parts of the supports of task group `i` (an episode and a part of its queries), from the first to the last, to the result.
template <typename T>
FASTMETA_INLINE void finish_group(const Problem<T>& p, int64_t i, const States<T>* states, char* result, T* log_sums) {
  const auto task = p.task(i * p.support_parts);
  const Buffer<T> rows(kLanes<T> * p.value_row);
  for (int64_t k = 0; k * kLanes<T> < task.queries.size(); ++k) {
    for (int64_t s = 1; s < p.support_parts; ++s) merge(p, states[0][k], states[s][k]);
    finish_panel(p, task.b, panel_range<T>(task, k), states[0][k], rows.get(), result, log_sums);
  }
}

// ---- backward ----------------------------------------------------------------------------------------------------------------------

// The gradients as they are gathered, in the accumulation type: the results themselves, or one copy for each part of the other side.
template <typename T> struct Gradients {
  int64_t needs;
  T *query, *support, *values;  // [parts][B][rows][D or C]
  T* scales;                    // [tasks]
};

// What the backward knows of a panel of queries before it sees a support, and what it gathers.
template <typename T> struct Incoming {
  T* log_sum;    // [classes][kLanes]: +inf where there is nothing, so that every weight is 0
  T* grad;       // [C][kLanes]
  T* grad_rows;  // [kLanes][value_row]
  T* query;      // the gradient of the packed queries: [D][kLanes]
  T* total;      // [kLanes]: matching_log_probs: sum of grad; cosine_attention: the product of grad and result
  T* log_total;  // [kLanes]: matching_log_probs: log-sum of all classes
  T* radial;     // [kLanes]: sum of scale ds v (q^ . k^)
};

template <typename T> class IncomingPanels {
 public:
  IncomingPanels(const Problem<T>& p, const typename Problem<T>::Task& task)
      : slots_(task.supports.size() <= p.block ? 1 : ceil_divide(task.queries.size(), kLanes<T>)),
        sizes_{p.values ? 1 : p.value_row, p.value_row, p.value_row, p.row, 1, 1, 1} {
    for (int64_t size : sizes_) each_ += size * kLanes<T>;
    data_ = Buffer<T>(slots_ * each_);
  }
  Incoming<T> operator[](int64_t i) const {
    T* at[7] = {data_.get() + i % slots_ * each_};
    for (int j = 1; j < 7; ++j) at[j] = at[j - 1] + sizes_[j - 1] * kLanes<T>;
    return {at[0], at[1], at[2], at[3], at[4], at[5], at[6]};
  }

 private:
  int64_t slots_, sizes_[7], each_ = 0;
  Buffer<T> data_;
};

template <typename T>
FASTMETA_INLINE void load_incoming(const Problem<T>& p, int64_t b, Range queries, const View& grad, const View& result, const T* log_sums,
                                   const Incoming<T>& in) {
  constexpr int L = kLanes<T>;
  const T kInfinity = std::numeric_limits<T>::infinity();
  std::fill_n(in.query, p.row * L, T(0)), std::fill_n(in.radial, L, T(0)), std::fill_n(in.total, L, T(0));
  std::fill_n(in.log_total, L, kInfinity);
  const int64_t first = b * p.queries + queries.begin;
  T* rows = in.grad_rows;
  if (p.values) {
    std::fill_n(in.log_sum, L, kInfinity);
    for (int64_t l = 0; l < queries.size(); ++l) {
      in.log_sum[l] = log_sums[first + l] == -kInfinity ? kInfinity : log_sums[first + l];
      read_row(result, b, queries.begin + l, p.columns, p.value_row, rows + l * p.value_row);
    }
  } else {
    for (int64_t l = 0; l < queries.size(); ++l) std::copy_n(log_sums + (first + l) * p.columns, p.columns, rows + l * p.value_row);
    for (int64_t l = queries.size(); l < L; ++l) std::fill_n(rows + l * p.value_row, p.columns, -kInfinity);
    transpose(L, p.value_row, rows, p.value_row, in.log_sum, L);
  }
  T* result_columns = in.grad;  // in place: the result is needed in the sum with grad only
  if (p.values) {
    for (int64_t l = queries.size(); l < L; ++l) std::fill_n(rows + l * p.value_row, p.value_row, T(0));
    transpose(L, p.value_row, rows, p.value_row, result_columns, L);
  }
  for (int64_t l = 0; l < L; ++l)
    if (l < queries.size())
      read_row(grad, b, queries.begin + l, p.columns, p.value_row, rows + l * p.value_row);
    else
      std::fill_n(rows + l * p.value_row, p.value_row, T(0));
  if (p.values)
    for (int64_t c = 0; c < p.columns; ++c)
      FASTMETA_EACH_LANE in.total[l] += result_columns[c * L + l] * rows[l * p.value_row + c];
  transpose(L, p.value_row, rows, p.value_row, in.grad, L);
  if (p.values) return;
  T peak[L], sum[L];
  std::fill_n(peak, L, -kInfinity), std::fill_n(sum, L, T(0));
  for (int64_t c = 0; c < p.columns; ++c)
    FASTMETA_EACH_LANE peak[l] = in.log_sum[c * L + l] > peak[l] ? in.log_sum[c * L + l] : peak[l];
  for (int64_t c = 0; c < p.columns; ++c)
    FASTMETA_EACH_LANE {
      T& log_sum = in.log_sum[c * L + l];
      const bool absent = log_sum == -kInfinity;  // a class without support gives no gradient
      sum[l] += absent ? T(0) : exp_nonpositive(log_sum - peak[l]);
      in.total[l] += absent ? T(0) : in.grad[c * L + l];
      log_sum = absent ? kInfinity : log_sum;
    }
  FASTMETA_EACH_LANE in.log_total[l] = sum[l] == T(0) ? kInfinity : peak[l] + log_of(sum[l]);
}

// The tiles of one (block, panel) in the backward, [block][kLanes] each.
template <typename T> struct Tiles {
  Buffer<T> dots, weights, flow;
  explicit Tiles(const Problem<T>& p)
      : dots(p.block * kLanes<T>), weights(p.values ? p.block * kLanes<T> : 0), flow(p.block * kLanes<T>) {}
};

// tiles.flow = scale ds u; and the sums of scale ds v (q^ . k^) over either side, those over the queries lane by lane. Returns the sum of ds c, the gradient of the scale.
template <typename T>
FASTMETA_INLINE T flow_tile(const Problem<T>& p, T scale, const Block<T>& block, const Panel<T>& panel, const Incoming<T>& in,
                            const Tiles<T>& tiles, T* radial) {
  constexpr int L = kLanes<T>;
  T *dots = tiles.dots.get(), *flow = tiles.flow.get(), *weights = tiles.weights.get();
  dot_tile(p, block, panel, dots);
  if (p.values)
    product<T, Left::kRows>(block.count, p.columns, block.values.get(), p.value_row, in.grad, L, flow, L, false);
  T scale_sums[L] = {};
  for (int64_t j = 0; j < block.count; ++j) {
    T u[L], v[L], ds[L], along[L];
    FASTMETA_EACH_LANE u[l] = v[l] = T(1);
    if (!p.separable()) {
      FASTMETA_EACH_LANE
        u[l] = cosine_factor(p.eps_mode, p.eps, block.norm.get()[j] * panel.scaling.norm[l], block.inverse.get()[j] * panel.scaling.inverse[l]);
      FASTMETA_EACH_LANE v[l] = radial_factor(p.eps_mode, u[l]);
    }
    const T* dot = dots + j * L;
    T* out = flow + j * L;
    if (p.values) {
      T* weight = weights + j * L;
      FASTMETA_EACH_LANE weight[l] = exp_nonpositive(scale * u[l] * dot[l] - in.log_sum[l]);
      FASTMETA_EACH_LANE ds[l] = weight[l] * (out[l] - in.total[l]);
    } else {
      const T *log_sum = in.log_sum + block.labels.get()[j] * L, *grad = in.grad + block.labels.get()[j] * L;
      FASTMETA_EACH_LANE {
        const T s = scale * u[l] * dot[l];
        ds[l] = exp_nonpositive(s - log_sum[l]) * grad[l] - exp_nonpositive(s - in.log_total[l]) * in.total[l];
      }
    }
    FASTMETA_EACH_LANE {
      scale_sums[l] += ds[l] * u[l] * dot[l];
      along[l] = scale * ds[l] * v[l] * dot[l];
      in.radial[l] += along[l];
      radial[j * L + l] += along[l];
      out[l] = scale * ds[l] * u[l];
    }
  }
  T sum = 0;
  for (const T x : scale_sums) sum += x;
  return sum;
}

// The gradient of the queries of a panel, when it has seen all supports of the task; `columns` of Incoming and Panel are used up.
template <typename T>
FASTMETA_INLINE void finish_query(const Problem<T>& p, Range queries, const Panel<T>& panel, const Incoming<T>& in, T* to) {
  constexpr int L = kLanes<T>;
  T back[L];
  FASTMETA_EACH_LANE back[l] = in.radial[l] * panel.scaling.active[l];
  for (int64_t d = 0; d < p.features; ++d)
    FASTMETA_EACH_LANE in.query[d * L + l] = panel.scaling.inverse[l] * (in.query[d * L + l] - back[l] * panel.columns[d * L + l]);
  transpose(p.row, L, in.query, L, panel.columns, p.row);
  for (int64_t q = queries.begin; q < queries.end; ++q)
    std::copy_n(panel.columns + (q - queries.begin) * p.row, p.features, to + q * p.features);
}

template <typename T>
FASTMETA_INLINE void backward_task(const Problem<T>& p, int64_t i, const View& grad, const View& result, const T* log_sums,
                                   const Gradients<T>& out) {
  constexpr int L = kLanes<T>;
  const auto task = p.task(i);
  const T scale = p.scale_of(task.b);
  const bool needs_query = out.needs & kNeedsQuery, needs_support = out.needs & kNeedsSupport;
  const bool needs_values = p.values && out.needs & kNeedsValues;
  const Queries<T> queries(p, task);
  const IncomingPanels<T> incoming(p, task);
  Block<T> block(p);
  const Tiles<T> tiles(p);
  const Buffer<T> support(p.block * p.row), values(needs_values ? p.block * p.value_row : 0), radial(p.block * L);
  T* of_query = needs_query ? out.query + (task.support_part * p.batch + task.b) * p.queries * p.features : nullptr;
  T* of_support = needs_support ? out.support + (task.query_part * p.batch + task.b) * p.supports * p.features : nullptr;
  T* of_values = needs_values ? out.values + (task.query_part * p.batch + task.b) * p.supports * p.columns : nullptr;
  T scale_sum = 0;
  int64_t next = task.supports.begin;
  do {  // once even without supports: the gradients of the queries are then 0
    const int64_t begin = next;
    next = pack_supports(p, task.b, next, task.supports.end, block);
    std::fill_n(support.get(), block.count * p.row, T(0)), std::fill_n(radial.get(), block.count * L, T(0));
    if (needs_values) std::fill_n(values.get(), block.count * p.value_row, T(0));
    for (int64_t k = 0; k < queries.count(); ++k) {
      const Panel<T> panel = queries[k];
      const Incoming<T> in = incoming[k];
      const Range range = panel_range<T>(task, k);
      if (begin == task.supports.begin) {
        pack_panel(p, task.b, range, panel);
        load_incoming(p, task.b, range, grad, result, log_sums, in);
      }
      scale_sum += flow_tile(p, scale, block, panel, in, tiles, radial.get());
      if (needs_support)
        for (int64_t d = 0; d < p.features; d += L)
          product<T, Left::kRows>(block.count, L, tiles.flow.get(), L, panel.rows + d, p.row, support.get() + d, p.row, true);
      if (needs_values)
        for (int64_t c = 0; c < p.columns; c += L)
          product<T, Left::kRows>(block.count, L, tiles.weights.get(), L, in.grad_rows + c, p.value_row, values.get() + c, p.value_row, true);
      if (needs_query) {
        product<T, Left::kColumns>(p.features, block.count, block.rows.get(), p.row, tiles.flow.get(), L, in.query, L, true);
        if (next >= task.supports.end) finish_query(p, range, panel, in, of_query);
      }
    }
    if (p.mask.data) {  // padding in between has gradient 0
      if (needs_support) std::fill(of_support + begin * p.features, of_support + next * p.features, T(0));
      if (needs_values) std::fill(of_values + begin * p.columns, of_values + next * p.columns, T(0));
    }
    for (int64_t j = 0; j < block.count; ++j) {
      const int64_t s = block.index.get()[j];
      T back = 0;
      for (int l = 0; l < L; ++l) back += radial.get()[j * L + l];
      back *= block.active.get()[j];
      const T inverse = block.inverse.get()[j];
      const T *gathered = support.get() + j * p.row, *unit = block.rows.get() + j * p.row;
      if (needs_support)
        for (int64_t d = 0; d < p.features; ++d) of_support[s * p.features + d] = inverse * (gathered[d] - back * unit[d]);
      if (needs_values) std::copy_n(values.get() + j * p.value_row, p.columns, of_values + s * p.columns);
    }
  } while (next < task.supports.end);
  out.scales[i] = p.scale * scale_sum;
}

// ---- one function for each type, compiled for each instruction set ----------------------------------------------------------------------------

FASTMETA_CLONES void run_forward(const Problem<float>& p, int64_t i, const States<float>& states) { forward_task(p, i, states); }
FASTMETA_CLONES void run_forward(const Problem<double>& p, int64_t i, const States<double>& states) { forward_task(p, i, states); }
FASTMETA_CLONES void run_finish(const Problem<float>& p, int64_t i, const States<float>* states, char* result, float* log_sums) {
  finish_group(p, i, states, result, log_sums);
}
FASTMETA_CLONES void run_finish(const Problem<double>& p, int64_t i, const States<double>* states, char* result, double* log_sums) {
  finish_group(p, i, states, result, log_sums);
}
FASTMETA_CLONES void run_backward(const Problem<float>& p, int64_t i, const View& grad, const View& result, const float* log_sums,
                                  const Gradients<float>& out) {
  backward_task(p, i, grad, result, log_sums, out);
}
FASTMETA_CLONES void run_backward(const Problem<double>& p, int64_t i, const View& grad, const View& result, const double* log_sums,
                                  const Gradients<double>& out) {
  backward_task(p, i, grad, result, log_sums, out);
}

// ---- the operations ------------------------------------------------------------------------------------------------------------------

void check_labels(const Tensor& labels, const std::optional<Tensor>& mask, int64_t num_classes) {
  const View y(labels), m = mask ? View(*mask) : View();
  for (int64_t b = 0; b < labels.size(0); ++b)
    for (int64_t s = 0; s < labels.size(1); ++s) {
      const int64_t label = y.at<int64_t>(b, s);
      if ((label < 0 || label >= num_classes) && !(m.data && !m.at<bool>(b, s)))
        throw std::runtime_error("matching_log_probs: labels must be in [0, " + std::to_string(num_classes) + "), got " + std::to_string(label));
    }
}

template <typename T> std::tuple<Tensor, Tensor> forward(Problem<T> p, const Tensor& query) {
  cut_forward(p);
  Tensor result = empty({p.batch, p.queries, p.columns}, query.scalar_type());
  std::vector<int64_t> log_shape{p.batch, p.queries};
  if (!p.values) log_shape.push_back(p.columns);
  Tensor log_sums = empty(log_shape, accumulation_type(query));
  char* to = static_cast<char*>(result.mutable_data_ptr());
  T* log_to = static_cast<T*>(log_sums.mutable_data_ptr());

  auto states_of = [&](int64_t i) { return States<T>(p, ceil_divide(p.task(i).queries.size(), kLanes<T>)); };
  if (p.support_parts == 1) {
    for_each_task(p.tasks(), p.grain(), [&](int64_t i) {
      const States<T> states = states_of(i);
      run_forward(p, i, states);
      run_finish(p, i, &states, to, log_to);
    });
    return {result, log_sums};
  }
  std::vector<States<T>> states;
  for (int64_t i = 0; i < p.tasks(); ++i) states.push_back(states_of(i));
  for_each_task(p.tasks(), p.grain(), [&](int64_t i) { run_forward(p, i, states[i]); });
  for_each_task(p.tasks() / p.support_parts, 1, [&](int64_t i) { run_finish(p, i, &states[i * p.support_parts], to, log_to); });
  return {result, log_sums};
}

// A gradient and what the tasks gather it in: itself, where the dtype is that of accumulation and nothing is to be added up.
template <typename T> struct Target {
  Tensor tensor;
  Buffer<T> copies;
  T* at = nullptr;
  int64_t parts, size;

  Target(ScalarType dtype, const std::vector<int64_t>& shape, bool needed, int64_t parts)
      : tensor(empty(needed ? shape : std::vector<int64_t>{0}, dtype)), parts(parts), size(tensor.numel()) {
    if (parts == 1 && tensor.scalar_type() == accumulation_type(tensor)) {
      at = static_cast<T*>(tensor.mutable_data_ptr());
    } else {
      copies = Buffer<T>(size * parts);
      at = copies.get();
    }
  }

  void finish() {
    if (!copies.get() || size == 0) return;
    char* to = static_cast<char*>(tensor.mutable_data_ptr());
    torch::stable::parallel_for(0, size, 16384, [&](int64_t begin, int64_t end) {
      for (int64_t part = 1; part < parts; ++part)
        for (int64_t i = begin; i < end; ++i) at[i] += at[part * size + i];
      write_row(at + begin, end - begin, true, tensor.scalar_type(), to, begin);
    });
  }
};

template <typename T>
std::tuple<Tensor, Tensor, Tensor, Tensor> backward(Problem<T> p, const Tensor& grad, int64_t needs, const Tensor& query, const Tensor& result,
                                                    const Tensor& log_sums) {
  cut_backward(p);
  const bool needs_values = p.values && needs & kNeedsValues;
  Target<T> to_query(p.dtype, {p.batch, p.queries, p.features}, needs & kNeedsQuery, p.support_parts);
  Target<T> to_support(p.dtype, {p.batch, p.supports, p.features}, needs & kNeedsSupport, p.query_parts);
  Target<T> to_values(p.dtype, {p.batch, p.supports, p.columns}, needs_values, p.query_parts);
  Tensor to_scales = empty({needs & kNeedsScales ? p.batch : 0}, needs & kNeedsScales ? accumulation_type(query) : p.dtype);
  const Buffer<T> scale_parts(p.tasks());

  const Gradients<T> out{needs, to_query.at, to_support.at, to_values.at, scale_parts.get()};
  const View grad_view(grad), result_view(result);
  const T* sums = static_cast<const T*>(log_sums.const_data_ptr());
  for_each_task(p.tasks(), p.grain(), [&](int64_t i) { run_backward(p, i, grad_view, result_view, sums, out); });

  to_query.finish(), to_support.finish(), to_values.finish();
  T* scales = static_cast<T*>(to_scales.mutable_data_ptr());
  const int64_t each = p.query_parts * p.support_parts;
  for (int64_t b = 0; b < to_scales.numel(); ++b) {
    scales[b] = 0;
    for (int64_t i = 0; i < each; ++i) scales[b] += scale_parts.get()[b * each + i];
  }
  return {to_query.tensor, to_support.tensor, to_values.tensor, to_scales};
}

std::tuple<Tensor, Tensor> cosine_attention(Tensor query, Tensor support, Tensor values, Optional mask, Optional scales, double scale,
                                            int64_t normalize, int64_t eps_mode, double eps) {
  auto run = [&](auto zero) {
    using T = decltype(zero);
    return forward(make_problem<T>(query, support, values, mask, scales, scale, normalize, eps_mode, eps, values.size(2), true), query);
  };
  return for_dtype(query, run);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> cosine_attention_backward(Tensor grad, int64_t needs, Tensor query, Tensor support, Tensor values,
                                                                     Optional mask, Optional scales, double scale, int64_t normalize,
                                                                     int64_t eps_mode, double eps, Tensor result, Tensor log_sums) {
  auto run = [&](auto zero) {
    using T = decltype(zero);
    return backward(make_problem<T>(query, support, values, mask, scales, scale, normalize, eps_mode, eps, values.size(2), true), grad, needs,
                    query, result, as_contiguous(log_sums));
  };
  return for_dtype(query, run);
}

std::tuple<Tensor, Tensor> matching_log_probs(Tensor query, Tensor support, Tensor labels, Optional mask, Optional scales, double scale,
                                              int64_t normalize, int64_t eps_mode, double eps, int64_t num_classes) {
  check_labels(labels, mask, num_classes);
  auto run = [&](auto zero) {
    using T = decltype(zero);
    return forward(make_problem<T>(query, support, labels, mask, scales, scale, normalize, eps_mode, eps, num_classes, false), query);
  };
  return for_dtype(query, run);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> matching_log_probs_backward(Tensor grad, int64_t needs, Tensor query, Tensor support, Tensor labels,
                                                                       Optional mask, Optional scales, double scale, int64_t normalize,
                                                                       int64_t eps_mode, double eps, int64_t num_classes, Tensor result,
                                                                       Tensor log_sums) {
  auto run = [&](auto zero) {
    using T = decltype(zero);
    return backward(make_problem<T>(query, support, labels, mask, scales, scale, normalize, eps_mode, eps, num_classes, false), grad, needs,
                    query, result, as_contiguous(log_sums));
  };
  return for_dtype(query, run);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastmeta, CPU, module) {
  module.impl("cosine_attention", TORCH_BOX(&cosine_attention));
  module.impl("cosine_attention_backward", TORCH_BOX(&cosine_attention_backward));
  module.impl("matching_log_probs", TORCH_BOX(&matching_log_probs));
  module.impl("matching_log_probs_backward", TORCH_BOX(&matching_log_probs_backward));
}

}  // namespace fastmeta
