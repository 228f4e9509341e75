// Baseline of bench_patched_glu.py: silu(gate) * up and nothing else, in the style of csrc/patched_glu.cpp.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>

#include "../csrc/elementwise.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t BLOCK = 512;

CLONES void glu_f32(const float* __restrict gate, const float* __restrict up, float* __restrict out, int64_t n) {
  for (int64_t i = 0; i < n; ++i) store(silu(load(gate[i])) * load(up[i]), out + i);
}
CLONES void glu_bf16(const Bf16* __restrict gate, const Bf16* __restrict up, Bf16* __restrict out, int64_t n) {
  for (int64_t i = 0; i < n; ++i) store(silu(load(gate[i])) * load(up[i]), out + i);
}

template <typename Element>
void run(const Tensor& gate_up, const Tensor& out, void (*glu)(const Element*, const Element*, Element*, int64_t)) {
  const auto* from = static_cast<const Element*>(gate_up.const_data_ptr());
  auto* to = static_cast<Element*>(out.mutable_data_ptr());
  const int64_t rows = gate_up.size(0), width = gate_up.size(1) / 2;
  torch::stable::parallel_for(0, (width + BLOCK - 1) / BLOCK, 1, [&](int64_t begin, int64_t end) {
    for (int64_t start = begin * BLOCK; start < std::min(end * BLOCK, width); start += BLOCK)
      for (int64_t t = 0; t < rows; ++t) {
        const Element* row = from + t * 2 * width + start;
        glu(row, row + width, to + t * width + start, std::min(BLOCK, width - start));
      }
  });
}

Tensor silu_mul(const Tensor& gate_up) {
  Tensor out = torch::stable::new_empty(gate_up, {gate_up.size(0), gate_up.size(1) / 2});
  if (gate_up.scalar_type() == ScalarType::Float) run<float>(gate_up, out, glu_f32);
  else run<Bf16>(gate_up, out, glu_bf16);
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY(snpatch_bench, m) { m.def("silu_mul(Tensor gate_up) -> Tensor"); }
STABLE_TORCH_LIBRARY_IMPL(snpatch_bench, CPU, m) { m.impl("silu_mul", TORCH_BOX(&silu_mul)); }
