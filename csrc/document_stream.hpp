// A domain's documents in shuffled order, epoch after epoch, with no memory per document; and how far a token budget reaches.
#pragma once
#include <cstdint>
#include <vector>

namespace demix {

// One indexed data set as part of a domain. `lengths` (int32) and `pointers` (int64) may be unaligned: they lie in a mapped .idx.
// `base`: where its .bin begins in the pool (all .bin files laid end to end), in bytes.
struct Source {
    const std::uint8_t* lengths = nullptr;
    const std::uint8_t* pointers = nullptr;
    std::int64_t documents = 0;
    std::int64_t base = 0;
    // Where every document begins where the one before ends: the binary logarithm of a token's bytes; else -1. A length then follows
    // from two neighbouring pointers, which is one place in memory to wait for instead of two.
    int item_shift = -1;
    bool end_to_end() const { return item_shift >= 0; }
};

// A permutation of [0, n), computed entry by entry: a Feistel network over the next power of two, walked until it lands below n.
class Shuffle {
  public:
    static constexpr int kBatch = 64;

    Shuffle(std::uint64_t n, std::uint64_t key);
    // Entries [first, first + count), count <= kBatch. Together, because entries walk a different number of steps: done one by
    // one, every second would be a mispredicted branch.
    void batch(std::uint64_t first, int count, std::uint64_t* out) const;

  private:
    static constexpr int kRounds = 8;  // fewer fail a chi-squared test of neighbours' distances
    std::uint64_t once(std::uint64_t i) const;
    std::uint64_t n_;
    int left_bits_, right_bits_;
    std::uint64_t keys_[kRounds];
};

// A domain's endless stream of documents: its sources, shuffled anew in every epoch by (seed, epoch).
class Stream {
  public:
    Stream(std::vector<Source> sources, std::uint64_t seed);
    std::int64_t documents() const { return documents_; }
    // Writes length and pool pointer (where not null) of stream positions [begin, begin + count).
    void fill(std::int64_t begin, std::int64_t count, std::int32_t* lengths, std::int64_t* pointers, int threads) const;

  private:
    struct Batch;
    void fetch(const Shuffle& shuffle, std::int64_t start, std::int64_t left, bool with_pointers, Batch& batch) const;
    void fill_one(std::int64_t begin, std::int64_t count, std::int32_t* lengths, std::int64_t* pointers) const;
    const Source& find(std::int64_t document, std::int64_t& entry) const;
    std::vector<Source> sources_;
    std::vector<std::int64_t> first_;        // first document of each source, and the end
    std::vector<std::uint32_t> candidates_;  // by document >> shift_: the last source that begins there or before
    int shift_ = 0;
    std::int64_t documents_ = 0;
    std::uint64_t seed_;
};

struct Advance {
    std::int64_t documents = 0;    // how many fit
    std::int64_t tokens = 0;       // their tokens, <= budget
    std::int64_t next_length = 0;  // of the one that no longer fits
};

// How many documents from stream position `begin` fit into `budget` tokens. `epoch_tokens`: tokens of one epoch (> 0).
Advance advance(const Stream& stream, std::int64_t begin, std::int64_t budget, std::int64_t epoch_tokens, int threads);

}  // namespace demix
