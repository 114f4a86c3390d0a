// Folding with carry-less multiplication (the method of Gopal et al., "Fast CRC Computation for Generic Polynomials Using
// PCLMULQDQ", Intel 2009); the constants are computed here from the polynomial. A byte table elsewhere and for the ends.
#include "crc32.hpp"

#include <algorithm>
#include <array>
#include <cstring>

#include "streams.hpp"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace demix {
namespace {

constexpr std::uint32_t polynomial = 0xedb88320u;

using Tables = std::array<std::array<std::uint32_t, 256>, 8>;

constexpr Tables make_tables() {
    Tables t{};
    for (std::uint32_t b = 0; b < 256; ++b) {
        std::uint32_t r = b;
        for (int bit = 0; bit < 8; ++bit) r = (r >> 1) ^ (r & 1 ? polynomial : 0);
        t[0][b] = r;
    }
    for (int j = 1; j < 8; ++j)
        for (std::uint32_t b = 0; b < 256; ++b) t[j][b] = (t[j - 1][b] >> 8) ^ t[0][t[j - 1][b] & 255];
    return t;
}

constexpr Tables tables = make_tables();

std::uint32_t by_table(std::uint32_t r, const unsigned char* p, std::size_t n) {
    for (; n >= 8; p += 8, n -= 8) {
        std::uint64_t word = 0;
        for (int j = 7; j >= 0; --j) word = word << 8 | p[j];
        word ^= r;
        r = 0;
        for (int j = 0; j < 8; ++j) r ^= tables[7 - j][(word >> (8 * j)) & 255];
    }
    for (; n; ++p, --n) r = (r >> 8) ^ tables[0][(r ^ *p) & 255];
    return r;
}

// a * b modulo the polynomial; bit 31 is the coefficient of x^0.
std::uint32_t multiply(std::uint32_t a, std::uint32_t b) {
    std::uint32_t product = 0;
    for (std::uint32_t bit = 0x80000000u; bit; bit >>= 1) {
        if (a & bit) product ^= b;
        b = (b >> 1) ^ (b & 1 ? polynomial : 0);
    }
    return product;
}

// x^(2^i) for i in 0..63.
const std::array<std::uint32_t, 64>& powers() {
    static const std::array<std::uint32_t, 64> table = [] {
        std::array<std::uint32_t, 64> p{};
        p[0] = 0x40000000u;
        for (int i = 1; i < 64; ++i) p[i] = multiply(p[i - 1], p[i - 1]);
        return p;
    }();
    return table;
}

std::uint32_t power_of_x(std::uint64_t exponent) {
    std::uint32_t result = 0x80000000u;
    for (int i = 0; exponent; ++i, exponent >>= 1)
        if (exponent & 1) result = multiply(result, powers()[i]);
    return result;
}

#if defined(__x86_64__)

// Moving a 128-bit block `bits` further along multiplies its low half by x^(bits+32) and its high half by x^(bits-32) (the
// reflected product is one bit short, hence the shift).
struct Fold {
    std::uint64_t low, high;
};

Fold fold_by(std::uint64_t bits) {
    return {std::uint64_t(power_of_x(bits + 32)) << 1, std::uint64_t(power_of_x(bits - 32)) << 1};
}

#define PCLMUL __attribute__((target("pclmul,sse4.1")))
#define VPCLMUL __attribute__((target("vpclmulqdq,pclmul,avx2")))

PCLMUL inline __m128i step(__m128i x, __m128i k, __m128i next) {
    return _mm_xor_si128(next, _mm_xor_si128(_mm_clmulepi64_si128(x, k, 0x00), _mm_clmulepi64_si128(x, k, 0x11)));
}

PCLMUL inline __m128i constant(Fold f) { return _mm_set_epi64x(std::int64_t(f.high), std::int64_t(f.low)); }

PCLMUL inline __m128i load(const unsigned char* p) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)); }

// Carries the 128-bit remainder of everything before p over the rest of the data.
PCLMUL std::uint32_t finish(__m128i x, const unsigned char* p, std::size_t n) {
    static const Fold by16 = fold_by(128);
    const __m128i k = constant(by16);
    for (; n >= 16; p += 16, n -= 16) x = step(x, k, load(p));
    unsigned char last[16];
    _mm_storeu_si128(reinterpret_cast<__m128i*>(last), x);
    return by_table(by_table(0, last, 16), p, n);
}

PCLMUL std::uint32_t by_pclmul(std::uint32_t state, const unsigned char* p, std::size_t n) {
    static const Fold by64 = fold_by(512), by16 = fold_by(128);
    const __m128i k = constant(by64), k1 = constant(by16);
    __m128i a = _mm_xor_si128(load(p), _mm_cvtsi32_si128(int(state)));
    __m128i b = load(p + 16), c = load(p + 32), d = load(p + 48);
    for (p += 64, n -= 64; n >= 64; p += 64, n -= 64) {
        a = step(a, k, load(p));
        b = step(b, k, load(p + 16));
        c = step(c, k, load(p + 32));
        d = step(d, k, load(p + 48));
    }
    return finish(step(step(step(a, k1, b), k1, c), k1, d), p, n);
}

