// Sixteen lanes. Included by kernels_avx512.cpp and kernels_avx512bf16.cpp, inside their anonymous namespace, after TARGET and
// INLINE; DEMIX_AVX512_BF16: the instruction set has a convert to bf16.

struct V {
    static constexpr std::size_t lanes = 16;
    static constexpr int rows = 4, columns = 4, rows_past = 4, columns_past = 4;
    using Float = __m512;

    INLINE Float splat(float f) { return _mm512_set1_ps(f); }
    INLINE Float mul(Float a, Float b) { return _mm512_mul_ps(a, b); }
    INLINE Float fma(Float a, Float b, Float c) { return _mm512_fmadd_ps(a, b, c); }
    INLINE void store_raw(float* dst, std::size_t i, Float f) { _mm512_storeu_ps(dst + i, f); }
    template <bool PastCache>
    INLINE void store_half(char* at, __m256i h) {
        if constexpr (PastCache) _mm256_stream_si256(reinterpret_cast<__m256i*>(at), h);
        else _mm256_storeu_si256(reinterpret_cast<__m256i*>(at), h);
    }

    template <DType In>
    INLINE Float load(const void* base, std::size_t i) {
        const char* at = static_cast<const char*>(base) + item_size(In) * i;
        if constexpr (In == DType::f32) return _mm512_loadu_ps(at);
        const __m256i h = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at));
        if constexpr (In == DType::f16) return _mm512_cvtph_ps(h);
        return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16));
    }

#if defined(DEMIX_AVX512_BF16)
    static constexpr bool converts_pairs = true;

    // The processor's convert to bf16 rounds to nearest even, but takes denormals for zeros and keeps a NaN's payload. Adding up what
    // is converted finds both: the sum is NaN if a number was, and a denormal operand raises a flag. Additions have pipelines of
    // their own beside the multiply-adds, so that they cost next to nothing.
    struct Watch {
        Float sums[2];

        INLINE Watch begin() { return {{_mm512_setzero_ps(), _mm512_setzero_ps()}}; }

        INLINE void see(Watch& watch, Float a, Float b) {
            watch.sums[0] = _mm512_add_ps(watch.sums[0], a);
            watch.sums[1] = _mm512_add_ps(watch.sums[1], b);
        }

        // Also true where the flag was raised before, or cannot be; takes it down. An infinite sum may be NaN as well.
        INLINE bool saw(const Watch& watch) {
            Float all = _mm512_add_ps(watch.sums[0], watch.sums[1]);
            asm volatile("" : "+v"(all));  // the flag is read after the additions
            const unsigned raised = _mm_getcsr() & (_MM_EXCEPT_DENORM | denormals_are_zeros);
            if (raised) _mm_setcsr(_mm_getcsr() & ~unsigned(_MM_EXCEPT_DENORM));
            return raised || _mm512_cmp_ps_mask(all, all, _CMP_UNORD_Q);
        }

        static constexpr unsigned denormals_are_zeros = 0x40;
    };

    template <bool PastCache>
    INLINE void store_pair(void* base, std::size_t i, Float low, Float high) {
        char* at = static_cast<char*>(base) + 2 * i;
        const __m512i both = (__m512i)_mm512_cvtne2ps_pbh(high, low);
        if constexpr (PastCache) _mm512_stream_si512(reinterpret_cast<__m512i*>(at), both);
        else _mm512_storeu_si512(at, both);
    }
#else
    static constexpr bool converts_pairs = false;
#endif

    template <DType Out, bool PastCache>
    INLINE void store(void* base, std::size_t i, Float f) {
        char* at = static_cast<char*>(base) + item_size(Out) * i;
        const __mmask16 nan = _mm512_cmp_ps_mask(f, f, _CMP_UNORD_Q);
        if constexpr (Out == DType::bf16) {
            // In integers: the hardware convert of newer processors flushes denormals.
            const __m512i u = _mm512_castps_si512(f);
            const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
            __m512i h = _mm512_srli_epi32(_mm512_add_epi32(_mm512_add_epi32(u, _mm512_set1_epi32(0x7fff)), odd), 16);
            h = _mm512_mask_mov_epi32(h, nan, _mm512_set1_epi32(0x7fc0));
            store_half<PastCache>(at, _mm512_cvtepi32_epi16(h));
        } else {
            f = _mm512_mask_mov_ps(f, nan, _mm512_castsi512_ps(_mm512_set1_epi32(0x7fc00000)));
            if constexpr (Out == DType::f16) {
                store_half<PastCache>(at, _mm512_cvtps_ph(f, _MM_FROUND_TO_NEAREST_INT));
            } else if constexpr (PastCache) {
                _mm512_stream_ps(reinterpret_cast<float*>(at), f);
            } else {
                _mm512_storeu_ps(at, f);
            }
        }
    }
};
