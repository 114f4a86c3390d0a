#include "merge.hpp"

#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdlib>
#include <memory>
#include <stdexcept>
#include <thread>

#include "crc32.hpp"
#include "kernels.hpp"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace demix {
namespace {

// One mixture's share of one weight set: only the sources that count.
struct Combination {
    std::vector<int> sources;
    std::vector<float> weights;
    bool lone_one() const { return sources.size() == 1 && weights[0] == 1.0f; }
};

struct WeightSet {
    std::vector<Combination> mixtures;  // [M]
    std::vector<int> read;              // sources that any mixture needs
};

std::vector<WeightSet> make_sets(const Settings& s, int num_sources) {
    std::vector<WeightSet> sets(s.num_sets);
    for (int set = 0; set < s.num_sets; ++set) {
        std::vector<bool> used(num_sources, false);
        sets[set].mixtures.resize(s.num_mixtures);
        for (int m = 0; m < s.num_mixtures; ++m) {
            const float* w = s.weights + (std::size_t(set) * s.num_mixtures + m) * num_sources;
            for (int k = 0; k < num_sources; ++k) {
                if (w[k] == 0.0f) continue;
                sets[set].mixtures[m].sources.push_back(k);
                sets[set].mixtures[m].weights.push_back(w[k]);
                used[k] = true;
            }
        }
        for (int k = 0; k < num_sources; ++k)
            if (used[k]) sets[set].read.push_back(k);
    }
    return sets;
}

// How a target is cut into contiguous pieces: single indices before dimension `dim`, `rows` of it at a time, all that follows.
struct Tiling {
    int dim;
    std::int64_t rows, row_elements, tiles_along, num_tiles;
};

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

template <class T>
struct Buffer {  // page aligned, grows only
    std::unique_ptr<void, decltype(&std::free)> memory{nullptr, &std::free};
    std::size_t capacity = 0;
    T* get(std::size_t n) {
        if (n > capacity) {
            void* p = nullptr;
            memory.reset();
            if (posix_memalign(&p, 4096, (n * sizeof(T) + 4095) / 4096 * 4096)) throw std::bad_alloc();
            memory.reset(p);
            capacity = n;
        }
        return static_cast<T*>(memory.get());
    }
};

int write_all(int descriptor, const char* data, std::size_t n, std::uint64_t offset) {
    while (n) {
        const ssize_t written = ::pwrite(descriptor, data, n, off_t(offset));
        if (written < 0 && errno == EINTR) continue;
        if (written <= 0) return written < 0 ? errno : EIO;
        data += written, offset += std::uint64_t(written), n -= std::size_t(written);
    }
    return 0;
}

// Copies past the caches: results that nobody reads soon would otherwise cost a read of the line they overwrite.
void stream_copy(char* to, const char* from, std::size_t n) {
#if defined(__x86_64__)
    const std::size_t head = std::min(n, std::size_t(-reinterpret_cast<std::uintptr_t>(to) % 64));
    std::memcpy(to, from, head);
    to += head, from += head, n -= head;
    for (; n >= 64; to += 64, from += 64, n -= 64)
        for (int part = 0; part < 64; part += 16)
            _mm_stream_si128(reinterpret_cast<__m128i*>(to + part), _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + part)));
#endif
    std::memcpy(to, from, n);
}

// What direct writes need: a multiple of every common block and page size, in memory and on disk.
constexpr std::size_t direct_alignment = 4096;

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

struct Shared {
    const MergePlan& plan;
    const Settings& settings;
    const Destinations& to;
    const Kernels& kernels;
    std::vector<WeightSet> sets;
    std::vector<Tiling> tilings;              // [T]
    std::vector<std::int64_t> first_tile;     // [T + 1]
    std::vector<std::atomic<std::uint32_t>> target_crcs, record_crcs;
    std::vector<std::atomic<std::uint8_t>> record_read;
    std::atomic<std::int64_t> next_tile{0};
    std::atomic<bool> stop{false};
    std::atomic<int> error{0};
    std::atomic<std::int64_t> failed_target{-1};
};

