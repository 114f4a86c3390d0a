// Weighted sums of K typed buffers into one: the arithmetic of every linear merge, for each instruction set.
#pragma once

#include <string>
#include <vector>

#include "dtype.hpp"

namespace demix {

// For each of `rows` (1 or row_block) results r: dsts[r][i] = round(sum_k weights[r * K + k] * sources[k][i]) for i < n; K >= 1;
// addresses of any alignment.
// Accumulates in float32 with fused multiply-adds in the order of k (the first term is a product, so that -0 survives) and
// rounds once, to nearest even; NaN results are the canonical quiet NaN. Every instruction set gives the same bits.
// past_cache: results that nobody reads soon are written past the caches, where each would cost a read of the line it overwrites;
// all dsts are multiples of 64, and the thread must call stream_fence() (merge_write.hpp) before others may look.
using WeightedSum = void (*)(const void* const* sources, const float* weights, int num_sources, void* const* dsts, std::size_t n,
                             bool past_cache);

// Results that are summed together: each source element is loaded once for all of them, and they stay in registers.
inline constexpr int row_block = 4;

// dst[i] = float32(src[i])
using Widen = void (*)(const void* src, float* dst, std::size_t n);

struct Kernels {
    const char* isa;
    WeightedSum one_row[3][3], row_block[3][3];  // [in][out], by DType
    Widen widen[3];
};

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
