// The bytes that a file is given, whole.
#pragma once

#include <unistd.h>

#include <cerrno>
#include <cstddef>
#include <cstdint>

namespace demix {

// Writes n bytes at `offset` of a file, in as many calls as it takes. Returns 0 or an errno.
inline int write_all(int descriptor, const void* data, std::size_t n, std::uint64_t offset) {
    auto from = static_cast<const char*>(data);
    while (n) {
        const ssize_t written = ::pwrite(descriptor, from, n, off_t(offset));
        if (written < 0 && errno == EINTR) continue;
        if (written <= 0) return written < 0 ? errno : EIO;
        from += written, offset += std::uint64_t(written), n -= std::size_t(written);
    }
    return 0;
}

}  // namespace demix