class Worker {
public:
    explicit Worker(Shared& shared) : s_(shared), num_mixtures_(shared.settings.num_mixtures) {}

    // One tile: fill it from the regions that meet it, then hand it to its destinations. Returns bytes made.
    std::uint64_t tile(std::int64_t target_index, std::int64_t tile_index) {
        const Target& t = s_.plan.targets()[target_index];
        const Tiling& g = s_.tilings[target_index];
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

        outs_.resize(num_mixtures_);
        const bool to_files = s_.to.addresses.empty();
        if (to_files) {
            const std::size_t stride = (bytes + 4095) / 4096 * 4096;
            char* buffer = tile_buffer_.get(stride * num_mixtures_);
            for (int m = 0; m < num_mixtures_; ++m) outs_[m] = buffer + m * stride;
        } else {
            for (int m = 0; m < num_mixtures_; ++m)
                outs_[m] = s_.to.addresses[target_index * num_mixtures_ + m] + std::size_t(first) * item;
        }
        for (const Region& region : t.regions) meet(t, region, lo, hi, first);
#if defined(__x86_64__)
        if (!to_files) _mm_sfence();  // streamed stores become visible before the thread is joined
#endif

        if (to_files) {
            const std::uint64_t offset = std::uint64_t(first) * item, total = t.elements() * item;
            for (int m = 0; m < num_mixtures_; ++m) {
                const std::size_t at = target_index * num_mixtures_ + m;
                s_.target_crcs[at].fetch_xor(crc32_contribution(outs_[m], bytes, total - offset - bytes));
                const int direct = s_.to.direct_descriptors.empty() ? -1 : s_.to.direct_descriptors[at];
                if (const int error =
                        write_tile(s_.to.descriptors[at], direct, outs_[m], bytes, s_.to.offsets[target_index] + offset)) {
                    s_.error.store(error);
                    s_.failed_target.store(target_index);
                    s_.stop.store(true);
                    return 0;
                }
            }
        }
        return std::uint64_t(bytes) * num_mixtures_;
    }

private:
    // The part of a region that lies in the tile [lo, hi), run by run.
    void meet(const Target& t, const Region& r, const std::int64_t* tile_lo, const std::int64_t* tile_hi, std::int64_t first) {
        std::int64_t lo[max_dims], hi[max_dims], at[max_dims];
        for (int d = 0; d < t.dims; ++d) {
            lo[d] = std::max(r.lo[d], tile_lo[d]), hi[d] = std::min(r.hi[d], tile_hi[d]);
            if (lo[d] >= hi[d]) return;
            at[d] = lo[d];
        }
        const int outer = t.dims - r.run_dims;  // dimensions walked one index at a time
        std::int64_t length = 1;
        for (int d = outer; d < t.dims; ++d) length *= hi[d] - lo[d];
        const int num_sources = s_.plan.num_sources();
        sources_.resize(num_sources);
        for (;;) {
            std::int64_t to = 0;
            for (int d = 0; d < t.dims; ++d) to = to * t.shape[d] + at[d];
            for (int k = 0; k < num_sources; ++k) {
                std::int64_t from = 0;
                for (int d = 0; d < t.dims; ++d) from += (at[d] - r.lo[d]) * r.strides[std::size_t(k) * t.dims + d];
                sources_[k] = r.sources[k] + from * std::int64_t(item_size(t.in));
            }
            run(t, r, to - first, length);
            int d = outer - 1;
            while (d >= 0 && ++at[d] == hi[d]) at[d] = lo[d], --d;
            if (d < 0) return;
        }
    }

