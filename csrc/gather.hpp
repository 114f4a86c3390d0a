// The documents of an index, copied one after another into a file by several threads.
#pragma once
#include <cstdint>
#include <vector>

namespace demix {

struct Span {
    const std::uint8_t* data = nullptr;
    std::int64_t base = 0;  // where it lies in the pool
};

struct Gathered {
    int error = 0;              // an errno
    std::uint64_t content = 0;  // sum of hash_document(document, its number) modulo 2^64
};

// Copies documents [begin, end) of an index over the pool, one after another, to `descriptor` at byte `offset`.
// Spans are sorted by base and cover every pointer.
Gathered gather(const std::uint8_t* lengths, const std::uint8_t* pointers, std::int64_t begin, std::int64_t end,
                int item_bytes, const std::vector<Span>& spans, int descriptor, std::int64_t offset, int threads);

}  // namespace demix
