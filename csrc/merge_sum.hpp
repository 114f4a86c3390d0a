// The M mixtures of a run of elements from one look at its K sources.
#pragma once

#include <cstddef>
#include <vector>

#include "buffer.hpp"
#include "kernels.hpp"
#include "merge.hpp"

namespace demix {

// Mixtures that read the same sources: those whose weight there is not exactly 0, for any of them.
struct Block {
    int first, count;            // mixtures [first, first + count); count is 1 or row_block
    std::vector<int> sources;    // none: the mixtures are 0
    std::vector<float> weights;  // [count][sources]
    bool lone_one() const { return count == 1 && sources.size() == 1 && weights[0] == 1.0f; }
};

struct WeightSet {
    std::vector<Block> blocks;  // of all M mixtures
    std::vector<int> read;      // sources that any mixture of any set needs: a record may lie in several sets' regions
};

std::vector<WeightSet> make_weight_sets(const Settings& settings, int num_sources);

// Elements of `item` bytes before all outs come to a multiple of 64 bytes together; `count`, if that is sooner.
std::size_t unaligned_head(const std::vector<char*>& outs, std::size_t item, std::size_t count);

// One thread's summing, with its buffers.
class MixtureSum {
public:
    explicit MixtureSum(const Kernels& kernels) : kernels_(kernels) {}

    // For every mixture m, `count` elements to outs[m]. views: [K] addresses of contiguous elements, valid where set.read says.
    // past_cache: as in WeightedSum, but outs may have any alignment.
    void operator()(const WeightSet& set, DType in, DType out, const std::vector<const char*>& views, const std::vector<char*>& outs,
                    std::size_t count, bool past_cache);

private:
    void sum(const Block& b, DType in, DType out, void* const* dsts, std::size_t n, bool past_cache);

    const Kernels& kernels_;
    Buffer<float> wide_, sums_;
    std::vector<const void*> narrow_, terms_;
};

}  // namespace demix
