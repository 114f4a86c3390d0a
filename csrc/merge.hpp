// The merge itself: a plan of which bytes of which source make which bytes of which target, and its execution by threads.
//
// A target is one contiguous block of elements (a chunk of an output checkpoint, or a parameter of a live model), seen as a box of
// up to `max_dims` dimensions. Its regions tile that box; in a region each of the K sources is one strided view. One execution
// produces M mixtures of every target, reading each source once.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <string>
#include <vector>

#include "dtype.hpp"

namespace demix {

inline constexpr int max_dims = 8;
inline constexpr int buffers_per_thread = 2;  // when files are written: one waits for the disk while the other is filled

// Bytes that sources point into: one payload of one checkpoint, with the CRC its container promises.
struct Record {
    const char* base;
    std::uint64_t bytes;
    std::uint32_t crc;
};

struct Region {
    std::int64_t lo[max_dims], hi[max_dims];   // within the target
    int weight_set;                            // which M x K weights (and which rule of DeltaRules) apply
    std::vector<const char*> sources;          // [K] address of the element at `lo`
    std::vector<std::int32_t> records;         // [K] the record each lies in
    std::vector<std::int64_t> strides;         // [K][dims] in elements
    std::int64_t index, index_strides[max_dims];  // of the element at `lo` in the tensor it is numbered in, and how that goes on
    int run_dims;                              // trailing dimensions (at least 1) that form one run in the target and all sources
};

struct Target {
    int dims;
    std::int64_t shape[max_dims];
    DType in, out;             // in: what is summed, the type of all sources, or float32 where they differ
    std::vector<DType> stored;  // [K] the type of each source
    std::vector<Region> regions;
    std::uint64_t elements() const;
};

// Where the M results of the targets go: to addresses, or to files (descriptor, and the same offset in every mixture's files).
// A file may be open a second time for direct writes, past the page cache; what is not aligned is written the ordinary way.
struct Destinations {
    std::vector<char*> addresses;         // [T][M], or empty
    std::vector<int> descriptors;         // [T][M], or empty
    std::vector<int> direct_descriptors;  // [T][M] opened with O_DIRECT, or -1; or empty
    std::vector<std::uint64_t> offsets;   // [T]
};

struct DeltaRules;

struct Settings {
    int num_mixtures = 1, num_sets = 1;
    const float* weights = nullptr;  // [sets][M][K]; a weight of exactly 0 leaves its source out, a lone 1 copies bits
    int threads = 1;                 // that sum at a time; each holds one tile of every mixture, twice when files are written
    std::string isa;
    std::size_t tile_bytes = 256 << 10;
    const DeltaRules* deltas = nullptr;  // null: plain weighted sums
    bool check_sources = false;  // compare the CRC of every record that is read
    bool shows_cached = true;    // mincore(2) tells this user which pages of the sources are in memory
};

struct Outcome {
    std::vector<std::uint32_t> crcs;      // [T][M] of what was written; empty for addresses
    std::vector<std::uint8_t> damaged;    // [records] 1 where check_sources found other bytes than the CRC promises
    std::vector<std::uint8_t> not_finite; // [T] 1 where a result holds NaN or infinity; empty for addresses
    int error = 0;                        // errno of a failed write, 0 if none
    std::int64_t failed_target = -1;
};

class MergePlan {
public:
    explicit MergePlan(int num_sources) : num_sources_(num_sources) {}

    int add_record(const void* base, std::uint64_t bytes, std::uint32_t crc);
    // stored: [K] the type of each source. Throws std::invalid_argument for other numbers of types, or of dimensions.
    int add_target(const std::vector<std::int64_t>& shape, const std::vector<DType>& stored, DType out);
    // lo, hi: [dims]; records, byte_offsets: [K] where the element at `lo` lies; strides: [K][dims], in elements.
    // index, index_strides: the number of the element at `lo` and how it grows along each dimension ([dims], the last one 1), for
    // rules that need to know which element of its tensor they see; [] where none does.
    // Throws std::invalid_argument if the region leaves its target or a source leaves its record.
    void add_region(int target, const std::vector<std::int64_t>& lo, const std::vector<std::int64_t>& hi, int weight_set,
                    const std::vector<std::int32_t>& records, const std::vector<std::uint64_t>& byte_offsets,
                    const std::vector<std::int64_t>& strides, std::int64_t index = 0,
                    const std::vector<std::int64_t>& index_strides = {});

    int num_sources() const { return num_sources_; }
    const std::vector<Target>& targets() const { return targets_; }
    const std::vector<Record>& records() const { return records_; }

    // Blocks until done, cancelled, or a write failed. The result does not depend on threads or tile_bytes.
    Outcome run(const Settings& settings, const Destinations& destinations);

    // For another thread, while run() works: bytes of targets finished (all mixtures together), and a request to stop.
    std::uint64_t done_bytes() const { return done_bytes_.load(std::memory_order_relaxed); }
    // begin() takes it back, for whoever calls run() or looks at the plan's elements after it.
    void cancel() { cancelled_.store(true); }
    void begin() { cancelled_.store(false); }
    // Lasts as long as a call that looks at the plan's elements; end() cancels such calls, and returns when there is none.
    class Call {
    public:
        explicit Call(MergePlan& plan) : plan_(plan) { plan_.count(1); }
        Call(const Call&) = delete;
        Call& operator=(const Call&) = delete;
        ~Call() { plan_.count(-1); }

    private:
        MergePlan& plan_;
    };
    void end();
    bool cancelled() const { return cancelled_.load(std::memory_order_relaxed); }

private:
    void count(int more);

    int num_sources_;
    std::mutex counting_;
    std::condition_variable none_;
    int calls_ = 0;
    std::vector<Record> records_;
    std::vector<Target> targets_;
    std::atomic<std::uint64_t> done_bytes_{0};
    std::atomic<bool> cancelled_{false};
};

}  // namespace demix
