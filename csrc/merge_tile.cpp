#include "merge_tile.hpp"

#include <algorithm>
#include <cstring>

#include "crc32.hpp"
#include "merge_write.hpp"

namespace demix {
namespace {

// Elements in work at a time. Their sources must stay in half of a 1 MiB second-level cache between their CRC and their sum, also
// where two threads share it; but every source is a stream of its own to the memory, and long pieces of few streams are faster.
std::int64_t block_of(std::size_t num_sources) { return std::clamp<std::int64_t>((128 << 10) / std::int64_t(num_sources), 2048, 16384); }

}  // namespace

Tiling make_tiling(const Target& t, std::size_t tile_bytes) {
    const std::int64_t wanted = std::max<std::int64_t>(1, std::int64_t(tile_bytes / item_size(t.out)));
    Tiling g{0, 1, 1, 0, 0};
    for (int d = 1; d < t.dims; ++d) g.row_elements *= t.shape[d];
    while (g.dim + 1 < t.dims && g.row_elements > wanted) g.row_elements /= std::max<std::int64_t>(1, t.shape[++g.dim]);
    g.rows = std::max<std::int64_t>(1, wanted / std::max<std::int64_t>(1, g.row_elements));
    g.tiles_along = (t.shape[g.dim] + g.rows - 1) / g.rows;
    g.num_tiles = g.tiles_along;
    for (int d = 0; d < g.dim; ++d) g.num_tiles *= t.shape[d];
    return g;
}

TileWorker::TileWorker(Execution& execution)
    : x_(execution), num_mixtures_(execution.settings.num_mixtures), to_files_(execution.to.addresses.empty()),
      block_(block_of(execution.plan.num_sources())), sum_(execution.kernels),
      gathered_(execution.plan.num_sources()), widened_(execution.plan.num_sources()), outs_(num_mixtures_), outs_here_(num_mixtures_), sources_(execution.plan.num_sources()) {
    if (execution.settings.deltas) delta_sum_ = std::make_unique<DeltaSum>(*execution.settings.deltas, execution.kernels);
}

std::uint64_t TileWorker::make(std::int64_t target_index, std::int64_t tile_index) {
    const Target& t = x_.plan.targets()[target_index];
    const Tiling& g = x_.tilings[target_index];
    const std::size_t item = item_size(t.out);

    std::int64_t lo[max_dims], hi[max_dims];
    const std::int64_t along = tile_index % g.tiles_along;
    std::int64_t rest = tile_index / g.tiles_along;
    for (int d = g.dim - 1; d >= 0; --d) lo[d] = rest % t.shape[d], hi[d] = lo[d] + 1, rest /= t.shape[d];
    lo[g.dim] = along * g.rows, hi[g.dim] = std::min(lo[g.dim] + g.rows, t.shape[g.dim]);
    for (int d = g.dim + 1; d < t.dims; ++d) lo[d] = 0, hi[d] = t.shape[d];

    std::int64_t first = 0;
    for (int d = 0; d < t.dims; ++d) first = first * t.shape[d] + lo[d];
    const std::size_t bytes = std::size_t(hi[g.dim] - lo[g.dim]) * std::size_t(g.row_elements) * item;

    if (to_files_) {
        const std::size_t stride = (bytes + 4095) / 4096 * 4096;
        char* buffer = tile_buffer_.get(stride * num_mixtures_);
        for (int m = 0; m < num_mixtures_; ++m) outs_[m] = buffer + m * stride;
    } else {
        for (int m = 0; m < num_mixtures_; ++m)
            outs_[m] = x_.to.addresses[target_index * num_mixtures_ + m] + std::size_t(first) * item;
    }
    for (const Region& region : t.regions) meet(t, region, lo, hi, first);
    if (to_files_) {
        write(t, target_index, std::uint64_t(first) * item, bytes);
    } else {
        stream_fence();
    }
    return std::uint64_t(bytes) * num_mixtures_;
}

void TileWorker::meet(const Target& t, const Region& r, const std::int64_t* tile_lo, const std::int64_t* tile_hi, std::int64_t first) {
    std::int64_t lo[max_dims], hi[max_dims], at[max_dims];
    for (int d = 0; d < t.dims; ++d) {
        lo[d] = std::max(r.lo[d], tile_lo[d]), hi[d] = std::min(r.hi[d], tile_hi[d]);
        if (lo[d] >= hi[d]) return;
        at[d] = lo[d];
    }
    const int outer = t.dims - r.run_dims;  // dimensions walked one index at a time
    std::int64_t length = 1;
    for (int d = outer; d < t.dims; ++d) length *= hi[d] - lo[d];
    for (;;) {
        std::int64_t to = 0, index = r.index;
        for (int d = 0; d < t.dims; ++d) to = to * t.shape[d] + at[d], index += (at[d] - r.lo[d]) * r.index_strides[d];
        for (std::size_t k = 0; k < sources_.size(); ++k) {
            std::int64_t from = 0;
            for (int d = 0; d < t.dims; ++d) from += (at[d] - r.lo[d]) * r.strides[k * t.dims + d];
            sources_[k] = r.sources[k] + from * std::int64_t(item_size(t.stored[k]));
        }
        run(t, r, to - first, length, index);
        int d = outer - 1;
        while (d >= 0 && ++at[d] == hi[d]) at[d] = lo[d], --d;
        if (d < 0) return;
    }
}

void TileWorker::run(const Target& t, const Region& r, std::int64_t to, std::int64_t n, std::int64_t index) {
    const WeightSet& set = x_.sets[r.weight_set];
    const std::size_t out = item_size(t.out);
    const auto item = [&](int k) { return item_size(t.stored[std::size_t(k)]); };
    const auto contiguous = [&](int k) { return n == 1 || r.strides[std::size_t(k) * t.dims + t.dims - 1] == 1; };
    const bool together = x_.check && x_.check->together(r);
    if (x_.check) crcs_.assign(set.read.size(), 0), checked_.resize(set.read.size());
    for (std::int64_t i = 0; i < n; i += block_) {
        const std::int64_t count = std::min(block_, n - i);
        views_.assign(sources_.begin(), sources_.end());
        for (std::size_t j = 0; j < set.read.size(); ++j) {
            const int k = set.read[j];
            const std::int64_t stride = r.strides[std::size_t(k) * t.dims + t.dims - 1];
            const std::size_t in = item(k);
            const char* at = sources_[k] + i * stride * std::int64_t(in);
            views_[k] = contiguous(k) ? sources_[k] + std::size_t(i) * in : gather(k, at, stride, in, count);
            if (x_.check && !contiguous(k)) check_scattered(r, k, at, stride, in, count);
            if (x_.check && contiguous(k) && !together) crcs_[j] = crc32_raw(crcs_[j], views_[k], std::size_t(count) * in);
            if (together) checked_[j] = views_[k];
            if (t.stored[std::size_t(k)] != t.in) {
                float* const wide = widened_[k].get(block_);
                x_.kernels.widen[int(t.stored[std::size_t(k)])](views_[k], wide, std::size_t(count));
                views_[k] = reinterpret_cast<const char*>(wide);
            }
        }
        if (together) crcs_[0] = crc32_raw_staggered(crcs_[0], checked_.data(), checked_.size(), std::size_t(count) * item(set.read[0]));
        for (int m = 0; m < num_mixtures_; ++m) outs_here_[m] = outs_[m] + std::size_t(to + i) * out;
        if (delta_sum_) {
            (*delta_sum_)(r.weight_set, set, t.in, t.out, views_, index + i, outs_here_, std::size_t(count), !to_files_);
        } else {
            sum_(set, t.in, t.out, views_, outs_here_, std::size_t(count), !to_files_);
        }
    }
    if (!x_.check) return;
    for (std::size_t j = 0; j < (together ? 1 : set.read.size()); ++j)
        if (const int k = set.read[j]; contiguous(k)) {
            const std::uint64_t bytes = std::uint64_t(n) * item(k);
            x_.check->add(r.records[k], crcs_[j], bytes, sources_[k] + bytes);
        }
}

void TileWorker::write(const Target& t, std::int64_t target_index, std::uint64_t offset, std::size_t bytes) {
    const std::uint64_t total = t.elements() * item_size(t.out);
    for (int m = 0; m < num_mixtures_; ++m) {
        const std::size_t at = std::size_t(target_index) * num_mixtures_ + m;
        if (x_.kernels.not_finite[int(t.out)](outs_[m], bytes / item_size(t.out)))
            x_.target_not_finite[target_index].store(1, std::memory_order_relaxed);
        x_.target_crcs[at].fetch_xor(crc32_contribution(outs_[m], bytes, total - offset - bytes));
        const int direct = x_.to.direct_descriptors.empty() ? -1 : x_.to.direct_descriptors[at];
        if (const int error = write_tile(x_.to.descriptors[at], direct, outs_[m], bytes, x_.to.offsets[target_index] + offset)) {
            x_.error.store(error);
            x_.failed_target.store(target_index);
            x_.stop.store(true);
            return;
        }
    }
}

void TileWorker::check_scattered(const Region& r, int k, const char* at, std::int64_t stride, std::size_t item, std::int64_t n) {
    for (std::int64_t i = 0; i < n; ++i, at += stride * std::int64_t(item))
        x_.check->add(r.records[k], crc32_raw(0, at, item), item, at + item);
}

const char* TileWorker::gather(int k, const char* at, std::int64_t stride, std::size_t item, std::int64_t n) {
    char* to = gathered_[k].get(block_ * 4);
    for (std::int64_t i = 0; i < n; ++i, at += stride * std::int64_t(item)) std::memcpy(to + i * item, at, item);
    return to;
}

}  // namespace demix
