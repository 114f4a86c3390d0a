// CRC-32 as zip files use it (reflected polynomial 0xEDB88320), for data that arrives in pieces and in any order.
#pragma once

#include <cstddef>
#include <cstdint>

namespace demix {

// The register after n bytes, without the inversions before and after. Linear over GF(2) in `state` and in the bytes.
std::uint32_t crc32_raw(std::uint32_t state, const void* data, std::size_t n);

// The register after the xor of `num` <= max_staggered buffers of n bytes each, in which j zero bytes follow buffer j: the sum over
// j of crc32_shift(crc32_raw(0, data[j], n), j), for the cost of little more than one of them. `state` is what this returned for
// the n bytes before in all buffers, or 0. Staggered, because damage at the same place of two buffers does not cancel.
std::uint32_t crc32_raw_staggered(std::uint32_t state, const char* const* data, std::size_t num, std::size_t n);
inline constexpr std::size_t max_staggered = 32;

// The register after n more zero bytes.
std::uint32_t crc32_shift(std::uint32_t state, std::uint64_t n);

// The CRC of one buffer, as in a zip header.
std::uint32_t crc32(const void* data, std::size_t n);

// A CRC put together from pieces: xor the contributions of all pieces (in any order), then finish.
inline std::uint32_t crc32_contribution(const void* piece, std::size_t n, std::uint64_t bytes_after) {
    return crc32_shift(crc32_raw(0, piece, n), bytes_after);
}
inline std::uint32_t crc32_finish(std::uint32_t contributions, std::uint64_t total_bytes) {
    return ~(contributions ^ crc32_shift(0xffffffffu, total_bytes));
}

}  // namespace demix