VPCLMUL inline __m256i fold(__m256i x, __m256i k) {
    return _mm256_xor_si256(_mm256_clmulepi64_epi128(x, k, 0x00), _mm256_clmulepi64_epi128(x, k, 0x11));
}

VPCLMUL inline void add(__m256i& x, const unsigned char* p) {
    x = _mm256_xor_si256(x, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}

constexpr std::size_t wide_block = 128;

// The sum (xor) of `num` buffers of n bytes each, which is at least a wide block. What is left of them is carried over with the
// first buffer's pointer alone: n must be a multiple of a wide block if there are several.
VPCLMUL std::uint32_t by_vpclmul(std::uint32_t state, const unsigned char* const* data, std::size_t num, std::size_t n) {
    static const Fold by128 = fold_by(1024), by32 = fold_by(256), by16 = fold_by(128);
    const __m256i k = _mm256_broadcastsi128_si256(constant(by128)), k32 = _mm256_broadcastsi128_si256(constant(by32));
    __m256i a = _mm256_zextsi128_si256(_mm_cvtsi32_si128(int(state))), b = _mm256_setzero_si256(), c = b, d = b;
    std::size_t at = 0;
    for (; at + wide_block <= n; at += wide_block) {
        if (at) a = fold(a, k), b = fold(b, k), c = fold(c, k), d = fold(d, k);
        // Load instructions of its own for each buffer: see streams.hpp.
#pragma GCC unroll 8
        for (std::size_t j = 0; j < num; ++j) {
            const unsigned char* p = data[j] + at;
            add(a, p), add(b, p + 32), add(c, p + 64), add(d, p + 96);
        }
    }
    a = _mm256_xor_si256(fold(a, k32), b);
    a = _mm256_xor_si256(fold(a, k32), c);
    a = _mm256_xor_si256(fold(a, k32), d);
    const __m128i x = step(_mm256_castsi256_si128(a), constant(by16), _mm256_extracti128_si256(a, 1));
    return finish(x, data[0] + at, n - at);
}

bool has_vpclmul() {
    static const bool here = __builtin_cpu_supports("vpclmulqdq") && __builtin_cpu_supports("avx2");
    return here;
}

#endif

}  // namespace

std::uint32_t crc32_raw(std::uint32_t state, const void* data, std::size_t n) {
    const unsigned char* p = static_cast<const unsigned char*>(data);
#if defined(__x86_64__)
    static const bool folding = __builtin_cpu_supports("pclmul") && __builtin_cpu_supports("sse4.1");
    if (has_vpclmul() && n >= 2 * wide_block) return by_vpclmul(state, &p, 1, n);
    if (folding && n >= 128) return by_pclmul(state, p, n);
#endif
    return by_table(state, p, n);
}

std::uint32_t crc32_raw_staggered(std::uint32_t state, const char* const* data, std::size_t num, std::size_t n) {
    // The sum has n + late bytes; buffer j lies in it from byte late - j on.
    const std::size_t late = num - 1;
    unsigned char piece[512];
    const auto sum = [&](std::size_t first, std::size_t count) {
        std::memset(piece, 0, count);
        for (std::size_t j = 0; j < num; ++j) {
            const std::size_t begin = std::max(first, late - j), end = std::min(first + count, late - j + n);
            for (std::size_t p = begin; p < end; ++p) piece[p - first] ^= static_cast<unsigned char>(data[j][p - (late - j)]);
        }
    };
    const auto add = [&](std::uint32_t from, std::size_t first, std::size_t end) {
        for (std::size_t count; first < end; first += count) {
            count = std::min(end - first, sizeof piece);
            sum(first, count);
            from = crc32_raw(from, piece, count);
        }
        return from;
    };
    state ^= add(0, 0, late);  // where the buffers' bytes before these reach into
    std::size_t first = late;
#if defined(__x86_64__)
    if (has_vpclmul() && num <= max_staggered && n >= late + wide_block) {
        const unsigned char* starts[max_staggered];
        for (std::size_t j = 0; j < num; ++j) starts[j] = reinterpret_cast<const unsigned char*>(data[j]) + j;
        const std::size_t whole = (n - late) / wide_block * wide_block;
        std::uint32_t sum = 0;
        for (std::size_t j = 0; j < num; j += most_streams)
            sum ^= by_vpclmul(j ? 0 : state, starts + j, std::min(most_streams, num - j), whole);
        state = sum;
        first += whole;
    }
#endif
    return add(state, first, late + n);
}

std::uint32_t crc32_shift(std::uint32_t state, std::uint64_t n) {
    if (n == 0 || state == 0) return state;
    std::uint64_t bits_by_8 = n;
    for (int i = 3; bits_by_8; ++i, bits_by_8 >>= 1)
        if (bits_by_8 & 1) state = multiply(state, powers()[i & 63]);
    return state;
}

std::uint32_t crc32(const void* data, std::size_t n) { return ~crc32_raw(0xffffffffu, data, n); }

}  // namespace demix
