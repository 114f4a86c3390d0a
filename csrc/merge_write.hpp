// How results leave a tile: to a file, past the page cache where that is possible.
#pragma once

#include <cstddef>
#include <cstdint>

namespace demix {

// Writes n bytes at `offset` of a file. direct: the same file opened with O_DIRECT, or -1. Returns 0 or an errno.
int write_tile(int descriptor, int direct, const char* data, std::size_t n, std::uint64_t offset);

// After results were written past the caches (kernels.hpp), before others may look.
void stream_fence();

}  // namespace demix
