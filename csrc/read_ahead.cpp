#include "read_ahead.hpp"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <thread>

namespace demix {
namespace {

constexpr std::uint64_t piece = 4 << 20;         // bytes of one source asked for together
constexpr std::uint64_t farthest = 1ull << 30;  // bytes of all sources asked for before they are used

// Bytes from a region's first to its last element in source k.
std::uint64_t extent(const Target& t, const Region& r, std::size_t k) {
    std::uint64_t last = 0;
    for (int d = 0; d < t.dims; ++d) last += std::uint64_t(r.strides[k * t.dims + d]) * std::uint64_t(r.hi[d] - r.lo[d] - 1);
    return (last + 1) * item_size(t.stored[k]);
}

void ask(const char* data, std::uint64_t bytes, bool shows_cached) {
    static const std::uintptr_t page = std::uintptr_t(::sysconf(_SC_PAGESIZE));
    const std::uintptr_t begin = reinterpret_cast<std::uintptr_t>(data) / page * page;
    const std::uintptr_t end = (reinterpret_cast<std::uintptr_t>(data) + bytes + page - 1) / page * page;
    // The first and last pages may be there because the archive's frame was read.
    unsigned char resident = 1;
    void* const middle = reinterpret_cast<void*>((begin + (end - begin) / 2) / page * page);
    if (shows_cached && (::mincore(middle, page, &resident) || (resident & 1))) return;
    ::madvise(reinterpret_cast<void*>(begin), end - begin, MADV_WILLNEED);
}

}  // namespace

void read_ahead(const Execution& x, const std::atomic<bool>& finished) {
    const std::vector<int>& read = x.sets.front().read;
    const std::uint64_t num_mixtures = std::uint64_t(x.settings.num_mixtures);
    std::uint64_t before = 0;  // bytes of one mixture, of the targets that are asked for whole
    for (const Target& t : x.plan.targets()) {
        for (const Region& r : t.regions) {
            std::uint64_t longest = 0;
            for (const int k : read) longest = std::max(longest, extent(t, r, std::size_t(k)));
            for (std::uint64_t at = 0; at < longest; at += piece) {
                while (!finished.load() && (before + at) * read.size() > x.plan.done_bytes() / num_mixtures * read.size() + farthest)
                    std::this_thread::sleep_for(std::chrono::milliseconds(1));
                if (finished.load() || x.stop.load() || x.plan.cancelled()) return;
                for (const int k : read)
                    if (const std::uint64_t bytes = extent(t, r, std::size_t(k)); at < bytes) ask(r.sources[k] + at, std::min(piece, bytes - at), x.settings.shows_cached);
            }
        }
        before += t.elements() * item_size(t.out);
    }
}

}  // namespace demix
