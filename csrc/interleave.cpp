#include "interleave.hpp"

#include <algorithm>
#include <cmath>
#include <limits>

namespace demix {
namespace {

constexpr double kNever = std::numeric_limits<double>::infinity();

}  // namespace

Interleaver::Interleaver(const std::vector<Part>& parts)
    : queues_(parts.size()), start_(parts.size()), finish_(parts.size()) {
    std::int64_t total = 0;
    for (const auto& p : parts) {
        left_ += p.documents;
        total += p.tokens;
    }
    for (std::size_t d = 0; d < parts.size(); ++d) {
        Queue& q = queues_[d];
        q.stream = parts[d].stream;
        q.left = parts[d].documents;
        q.position = parts[d].begin;
        q.share = total ? static_cast<double>(parts[d].tokens) / static_cast<double>(total) : 0;
        q.per_token = parts[d].tokens ? static_cast<double>(total) / static_cast<double>(parts[d].tokens) : 0;
    }
}

void Interleaver::refill(Queue& q, int threads) {
    constexpr std::int64_t kBlock = 1 << 15;
    q.filled = std::min(kBlock, q.left);
    q.next = 0;
    const auto n = static_cast<std::size_t>(q.filled);
    q.lengths.resize(n);
    q.pointers.resize(n);
    q.finish.resize(n);
    q.stream->fill(q.position, q.filled, q.lengths.data(), q.pointers.data(), threads);
    for (std::size_t j = 0; j < n; ++j) {
        q.taken += q.lengths[j];
        q.finish[j] = q.taken * q.per_token;
    }
    q.position += q.filled;
    q.left -= q.filled;
}

void Interleaver::next(std::int64_t count, std::int32_t* lengths, std::int64_t* pointers, std::uint16_t* part_of, int threads) {
    // Local names, so that the compiler need not suppose that what is written through the arguments changes the members.
    const std::size_t n = queues_.size();
    Queue* const queues = queues_.data();
    double *const start = start_.data(), *const finish = finish_.data();
    double now = now_;
    const auto refresh = [&](std::size_t d) {
        Queue& q = queues[d];
        if (q.next == q.filled) {
            if (q.left == 0) {
                start[d] = finish[d] = kNever;
                return;
            }
            refill(q, threads);
        }
        start[d] = finish[d];
        finish[d] = q.finish[static_cast<std::size_t>(q.next)];
    };
    for (std::size_t d = 0; d < n && !begun_; ++d) refresh(d);
    begun_ = true;
    for (std::int64_t i = 0; i < count; ++i) {
        // Among the parts that are not ahead of their share, the one whose next document is due first. No branches: which part
        // comes next is as good as random, and a mispredicted one costs more than the rest of the loop.
        std::size_t best = n;
        double due = kNever;
        for (std::size_t d = 0; d < n; ++d) {
            const double candidate = start[d] <= now ? finish[d] : kNever;
            best = candidate < due ? d : best;
            due = candidate < due ? candidate : due;
        }
        // Only by rounding is nobody eligible; then whoever is least ahead.
        if (best == n) best = static_cast<std::size_t>(std::min_element(start, start + n) - start);
        Queue& q = queues[best];
        const auto j = static_cast<std::size_t>(q.next++);
        const std::int32_t length = q.lengths[j];
        lengths[i] = length;
        pointers[i] = q.pointers[j];
        part_of[i] = static_cast<std::uint16_t>(best);
        q.behind = std::max(q.behind, now * q.share - q.emitted);
        q.emitted += length;
        now += length;
        q.ahead = std::max(q.ahead, q.emitted - now * q.share);
        refresh(best);
    }
    now_ = now;
    left_ -= count;
}

std::int64_t Interleaver::ahead(std::size_t d) const { return static_cast<std::int64_t>(std::ceil(queues_[d].ahead)); }

std::int64_t Interleaver::behind(std::size_t d) const { return static_cast<std::int64_t>(std::ceil(queues_[d].behind)); }

}  // namespace demix
