// Loops over the deltas x - base of a run of elements, for each instruction set. All of them give the same bits.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#include "dtype.hpp"
#include "mix.hpp"

namespace demix {

// A magnitude as its float32 bits: ordered as the magnitudes are, and every NaN the same, above infinity.
inline std::uint32_t magnitude_bits(float f) {
    const std::uint32_t u = bits_of(f) & 0x7fffffffu;
    return u > 0x7f800000u ? 0x7fc00000u : u;
}

// Number `index` of the random stream `stream`, uniform over 32 bits: the SplitMix64 generator, entered at any place.
inline std::uint32_t random_bits(std::uint64_t stream, std::uint64_t index) {
    return std::uint32_t(mix(stream + (index + 1) * 0x9e3779b97f4a7c15u) >> 32);
}

struct DeltaKernels {
    // d[i] -= base[i]
    void (*subtract)(float* d, const float* base, std::size_t n);
    // d[i] = lowest <= magnitude_bits(d[i]) <= highest ? d[i] : 0
    void (*keep_window)(float* d, std::size_t n, std::uint32_t lowest, std::uint32_t highest);
    // d[i] = random_bits(stream, index + i) < threshold ? d[i] * factor : 0
    void (*keep_random)(float* d, std::size_t n, std::uint64_t stream, std::uint64_t index, std::uint64_t threshold, float factor);
    // total[i] += weight * d[i], the product rounded first
    void (*add)(const float* d, float weight, float* total, std::size_t n);
    // Where weight * d[i] has the sign of total[i] (positive if total[i] >= 0), or is NaN: sum[i] += weight * d[i], used[i] += weight
    void (*add_agreeing)(const float* d, float weight, const float* total, float* sum, float* used, std::size_t n);
    // sum[i] /= used[i], where used[i] is not 0
    void (*divide)(float* sum, const float* used, std::size_t n);
    // sum_i a[i] * b[i] over n doubles (n a multiple of 8), in eight interleaved sums that are then added in one order
    double (*dot)(const double* a, const double* b, std::size_t n);
};

// As kernels() of kernels.hpp chooses them.
const DeltaKernels& delta_kernels(const std::string& isa);

}  // namespace demix
