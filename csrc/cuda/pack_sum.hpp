// What one GPU thread computes: float32 sums of K sources for a group of mixtures, at 16 bytes of each source. Bit for bit the sums
// of csrc/kernels.hpp: fused multiply-adds in the order of k, one rounding to nearest even, canonical NaN, a weight of 0 leaves its
// source out. Host code, too: tests/native/cuda_on_host.cpp runs these very lines on the CPU, with every address checked.
#pragma once

#include <cmath>

#include "../dtype.hpp"

#ifdef __CUDACC__
#include <cuda_fp16.h>
#define DEMIX_UNROLL _Pragma("unroll")
#else
#define DEMIX_UNROLL
#endif

namespace demix {

constexpr int max_sources = 64, max_mixtures = 32, max_group = 8, max_weights = 640, block_threads = 256;

// The arguments of a launch; 4 KiB are what every CUDA version passes to a kernel.
struct Operands {
    const void* sources[max_sources];
    void* outs[max_mixtures];
    std::uint32_t used[max_sources];  // bit m: mixture m has a weight other than 0 for this source
    float weights[max_weights];       // [num_groups][num_sources][Group], so that a group's weights of one source are neighbours
    int num_sources, num_groups;
    std::size_t num_packs;  // the elements before num_packs * pack_width are loaded 16 bytes at a time, the rest one by one
    std::size_t n;
};
static_assert(sizeof(Operands) <= 4096, "a launch's arguments");

template <DType T>
constexpr int pack_width = 16 / int(item_size(T));

struct alignas(16) Pack {
    std::uint32_t words[4];
};

DEMIX_SHARED inline float multiply_add(float a, float b, float c) {
#ifdef __CUDA_ARCH__
    return __fmaf_rn(a, b, c);
#else
    return std::fma(a, b, c);
#endif
}

// float16 has conversions in hardware that round as ours do. bfloat16 is rounded in integers: the hardware makes other NaNs.
template <DType T>
DEMIX_SHARED inline float widen_bits(std::uint32_t bits) {
    if constexpr (T == DType::f32) return float_from_bits(bits);
    if constexpr (T == DType::bf16) return bf16_to_float(std::uint16_t(bits));
#ifdef __CUDA_ARCH__
    return __half2float(__ushort_as_half(std::uint16_t(bits)));
#else
    return f16_to_float(std::uint16_t(bits));
#endif
}

template <DType T>
DEMIX_SHARED inline std::uint32_t narrow_bits(float f) {
    if constexpr (T == DType::f32) return bits_of(canonical(f));
    if constexpr (T == DType::bf16) return float_to_bf16(f);
#ifdef __CUDA_ARCH__
    return f != f ? 0x7e00u : std::uint32_t(__half_as_ushort(__float2half_rn(f)));
#else
    return float_to_f16(f);
#endif
}

template <DType T>
DEMIX_SHARED inline float widen_element(const std::uint32_t* words, int e) {
    if constexpr (item_size(T) == 4) return widen_bits<T>(words[e]);
    return widen_bits<T>(words[e / 2] >> (16 * (e % 2)) & 0xffffu);
}

// `Width` elements from element i on, of all mixtures of a group. Memory says how bytes are loaded and stored.
template <DType In, DType Out, int Group, int Tile, int Width, class Memory>
DEMIX_SHARED inline void sum_at(const Operands& op, int group, std::size_t i) {
    constexpr int in_bytes = Width * int(item_size(In)), out_bytes = Width * int(item_size(Out));
    constexpr int out_words = out_bytes < 4 ? 1 : out_bytes / 4;
    constexpr std::uint32_t all = (1u << Group) - 1;
    float sums[Group][Width];
    DEMIX_UNROLL
    for (int m = 0; m < Group; ++m) {
        DEMIX_UNROLL
        for (int e = 0; e < Width; ++e) sums[m][e] = -0.0f;  // x + (-0) is x for every x, so the first term keeps its sign
    }
    for (int first = 0; first < op.num_sources; first += Tile) {
        Pack loaded[Tile];  // all loads of a tile are on their way before the first is used
        DEMIX_UNROLL
        for (int j = 0; j < Tile; ++j)
            if (first + j < op.num_sources)
                Memory::template load<in_bytes>(static_cast<const char*>(op.sources[first + j]) + i * item_size(In), loaded[j]);
        DEMIX_UNROLL
        for (int j = 0; j < Tile; ++j) {
            const int k = first + j;
            if (k >= op.num_sources) break;
            const float* const w = op.weights + (group * op.num_sources + k) * Group;
            const std::uint32_t used = op.used[k] >> (group * Group) & all;
            // The same for the whole grid, so that neither branch diverges.
            if (used == all) {
                DEMIX_UNROLL
                for (int e = 0; e < Width; ++e) {
                    const float value = widen_element<In>(loaded[j].words, e);
                    DEMIX_UNROLL
                    for (int m = 0; m < Group; ++m) sums[m][e] = multiply_add(w[m], value, sums[m][e]);
                }
            } else {
                DEMIX_UNROLL
                for (int m = 0; m < Group; ++m) {
                    if (!(used >> m & 1)) continue;
                    DEMIX_UNROLL
                    for (int e = 0; e < Width; ++e)
                        sums[m][e] = multiply_add(w[m], widen_element<In>(loaded[j].words, e), sums[m][e]);
                }
            }
        }
    }
    DEMIX_UNROLL
    for (int m = 0; m < Group; ++m) {
        std::uint32_t words[out_words];
        if constexpr (Width == 1) {
            words[0] = narrow_bits<Out>(sums[m][0]);
        } else {
            DEMIX_UNROLL
            for (int word = 0; word < out_words; ++word) {
                if constexpr (item_size(Out) == 4)
                    words[word] = narrow_bits<Out>(sums[m][word]);
                else
                    words[word] = narrow_bits<Out>(sums[m][2 * word]) | narrow_bits<Out>(sums[m][2 * word + 1]) << 16;
            }
        }
        Memory::template store<out_bytes>(static_cast<char*>(op.outs[group * Group + m]) + i * item_size(Out), words);
    }
}

// The work of one thread of a grid. Neighbouring blocks make the groups of mixtures of the same elements, so that all groups but the
// first find the sources in the second-level cache.
template <DType In, DType Out, int Group, int Tile, class Memory>
DEMIX_SHARED inline void thread_work(const Operands& op, unsigned block, unsigned num_blocks, unsigned thread) {
    constexpr int width = pack_width<In>;
    const int group = int(block % unsigned(op.num_groups));
    const std::size_t at = std::size_t(block / unsigned(op.num_groups)) * block_threads + thread;
    const std::size_t step = std::size_t(num_blocks / unsigned(op.num_groups)) * block_threads;
    for (std::size_t pack = at; pack < op.num_packs; pack += step) sum_at<In, Out, Group, Tile, width, Memory>(op, group, pack * width);
    for (std::size_t i = op.num_packs * width + at; i < op.n; i += step) sum_at<In, Out, Group, 2, 1, Memory>(op, group, i);
}

}  // namespace demix
