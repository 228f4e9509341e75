// snpatch::patched_glu for the CPU, as snpatch/op/reference.py defines it, in one pass over gate_up.
//
// The work is split by neurons, never by tokens: one thread adds up each neuron's sums in token order, so the same
// batch gives the same bits for any number of threads. A block of neurons and its sums stay in the L1 cache while all
// tokens pass. Within a step the sums are float32 over runs of at most RUN tokens, then float64.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "elementwise.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t BLOCK = 512;  // neurons; with five sums and both streams 22 KB, which fits every L1
constexpr int64_t RUN = 16;     // tokens; float32 rounding within a run stays below 1e-6 of the sum
constexpr int64_t GRAIN = 131072;  // elements, 50 us of work: waking a thread in an engine costs as much

// Columns of a plan row and values of its source, as in snpatch/op/plan.py (tests compare the two).
enum PlanColumn { ADAPTER_0, ADAPTER_1, RECIPIENT_STREAM, RANKING, LO, HI, SOURCE, CONSTANT_ROW, SEED, SELF_WEIGHT,
                  SOURCE_WEIGHT, POSITION, GROUP, CAPTURE, RECEIPT, COLUMNS };
constexpr int64_t COLUMNS_PER_INTERVENTION = SOURCE_WEIGHT + 1 - RANKING;  // of each further one, after the last column
enum Source { FROM_DONOR, FROM_CONSTANT, FROM_NOISE };
enum ReceiptColumn { OVERWRITES, NONFINITE, LAYER, RECEIPT_COLUMNS };  // columns of a row of `receipt`

// ---- loops over a block of neurons -------------------------------------------------------------------------------

#define DEFINE_GLU(NAME, TYPE, ACTIVATION)                                                                         \
  CLONES void NAME(const TYPE* __restrict gate, const TYPE* __restrict up, const float* __restrict scale,         \
                   float* __restrict value, int64_t n) {                                                           \
    for (int64_t i = 0; i < n; ++i) value[i] = ACTIVATION(load(gate[i])) * load(up[i]) * scale[i];                \
  }
DEFINE_GLU(glu_silu_f32, float, silu)
DEFINE_GLU(glu_silu_bf16, Bf16, silu)
DEFINE_GLU(glu_silu_fp16, Fp16, silu)
DEFINE_GLU(glu_gelu_f32, float, gelu_tanh)
DEFINE_GLU(glu_gelu_bf16, Bf16, gelu_tanh)
DEFINE_GLU(glu_gelu_fp16, Fp16, gelu_tanh)

// Both streams and their sums in one loop: the sums wait for memory while the activations keep the ALUs busy.
#define DEFINE_PAIR(NAME, TYPE, ACTIVATION, STORE_D)                                                                     \
  CLONES void NAME(const TYPE* __restrict gate0, const TYPE* __restrict up0, const float* __restrict scale0,      \
                   const TYPE* __restrict gate1, const TYPE* __restrict up1, const float* __restrict scale1,      \
                   float* __restrict r, float* __restrict d, TYPE* __restrict to_d, float* __restrict sums,       \
                   int64_t n) {                                                                                    \
    float *r1 = sums, *r2 = sums + BLOCK, *d1 = sums + 2 * BLOCK, *d2 = sums + 3 * BLOCK, *dd = sums + 4 * BLOCK; \
    for (int64_t i = 0; i < n; ++i) {                                                                              \
      const float x = ACTIVATION(load(gate0[i])) * load(up0[i]) * scale0[i];                                      \
      const float y = ACTIVATION(load(gate1[i])) * load(up1[i]) * scale1[i];                                      \
      const float difference = x - y;                                                                              \
      r[i] = x;                                                                                                    \
      d[i] = y;                                                                                                    \
      STORE_D;                                                                                                     \
      r1[i] += x;                                                                                                  \
      r2[i] += x * x;                                                                                              \
      d1[i] += y;                                                                                                  \
      d2[i] += y * y;                                                                                              \
      dd[i] += difference * difference;                                                                            \
    }                                                                                                              \
  }
