// Sixteen lanes. Included by kernels_avx512.cpp and kernels_avx512bf16.cpp, inside their anonymous namespace, after TARGET and
// INLINE; DEMIX_AVX512_BF16: the instruction set has a convert to bf16.

struct V {
    static constexpr std::size_t lanes = 16;
    static constexpr int columns = 4;
    using Float = __m512;

    INLINE Float splat(float f) { return _mm512_set1_ps(f); }
    INLINE Float mul(Float a, Float b) { return _mm512_mul_ps(a, b); }
    INLINE Float fma(Float a, Float b, Float c) { return _mm512_fmadd_ps(a, b, c); }
    INLINE void store_raw(float* dst, std::size_t i, Float f) { _mm512_storeu_ps(dst + i, f); }
    INLINE void stream(char* to, const char* from) { _mm512_stream_si512(reinterpret_cast<__m512i*>(to), _mm512_loadu_si512(from)); }

    template <DType In>
    INLINE Float load(const void* base, std::size_t i) {
        const char* at = static_cast<const char*>(base) + item_size(In) * i;
        if constexpr (In == DType::f32) return _mm512_loadu_ps(at);
        const __m256i h = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at));
        if constexpr (In == DType::f16) return _mm512_cvtph_ps(h);
        return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16));
    }

    template <DType Out, int Columns>
    INLINE void store(void* base, std::size_t i, const Float (&sums)[Columns]) {
#if defined(DEMIX_AVX512_BF16)
        if constexpr (Out == DType::bf16) {
            // The processor's own convert rounds to nearest even, too, but flushes denormals and keeps a NaN's payload.
            __mmask16 special = 0;
#pragma GCC unroll 8
            for (int c = 0; c < Columns; ++c) special |= _mm512_fpclass_ps_mask(sums[c], 0x01 | 0x20 | 0x80);
            if (__builtin_expect(special == 0, 1)) {
                char* at = static_cast<char*>(base) + 2 * i;
#pragma GCC unroll 8
                for (int c = 0; c < Columns; ++c)
                    _mm256_storeu_si256(reinterpret_cast<__m256i*>(at + 32 * c), (__m256i)_mm512_cvtneps_pbh(sums[c]));
                return;
            }
        }
#endif
#pragma GCC unroll 8
        for (int c = 0; c < Columns; ++c) store_one<Out>(base, i + c * lanes, sums[c]);
    }

    template <DType Out>
    INLINE void store_one(void* base, std::size_t i, Float f) {
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