    // n elements in a row of the target, from `to` within the tile; sources_ hold their addresses.
    void run(const Target& t, const Region& r, std::int64_t to, std::int64_t n) {
        constexpr std::int64_t block = 8192;  // sources stay in the caches between their CRC and their sum
        const WeightSet& set = s_.sets[r.weight_set];
        const std::size_t in = item_size(t.in), out = item_size(t.out);
        const bool check = s_.settings.check_sources;
        if (check) crcs_.assign(set.read.size(), 0);
        for (std::int64_t i = 0; i < n; i += block) {
            const std::int64_t count = std::min(block, n - i);
            views_.assign(sources_.begin(), sources_.end());
            for (std::size_t j = 0; j < set.read.size(); ++j) {
                const int k = set.read[j];
                const std::int64_t stride = r.strides[std::size_t(k) * t.dims + t.dims - 1];
                views_[k] = stride == 1 || count == 1 ? sources_[k] + std::size_t(i) * in
                                                      : gather(k, sources_[k] + i * stride * std::int64_t(in), stride, in, count);
                if (check && (stride == 1 || n == 1)) crcs_[j] = crc32_raw(crcs_[j], views_[k], std::size_t(count) * in);
                if (check && stride != 1 && n > 1) check_scattered(r, k, sources_[k] + i * stride * std::int64_t(in), stride, in, count);
            }
            sum(t, set, std::size_t(to + i) * out, std::size_t(count));
        }
        if (!check) return;
        for (std::size_t j = 0; j < set.read.size(); ++j) {
            const int k = set.read[j];
            s_.record_read[r.records[k]].store(1, std::memory_order_relaxed);
            if (r.strides[std::size_t(k) * t.dims + t.dims - 1] == 1 || n == 1)
                contribute(r.records[k], crcs_[j], sources_[k] + std::size_t(n) * in);
        }
    }

    void contribute(int record_index, std::uint32_t crc, const char* end) {
        const Record& record = s_.plan.records()[record_index];
        s_.record_crcs[record_index].fetch_xor(crc32_shift(crc, record.bytes - std::uint64_t(end - record.base)));
    }

    void check_scattered(const Region& r, int k, const char* at, std::int64_t stride, std::size_t item, std::int64_t n) {
        for (std::int64_t i = 0; i < n; ++i, at += stride * std::int64_t(item))
            contribute(r.records[k], crc32_raw(0, at, item), at + item);
    }

    const char* gather(int k, const char* at, std::int64_t stride, std::size_t item, std::int64_t n) {
        if (gathered_.size() < sources_.size()) gathered_.resize(sources_.size());
        char* to = gathered_[k].get(8192 * 4);
        for (std::int64_t i = 0; i < n; ++i, at += stride * std::int64_t(item)) std::memcpy(to + i * item, at, item);
        return to;
    }

    // All mixtures of `count` elements of the contiguous views_, to byte `to` of outs_.
    void sum(const Target& t, const WeightSet& set, std::size_t to, std::size_t count) {
        const std::size_t in = item_size(t.in), out = item_size(t.out);
        const bool to_files = s_.to.addresses.empty();
        const bool widen = num_mixtures_ > 2 && t.in != DType::f32;
        const int num_sources = int(views_.size());
        const DType read_as = widen ? DType::f32 : t.in;
        // Widened sources of one step together take half of a 48 KiB first-level cache, one result a small part of it.
        const std::size_t by_sources = std::max<std::size_t>(256, 6144 / std::size_t(num_sources) / 64 * 64);
        const std::size_t step = num_mixtures_ == 1 ? 2048 : by_sources;
        for (std::size_t i = 0; i < count; i += step) {
            const std::size_t n = std::min(step, count - i);
            narrow_.resize(num_sources);
            for (const int k : set.read) {
                narrow_[k] = views_[k] + i * in;
                if (!widen) continue;
                float* to_floats = wide_.get(step * std::size_t(num_sources)) + step * std::size_t(k);
                s_.kernels.widen[int(t.in)](narrow_[k], to_floats, n);
                wide_views_.resize(num_sources);
                wide_views_[k] = to_floats;
            }
            for (int m = 0; m < num_mixtures_; ++m) {
                const Combination& c = set.mixtures[m];
                char* const to_here = outs_[m] + to + i * out;
                char* const dst = to_files ? to_here : result_.get(8192 * 4);
                const char* made = dst;
                if (c.sources.empty()) {
                    std::memset(dst, 0, n * out);
                } else if (c.lone_one() && t.in == t.out) {
                    made = narrow_[c.sources[0]];
                } else {
                    terms_.resize(c.sources.size());
                    for (std::size_t j = 0; j < terms_.size(); ++j)
                        terms_[j] = widen ? static_cast<const void*>(wide_views_[c.sources[j]]) : narrow_[c.sources[j]];
                    s_.kernels.weighted_sum[int(read_as)][int(t.out)](terms_.data(), c.weights.data(), int(terms_.size()), dst, n);
                }
                if (!to_files) {
                    stream_copy(to_here, made, n * out);
                } else if (made != dst) {
                    std::memcpy(dst, made, n * out);
                }
            }
        }
    }

