// Weighted sums of K typed buffers into one: the arithmetic of every linear merge, for each instruction set.
#pragma once

#include <string>

#include "dtype.hpp"

namespace demix {

// dst[i] = round(sum_k weights[k] * sources[k][i]) for i < n; K >= 1; addresses of any alignment.
// Accumulates in float32 with fused multiply-adds in the order of k (the first term is a product, so that -0 survives) and
// rounds once, to nearest even; NaN results are the canonical quiet NaN. Every instruction set gives the same bits.
using WeightedSum = void (*)(const void* const* sources, const float* weights, int num_sources, void* dst, std::size_t n);

// dst[i] = float32(src[i])
using Widen = void (*)(const void* src, float* dst, std::size_t n);

struct Kernels {
    const char* isa;
    WeightedSum weighted_sum[3][3];  // [in][out], by DType
    Widen widen[3];
};

const Kernels& scalar_kernels();
const Kernels* avx2_kernels();    // null where the processor (or the build) has none
const Kernels* avx512_kernels();

// The kernels of one instruction set ("scalar", "avx2", "avx512"), or for "" the best this processor has.
// Throws std::invalid_argument if the name is unknown or the processor lacks it.
const Kernels& kernels(const std::string& isa);

}  // namespace demix
