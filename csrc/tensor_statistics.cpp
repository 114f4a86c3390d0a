#include "tensor_statistics.hpp"

#include <algorithm>
#include <atomic>
#include <functional>
#include <memory>
#include <numeric>
#include <stdexcept>

#include "buffer.hpp"
#include "delta_kernels.hpp"
#include "parallel.hpp"
#include "row_reader.hpp"

namespace demix {
namespace {

constexpr std::int64_t segment = 4096;  // elements of a row in work at a time; a multiple of 8

// Calls work(job) for every job, the largest first, on several threads. make_work: one for each thread, with its own buffers.
void in_parallel(std::vector<std::int64_t> sizes, int threads, const MergePlan& plan,
                 const std::function<std::function<void(std::size_t)>()>& make_work) {
    std::vector<std::size_t> order(sizes.size());
    std::iota(order.begin(), order.end(), std::size_t(0));
    std::stable_sort(order.begin(), order.end(), [&](std::size_t a, std::size_t b) { return sizes[a] > sizes[b]; });
    std::atomic<std::size_t> next{0};
    on_threads(std::max(1, threads), [&] {
        const IeeeArithmetic exact;  // as the merge itself
        try {
            const auto work = make_work();
            for (std::size_t i; (i = next.fetch_add(1)) < order.size() && !plan.cancelled();) work(order[i]);
        } catch (...) {
            next.store(order.size());
            throw;
        }
    });
}

}  // namespace

std::vector<double> gram(const MergePlan& plan, bool from_base, int threads, const Kernels& kernels) {
    const int num_sources = plan.num_sources(), J = num_sources - int(from_base);
    const DeltaKernels& loops = delta_kernels(kernels.isa);
    const std::vector<Target>& targets = plan.targets();
    std::vector<double> result(targets.size() * std::size_t(J) * J);
    std::vector<std::int64_t> sizes;
    for (const Target& t : targets) sizes.push_back(std::int64_t(t.elements()));
    const auto make_work = [&]() -> std::function<void(std::size_t)> {
        auto rows = std::make_shared<RowReader>(kernels);
        auto floats = std::make_shared<std::vector<float>>(segment);
        auto wide = std::make_shared<std::vector<double>>(std::size_t(num_sources) * segment);
        return [&, rows, floats, wide](std::size_t index) {
            const Target& t = targets[index];
            double* const out = &result[index * std::size_t(J) * J];
            const std::int64_t columns = RowReader::columns(t);
            for (std::int64_t row = 0; row < RowReader::rows(t) && !plan.cancelled(); ++row)
                for (std::int64_t begin = 0; begin < columns; begin += segment) {
                    const std::int64_t n = std::min(segment, columns - begin), padded = (n + 7) / 8 * 8;
                    for (int k = 0; k < num_sources; ++k) {
                        rows->read(t, k, row, begin, begin + n, floats->data());
                        double* const x = &(*wide)[std::size_t(k) * segment];
                        std::copy_n(floats->data(), n, x);
                        std::fill(x + n, x + padded, 0.0);
                    }
                    if (from_base)
                        for (int j = 0; j < J; ++j)
                            for (std::int64_t i = 0; i < n; ++i) (*wide)[j * segment + i] -= (*wide)[J * segment + i];
                    for (int j = 0; j < J; ++j)
                        for (int l = 0; l <= j; ++l)
                            out[j * J + l] += loops.dot(&(*wide)[j * segment], &(*wide)[l * segment], std::size_t(padded));
                }
            for (int j = 0; j < J; ++j)
                for (int l = 0; l < j; ++l) out[l * J + j] = out[j * J + l];
        };
    };
    in_parallel(std::move(sizes), threads, plan, make_work);
    return plan.cancelled() ? std::vector<double>() : result;
}

namespace {

// Order statistics by counting: the leading 16 bits of all magnitudes in one pass, then the rest of those whose leading bits hold
// a wanted rank in another.
class Selection {
public:
    Selection(const Kernels& kernels, const MergePlan& plan)
        : plan_(plan), loops_(delta_kernels(kernels.isa)), rows_(kernels), base_rows_(kernels), deltas_(segment), base_(segment) {}