DEFINE_PAIR(pair_silu_f32, float, silu, (void)to_d)
DEFINE_PAIR(pair_silu_bf16, Bf16, silu, store(y, to_d + i))
DEFINE_PAIR(pair_silu_fp16, Fp16, silu, store(y, to_d + i))
DEFINE_PAIR(pair_gelu_f32, float, gelu_tanh, (void)to_d)
DEFINE_PAIR(pair_gelu_bf16, Bf16, gelu_tanh, store(y, to_d + i))
DEFINE_PAIR(pair_gelu_fp16, Fp16, gelu_tanh, store(y, to_d + i))

#define DEFINE_STORE(NAME, TYPE)                                                                                   \
  CLONES void NAME(const float* __restrict value, TYPE* __restrict to, int64_t n) {                               \
    for (int64_t i = 0; i < n; ++i) store(value[i], to + i);                                                      \
  }
void store_f32(const float*, float*, int64_t) {}  // float32 values are computed in place
DEFINE_STORE(store_bf16, Bf16)
DEFINE_STORE(store_fp16, Fp16)

CLONES void add_one(const float* __restrict r, float* __restrict sums, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    sums[i] += r[i];
    sums[BLOCK + i] += r[i] * r[i];
  }
}

CLONES void move_sums(float* __restrict from, double* __restrict to, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    to[i] += static_cast<double>(from[i]);
    from[i] = 0.0f;
  }
}

// Store r, or `by` where lo <= rank < hi; return how many neurons were overwritten. A float32 r is changed in place.
#define DEFINE_OVERWRITE(NAME, TYPE, STORE)                                                                        \
  CLONES int32_t NAME(float* __restrict r, const float* __restrict by, const int32_t* __restrict rank, int32_t lo, \
                      int32_t hi, TYPE* __restrict to, int64_t n) {                                               \
    int32_t done = 0;                                                                                              \
    for (int64_t i = 0; i < n; ++i) {                                                                              \
      const bool patched = (lo <= rank[i]) & (rank[i] < hi);                                                       \
      const float value = patched ? by[i] : r[i];                                                                  \
      STORE;                                                                                                       \
      done += patched;                                                                                             \
    }                                                                                                              \
    return done;                                                                                                   \
  }
DEFINE_OVERWRITE(overwrite_f32, float, ((void)to, r[i] = value))
DEFINE_OVERWRITE(overwrite_bf16, Bf16, store(value, to + i))
DEFINE_OVERWRITE(overwrite_fp16, Fp16, store(value, to + i))

// Count the values whose exponent bits are all ones: infinities and NaN.
#define DEFINE_NONFINITE(NAME, TYPE, BITS, EXPONENT)                                                               \
  CLONES int32_t NAME(const TYPE* __restrict value, int64_t n) {                                                   \
    int32_t count = 0;                                                                                             \
    for (int64_t i = 0; i < n; ++i) count += (BITS(value[i]) & EXPONENT) == EXPONENT;                             \
    return count;                                                                                                  \
  }
inline uint32_t stored_bits(float x) { return bits_of(x); }
inline uint16_t stored_bits(Bf16 x) { return x.bits; }
inline uint16_t stored_bits(Fp16 x) { return x.bits; }
DEFINE_NONFINITE(nonfinite_f32, float, stored_bits, 0x7f800000u)
DEFINE_NONFINITE(nonfinite_bf16, Bf16, stored_bits, 0x7f80u)
DEFINE_NONFINITE(nonfinite_fp16, Fp16, stored_bits, 0x7c00u)

// Replace `by` with self_weight * r + source_weight * by; a term whose weight is 0 is not read.
CLONES void mix(const float* __restrict r, float* __restrict by, float self_weight, float source_weight, int64_t n) {
  if (self_weight == 0.0f)
    for (int64_t i = 0; i < n; ++i) by[i] = source_weight * by[i];
  else if (source_weight == 0.0f)
    for (int64_t i = 0; i < n; ++i) by[i] = self_weight * r[i];
  else
    for (int64_t i = 0; i < n; ++i) by[i] = self_weight * r[i] + source_weight * by[i];
}

