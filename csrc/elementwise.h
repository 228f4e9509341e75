// Element types and activations shared by the CPU kernels: loads and stores of three types, and a branch-free exp.
//
// Why plain inline functions: a loop over them is vectorized for each CPU that it is cloned for (CLONES).
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#if defined(__x86_64__) && defined(__GLIBC__) && !defined(__clang__) && __GNUC__ >= 12
#define CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default"), noinline))
#else
#define CLONES __attribute__((noinline))
#endif

namespace {

struct Bf16 { uint16_t bits; };
struct Fp16 { uint16_t bits; };

inline uint32_t bits_of(float x) { uint32_t b; std::memcpy(&b, &x, 4); return b; }
inline float float_of(uint32_t b) { float x; std::memcpy(&x, &b, 4); return x; }

inline float load(float x) { return x; }
inline float load(Bf16 x) { return float_of(static_cast<uint32_t>(x.bits) << 16); }
inline float load(Fp16 x) {
  // Shift the fields into place and rescale. The multiply also converts subnormals; infinities are kept.
  const uint32_t magnitude = static_cast<uint32_t>(x.bits & 0x7fff) << 13;
  const float finite = float_of(magnitude) * float_of(0x77800000u);  // 2^112
  const uint32_t value = magnitude >= (0x7c00u << 13) ? (magnitude | 0x7f800000u) : bits_of(finite);
  return float_of(value | static_cast<uint32_t>(x.bits & 0x8000) << 16);
}

inline void store(float x, float* to) { *to = x; }
inline void store(float x, Bf16* to) {
  const uint32_t b = bits_of(x);
  const uint32_t rounded = (b + 0x7fffu + ((b >> 16) & 1u)) >> 16;
  to->bits = static_cast<uint16_t>((b & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
}
inline void store(float x, Fp16* to) {
  const uint32_t b = bits_of(x), sign = (b >> 16) & 0x8000u, magnitude = b & 0x7fffffffu;
  const uint32_t normal = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  // Adding 0.5 rounds a subnormal's bits into the low end of the mantissa.
  const uint32_t subnormal = bits_of(float_of(magnitude) + 0.5f) - bits_of(0.5f);
  uint32_t value = magnitude < (113u << 23) ? subnormal : normal;
  value = magnitude >= 0x477ff000u ? 0x7c00u : value;  // 65520 and more round to infinity
  value = magnitude > 0x7f800000u ? 0x7e00u : value;
  to->bits = static_cast<uint16_t>(sign | value);
}

inline float exponential(float x) {
  // 2^n * e^r with |r| <= ln(2)/2 and a degree-6 polynomial: within 2 ulp; overflows to infinity, keeps NaN.
  const float clamped = x < -87.0f ? -87.0f : x > 88.7f ? 88.7f : x;
  const float n = clamped * 1.44269504088896341f + 12582912.0f;  // 1.5 * 2^23 rounds to an integer
  const float integer = n - 12582912.0f;
  const float r = (clamped - integer * 0.693359375f) + integer * 2.12194440e-4f;
  float p = 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  // Multiply by 2^n by adding n to the exponent. With |r| <= ln(2)/2 it leaves its range only on overflow to infinity.
  const uint32_t e = (bits_of(n) - 0x4b400000u) << 23;
  const float value = float_of(bits_of(p) + e);
  return x > 88.7228f ? std::numeric_limits<float>::infinity() : value;
}

inline float silu(float x) { return x / (1.0f + exponential(-x)); }
inline float gelu_tanh(float x) {
  // x * (1 + tanh(y)) / 2 = x / (1 + exp(-2y)), y = sqrt(2/pi) (x + 0.044715 x^3)
  const float y = 1.5957691216057308f * (x + 0.044715f * x * x * x);
  return x / (1.0f + exponential(-y));
}

}  // namespace