    void operator()(const Target& t, int k, const std::int64_t* ranks, int num_ranks, std::uint32_t* out) {
        leading_.assign(1 << 16, 0);
        walk(t, k, [&](std::uint32_t magnitude) { ++leading_[magnitude >> trailing_bits]; });
        std::vector<std::uint32_t> bins(num_ranks);
        std::vector<std::int64_t> within(num_ranks);  // the rank among those of its bin
        trailing_.assign(std::size_t(num_ranks) << trailing_bits, 0);
        for (int q = 0; q < num_ranks; ++q) bins[q] = find(leading_.data(), 0xffff, ranks[q], &within[q]);
        walk(t, k, [&](std::uint32_t magnitude) {
            for (int q = 0; q < num_ranks; ++q)
                if (magnitude >> trailing_bits == bins[q]) ++trailing_[(std::size_t(q) << trailing_bits) + (magnitude & mask)];
        });
        if (plan_.cancelled()) return;
        for (int q = 0; q < num_ranks; ++q) {
            std::int64_t rest = 0;
            out[q] = bins[q] << trailing_bits | find(&trailing_[std::size_t(q) << trailing_bits], mask, within[q], &rest);
        }
    }

private:
    static constexpr int trailing_bits = 15;
    static constexpr std::uint32_t mask = (1u << trailing_bits) - 1;

    // The bin of a rank, at most `last`: a file that is changed meanwhile has other counts when it is read again.
    static std::uint32_t find(const std::int64_t* counts, std::uint32_t last, std::int64_t rank, std::int64_t* within) {
        std::uint32_t bin = 0;
        while (rank >= counts[bin] && bin < last) rank -= counts[bin++];
        *within = rank;
        return bin;
    }

    template <class Count>
    void walk(const Target& t, int k, const Count& count) {
        const std::int64_t columns = RowReader::columns(t);
        for (std::int64_t row = 0; row < RowReader::rows(t) && !plan_.cancelled(); ++row)
            for (std::int64_t begin = 0; begin < columns; begin += segment) {
                const std::int64_t end = std::min(columns, begin + segment);
                rows_.read(t, k, row, begin, end, deltas_.data());
                base_rows_.read(t, plan_.num_sources() - 1, row, begin, end, base_.data());
                loops_.subtract(deltas_.data(), base_.data(), std::size_t(end - begin));
                for (std::int64_t i = 0; i < end - begin; ++i) count(magnitude_bits(deltas_[i]));
            }
    }

    const MergePlan& plan_;
    const DeltaKernels& loops_;
    RowReader rows_, base_rows_;
    std::vector<float> deltas_, base_;
    std::vector<std::int64_t> leading_, trailing_;
};

}  // namespace

std::vector<std::uint32_t> delta_magnitudes(const MergePlan& plan, const std::vector<std::int64_t>& ranks, int num_ranks, int threads,
                                            const Kernels& kernels) {
    const std::vector<Target>& targets = plan.targets();
    const std::size_t num_parts = std::size_t(plan.num_sources() - 1), Q = std::size_t(num_ranks);
    if (num_ranks < 1 || ranks.size() != targets.size() * Q) throw std::invalid_argument("ranks must be [T * Q]");
    for (std::size_t i = 0; i < ranks.size(); ++i)
        if (ranks[i] < 0 || ranks[i] >= std::int64_t(targets[i / Q].elements()))
            throw std::invalid_argument("a rank lies outside of its target");
    std::vector<std::uint32_t> result(targets.size() * num_parts * Q);
    std::vector<std::int64_t> sizes;
    for (const Target& t : targets) sizes.insert(sizes.end(), num_parts, std::int64_t(t.elements()));
    const auto make_work = [&]() -> std::function<void(std::size_t)> {
        auto select = std::make_shared<Selection>(kernels, plan);
        return [&, select](std::size_t job) {
            const std::size_t target = job / num_parts;
            (*select)(targets[target], int(job % num_parts), &ranks[target * Q], num_ranks, &result[job * Q]);
        };
    };
    in_parallel(std::move(sizes), threads, plan, make_work);
    return plan.cancelled() ? std::vector<std::uint32_t>() : result;
}

}  // namespace demix
