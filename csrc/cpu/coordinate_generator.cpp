// coordinate_mlp and coordinate_lstm, forward and backward. The mathematics is in fastmeta/reference/coordinate_generator.py, the contract of
// the operations in fastmeta/schemas/coordinate_generator.py.
//
// Work goes in tiles of kTile coordinates: a unit of a layer is a row of kTile numbers, so that a layer is a product with its small matrix of
// weights, and all else is vector code over coordinates. The first input of every layer is 1 and the first column of its weights the bias. A
// tile passes through all layers, and all steps of the LSTM, while it is in the cache; the backward does that again, on the tape of one tile.
//
// Units that did not fire leave gradients of exactly 0: a sixth to a third of all in a new network, more in a trained one. To all such coordinates
// a generator gives the same number: it is computed once, and in the backward they are one coordinate, with the sum of their gradients.
//
// A task is a block of kBlock coordinates and has sums of its own for the gradients of the weights. They are added up block by block, so
// the bits of a result do not depend on the number of threads.

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <tuple>
#include <utility>
#include <vector>

#include "cpu/lstm.h"
#include "cpu/simd.h"
#include "cpu/tensor.h"

namespace fastmeta {
namespace {

template <typename T> inline constexpr int64_t kTile = 4 * kLanes<T>;  // coordinates
constexpr int64_t kBlock = 1024;                                       // coordinates
constexpr int64_t kChannels = 2;

// ---- preprocessing --------------------------------------------------------------------------------------------------------------------

template <typename T> inline constexpr T kEps = T(1.0 / (1 << 23));  // 2^-23
template <typename T> inline constexpr T kPower = T(7);  // p
template <typename T> inline constexpr T kSlope = T(1096.6331584284585);  // e^p

template <typename T> FASTMETA_INLINE T log_size(T gradient) {
  return log_of(std::abs(gradient) + kEps<T>) / kPower<T>;
}

// ---- the coordinates of a tile -------------------------------------------------------------------------------------------------------

constexpr int64_t kAllZero = -1;  // stands for all coordinates whose gradients are 0

// Those of [begin, end) where one of the gradients [steps][coordinates] is not 0, or `all`; returns how many there are.
template <typename T>
FASTMETA_INLINE int64_t choose(const T* gradients, int64_t steps, int64_t coordinates, int64_t begin, int64_t end, bool all, int64_t* chosen) {
  int64_t count = 0;
  for (int64_t i = begin; i < end; ++i) {
    bool zero = !all;
    for (int64_t t = 0; t < steps; ++t) zero &= gradients[t * coordinates + i] == 0;
    chosen[count] = i;
    count += !zero;
  }
  return count;
}

// `from` at the chosen coordinates, `of_zero` for kAllZero, and zeros behind them.
template <typename T> FASTMETA_INLINE void gather(const T* from, const int64_t* chosen, int64_t count, T of_zero, T* to) {
  for (int64_t l = 0; l < count; ++l) to[l] = chosen[l] == kAllZero ? of_zero : from[chosen[l]];
  std::fill_n(to + count, kTile<T> - count, T(0));
}

// Both channels of a tile, [2][kTile].
template <typename T> FASTMETA_INLINE void preprocess(const T* gradients, const int64_t* chosen, int64_t count, T* channels) {
  T* sign = channels + kTile<T>;
  gather(gradients, chosen, count, T(0), sign);
  std::fill_n(sign + count, kTile<T> - count, sign[count - 1]);  // lanes without a coordinate overflow only where one that is there does
#pragma omp simd
  for (int l = 0; l < kTile<T>; ++l) {
    const T size = log_size(sign[l]), slope = sign[l] * kSlope<T>;
    channels[l] = size < -1 ? T(-1) : size;
    sign[l] = slope < -1 ? T(-1) : slope > 1 ? T(1) : slope;
  }
}

// As PyTorch has it: the slope of a clamp is 1 on its borders, that of the absolute value is 0 at 0.
template <typename T> FASTMETA_INLINE void preprocess_backward(const T* gradients, int64_t count, const T* grad_channels, T* grad) {
  const T* grad_sign = grad_channels + kTile<T>;
  for (int64_t l = 0; l < count; ++l) {
    const T x = gradients[l], slope = x * kSlope<T>;
    const T by_size = log_size(x) >= -1 ? grad_channels[l] / (std::abs(x) + kEps<T>) / kPower<T> : T(0);
    grad[l] = (x > 0 ? by_size : x < 0 ? -by_size : T(0)) + (slope >= -1 && slope <= 1 ? grad_sign[l] * kSlope<T> : T(0));
  }
}

// ---- a layer --------------------------------------------------------------------------------------------------------------------------

// y = weight x, with x[0] = 1; what works on it works on a tile, a row of kTile numbers for each input and output.
template <typename T> struct Layer {
  int64_t outputs, inputs;
  Buffer<T> weight{outputs * inputs};  // [outputs][inputs]
  int64_t padded = ceil_divide(inputs, kLanes<T>) * kLanes<T>;  // rows of a tile of inputs, those behind the inputs zeros; columns of a gradient

  int64_t tile() const { return padded * kTile<T>; }
  int64_t grad_size() const { return outputs * padded; }

  // A tile of inputs: zeros but for the 1.
  FASTMETA_INLINE void prepare(T* x) const {
    std::fill_n(x, tile(), T(0));
    std::fill_n(x, kTile<T>, T(1));
  }
  // With the first `used` inputs.
  FASTMETA_INLINE void apply(int64_t used, const T* x, T* y) const {
    for (int64_t l = 0; l < kTile<T>; l += kLanes<T>)
      product<T, Left::kRows>(outputs, used, weight.get(), inputs, x + l, kTile<T>, y + l, kTile<T>, false);
  }
  // The gradients of `count` inputs from the `first` on.
  FASTMETA_INLINE void pull_back(int64_t first, int64_t count, const T* grad_y, T* grad_x) const {
    for (int64_t l = 0; l < kTile<T>; l += kLanes<T>)
      product<T, Left::kColumns>(count, outputs, weight.get() + first, inputs, grad_y + l, kTile<T>, grad_x + l, kTile<T>, false);
  }
  // grad [outputs][padded] += grad_y x^T, of the first `used` inputs and those up to whole lanes, which must be 0; `scratch` has room for a tile of
  // inputs and a gradient. A tile is summed up by itself first, so that a small number is not added to the sum of a whole block.
  FASTMETA_INLINE void accumulate(int64_t used, const T* grad_y, const T* x, T* scratch, T* grad) const {
    T* sums = scratch + tile();
    transpose(padded, kTile<T>, x, kTile<T>, scratch, padded);
    for (int64_t i = 0; i < used; i += kLanes<T>)
      product<T, Left::kRows>(outputs, kTile<T>, grad_y, kTile<T>, scratch + i, padded, sums + i, padded, false);
    const int64_t columns = ceil_divide(used, kLanes<T>) * kLanes<T>;
    for (int64_t m = 0; m < outputs * padded; m += padded)
#pragma omp simd
      for (int64_t i = 0; i < columns; ++i) grad[m + i] += sums[m + i];
  }
  int64_t scratch() const { return tile() + grad_size(); }
};

struct Part {  // of the weights of a layer: one tensor [outputs, columns], or a bias
  const Tensor* tensor;
  int64_t columns;
};

template <typename T, size_t kParts> Layer<T> make_layer(int64_t outputs, const std::array<Part, kParts>& parts) {
  int64_t inputs = 0, first = 0;
  for (const Part& part : parts) inputs += part.columns;
  Layer<T> layer{outputs, inputs};
  for (const Part& part : parts) {
    const Rows<T> from(*part.tensor);
    for (int64_t i = 0; i < outputs; ++i) std::copy_n(from[0] + i * part.columns, part.columns, layer.weight.get() + i * inputs + first);
    first += part.columns;
  }
  return layer;
}

// The columns [first, first + sizes.back()) of a gradient [outputs][padded].
template <typename T> Tensor columns_of(const Layer<T>& layer, const T* grad, int64_t first, const std::vector<int64_t>& sizes) {
  const Rows<T> to = Rows<T>::make(sizes);
  const int64_t count = sizes.size() > 1 ? sizes[1] : 1;
  for (int64_t i = 0; i < layer.outputs; ++i) std::copy_n(grad + i * layer.padded + first, count, to[0] + i * count);
  return to.tensor();
}

// run(first, size) for every tile of `count` coordinates.
template <typename T, typename Run> FASTMETA_INLINE void for_each_tile(int64_t count, const Run& run) {
  for (int64_t at = 0; at < count; at += kTile<T>) run(at, std::min(kTile<T>, count - at));
}

// ---- the perceptron -------------------------------------------------------------------------------------------------------------------

template <typename T> struct Mlp {
  static constexpr int kLayers = 3;
  static constexpr int64_t steps = 1;
  int64_t coordinates, width;
  const T* gradients;
  std::array<Layer<T>, kLayers> layers;

  int64_t grad_size() const { return layers[0].grad_size() + layers[1].grad_size() + layers[2].grad_size(); }
  int64_t multiplications() const { return width * (width + 3); }
};

template <typename T> struct MlpTape {
  Buffer<T> inputs[Mlp<T>::kLayers];  // of each layer
  Buffer<T> output{kTile<T>};

  explicit FASTMETA_INLINE MlpTape(const Mlp<T>& p) {
    for (int i = 0; i < p.kLayers; ++i) {
      inputs[i] = Buffer<T>(p.layers[i].tile());
      p.layers[i].prepare(inputs[i].get());
    }
  }
};

template <typename T> FASTMETA_INLINE void forward_tile(const Mlp<T>& p, const int64_t* chosen, int64_t count, const MlpTape<T>& tape) {
  preprocess(p.gradients, chosen, count, tape.inputs[0].get() + kTile<T>);
  for (int i = 0; i < p.kLayers; ++i) {
    const Layer<T>& layer = p.layers[i];
    T* y = i + 1 < p.kLayers ? tape.inputs[i + 1].get() + kTile<T> : tape.output.get();
    layer.apply(layer.inputs, tape.inputs[i].get(), y);
    if (i + 1 < p.kLayers)
#pragma omp simd
      for (int64_t l = 0; l < layer.outputs * kTile<T>; ++l) y[l] = y[l] < 0 ? T(0) : y[l];
  }
}

template <typename T> FASTMETA_INLINE void forward_chosen(const Mlp<T>& p, const int64_t* chosen, int64_t count, T* result) {
  const MlpTape<T> tape(p);
  for_each_tile<T>(count, [&](int64_t at, int64_t size) FASTMETA_INLINE_LAMBDA {
    forward_tile(p, chosen + at, size, tape);
    for (int64_t l = 0; l < size; ++l) result[chosen[at + l]] = tape.output.get()[l];
  });
}

// `grad`: of the result, `of_zero` that of kAllZero; sets `of_gradients` and adds to `of_weights`, that of one layer behind the other, where they
// are not null. Where it is to set `of_gradients`, coordinates are chosen in a row.
template <typename T>
FASTMETA_INLINE void backward_chosen(const Mlp<T>& p, const int64_t* chosen, int64_t count, const T* grad, T of_zero, T* of_gradients, T* of_weights) {
  const MlpTape<T> tape(p);
  const int64_t widest = std::max(p.width, kChannels) * kTile<T>;
  const Buffer<T> grad_x(widest), scratch(std::max(p.layers[0].scratch(), p.layers[1].scratch())), grad_y(widest);
  for_each_tile<T>(count, [&](int64_t at, int64_t size) FASTMETA_INLINE_LAMBDA {
    forward_tile(p, chosen + at, size, tape);
    gather(grad, chosen + at, size, of_zero, grad_y.get());
    T* sums = of_weights ? of_weights + p.grad_size() : nullptr;
    for (int i = p.kLayers - 1; i >= 0; --i) {
      const Layer<T>& layer = p.layers[i];
      const T* x = tape.inputs[i].get();
      if (sums) layer.accumulate(layer.inputs, grad_y.get(), x, scratch.get(), sums -= layer.grad_size());
      if (i == 0 && !of_gradients) break;
      layer.pull_back(1, layer.inputs - 1, grad_y.get(), grad_x.get());
      if (i)
#pragma omp simd
        for (int64_t l = 0; l < p.width * kTile<T>; ++l) grad_y.get()[l] = x[kTile<T> + l] <= 0 ? T(0) : grad_x.get()[l];
    }
    if (of_gradients) preprocess_backward(p.gradients + chosen[at], size, grad_x.get(), of_gradients + chosen[at]);
  });
}

// ---- the LSTM -------------------------------------------------------------------------------------------------------------------------

template <typename T> struct Lstm {
  int64_t coordinates, width, steps;
  const T* gradients;  // [steps][coordinates]
  Layer<T> gates, output;

  static constexpr int64_t kHidden = 1 + kChannels;  // the first input of the gates that is h
  int64_t state() const { return width * kTile<T>; }
  int64_t grad_size() const { return gates.grad_size() + output.grad_size(); }
  int64_t multiplications() const { return steps * 4 * width * (width + 6); }
  int64_t used(int64_t t) const { return t ? gates.inputs : kHidden; }  // h_0 is 0
};

// Of a tile at every step, or, where nothing is kept, of the last one.
template <typename T> struct LstmTape {
  const Lstm<T>& p;
  bool keep;
  int64_t steps = keep ? p.steps : 1;
  Buffer<T> inputs{steps * p.gates.tile()}, gates{steps * 4 * p.state()}, cells{(1 + steps) * p.state()}, squashed{steps * p.state()}, last{p.output.tile()};

  FASTMETA_INLINE LstmTape(const Lstm<T>& p, bool keep) : p(p), keep(keep) {
    for (int64_t t = 0; t < steps; ++t) p.gates.prepare(inputs.get() + t * p.gates.tile());
    p.output.prepare(last.get());
    std::fill_n(cells.get(), p.state(), T(0));
  }
  T* inputs_at(int64_t t) const { return inputs.get() + (keep ? t : 0) * p.gates.tile(); }
  T* gates_at(int64_t t) const { return gates.get() + (keep ? t : 0) * 4 * p.state(); }
  T* cell_after(int64_t t) const { return cells.get() + (1 + (keep ? t : 0)) * p.state(); }
  T* squashed_at(int64_t t) const { return squashed.get() + (keep ? t : 0) * p.state(); }
  const T* cell_before(int64_t t) const { return t ? cell_after(t - 1) : cells.get(); }
};

template <typename T> FASTMETA_INLINE void forward_tile(const Lstm<T>& p, const int64_t* chosen, int64_t count, const LstmTape<T>& tape) {
  for (int64_t t = 0; t < p.steps; ++t) {
    preprocess(p.gradients + t * p.coordinates, chosen, count, tape.inputs_at(t) + kTile<T>);
    p.gates.apply(p.used(t), tape.inputs_at(t), tape.gates_at(t));
    T* h = t + 1 < p.steps ? tape.inputs_at(t + 1) + p.kHidden * kTile<T> : tape.last.get() + kTile<T>;
    activate_gates(p.state(), tape.gates_at(t), tape.cell_before(t), tape.cell_after(t), tape.squashed_at(t), h);
  }
}

template <typename T> FASTMETA_INLINE void forward_chosen(const Lstm<T>& p, const int64_t* chosen, int64_t count, T* result) {
  const LstmTape<T> tape(p, false);
  const Buffer<T> y(kTile<T>);
  for_each_tile<T>(count, [&](int64_t at, int64_t size) FASTMETA_INLINE_LAMBDA {
    forward_tile(p, chosen + at, size, tape);
    p.output.apply(p.output.inputs, tape.last.get(), y.get());
    for (int64_t l = 0; l < size; ++l) result[chosen[at + l]] = y.get()[l];
  });
}

template <typename T>
FASTMETA_INLINE void backward_chosen(const Lstm<T>& p, const int64_t* chosen, int64_t count, const T* grad, T of_zero, T* of_gradients, T* of_weights) {
  const LstmTape<T> tape(p, true);
  const Buffer<T> grad_y(kTile<T>), grad_h(p.state()), grad_cell(p.state()), grad_gates(4 * p.state()), grad_channels(kChannels * kTile<T>),
      scratch(std::max(p.gates.scratch(), p.output.scratch()));
  for_each_tile<T>(count, [&](int64_t at, int64_t size) FASTMETA_INLINE_LAMBDA {
    forward_tile(p, chosen + at, size, tape);
    gather(grad, chosen + at, size, of_zero, grad_y.get());
    std::fill_n(grad_cell.get(), p.state(), T(0));
    if (of_weights) p.output.accumulate(p.output.inputs, grad_y.get(), tape.last.get(), scratch.get(), of_weights + p.gates.grad_size());
    p.output.pull_back(1, p.width, grad_y.get(), grad_h.get());
    for (int64_t t = p.steps - 1; t >= 0; --t) {
      gates_backward(p.state(), tape.gates_at(t), tape.squashed_at(t), tape.cell_before(t), grad_h.get(), grad_cell.get(), grad_gates.get());
      if (of_weights) p.gates.accumulate(p.used(t), grad_gates.get(), tape.inputs_at(t), scratch.get(), of_weights);
      if (of_gradients) {
        p.gates.pull_back(1, kChannels, grad_gates.get(), grad_channels.get());
        const int64_t from = t * p.coordinates + chosen[at];
        preprocess_backward(p.gradients + from, size, grad_channels.get(), of_gradients + from);
      }
      if (t) p.gates.pull_back(p.kHidden, p.width, grad_gates.get(), grad_h.get());
    }
  });
}

// ---- a block, of either ---------------------------------------------------------------------------------------------------------------

// `of_zero`: the result where the gradients are 0; null: nothing is left out.
template <typename Generator, typename T> FASTMETA_INLINE void forward_block(const Generator& p, int64_t begin, int64_t end, const T* of_zero, T* result) {
  const Buffer<int64_t> chosen(end - begin);
  if (of_zero) std::fill_n(result + begin, end - begin, *of_zero);
  forward_chosen(p, chosen.get(), choose(p.gradients, p.steps, p.coordinates, begin, end, !of_zero, chosen.get()), result);
}

template <typename Generator, typename T>
FASTMETA_INLINE void backward_block(const Generator& p, int64_t begin, int64_t end, const T* grad, T* of_gradients, T* of_weights) {
  const Buffer<int64_t> chosen(end - begin + 1);
  int64_t count = choose(p.gradients, p.steps, p.coordinates, begin, end, of_gradients != nullptr, chosen.get());
  double of_zero = 0;
  if (count < end - begin) {
    for (int64_t i = begin, k = 0; i < end; ++i) k < count && chosen.get()[k] == i ? void(++k) : void(of_zero += double(grad[i]));
    chosen.get()[count++] = kAllZero;
  }
  backward_chosen(p, chosen.get(), count, grad, T(of_zero), of_gradients, of_weights);
}

// ---- one function for each type, compiled for each instruction set --------------------------------------------------------------------

FASTMETA_CLONES void run_forward(const Mlp<float>& p, int64_t begin, int64_t end, const float* of_zero, float* result) {
  forward_block(p, begin, end, of_zero, result);
}
FASTMETA_CLONES void run_forward(const Mlp<double>& p, int64_t begin, int64_t end, const double* of_zero, double* result) {
  forward_block(p, begin, end, of_zero, result);
}
FASTMETA_CLONES void run_forward(const Lstm<float>& p, int64_t begin, int64_t end, const float* of_zero, float* result) {
  forward_block(p, begin, end, of_zero, result);
}
FASTMETA_CLONES void run_forward(const Lstm<double>& p, int64_t begin, int64_t end, const double* of_zero, double* result) {
  forward_block(p, begin, end, of_zero, result);
}
FASTMETA_CLONES void run_backward(const Mlp<float>& p, int64_t begin, int64_t end, const float* grad, float* of_gradients, float* of_weights) {
  backward_block(p, begin, end, grad, of_gradients, of_weights);
}
FASTMETA_CLONES void run_backward(const Mlp<double>& p, int64_t begin, int64_t end, const double* grad, double* of_gradients, double* of_weights) {
  backward_block(p, begin, end, grad, of_gradients, of_weights);
}
FASTMETA_CLONES void run_backward(const Lstm<float>& p, int64_t begin, int64_t end, const float* grad, float* of_gradients, float* of_weights) {
  backward_block(p, begin, end, grad, of_gradients, of_weights);
}
FASTMETA_CLONES void run_backward(const Lstm<double>& p, int64_t begin, int64_t end, const double* grad, double* of_gradients, double* of_weights) {
  backward_block(p, begin, end, grad, of_gradients, of_weights);
}

template <typename Generator, typename Run> void for_each_block(const Generator& p, const Run& run) {
  // A fork and join of threads costs some microseconds: not for work of that size.
  const int64_t grain = 1 + 200000 / (kBlock * std::max<int64_t>(1, p.multiplications()));
  for_each_task(ceil_divide(p.coordinates, kBlock), grain, [&](int64_t i) { run(i, i * kBlock, std::min(p.coordinates, (i + 1) * kBlock)); });
}

template <typename T, typename Generator> Tensor forward(Generator& p) {
  const Rows<T> result = Rows<T>::make({p.coordinates});
  // First of a single coordinate whose gradients are 0.
  T of_zero;
  const std::vector<T> zeros(p.steps, T(0));
  const T* gradients = std::exchange(p.gradients, zeros.data());
  const int64_t coordinates = std::exchange(p.coordinates, 1);
  run_forward(p, 0, 1, nullptr, &of_zero);
  p.gradients = gradients, p.coordinates = coordinates;
  for_each_block(p, [&](int64_t, int64_t begin, int64_t end) { run_forward(p, begin, end, &of_zero, result[0]); });
  return result.tensor();
}

// The gradients of the gradients, in the shape `sizes`, and of the weights, where they are needed.
template <typename T, typename Generator>
std::tuple<Tensor, Buffer<T>> backward(const Generator& p, const Tensor& grad, int64_t needs, const std::vector<int64_t>& sizes) {
  const Rows<T> of_result(grad), of_gradients = Rows<T>::make(needs & 1 ? sizes : std::vector<int64_t>{0});
  const int64_t blocks = ceil_divide(p.coordinates, kBlock), size = p.grad_size();
  const bool weights = needs >> 1;
  const Buffer<T> partial(weights ? blocks * size : 0);
  for_each_block(p, [&](int64_t i, int64_t begin, int64_t end) {
    if (weights) std::fill_n(partial.get() + i * size, size, T(0));
    run_backward(p, begin, end, of_result[0], needs & 1 ? of_gradients[0] : nullptr, weights ? partial.get() + i * size : nullptr);
  });
  Buffer<T> of_weights(size);
  for (int64_t k = 0; weights && k < size; ++k) {
    double sum = 0;
    for (int64_t i = 0; i < blocks; ++i) sum += double(partial.get()[i * size + k]);
    of_weights.get()[k] = T(sum);
  }
  return {of_gradients.tensor(), std::move(of_weights)};
}

// ---- the operations -------------------------------------------------------------------------------------------------------------------

template <typename T>
Mlp<T> make_mlp(const Rows<T>& gradients, const Tensor& weight_1, const Tensor& bias_1, const Tensor& weight_2, const Tensor& bias_2,
                const Tensor& weight_3, const Tensor& bias_3) {
  const int64_t width = bias_1.size(0);
  using Parts = std::array<Part, 2>;
  return {gradients.tensor().size(0), width, gradients[0],
          {make_layer<T>(width, Parts{{{&bias_1, 1}, {&weight_1, kChannels}}}), make_layer<T>(width, Parts{{{&bias_2, 1}, {&weight_2, width}}}),
           make_layer<T>(1, Parts{{{&bias_3, 1}, {&weight_3, width}}})}};
}

Tensor coordinate_mlp(Tensor gradients, Tensor weight_1, Tensor bias_1, Tensor weight_2, Tensor bias_2, Tensor weight_3, Tensor bias_3) {
  return for_dtype(gradients, [&](auto zero) {
    using T = decltype(zero);
    const Rows<T> rows(gradients);
    Mlp<T> p = make_mlp(rows, weight_1, bias_1, weight_2, bias_2, weight_3, bias_3);
    return forward<T>(p);
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> coordinate_mlp_backward(
    Tensor grad, int64_t needs, Tensor gradients, Tensor weight_1, Tensor bias_1, Tensor weight_2, Tensor bias_2, Tensor weight_3, Tensor bias_3,
    Tensor) {
  return for_dtype(gradients, [&](auto zero) -> std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> {
    using T = decltype(zero);
    const Rows<T> rows(gradients);
    const Mlp<T> p = make_mlp(rows, weight_1, bias_1, weight_2, bias_2, weight_3, bias_3);
    const auto [of_gradients, of_weights] = backward<T>(p, grad, needs, {p.coordinates});
    const T* sums = of_weights.get();
    auto when = [&, &sums = sums](int bit, int layer, int64_t first, std::vector<int64_t> sizes) {
      const T* at = sums;
      for (int i = 0; i < layer; ++i) at += p.layers[i].grad_size();
      return needs >> bit & 1 ? columns_of(p.layers[layer], at, first, sizes) : empty({0}, kScalarType<T>);
    };
    return {of_gradients, when(1, 0, 1, {p.width, kChannels}), when(2, 0, 0, {p.width}), when(3, 1, 1, {p.width, p.width}),
            when(4, 1, 0, {p.width}), when(5, 2, 1, {1, p.width}), when(6, 2, 0, {1})};
  });
}

template <typename T>
Lstm<T> make_lstm(const Rows<T>& gradients, const Tensor& weight_ih, const Tensor& weight_hh, const Tensor& bias, const Tensor& output_weight,
                  const Tensor& output_bias) {
  const int64_t width = weight_hh.size(1);
  return {gradients.tensor().size(1), width, gradients.tensor().size(0), gradients[0],
          make_layer<T>(4 * width, std::array<Part, 3>{{{&bias, 1}, {&weight_ih, kChannels}, {&weight_hh, width}}}),
          make_layer<T>(1, std::array<Part, 2>{{{&output_bias, 1}, {&output_weight, width}}})};
}

Tensor coordinate_lstm(Tensor gradients, Tensor weight_ih, Tensor weight_hh, Tensor bias, Tensor output_weight, Tensor output_bias) {
  return for_dtype(gradients, [&](auto zero) {
    using T = decltype(zero);
    const Rows<T> rows(gradients);
    Lstm<T> p = make_lstm(rows, weight_ih, weight_hh, bias, output_weight, output_bias);
    return forward<T>(p);
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> coordinate_lstm_backward(Tensor grad, int64_t needs, Tensor gradients, Tensor weight_ih,
                                                                                    Tensor weight_hh, Tensor bias, Tensor output_weight,
                                                                                    Tensor output_bias, Tensor) {
  return for_dtype(gradients, [&](auto zero) -> std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> {
    using T = decltype(zero);
    const Rows<T> rows(gradients);
    const Lstm<T> p = make_lstm(rows, weight_ih, weight_hh, bias, output_weight, output_bias);
    const auto [of_gradients, of_weights] = backward<T>(p, grad, needs, {p.steps, p.coordinates});
    const T *of_gates = of_weights.get(), *of_output = of_gates + p.gates.grad_size();
    auto when = [&](int bit, const Layer<T>& layer, const T* sums, int64_t first, std::vector<int64_t> sizes) {
      return needs >> bit & 1 ? columns_of(layer, sums, first, sizes) : empty({0}, kScalarType<T>);
    };
    return {of_gradients, when(1, p.gates, of_gates, 1, {4 * p.width, kChannels}), when(2, p.gates, of_gates, p.kHidden, {4 * p.width, p.width}),
            when(3, p.gates, of_gates, 0, {4 * p.width}), when(4, p.output, of_output, 1, {1, p.width}), when(5, p.output, of_output, 0, {1})};
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastmeta, CPU, module) {
  module.impl("coordinate_mlp", TORCH_BOX(&coordinate_mlp));
  module.impl("coordinate_mlp_backward", TORCH_BOX(&coordinate_mlp_backward));
  module.impl("coordinate_lstm", TORCH_BOX(&coordinate_lstm));
  module.impl("coordinate_lstm_backward", TORCH_BOX(&coordinate_lstm_backward));
}

}  // namespace fastmeta
