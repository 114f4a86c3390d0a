// Weighted sums of K typed buffers into one: the arithmetic of every linear merge, for each instruction set.
#pragma once

#include <string>
#include <vector>

#include "dtype.hpp"

namespace demix {

// For each of `rows` (1 or row_block) results r: dsts[r][i] = round(sum_k weights[r * K + k] * sources[k][i]) for i < n; K >= 1;
// addresses of any alignment. before: what the sums start from, of one row alone: [n], or null; it may be dsts[0] itself.
// Accumulates in float32 with fused multiply-adds in the order of k (the first term is a product, so that -0 survives) and
// rounds once, to nearest even; NaN results are the canonical quiet NaN. Every instruction set gives the same bits.
// past_cache: results that nobody reads soon are written past the caches, where each would cost a read of the line it overwrites;
// all dsts are multiples of 64, and the thread must call stream_fence() (merge_write.hpp) before others may look.
using WeightedSum = void (*)(const float* before, const void* const* sources, const float* weights, int num_sources, void* const* dsts,
                             std::size_t n, bool past_cache);

// Results that are summed together: each source element is loaded once for all of them, and they stay in registers.
inline constexpr int row_block = 4;

// dst[i] = float32(src[i])
using Widen = void (*)(const void* src, float* dst, std::size_t n);

// Whether any element is NaN or infinite.
using NotFinite = bool (*)(const void* src, std::size_t n);

struct Kernels {
    const char* isa;
    WeightedSum one_row[3][3], row_block[3][3];  // [in][out], by DType
    Widen widen[3];
    NotFinite not_finite[3];
};

// The loop of every NotFinite: one is added to an exponent, whose carry reaches the sign if all its bits are set.
template <class Bits, Bits exponent>
inline __attribute__((always_inline)) bool any_exponent_full(const void* src, std::size_t n) {
    constexpr Bits one = exponent & (~exponent + 1);
    Bits seen = 0;
    for (std::size_t i = 0; i < n; ++i) {
        Bits bits;
        std::memcpy(&bits, static_cast<const char*>(src) + i * sizeof(Bits), sizeof(Bits));
        seen |= Bits((bits & exponent) + one);
    }
    return seen >> (8 * sizeof(Bits) - 1);
}

template <DType In>
inline __attribute__((always_inline)) bool any_not_finite(const void* src, std::size_t n) {
    if constexpr (In == DType::f32) return any_exponent_full<std::uint32_t, 0x7f800000>(src, n);
    if constexpr (In == DType::bf16) return any_exponent_full<std::uint16_t, 0x7f80>(src, n);
    return any_exponent_full<std::uint16_t, 0x7c00>(src, n);
}

// A kernel for every pair of types, as Kernels holds them. `using D = DType` must be in force.
#define DEMIX_IN_OUT(kernel, rows)                                                                                        \
    {{kernel<D::f32, D::f32, rows>, kernel<D::f32, D::bf16, rows>, kernel<D::f32, D::f16, rows>},                        \
     {kernel<D::bf16, D::f32, rows>, kernel<D::bf16, D::bf16, rows>, kernel<D::bf16, D::f16, rows>},                     \
     {kernel<D::f16, D::f32, rows>, kernel<D::f16, D::bf16, rows>, kernel<D::f16, D::f16, rows>}}

const Kernels& scalar_kernels();
const Kernels* avx2_kernels();    // null where the processor (or the build) has none
const Kernels* avx512_kernels();
const Kernels* avx512bf16_kernels();

// Those this processor has, the fastest last.
std::vector<const Kernels*> available_kernels();

// The kernels of one instruction set ("scalar", "avx2", "avx512", "avx512bf16"), or for "" the fastest this processor has.
// Throws std::invalid_argument if the name is unknown or the processor lacks it.
const Kernels& kernels(const std::string& isa);

}  // namespace demix
