#include "merge_sum.hpp"

#include <algorithm>
#include <cstring>

#include "merge_write.hpp"

namespace demix {

std::vector<WeightSet> make_weight_sets(const Settings& s, int num_sources) {
    std::vector<WeightSet> sets(s.num_sets);
    std::vector<bool> used(num_sources, false);
    for (int set = 0; set < s.num_sets; ++set) {
        sets[set].mixtures.resize(s.num_mixtures);
        for (int m = 0; m < s.num_mixtures; ++m) {
            const float* w = s.weights + (std::size_t(set) * s.num_mixtures + m) * num_sources;
            for (int k = 0; k < num_sources; ++k) {
                if (w[k] == 0.0f) continue;
                sets[set].mixtures[m].sources.push_back(k);
                sets[set].mixtures[m].weights.push_back(w[k]);
                used[k] = true;
            }
        }
    }
    for (int k = 0; k < num_sources; ++k)
        if (used[k])
            for (WeightSet& set : sets) set.read.push_back(k);
    return sets;
}

void MixtureSum::operator()(const WeightSet& set, DType in, DType out, const std::vector<const char*>& views,
                            const std::vector<char*>& outs, std::size_t count, bool streamed) {
    const std::size_t in_size = item_size(in), out_size = item_size(out);
    const bool widen = outs.size() > 2 && in != DType::f32;
    const std::size_t num_sources = views.size();
    const DType read_as = widen ? DType::f32 : in;
    // Widened sources of one step together take half of a 48 KiB first-level cache, one result a small part of it.
    const std::size_t by_sources = std::max<std::size_t>(256, 6144 / num_sources / 64 * 64);
    const std::size_t step = outs.size() == 1 ? 2048 : by_sources;
    narrow_.resize(num_sources);
    wide_views_.resize(num_sources);
    for (std::size_t i = 0; i < count; i += step) {
        const std::size_t n = std::min(step, count - i);
        for (const int k : set.read) {
            narrow_[k] = views[k] + i * in_size;
            if (!widen) continue;
            float* floats = wide_.get(step * num_sources) + step * std::size_t(k);
            kernels_.widen[int(in)](narrow_[k], floats, n);
            wide_views_[k] = floats;
        }
        for (std::size_t m = 0; m < outs.size(); ++m) {
            const Combination& c = set.mixtures[m];
            char* const to = outs[m] + i * out_size;
            char* const dst = streamed ? result_.get(8192 * 4) : to;
            const char* made = dst;
            if (c.sources.empty()) {
                std::memset(dst, 0, n * out_size);
            } else if (c.lone_one() && in == out) {
                made = narrow_[c.sources[0]];
            } else {
                terms_.resize(c.sources.size());
                for (std::size_t j = 0; j < terms_.size(); ++j)
                    terms_[j] = widen ? static_cast<const void*>(wide_views_[c.sources[j]]) : narrow_[c.sources[j]];
                kernels_.weighted_sum[int(read_as)][int(out)](terms_.data(), c.weights.data(), int(terms_.size()), dst, n);
            }
            if (streamed) {
                stream_copy(to, made, n * out_size);
            } else if (made != dst) {
                std::memcpy(dst, made, n * out_size);
            }
        }
    }
}

}  // namespace demix
