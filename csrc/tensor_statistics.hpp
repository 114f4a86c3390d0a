// What merge methods need to know of whole tensors: inner products of the sources, and order statistics of their deltas.
//
// A plan's targets are the tensors; every one is walked by one thread in the order of its elements, so that the results depend on
// neither threads, nor instruction sets, nor how a checkpoint was cut.
#pragma once

#include <cstdint>
#include <vector>

#include "kernels.hpp"
#include "merge.hpp"

namespace demix {

// [T][J][J], row by row: sum_i x_j[i] * x_l[i] in float64 over each target. x_j is source j, and J the number of sources; or, with
// from_base, x_j is source j minus the last one, and J is one less.
// Throws std::invalid_argument if a target's regions do not cover it. Empty if the plan was cancelled.
std::vector<double> gram(const MergePlan& plan, bool from_base, int threads, const Kernels& kernels);

// [T][K - 1][Q]: for each target t and each source but the last, the magnitudes |float32(x - base)| with ranks[t * Q + q] in
// ascending order (from 0), as the bits of a float32; base: the last source. NaN counts as larger than any number.
// Throws std::invalid_argument if a rank is not one of the target's. Empty if the plan was cancelled.
std::vector<std::uint32_t> delta_magnitudes(const MergePlan& plan, const std::vector<std::int64_t>& ranks, int num_ranks, int threads,
                                            const Kernels& kernels);

}  // namespace demix
