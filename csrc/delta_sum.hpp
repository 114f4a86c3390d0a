// Mixtures of thinned deltas: base + scale * sum_k weight_k * thin(x_k - base), for the methods that drop some of each delta.
#pragma once

#include <cstdint>
#include <vector>

#include "buffer.hpp"
#include "delta_kernels.hpp"
#include "kernels.hpp"
#include "merge.hpp"
#include "merge_sum.hpp"
#include "row_reader.hpp"

namespace demix {

// What becomes of a delta d = float32(x - base). A region's weight set s says which logical tensor its elements belong to, and its
// index numbers them there. Sources: K, then the base. "Kept with probability p": where random_bits(streams[s, k], index) <
// p * 2^32, and then divided by p.
struct DeltaRules {
    enum class Keep {
        window,    // where windows[s, k] = {lowest, highest} holds its magnitude_bits
        random,    // with probability density
        row_rank,  // with probability density - epsilon + 2 * epsilon * r, r: the rank of its magnitude in its row of the tensor,
                   // 0 for the smallest and 1 for the largest; equals share the mean of their ranks; alone in its row: 0.5
    };
    Keep keep = Keep::window;
    bool elect = false;    // only terms weight * d count that have the sign of their sum over k (positive where that is 0) or are NaN
    bool average = false;  // with elect: divide by the sum of the weights that count, where that is not 0
    float scale = 1.0f;
    double density = 1.0, epsilon = 0.0;
    std::vector<std::uint32_t> windows;  // [S][K][2]
    std::vector<std::uint64_t> streams;  // [S][K]
    const MergePlan* tensors = nullptr;  // row_rank: whole logical tensors, as targets; sources as in the plan that is executed
    std::vector<std::int32_t> target;    // [S] the tensor of each set among them; -1: no element of it is asked for

    // Throws std::invalid_argument if an array has not the size that an execution of the plan with S sets needs.
    void check(int num_sets, const MergePlan& plan) const;
};

// One thread's summing, with its buffers. Same sources, same results, whatever the tiles: a drop depends on the element alone.
class DeltaSum {
public:
    DeltaSum(const DeltaRules& rules, const Kernels& kernels);

    // As MixtureSum; s, index: the weight set's number, and that of the first element.
    void operator()(int s, const WeightSet& set, DType in, DType out, const std::vector<const char*>& views, std::int64_t index,
                    const std::vector<char*>& outs, std::size_t count, bool past_cache);

private:
    void thin(int s, int k, std::int64_t index, float* d, std::size_t n);
    void thin_by_rank(int s, int k, std::int64_t index, float* d, std::size_t n);
    void rank_row(int s, int k, std::int64_t row);
    void tabulate(std::int64_t columns);
    // weights: those of the block's sources for one of its mixtures
    void mix(const Block& b, const float* weights, DType out, char* dst, std::size_t n, bool past_cache);

    const DeltaRules& rules_;
    const Kernels& kernels_;
    const DeltaKernels& loops_;
    RowReader rows_;
    Buffer<float> floats_;  // [K + 4][step]: the deltas, the base, and three sums
    float* base_ = nullptr;
    std::vector<const float*> deltas_;  // [K]
    std::vector<const void*> terms_;
    std::vector<float> weights_;

    struct Ranks {  // of one source's deltas in the row that was looked at last
        int set = -1;
        std::int64_t row = -1;
        std::vector<std::uint32_t> doubled;  // [columns] twice the mean rank
    };
    std::vector<Ranks> ranks_;  // [K]
    struct Chance {
        std::uint64_t threshold;
        float factor;
    };
    std::vector<Chance> chances_;  // by doubled rank, for rows of the length met last
    std::vector<float> row_, base_row_;
    std::vector<std::uint64_t> sorted_, scratch_;
};

}  // namespace demix
