// Element types of checkpoint payloads, and their exact scalar conversions to and from float32. Host and device code alike: what
// the GPU computes is compiled from the same lines.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define DEMIX_SHARED __host__ __device__
#else
#define DEMIX_SHARED
#endif

namespace demix {

enum class DType : std::uint8_t { f32 = 0, bf16 = 1, f16 = 2 };

DEMIX_SHARED inline constexpr std::size_t item_size(DType t) { return t == DType::f32 ? 4 : 2; }

DEMIX_SHARED inline float float_from_bits(std::uint32_t u) {
    float f;
    std::memcpy(&f, &u, 4);
    return f;
}

DEMIX_SHARED inline std::uint32_t bits_of(float f) {
    std::uint32_t u;
    std::memcpy(&u, &f, 4);
    return u;
}

DEMIX_SHARED inline float bf16_to_float(std::uint16_t h) { return float_from_bits(std::uint32_t(h) << 16); }

// Nearest even; every NaN becomes the same quiet NaN, so that all instruction sets (and CUDA) agree bit for bit.
DEMIX_SHARED inline std::uint16_t float_to_bf16(float f) {
    if (f != f) return 0x7fc0;
    std::uint32_t u = bits_of(f);
    return std::uint16_t((u + 0x7fff + ((u >> 16) & 1)) >> 16);
}

DEMIX_SHARED inline float f16_to_float(std::uint16_t h) {
    const std::uint32_t sign = std::uint32_t(h & 0x8000) << 16, magnitude = h & 0x7fff;
    if (magnitude >= 0x7c00) return float_from_bits(sign | 0x7f800000 | ((magnitude & 0x3ff) << 13));
    if (magnitude < 0x400) {  // zero or denormal: an exact multiple of 2^-24
        const float value = float(magnitude) * 5.9604644775390625e-8f;
        return float_from_bits(bits_of(value) | sign);
    }
    return float_from_bits(sign | ((magnitude << 13) + (112u << 23)));
}

DEMIX_SHARED inline std::uint16_t float_to_f16(float f) {
    const std::uint32_t u = bits_of(f), sign = (u >> 16) & 0x8000, magnitude = u & 0x7fffffff;
    if (magnitude > 0x7f800000) return 0x7e00;
    if (magnitude >= 0x477ff000) return std::uint16_t(sign | 0x7c00);  // 65520 and above round to infinity
    if (magnitude < 0x38800000) {  // below 2^-14: adding 0.5 makes the float unit round at 2^-24, nearest even
        const float shifted = float_from_bits(magnitude) + 0.5f;
        return std::uint16_t(sign | (bits_of(shifted) - 0x3f000000));
    }
    const std::uint32_t rounded = magnitude + 0xfff + ((magnitude >> 13) & 1);
    return std::uint16_t(sign | ((rounded - (112u << 23)) >> 13));
}

DEMIX_SHARED inline float canonical(float f) { return f != f ? float_from_bits(0x7fc00000) : f; }

// The i-th element at an address of any alignment.
template <DType T>
inline float load_element(const void* base, std::size_t i) {
    if constexpr (T == DType::f32) {
        float f;
        std::memcpy(&f, static_cast<const char*>(base) + 4 * i, 4);
        return f;
    } else {
        std::uint16_t h;
        std::memcpy(&h, static_cast<const char*>(base) + 2 * i, 2);
        return T == DType::bf16 ? bf16_to_float(h) : f16_to_float(h);
    }
}

template <DType T>
inline void store_element(void* base, std::size_t i, float f) {
    if constexpr (T == DType::f32) {
        f = canonical(f);
        std::memcpy(static_cast<char*>(base) + 4 * i, &f, 4);
    } else {
        const std::uint16_t h = T == DType::bf16 ? float_to_bf16(f) : float_to_f16(f);
        std::memcpy(static_cast<char*>(base) + 2 * i, &h, 2);
    }
}

}  // namespace demix