// ---- noise: reference.normal -------------------------------------------------------------------------------------

float normal(uint32_t seed, uint32_t position, uint32_t layer, uint32_t neuron) {
  uint32_t counter[4] = {neuron, layer, position, 0}, key[2] = {seed, 0};
  for (int round = 0; round < 10; ++round) {
    const uint64_t a = static_cast<uint64_t>(counter[0]) * 0xD2511F53u;
    const uint64_t b = static_cast<uint64_t>(counter[2]) * 0xCD9E8D57u;
    const uint32_t next[4] = {static_cast<uint32_t>(b >> 32) ^ counter[1] ^ key[0], static_cast<uint32_t>(b),
                              static_cast<uint32_t>(a >> 32) ^ counter[3] ^ key[1], static_cast<uint32_t>(a)};
    std::copy(next, next + 4, counter);
    key[0] += 0x9E3779B9u;
    key[1] += 0xBB67AE85u;
  }
  const float u = static_cast<float>((counter[0] >> 8) + 1) * 0x1p-24f;
  const float v = static_cast<float>(counter[1] >> 8) * 0x1p-24f;
  return std::sqrt(-2.0f * std::log(u)) * std::cos(6.283185307179586f * v);
}

// ---- the op ------------------------------------------------------------------------------------------------------

struct Arguments {
  const float *scale, *constant;
  const int32_t *rank, *plan;
  double* stats;
  int64_t* count;
  float* capture;
  int64_t* receipt;
  int64_t tokens, width, row_stride, captured;  // row_stride: of gate_up, in elements; captured: K
  int64_t streams, interventions, layer, first_neuron;
};

template <typename Element>
using Glu = void (*)(const Element*, const Element*, const float*, float*, int64_t);
template <typename Element>
using Pair = void (*)(const Element*, const Element*, const float*, const Element*, const Element*, const float*,
                      float*, float*, Element*, float*, int64_t);
template <typename Element>
using Overwrite = int32_t (*)(float*, const float*, const int32_t*, int32_t, int32_t, Element*, int64_t);
template <typename Element>
using Store = void (*)(const float*, Element*, int64_t);
template <typename Element>
using Nonfinite = int32_t (*)(const Element*, int64_t);

// The loops for one element type and activation.
template <typename Element>
struct Loops {
  Glu<Element> glu;
  Pair<Element> pair;
  Overwrite<Element> overwrite;
  Store<Element> store;
  Nonfinite<Element> nonfinite;
};

inline float weight(int32_t bits) { return float_of(static_cast<uint32_t>(bits)); }

