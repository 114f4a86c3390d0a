#include "merge_write.hpp"

#include <cerrno>

#include "write_all.hpp"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace demix {
namespace {

// What direct writes need: a multiple of every common block and page size, in memory and on disk.
constexpr std::size_t direct_alignment = 4096;

}  // namespace

int write_tile(int descriptor, int direct, const char* data, std::size_t n, std::uint64_t offset) {
    if (direct >= 0 && offset % direct_alignment == 0) {
        const std::size_t aligned = n / direct_alignment * direct_alignment;
        const int error = write_all(direct, data, aligned, offset);
        // A file system may refuse what it could not foresee at open (EINVAL): then the page cache takes it.
        if (error && error != EINVAL) return error;
        if (!error) data += aligned, offset += aligned, n -= aligned;
    }
    return write_all(descriptor, data, n, offset);
}

void stream_fence() {
#if defined(__x86_64__)
    _mm_sfence();
#endif
}

}  // namespace demix
