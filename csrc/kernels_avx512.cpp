// Sixteen lanes: AVX-512 F and BW.
#include <cmath>

#include "kernels.hpp"

#if defined(__x86_64__)
// GCC 12 warns about its own AVX-512 headers (its bug 105593).
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>

namespace demix {
namespace {

#define TARGET __attribute__((target("avx512f,avx512bw,fma,f16c")))
#define INLINE static inline __attribute__((always_inline, target("avx512f,avx512bw,fma,f16c")))

struct V {
    static constexpr std::size_t lanes = 16;
    using Float = __m512;

    INLINE Float splat(float f) { return _mm512_set1_ps(f); }
    INLINE Float mul(Float a, Float b) { return _mm512_mul_ps(a, b); }
    INLINE Float fma(Float a, Float b, Float c) { return _mm512_fmadd_ps(a, b, c); }
    INLINE void store_raw(float* dst, std::size_t i, Float f) { _mm512_storeu_ps(dst + i, f); }

    template <DType In>
    INLINE Float load(const void* base, std::size_t i) {
        const char* at = static_cast<const char*>(base) + item_size(In) * i;
        if constexpr (In == DType::f32) return _mm512_loadu_ps(at);
        const __m256i h = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at));
        if constexpr (In == DType::f16) return _mm512_cvtph_ps(h);
        return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16));
    }

    template <DType Out>
    INLINE void store(void* base, std::size_t i, Float f) {
        char* at = static_cast<char*>(base) + item_size(Out) * i;
        const __mmask16 nan = _mm512_cmp_ps_mask(f, f, _CMP_UNORD_Q);
        if constexpr (Out == DType::bf16) {
            // In integers: the hardware convert of newer processors flushes denormals.
            const __m512i u = _mm512_castps_si512(f);
            const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
            __m512i h = _mm512_srli_epi32(_mm512_add_epi32(_mm512_add_epi32(u, _mm512_set1_epi32(0x7fff)), odd), 16);
            h = _mm512_mask_mov_epi32(h, nan, _mm512_set1_epi32(0x7fc0));
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(at), _mm512_cvtepi32_epi16(h));
        } else {
            f = _mm512_mask_mov_ps(f, nan, _mm512_castsi512_ps(_mm512_set1_epi32(0x7fc00000)));
            if constexpr (Out == DType::f32) {
                _mm512_storeu_ps(at, f);
            } else {
                _mm256_storeu_si256(reinterpret_cast<__m256i*>(at), _mm512_cvtps_ph(f, _MM_FROUND_TO_NEAREST_INT));
            }
        }
    }
};

#include "kernels_simd.hpp"

}  // namespace

const Kernels* avx512_kernels() {
    static const bool here = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                             __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    return here ? &table("avx512") : nullptr;
}

}  // namespace demix
#else
namespace demix {
const Kernels* avx512_kernels() { return nullptr; }
}  // namespace demix
#endif