// *at = max(*at, value), atomically.
inline void raise_to(int64_t* at, int64_t value) {
  int64_t seen = __atomic_load_n(at, __ATOMIC_RELAXED);
  while (seen < value && !__atomic_compare_exchange_n(at, &seen, value, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {}
}

inline float* in_place(float* to, float*) { return to; }
template <typename Element>
float* in_place(Element*, float* block) { return block; }

// is_single: a token's only intervention is stored as it is computed. Several ones each change r, stored at the end.
template <typename Element, bool is_single>
void run_block(const Arguments& a, const Element* gate_up, Element* out, int64_t start,
               const Loops<Element>& loops) {
  const auto [glu, pair, overwrite, store_block, nonfinite] = loops;
  const int64_t n = std::min(BLOCK, a.width - start);
  alignas(64) float r_block[BLOCK], d_block[BLOCK], other[BLOCK];
  alignas(64) float sums[5 * BLOCK];
  bool has_sums = false;    // a token was observed
  int32_t open_group = -1;  // the group whose sums are in `sums`
  int64_t in_run = 0;
  const auto close_run = [&] {
    const int64_t kinds = a.streams == 2 ? 5 : 2;
    for (int64_t kind = 0; kind < kinds && in_run > 0; ++kind)
      move_sums(sums + kind * BLOCK, a.stats + (open_group * 5 + kind) * a.width + start, n);
    in_run = 0;
  };

  for (int64_t t = 0; t < a.tokens; ++t) {
    const int32_t* plan = a.plan + t * (COLUMNS + (is_single ? 0 : COLUMNS_PER_INTERVENTION * (a.interventions - 1)));
    const int32_t* rank = a.rank + plan[RANKING] * a.width + start;
    const int64_t stream = plan[RECIPIENT_STREAM];
    const int64_t i_recipient = t * a.streams + stream, i_donor = t * a.streams + a.streams - 1 - stream;
    const Element* row = gate_up + i_recipient * a.row_stride + start;
    const Element* donor_row = gate_up + i_donor * a.row_stride + start;
    Element *to = out + i_recipient * a.width + start, *to_donor = out + i_donor * a.width + start;
    // Neurons are float32 until they are stored; a float32 output is computed in place.
    float* r = in_place(to, r_block);
    float* d = in_place(to_donor, d_block);
    const float* scale = a.scale + plan[ADAPTER_0 + stream] * a.width + start;
    const float* donor_scale = a.scale + plan[ADAPTER_1 - stream] * a.width + start;
    const bool observed = plan[GROUP] >= 0;
    if (observed) {
      if (!has_sums) std::fill_n(sums, 5 * BLOCK, 0.0f);
      has_sums = true;
      if (plan[GROUP] != open_group || in_run == RUN) close_run();
      open_group = plan[GROUP];
      ++in_run;
      if (start == 0) ++a.count[open_group];
    }
    if (observed && a.streams == 2) {
      pair(row, row + a.width, scale, donor_row, donor_row + a.width, donor_scale, r, d, to_donor, sums, n);
    } else {
      glu(row, row + a.width, scale, r, n);
      if (observed) add_one(r, sums, n);
      if (a.streams == 2) {
        glu(donor_row, donor_row + a.width, donor_scale, d, n);
        store_block(d, to_donor, n);
      }
    }
    if (plan[CAPTURE] >= 0) {
      float* captured = a.capture + plan[CAPTURE] * a.captured;
      for (int64_t i = 0; i < n; ++i)
        if (0 <= rank[i] && rank[i] < a.captured) captured[rank[i]] = r[i];
    }
    int64_t done = 0;
    for (int64_t i = 0; i < (is_single ? 1 : a.interventions); ++i) {
      const int32_t* block = is_single || i == 0 ? plan + RANKING : plan + COLUMNS + COLUMNS_PER_INTERVENTION * (i - 1);
      const auto at = [block](PlanColumn column) { return block[column - RANKING]; };
      const int32_t lo = at(LO), hi = at(HI), source = at(SOURCE);
      // Without a donor stream nothing is copied from it or counted, so that the receipt shows it.
      const bool patches = lo < hi && (a.streams == 2 || source != FROM_DONOR);
      if (patches) {
        const int32_t* ranks = is_single ? rank : a.rank + at(RANKING) * a.width + start;
        const float* constant = a.constant + at(CONSTANT_ROW) * a.width + start;
        const float self_weight = weight(at(SELF_WEIGHT)), source_weight = weight(at(SOURCE_WEIGHT));
        const float* by = source == FROM_CONSTANT ? constant : d;
        if (source == FROM_NOISE) {
          for (int64_t j = 0; j < n; ++j)
            other[j] = lo <= ranks[j] && ranks[j] < hi
                           ? constant[j] * normal(at(SEED), plan[POSITION], a.layer, a.first_neuron + start + j)
                           : 0;
          by = other;
        }
        if (self_weight != 0.0f || source_weight != 1.0f) {
          if (by != other) std::copy(by, by + n, other);
          mix(r, other, self_weight, source_weight, n);
          by = other;
        }
        done += is_single ? overwrite(r, by, ranks, lo, hi, to, n) : overwrite_f32(r, by, ranks, lo, hi, nullptr, n);
      }
      if (is_single ? !patches : i + 1 == a.interventions) store_block(r, to, n);
    }
    if (plan[RECEIPT] >= 0) {
      int64_t* receipt = a.receipt + plan[RECEIPT] * RECEIPT_COLUMNS;
      if (done > 0) __atomic_fetch_add(receipt + OVERWRITES, done, __ATOMIC_RELAXED);
      const int64_t bad = nonfinite(to, n) + (a.streams == 2 ? nonfinite(to_donor, n) : 0);
      if (bad > 0) {
        __atomic_fetch_add(receipt + NONFINITE, bad, __ATOMIC_RELAXED);
        raise_to(receipt + LAYER, INT32_MAX - a.layer);
      }
    }
  }
  close_run();
}

template <typename Element>
void run(const Arguments& a, const Tensor& gate_up, const Tensor& out, const Loops<Element>& loops) {
  const auto* from = static_cast<const Element*>(gate_up.const_data_ptr());
  auto* to = static_cast<Element*>(out.mutable_data_ptr());
  const int64_t blocks = (a.width + BLOCK - 1) / BLOCK;
  const int64_t grain = std::max<int64_t>(1, GRAIN / (BLOCK * std::max<int64_t>(1, a.tokens * a.streams)));
  const auto run_one = a.interventions == 1 ? run_block<Element, true> : run_block<Element, false>;
  torch::stable::parallel_for(0, blocks, grain, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) run_one(a, from, to, block * BLOCK, loops);
  });
}

