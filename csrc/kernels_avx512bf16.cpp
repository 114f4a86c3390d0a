// AVX-512 with the convert to bf16 of newer processors (Zen 4, Cooper Lake, Sapphire Rapids).
#include <algorithm>
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

#define TARGET __attribute__((target("avx512f,avx512bw,fma,f16c,avx512dq,avx512bf16")))
#define INLINE static inline __attribute__((always_inline, target("avx512f,avx512bw,fma,f16c,avx512dq,avx512bf16")))
#define DEMIX_AVX512_BF16
#include "kernels_avx512.hpp"
#include "kernels_simd.hpp"

}  // namespace

const Kernels* avx512bf16_kernels() {
    static const bool here = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bf16");
    return here ? &table("avx512bf16") : nullptr;
}

}  // namespace demix
#else
namespace demix {
const Kernels* avx512bf16_kernels() { return nullptr; }
}  // namespace demix
#endif
