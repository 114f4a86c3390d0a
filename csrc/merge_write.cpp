#include "merge_write.hpp"

#include <unistd.h>

#include <cerrno>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace demix {
namespace {

// What direct writes need: a multiple of every common block and page size, in memory and on disk.
constexpr std::size_t direct_alignment = 4096;

int write_all(int descriptor, const char* data, std::size_t n, std::uint64_t offset) {
    while (n) {
        const ssize_t written = ::pwrite(descriptor, data, n, off_t(offset));
        if (written < 0 && errno == EINTR) continue;
        if (written <= 0) return written < 0 ? errno : EIO;
        data += written, offset += std::uint64_t(written), n -= std::size_t(written);
    }
    return 0;
}

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