void check(bool fits, const char* name, const char* expected, const Tensor& got) {
  if (fits) return;
  std::string sizes = "[";
  for (int64_t i = 0; i < got.dim(); ++i) sizes += (i ? ", " : "") + std::to_string(got.size(i));
  throw std::runtime_error(std::string("patched_glu: ") + name + ": expected " + expected + ", got " + sizes + "]");
}

bool is(const Tensor& tensor, ScalarType type, int64_t dims) {
  return tensor.scalar_type() == type && tensor.dim() == dims && tensor.is_contiguous();
}

// Check that every index of the plan points into its tensor, so that a wrong one does not read other memory.
void check_plan(const Tensor& plan, const Tensor& scale, const Tensor& rank, const Tensor& constant,
                const Tensor& stats, const Tensor& capture, const Tensor& receipt, int64_t streams) {
  const auto* row = static_cast<const int32_t*>(plan.const_data_ptr());
  const int64_t adapters = scale.size(0);
  const struct { PlanColumn column; int64_t lowest, end; const char* name; } ranges[] = {
      {ADAPTER_0, 0, adapters, "adapter_0"}, {ADAPTER_1, 0, adapters, "adapter_1"},
      {RECIPIENT_STREAM, 0, streams, "recipient_stream"},
      {RANKING, 0, rank.size(0), "ranking"}, {SOURCE, 0, FROM_NOISE + 1, "source"},
      {CONSTANT_ROW, 0, constant.size(0), "constant_row"},     {GROUP, -1, stats.size(0), "group"},
      {CAPTURE, -1, capture.size(0), "capture"}, {RECEIPT, -1, receipt.size(0), "receipt"}};
  const auto check = [](int64_t token, int32_t index, const auto& range) {
    if (index < range.lowest || index >= range.end)
      throw std::runtime_error("patched_glu: plan row " + std::to_string(token) + ": " + range.name + ": expected " +
                               std::to_string(range.lowest) + " to " + std::to_string(range.end - 1) + ", got " +
                               std::to_string(index));
  };
  for (int64_t t = 0; t < plan.size(0); ++t, row += plan.size(1)) {
    for (const auto& range : ranges) check(t, row[range.column], range);
    for (int64_t further = COLUMNS; further < plan.size(1); further += COLUMNS_PER_INTERVENTION)
      for (const auto& range : ranges)
        if (RANKING <= range.column && range.column <= SOURCE_WEIGHT)
          check(t, row[further + range.column - RANKING], range);
  }
}

