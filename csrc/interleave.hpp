// Several streams of documents in one order that is even at every scale.
#pragma once
#include <cstdint>
#include <vector>

#include "document_stream.hpp"

namespace demix {

struct Part {
    const Stream* stream = nullptr;
    std::int64_t begin = 0, documents = 0, tokens = 0;
};

// Gives the blend of its parts piece by piece. Worst-case fair weighted queueing (Bennett and Zhang, INFOCOM 1996): in every prefix,
// every part's tokens stay within one longest document of its share.
class Interleaver {
  public:
    explicit Interleaver(const std::vector<Part>& parts);
    // The next `count` documents: int32 length, int64 pool pointer, and the part each is of. No more than are left.
    void next(std::int64_t count, std::int32_t* lengths, std::int64_t* pointers, std::uint16_t* part_of, int threads);
    std::int64_t left() const { return left_; }
    // Furthest that any prefix so far is from part d's share, in tokens, rounded up.
    std::int64_t ahead(std::size_t d) const;
    std::int64_t behind(std::size_t d) const;

  private:
    struct Queue {
        const Stream* stream = nullptr;
        std::vector<std::int32_t> lengths;
        std::vector<std::int64_t> pointers;
        std::vector<double> finish;  // virtual time at which each is due, in tokens of the whole blend
        std::int64_t next = 0, filled = 0, left = 0, position = 0;
        double taken = 0;  // tokens of the documents in `lengths` and before
        double emitted = 0, share = 0, per_token = 0, ahead = 0, behind = 0;
    };
    static void refill(Queue& q, int threads);
    std::vector<Queue> queues_;
    std::vector<double> start_, finish_;  // virtual times of each part's next document
    double now_ = 0;                      // tokens given; like all counts of tokens here a whole number, exact below 2^53
    std::int64_t left_ = 0;
    bool begun_ = false;
};

}  // namespace demix
