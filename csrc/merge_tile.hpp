// The unit of work of a merge: one contiguous piece of a target, made in all mixtures by one thread.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <vector>

#include "buffer.hpp"
#include "delta_sum.hpp"
#include "merge.hpp"
#include "merge_sum.hpp"
#include "record_check.hpp"

namespace demix {

// How a target is cut into tiles: single indices before dimension `dim`, `rows` of it at a time, all that follows.
struct Tiling {
    int dim;
    std::int64_t rows, row_elements, tiles_along, num_tiles;
};

Tiling make_tiling(const Target& target, std::size_t tile_bytes);

// What the threads of one execution share.
struct Execution {
    const MergePlan& plan;
    const Settings& settings;
    const Destinations& to;
    const Kernels& kernels;
    std::vector<WeightSet> sets;
    std::vector<Tiling> tilings;            // [T]
    std::vector<std::int64_t> first_tile;   // [T + 1]
    std::vector<std::atomic<std::uint32_t>> target_crcs;
    std::vector<std::atomic<std::uint8_t>> target_not_finite;
    std::unique_ptr<RecordCheck> check;  // null: sources are not checked
    std::atomic<std::int64_t> next_tile{0};
    std::atomic<bool> stop{false};
    std::atomic<int> error{0};
    std::atomic<std::int64_t> failed_target{-1};
};

// One thread's work, with its buffers.
class TileWorker {
public:
    explicit TileWorker(Execution& execution);

    // Fills a tile from the regions that meet it, and hands it to its destinations. Returns the bytes made, of all mixtures.
    std::uint64_t make(std::int64_t target_index, std::int64_t tile_index);

private:
    // The part of a region that lies in the tile [lo, hi), run by run. first: index of the tile's first element in its target.
    void meet(const Target& t, const Region& r, const std::int64_t* tile_lo, const std::int64_t* tile_hi, std::int64_t first);
    // n elements in a row of the target, from `to` within the tile; sources_ hold their addresses, `index` is the first one's number.
    void run(const Target& t, const Region& r, std::int64_t to, std::int64_t n, std::int64_t index);
    void write(const Target& t, std::int64_t target_index, std::uint64_t offset, std::size_t bytes);
    void check_scattered(const Region& r, int k, const char* at, std::int64_t stride, std::size_t item, std::int64_t n);
    const char* gather(int k, const char* at, std::int64_t stride, std::size_t item, std::int64_t n);

    Execution& x_;
    const int num_mixtures_;
    const bool to_files_;
    const std::int64_t block_;  // elements in work at a time
    MixtureSum sum_;
    std::unique_ptr<DeltaSum> delta_sum_;  // takes the place of sum_ where the elements are deltas under a rule
    Buffer<char> tile_buffer_;
    std::vector<Buffer<char>> gathered_;    // [K]
    std::vector<Buffer<float>> widened_;    // [K] of sources that are stored in another type than is summed
    std::vector<char*> outs_, outs_here_;   // [M] where the tile lies, and where the elements in work go
    std::vector<const char*> sources_, views_, checked_;  // [K], [K], [read]
    std::vector<std::uint32_t> crcs_;
};

}  // namespace demix
