// The blend index: which documents, in which order, make a mixture. Seeded shuffles without an array, exact counting up to a
// token budget, an interleave that is even at every scale, and the parallel copy of the chosen documents.
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
};

// A permutation of [0, n), computed entry by entry: a Feistel network over the next power of two, walked until it lands below n.
class Shuffle {
  public:
    Shuffle(std::uint64_t n, std::uint64_t key);
    std::uint64_t operator()(std::uint64_t i) const {
        do i = once(i);
        while (i >= n_);
        return i;
    }

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
    void fill_one(std::int64_t begin, std::int64_t count, std::int32_t* lengths, std::int64_t* pointers) const;
    std::vector<Source> sources_;
    std::vector<std::int64_t> first_;  // first document of each source
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

struct Part {
    const Stream* stream = nullptr;
    std::int64_t begin = 0, documents = 0, tokens = 0;
    std::int64_t ahead = 0, behind = 0;  // out: furthest from its share of any prefix, in tokens (rounded up)
};

// Writes the blend of `parts` in order: int32 lengths, int64 pool pointers (both possibly unaligned) and the part of each
// document. Worst-case fair weighted queueing (Bennett and Zhang, INFOCOM 1996): in every prefix, every part's tokens stay
// within one longest document of its share.
void interleave(std::vector<Part>& parts, std::uint8_t* lengths, std::uint8_t* pointers, std::uint16_t* part_of, int threads);

struct Span {
    const std::uint8_t* data = nullptr;
    std::int64_t base = 0, bytes = 0;  // where it lies in the pool
};

struct Gathered {
    int error = 0;              // an errno
    std::uint64_t content = 0;  // sum of hash_document(document, its number) modulo 2^64
};

// Copies documents [begin, end) of an index over the pool, one after another, to `descriptor` at byte `offset`.
// Spans are sorted by base and cover every pointer.
Gathered gather(const std::uint8_t* lengths, const std::uint8_t* pointers, std::int64_t begin, std::int64_t end,
                int item_bytes, const std::vector<Span>& spans, int descriptor, std::int64_t offset, int threads);

// A 64-bit hash of bytes. The same on every machine; not cryptographic.
std::uint64_t hash_document(const std::uint8_t* data, std::int64_t bytes, std::uint64_t seed);

// hash_document of each content[offsets[i], offsets[i+1]), with seed + i * step.
void hash_documents(const std::uint8_t* content, const std::int64_t* offsets, std::int64_t documents, std::uint64_t seed,
                    std::uint64_t step, std::uint64_t* out);

// Copies the documents whose route[i] == which (all of them where route is null) from ids[offsets[i], offsets[i+1]) end to end
// to `out`, as uint16 or int32 (item_bytes 2 or 4), each followed by `eod` unless that is negative. The ids fit.
void pack_tokens(const std::uint32_t* ids, const std::int64_t* offsets, std::int64_t documents, const std::uint8_t* route,
                 std::uint8_t which, std::int64_t eod, int item_bytes, std::uint8_t* out);

}  // namespace demix