Tensor patched_glu(const Tensor& gate_up, const Tensor& scale, const Tensor& rank, const Tensor& constant,
                   const Tensor& plan, const Tensor& stats, const Tensor& count, const Tensor& capture,
                   const Tensor& receipt, const std::string& activation, int64_t streams, int64_t layer,
                   int64_t first_neuron) {
  if (streams != 1 && streams != 2)
    throw std::runtime_error("patched_glu: streams: expected 1 or 2, got " + std::to_string(streams));
  const bool is_silu = activation == "silu";
  if (!is_silu && activation != "gelu_tanh")
    throw std::runtime_error("patched_glu: activation: expected silu or gelu_tanh, got " + activation);
  check(is(plan, ScalarType::Int, 2) && plan.size(1) >= COLUMNS &&
            (plan.size(1) - COLUMNS) % COLUMNS_PER_INTERVENTION == 0,
        "plan", "[T, 15 + 8 * (interventions - 1)] int32, contiguous", plan);
  const int64_t tokens = plan.size(0), interventions = 1 + (plan.size(1) - COLUMNS) / COLUMNS_PER_INTERVENTION;
  const bool two_dimensional = gate_up.dim() == 2;
  check(two_dimensional && gate_up.size(0) == streams * tokens && gate_up.size(1) % 2 == 0 &&
            (gate_up.stride(1) == 1 || gate_up.size(1) <= 1 || tokens == 0),
        "gate_up", "[streams * T, 2 * F] with adjacent columns", gate_up);
  const int64_t width = gate_up.size(1) / 2;
  check(is(scale, ScalarType::Float, 2) && scale.size(1) == width, "scale", "[A, F] float32, contiguous", scale);
  check(is(rank, ScalarType::Int, 2) && rank.size(1) == width, "rank", "[R, F] int32, contiguous", rank);
  check(is(constant, ScalarType::Float, 2) && constant.size(1) == width, "constant", "[C, F] float32, contiguous",
        constant);
  check(is(stats, ScalarType::Double, 3) && stats.size(1) == 5 && stats.size(2) == width, "stats",
        "[G, 5, F] float64, contiguous", stats);
  check(is(count, ScalarType::Long, 1) && count.size(0) == stats.size(0), "count", "[G] int64, contiguous", count);
  check(is(capture, ScalarType::Float, 2), "capture", "[slots, K] float32, contiguous", capture);
  check(is(receipt, ScalarType::Long, 2) && receipt.size(1) == RECEIPT_COLUMNS, "receipt",
        "[slots, 3] int64, contiguous", receipt);
  check_plan(plan, scale, rank, constant, stats, capture, receipt, streams);

  Tensor out = torch::stable::new_empty(gate_up, {streams * tokens, width});
  const Arguments a{static_cast<const float*>(scale.const_data_ptr()),
                    static_cast<const float*>(constant.const_data_ptr()),
                    static_cast<const int32_t*>(rank.const_data_ptr()),
                    static_cast<const int32_t*>(plan.const_data_ptr()),
                    static_cast<double*>(stats.mutable_data_ptr()),
                    static_cast<int64_t*>(count.mutable_data_ptr()),
                    static_cast<float*>(capture.mutable_data_ptr()),
                    static_cast<int64_t*>(receipt.mutable_data_ptr()),
                    tokens, width, gate_up.stride(0), capture.size(1), streams, interventions, layer, first_neuron};
  switch (gate_up.scalar_type()) {
#define RUN(SCALAR, TYPE, SUFFIX)                                                                            \
  case ScalarType::SCALAR:                                                                                   \
    run<TYPE>(a, gate_up, out,                                                                               \
              {is_silu ? glu_silu_##SUFFIX : glu_gelu_##SUFFIX, is_silu ? pair_silu_##SUFFIX : pair_gelu_##SUFFIX, \
               overwrite_##SUFFIX, store_##SUFFIX, nonfinite_##SUFFIX});                                     \
    break;
    RUN(Float, float, f32)
    RUN(BFloat16, Bf16, bf16)
    RUN(Half, Fp16, fp16)
#undef RUN
    default: check(false, "gate_up", "float32, bfloat16 or float16", gate_up);
  }
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(snpatch, CPU, m) { m.impl("patched_glu", TORCH_BOX(&patched_glu)); }