    Shared& s_;
    const int num_mixtures_;
    Buffer<char> tile_buffer_, result_;
    Buffer<float> wide_;
    std::vector<Buffer<char>> gathered_;
    std::vector<char*> outs_;
    std::vector<const char*> sources_, views_, narrow_;
    std::vector<const float*> wide_views_;
    std::vector<const void*> terms_;
    std::vector<std::uint32_t> crcs_;
};

}  // namespace

std::uint64_t Target::elements() const {
    std::uint64_t n = 1;
    for (int d = 0; d < dims; ++d) n *= std::uint64_t(shape[d]);
    return n;
}

int MergePlan::add_record(const void* base, std::uint64_t bytes, std::uint32_t crc) {
    records_.push_back({static_cast<const char*>(base), bytes, crc});
    return int(records_.size()) - 1;
}

int MergePlan::add_target(const std::vector<std::int64_t>& shape, DType in, DType out) {
    if (shape.empty() || shape.size() > max_dims) throw std::invalid_argument("a target has 1 to 8 dimensions");
    Target t{int(shape.size()), {}, in, out, {}};
    for (int d = 0; d < t.dims; ++d) {
        if (shape[d] < 0) throw std::invalid_argument("a target has a negative size");
        t.shape[d] = shape[d];
    }
    targets_.push_back(std::move(t));
    return int(targets_.size()) - 1;
}

void MergePlan::add_region(int target, const std::vector<std::int64_t>& lo, const std::vector<std::int64_t>& hi, int weight_set,
                           const std::vector<std::int32_t>& records, const std::vector<std::uint64_t>& byte_offsets,
                           const std::vector<std::int64_t>& strides) {
    Target& t = targets_.at(target);
    const std::size_t dims = t.dims, num_sources = num_sources_;
    if (lo.size() != dims || hi.size() != dims || records.size() != num_sources || byte_offsets.size() != num_sources ||
        strides.size() != num_sources * dims || weight_set < 0)
        throw std::invalid_argument("a region's arrays do not have the sizes of its target and sources");
    Region r{};
    r.weight_set = weight_set;
    for (std::size_t d = 0; d < dims; ++d) {
        if (lo[d] < 0 || lo[d] >= hi[d] || hi[d] > t.shape[d]) throw std::invalid_argument("a region leaves its target");
        r.lo[d] = lo[d], r.hi[d] = hi[d];
    }
    for (std::size_t k = 0; k < num_sources; ++k) {
        const Record& record = records_.at(records[k]);
        std::uint64_t last = 0;  // elements from the first to the last one
        for (std::size_t d = 0; d < dims; ++d) {
            const std::int64_t stride = strides[k * dims + d];
            if (stride < 0) throw std::invalid_argument("a source has a negative stride");
            std::uint64_t extent = 0;
            if (__builtin_mul_overflow(std::uint64_t(stride), std::uint64_t(hi[d] - lo[d] - 1), &extent) ||
                __builtin_add_overflow(last, extent, &last) || last > record.bytes)
                throw std::invalid_argument("a source leaves its record");
        }
        const std::uint64_t item = item_size(t.in);
        if (byte_offsets[k] > record.bytes || (last + 1) * item > record.bytes - byte_offsets[k])
            throw std::invalid_argument("a source leaves its record");
        r.sources.push_back(record.base + byte_offsets[k]);
    }
    r.records = records;
    r.strides = strides;
    r.run_dims = 1;
    for (std::size_t d = dims - 1; d > 0; --d) {
        bool joins = lo[d] == 0 && hi[d] == t.shape[d];
        for (std::size_t k = 0; k < num_sources; ++k) {
            const std::int64_t* s = &strides[k * dims];
            joins = joins && s[dims - 1] == 1 && s[d - 1] == s[d] * t.shape[d];
        }
        if (!joins) break;
        ++r.run_dims;
    }
    t.regions.push_back(std::move(r));
}

