#include "merge_sum.hpp"

#include <algorithm>
#include <cstring>

namespace demix {
namespace {

std::vector<int> nonzero(const float* weights_K, int num_sources) {
    std::vector<int> found;
    for (int k = 0; k < num_sources; ++k)
        if (weights_K[k] != 0.0f) found.push_back(k);
    return found;
}

}  // namespace

std::vector<WeightSet> make_weight_sets(const Settings& s, int num_sources) {
    std::vector<WeightSet> sets(s.num_sets);
    std::vector<bool> used(num_sources, false);
    for (int index = 0; index < s.num_sets; ++index) {
        const float* weights_MK = s.weights + std::size_t(index) * s.num_mixtures * num_sources;
        for (int m = 0; m < s.num_mixtures;) {
            Block b{m, 1, nonzero(weights_MK + std::size_t(m) * num_sources, num_sources), {}};
            int alike = 1;
            while (alike < row_block && m + alike < s.num_mixtures &&
                   nonzero(weights_MK + std::size_t(m + alike) * num_sources, num_sources) == b.sources)
                ++alike;
            if (alike == row_block) b.count = row_block;
            for (int r = 0; r < b.count; ++r)
                for (const int k : b.sources) b.weights.push_back(weights_MK[std::size_t(m + r) * num_sources + k]);
            for (const int k : b.sources) used[k] = true;
            m += b.count;
            sets[index].blocks.push_back(std::move(b));
        }
    }
    for (int k = 0; k < num_sources; ++k)
        if (used[k])
            for (WeightSet& set : sets) set.read.push_back(k);
    return sets;
}

void MixtureSum::operator()(const WeightSet& set, DType in, DType out, const std::vector<const char*>& views,
                            const std::vector<char*>& outs, std::size_t count, bool streamed) {
    const std::size_t in_size = item_size(in), out_size = item_size(out), num_sources = views.size();
    const bool widen = outs.size() > 2 && in != DType::f32;
    const DType read_as = widen ? DType::f32 : in;
    // Widened sources of one step together take half of a 32 KiB first-level cache, a block of results a small part of it.
    const std::size_t step = outs.size() == 1 ? 2048 : std::max<std::size_t>(256, 4096 / num_sources / 64 * 64);
    narrow_.resize(num_sources);
    for (std::size_t i = 0; i < count; i += step) {
        const std::size_t n = std::min(step, count - i);
        for (const int k : set.read) {
            narrow_[k] = views[k] + i * in_size;
            if (!widen) continue;
            float* floats = wide_.get(step * num_sources) + step * std::size_t(k);
            kernels_.widen[int(in)](narrow_[k], floats, n);
        }
        for (const Block& b : set.blocks) {
            char* to[row_block];
            void* dsts[row_block];
            const void* made[row_block];
            for (int r = 0; r < b.count; ++r) {
                to[r] = outs[b.first + r] + i * out_size;
                dsts[r] = streamed ? results_.get(row_block * step * 4) + r * step * 4 : to[r];
                made[r] = dsts[r];
            }
            if (b.sources.empty()) {
                for (int r = 0; r < b.count; ++r) std::memset(dsts[r], 0, n * out_size);
            } else if (b.lone_one() && in == out) {
                made[0] = narrow_[b.sources[0]];
            } else {
                terms_.resize(b.sources.size());
                for (std::size_t j = 0; j < terms_.size(); ++j)
                    terms_[j] = widen ? wide_.get(0) + step * std::size_t(b.sources[j]) : narrow_[b.sources[j]];
                const auto& kernels = b.count == 1 ? kernels_.one_row : kernels_.row_block;
                kernels[int(read_as)][int(out)](terms_.data(), b.weights.data(), int(terms_.size()), dsts, n);
            }
            for (int r = 0; r < b.count; ++r) {
                if (streamed) {
                    kernels_.stream_copy(to[r], static_cast<const char*>(made[r]), n * out_size);
                } else if (made[r] != dsts[r]) {
                    std::memcpy(dsts[r], made[r], n * out_size);
                }
            }
        }
    }
}

}  // namespace demix
