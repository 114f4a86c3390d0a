// Eight lanes: AVX2, FMA and F16C.
#include <algorithm>
#include <cmath>

#include "kernels.hpp"

#if defined(__x86_64__)
#include <immintrin.h>

namespace demix {
namespace {

#define TARGET __attribute__((target("avx2,fma,f16c")))
#define INLINE static inline __attribute__((always_inline, target("avx2,fma,f16c")))

struct V {
    static constexpr std::size_t lanes = 8;
    // Past the caches one after the other, in whole lines: lines of several results at one place of a page, as those of models
    // usually are, get into one another's way.
    static constexpr int rows = 4, columns = 2, rows_past = 1, columns_past = 8;
    static constexpr bool converts_pairs = true;
    using Float = __m256;

    INLINE Float splat(float f) { return _mm256_set1_ps(f); }
    INLINE Float mul(Float a, Float b) { return _mm256_mul_ps(a, b); }
    INLINE Float fma(Float a, Float b, Float c) { return _mm256_fmadd_ps(a, b, c); }
    INLINE void store_raw(float* dst, std::size_t i, Float f) { _mm256_storeu_ps(dst + i, f); }
    template <bool PastCache>
    INLINE void store_half(char* at, __m128i h) {
        if constexpr (PastCache) _mm_stream_si128(reinterpret_cast<__m128i*>(at), h);
        else _mm_storeu_si128(reinterpret_cast<__m128i*>(at), h);
    }

    template <DType In>
    INLINE Float load(const void* base, std::size_t i) {
        const char* at = static_cast<const char*>(base) + item_size(In) * i;
        if constexpr (In == DType::f32) return _mm256_loadu_ps(reinterpret_cast<const float*>(at));
        const __m128i h = _mm_loadu_si128(reinterpret_cast<const __m128i*>(at));
        if constexpr (In == DType::f16) return _mm256_cvtph_ps(h);
        return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16));
    }

    // Rounded in integers; a NaN is found by adding up what is converted (the sum is NaN as well, also of infinities), which the
    // pipelines for additions do beside the multiply-adds.
    struct Watch {
        Float sums[2];
        INLINE Watch begin() { return {{_mm256_setzero_ps(), _mm256_setzero_ps()}}; }
        INLINE void see(Watch& watch, Float a, Float b) {
            watch.sums[0] = _mm256_add_ps(watch.sums[0], a);
            watch.sums[1] = _mm256_add_ps(watch.sums[1], b);
        }
        INLINE bool saw(const Watch& watch) {
            const Float all = _mm256_add_ps(watch.sums[0], watch.sums[1]);
            return _mm256_movemask_ps(_mm256_cmp_ps(all, all, _CMP_UNORD_Q));
        }
    };

    INLINE __m256i rounded(Float f) {  // to bf16 (to nearest, ties to even), in the lower halves
        const __m256i u = _mm256_castps_si256(f), high = _mm256_srli_epi32(u, 16);
        const __m256i odd = _mm256_and_si256(high, _mm256_set1_epi32(1));
        return _mm256_srli_epi32(_mm256_add_epi32(_mm256_add_epi32(u, _mm256_set1_epi32(0x7fff)), odd), 16);
    }

    template <bool PastCache>
    INLINE void store_pair(void* base, std::size_t i, Float low, Float high) {
        __m256i* at = reinterpret_cast<__m256i*>(static_cast<char*>(base) + 2 * i);
        const __m256i both = _mm256_permute4x64_epi64(_mm256_packus_epi32(rounded(low), rounded(high)), 0b11011000);
        if constexpr (PastCache) _mm256_stream_si256(at, both);
        else _mm256_storeu_si256(at, both);
    }

    template <DType Out, bool PastCache>
    INLINE void store(void* base, std::size_t i, Float f) {
        char* at = static_cast<char*>(base) + item_size(Out) * i;
        const __m256 nan = _mm256_cmp_ps(f, f, _CMP_UNORD_Q);
        if constexpr (Out == DType::bf16) {
            const __m256i h = _mm256_blendv_epi8(rounded(f), _mm256_set1_epi32(0x7fc0), _mm256_castps_si256(nan));
            const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(h, h), 0b1000);
            store_half<PastCache>(at, _mm256_castsi256_si128(packed));
        } else {
            f = _mm256_blendv_ps(f, _mm256_castsi256_ps(_mm256_set1_epi32(0x7fc00000)), nan);
            if constexpr (Out == DType::f16) {
                store_half<PastCache>(at, _mm256_cvtps_ph(f, _MM_FROUND_TO_NEAREST_INT));
            } else if constexpr (PastCache) {
                _mm256_stream_ps(reinterpret_cast<float*>(at), f);
            } else {
                _mm256_storeu_ps(reinterpret_cast<float*>(at), f);
            }
        }
    }
};

#include "kernels_simd.hpp"

}  // namespace

const Kernels* avx2_kernels() {
    static const bool here = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    return here ? &table("avx2") : nullptr;
}

}  // namespace demix
#else
namespace demix {
const Kernels* avx2_kernels() { return nullptr; }
}  // namespace demix
#endif
