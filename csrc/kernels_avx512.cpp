// AVX-512 F and BW.
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

#define TARGET __attribute__((target("avx512f,avx512bw,fma,f16c")))
#define INLINE static inline __attribute__((always_inline, target("avx512f,avx512bw,fma,f16c")))

#include "kernels_avx512.hpp"
#include "kernels_simd.hpp"

}  // namespace

const Kernels* avx512_kernels() {
    static const bool here = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    return here ? &table("avx512") : nullptr;
}

}  // namespace demix
#else
namespace demix {
const Kernels* avx512_kernels() { return nullptr; }
}  // namespace demix
#endif
