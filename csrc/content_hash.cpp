#include "content_hash.hpp"

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstring>
#include <unistd.h>
#include <vector>

#include "mix.hpp"
#include "parallel.hpp"
#include "unaligned.hpp"

namespace demix {

std::uint64_t hash_document(const std::uint8_t* data, std::int64_t bytes, std::uint64_t seed) {
    constexpr std::uint64_t kA = 0x2d358dccaa6c78a5ull, kB = 0x8bb84b93962eacc9ull;
    std::uint64_t h = mix(seed ^ kA) ^ static_cast<std::uint64_t>(bytes);
    for (; bytes >= 16; bytes -= 16, data += 16)
        h = fold(load<std::uint64_t>(data) ^ kA ^ h, load<std::uint64_t>(data + 8) ^ kB);
    std::uint8_t tail[16] = {};
    std::memcpy(tail, data, static_cast<std::size_t>(bytes));
    return mix(fold(load<std::uint64_t>(tail) ^ kA ^ h, load<std::uint64_t>(tail + 8) ^ kB));
}

void hash_documents(const std::uint8_t* content, const std::int64_t* offsets, std::int64_t documents, std::uint64_t seed,
                    std::uint64_t step, std::uint64_t* out) {
    for (std::int64_t i = 0; i < documents; ++i)
        out[i] = hash_document(content + offsets[i], offsets[i + 1] - offsets[i], seed + static_cast<std::uint64_t>(i) * step);
}

FileHash hash_file(int descriptor, std::int64_t begin, std::int64_t end, std::int64_t base, int threads) {
    std::atomic<int> error{0};
    std::atomic<std::uint64_t> hash{0};
    const std::int64_t blocks = (end - begin + kHashBlock - 1) / kHashBlock;
    parallel(blocks, threads, 4, [&](std::int64_t from, std::int64_t to) {
        std::vector<std::uint8_t> buffer(static_cast<std::size_t>(kHashBlock));
        std::uint64_t sum = 0;
        for (std::int64_t b = from; b < to && error == 0; ++b) {
            const std::int64_t start = begin + b * kHashBlock, wanted = std::min(kHashBlock, end - start);
            std::int64_t got = 0;
            while (got < wanted) {
                const ssize_t some = ::pread(descriptor, buffer.data() + got, static_cast<std::size_t>(wanted - got), start + got);
                if (some < 0 && errno == EINTR) continue;
                if (some <= 0) {
                    error = some < 0 ? errno : EIO;
                    return;
                }
                got += some;
            }
            sum += hash_document(buffer.data(), wanted, static_cast<std::uint64_t>((start - base) / kHashBlock));
        }
        hash += sum;
    });
    return {error, hash};
}

}  // namespace demix
