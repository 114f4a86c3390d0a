// Hashes that say whether bytes are still the same: 64 bits, equal on every machine, not cryptographic. They find damage, not
// forgery, as fast as memory can be read.
#pragma once
#include <cstdint>

namespace demix {

std::uint64_t hash_document(const std::uint8_t* data, std::int64_t bytes, std::uint64_t seed);

// hash_document of each content[offsets[i], offsets[i+1]), with seed + i * step.
void hash_documents(const std::uint8_t* content, const std::int64_t* offsets, std::int64_t documents, std::uint64_t seed,
                    std::uint64_t step, std::uint64_t* out);

struct FileHash {
    int error = 0;  // an errno; EIO where the file ends before `end`
    std::uint64_t hash = 0;
};

constexpr std::int64_t kHashBlock = 1 << 20;

// Sum modulo 2^64 of the hash of each block of kHashBlock bytes in [begin, end) of an open file, seeded with the block's number
// from `base` on. `begin` is a whole number of blocks after it, so that a file may be hashed in parts.
FileHash hash_file(int descriptor, std::int64_t begin, std::int64_t end, std::int64_t base, int threads);

}  // namespace demix
