#include "gather.hpp"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <fcntl.h>
#include <mutex>

#include "content_hash.hpp"
#include "parallel.hpp"
#include "unaligned.hpp"
#include "write_all.hpp"

namespace demix {

Gathered gather(const std::uint8_t* lengths, const std::uint8_t* pointers, std::int64_t begin, std::int64_t end,
                int item_bytes, const std::vector<Span>& spans, int descriptor, std::int64_t offset, int threads) {
    std::vector<std::int64_t> bases;
    for (const auto& s : spans) bases.push_back(s.base);
    // Where each piece of documents starts in the output.
    const std::int64_t count = end - begin;
    const auto pieces = std::max<std::int64_t>(1, std::min<std::int64_t>(threads, count / 64));
    std::vector<std::int64_t> at(static_cast<std::size_t>(pieces) + 1, offset);
    for (std::int64_t p = 0, i = begin; p < pieces; ++p) {
        std::int64_t bytes = 0;
        for (; i < begin + count * (p + 1) / pieces; ++i) bytes += static_cast<std::int64_t>(load<std::int32_t>(lengths + i * 4)) * item_bytes;
        at[static_cast<std::size_t>(p) + 1] = at[static_cast<std::size_t>(p)] + bytes;
    }
    std::atomic<int> error{0};
    std::atomic<std::uint64_t> content{0};
    // File systems let one writer into a file at a time and have the others spin; here they sleep, and collect meanwhile.
    std::mutex writing;
    const auto work = [&](std::int64_t piece) {
        constexpr std::size_t kBuffer = 1 << 20;
        std::vector<std::uint8_t> buffer(kBuffer);
        std::size_t used = 0;
        std::uint64_t sum = 0;
        std::int64_t position = at[static_cast<std::size_t>(piece)];
        const auto write = [&](const std::uint8_t* data, std::size_t bytes) {
            const std::lock_guard<std::mutex> only(writing);
            if (bytes == 0 || error != 0) return;
            if (const int failure = write_all(descriptor, data, bytes, static_cast<std::uint64_t>(position))) {
                error = failure;
                return;
            }
#ifdef __linux__
            // The disk begins at once, not when the caller waits for it. A hint: its failure is not one.
            (void)::sync_file_range(descriptor, position, static_cast<std::int64_t>(bytes), SYNC_FILE_RANGE_WRITE);
#endif
            position += static_cast<std::int64_t>(bytes);
        };
        const std::int64_t to = begin + count * (piece + 1) / pieces;
        const auto place = [&](std::int64_t i) {
            const auto pointer = load<std::int64_t>(pointers + i * 8);
            const auto after = spans.size() == 1 ? 1 : std::upper_bound(bases.begin(), bases.end(), pointer) - bases.begin();
            const Span& span = spans[static_cast<std::size_t>(after - 1)];
            return span.data + (pointer - span.base);
        };
        for (std::int64_t i = begin + count * piece / pieces; i < to && error == 0; ++i) {
            const auto bytes = static_cast<std::size_t>(load<std::int32_t>(lengths + i * 4)) * static_cast<std::size_t>(item_bytes);
            const std::uint8_t* data = place(i);
            // Documents lie anywhere: the next one's beginning is on its way while this one is copied.
            if (i + 1 < to) __builtin_prefetch(place(i + 1));
            sum += hash_document(data, static_cast<std::int64_t>(bytes), static_cast<std::uint64_t>(i));
            if (used + bytes > kBuffer) {
                write(buffer.data(), used);
                used = 0;
            }
            if (bytes > kBuffer) {
                write(data, bytes);
            } else {
                std::memcpy(buffer.data() + used, data, bytes);
                used += bytes;
            }
        }
        write(buffer.data(), used);
        content += sum;
    };
    parallel(pieces, static_cast<int>(pieces), 1, [&](std::int64_t from, std::int64_t to) {
        for (; from < to; ++from) work(from);
    });
    return {error, content};
}

}  // namespace demix