Outcome MergePlan::run(const Settings& settings, const Destinations& to) {
    const std::size_t num_results = targets_.size() * std::size_t(settings.num_mixtures);
    const bool to_files = to.addresses.empty();
    const bool direct_fits = to.direct_descriptors.empty() || to.direct_descriptors.size() == num_results;
    if (to_files ? to.descriptors.size() != num_results || to.offsets.size() != targets_.size() || !direct_fits
                 : to.addresses.size() != num_results)
        throw std::invalid_argument("destinations do not match the plan's targets");
    for (const Target& t : targets_)
        for (const Region& r : t.regions)
            if (r.weight_set >= settings.num_sets) throw std::invalid_argument("a region names a weight set that is not given");
    Shared s{*this, settings, to, kernels(settings.isa), make_sets(settings, num_sources_), {}, {0},
             std::vector<std::atomic<std::uint32_t>>(to_files ? num_results : 0),
             std::vector<std::atomic<std::uint32_t>>(settings.check_sources ? records_.size() : 0),
             std::vector<std::atomic<std::uint8_t>>(settings.check_sources ? records_.size() : 0)};
    for (const Target& t : targets_) {
        s.tilings.push_back(make_tiling(t, settings.tile_bytes));
        s.first_tile.push_back(s.first_tile.back() + s.tilings.back().num_tiles);
    }
    done_bytes_.store(0);
    cancelled_.store(false);

    const auto work = [&] {
#if defined(__x86_64__)
        _mm_setcsr(0x1f80);  // nearest even, denormals kept: a caller that flushes them must not change the result
#endif
        try {
            Worker worker(s);
            std::size_t target = 0;
            while (!s.stop.load(std::memory_order_relaxed) && !cancelled_.load(std::memory_order_relaxed)) {
                const std::int64_t tile = s.next_tile.fetch_add(1);
                if (tile >= s.first_tile.back()) return;
                while (tile >= s.first_tile[target + 1]) ++target;
                done_bytes_.fetch_add(worker.tile(std::int64_t(target), tile - s.first_tile[target]));
            }
        } catch (const std::bad_alloc&) {
            s.error.store(ENOMEM);
            s.stop.store(true);
        }
    };
    std::vector<std::thread> threads;
    for (int i = 0; i < std::max(1, settings.threads); ++i) threads.emplace_back(work);
    for (std::thread& thread : threads) thread.join();

    Outcome outcome;
    outcome.error = s.error.load();
    if (!outcome.error && cancelled_.load()) outcome.error = ECANCELED;
    outcome.failed_target = s.failed_target.load();
    if (outcome.error) return outcome;
    if (to_files)
        for (std::size_t t = 0, i = 0; t < targets_.size(); ++t)
            for (int m = 0; m < settings.num_mixtures; ++m, ++i)
                outcome.crcs.push_back(crc32_finish(s.target_crcs[i].load(), targets_[t].elements() * item_size(targets_[t].out)));
    if (settings.check_sources)
        for (std::size_t i = 0; i < records_.size(); ++i)
            outcome.damaged.push_back(s.record_read[i].load() &&
                                      crc32_finish(s.record_crcs[i].load(), records_[i].bytes) != records_[i].crc);
    return outcome;
}

}  // namespace demix
