// The M mixtures of a run of elements from one look at its K sources.
#pragma once

#include <cstddef>
#include <vector>

#include "buffer.hpp"
#include "kernels.hpp"
#include "merge.hpp"

namespace demix {

// One mixture's share of one weight set: only the sources that count.
struct Combination {
    std::vector<int> sources;
    std::vector<float> weights;
    bool lone_one() const { return sources.size() == 1 && weights[0] == 1.0f; }
};

struct WeightSet {
    std::vector<Combination> mixtures;  // [M]
    std::vector<int> read;              // sources that any mixture of any set needs: a record may lie in several sets' regions
};

std::vector<WeightSet> make_weight_sets(const Settings& settings, int num_sources);

// One thread's summing, with its buffers.
class MixtureSum {
public:
    explicit MixtureSum(const Kernels& kernels) : kernels_(kernels) {}

    // For every mixture m, `count` elements to outs[m]. views: [K] addresses of contiguous elements, valid where set.read says.
    // streamed: write past the caches (see stream_copy).
    void operator()(const WeightSet& set, DType in, DType out, const std::vector<const char*>& views, const std::vector<char*>& outs,
                    std::size_t count, bool streamed);

private:
    const Kernels& kernels_;
    Buffer<char> result_;
    Buffer<float> wide_;
    std::vector<const char*> narrow_;
    std::vector<const float*> wide_views_;
    std::vector<const void*> terms_;
};

}  // namespace demix
