#include "merge_sum.hpp"

#include <algorithm>
#include <cstring>

#include "streams.hpp"

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

std::size_t unaligned_head(const std::vector<char*>& outs, std::size_t item, std::size_t count) {
    const std::size_t bytes = std::size_t(-reinterpret_cast<std::uintptr_t>(outs[0])) % 64;
    for (const char* out : outs)
        if (std::size_t(-reinterpret_cast<std::uintptr_t>(out)) % 64 != bytes) return count;
    return bytes % item ? count : std::min(count, bytes / item);
}

void MixtureSum::operator()(const WeightSet& set, DType in, DType out, const std::vector<const char*>& views,
                            const std::vector<char*>& outs, std::size_t count, bool past_cache) {
    const std::size_t in_size = item_size(in), out_size = item_size(out), num_sources = views.size();
    const bool widen = outs.size() > 2 && in != DType::f32;
    const DType read_as = widen ? DType::f32 : in;
    // Widened sources of one step together take half of a 32 KiB first-level cache.
    const std::size_t step = outs.size() == 1 ? 2048 : std::max<std::size_t>(256, 4096 / num_sources / 64 * 64);
    const std::size_t head = past_cache ? unaligned_head(outs, out_size, count) : count;
    narrow_.resize(num_sources);
    for (std::size_t i = 0, n; i < count; i += n) {
        n = std::min(step, (i < head ? head : count) - i);
        for (const int k : set.read) {
            narrow_[k] = views[k] + i * in_size;
            if (!widen) continue;
            float* floats = wide_.get(step * num_sources) + step * std::size_t(k);
            kernels_.widen[int(in)](narrow_[k], floats, n);
        }
        // Several blocks compute for so long that the memory would rest: it brings what the next step reads, a part with each block.
        std::size_t asked = n * in_size, ask = asked;
        for (const Block& b : set.blocks) {
            if (widen) ask += (step * in_size + set.blocks.size() - 1) / set.blocks.size();
            for (; asked < ask; asked += 64)
                for (const int k : set.read) __builtin_prefetch(static_cast<const char*>(narrow_[k]) + asked);
            void* dsts[row_block];
            for (int r = 0; r < b.count; ++r) dsts[r] = outs[b.first + r] + i * out_size;
            if (b.sources.empty()) {
                for (int r = 0; r < b.count; ++r) std::memset(dsts[r], 0, n * out_size);
            } else if (b.lone_one() && in == out) {
                std::memcpy(dsts[0], narrow_[b.sources[0]], n * out_size);
            } else {
                terms_.resize(b.sources.size());
                for (std::size_t j = 0; j < terms_.size(); ++j)
                    terms_[j] = widen ? wide_.get(0) + step * std::size_t(b.sources[j]) : narrow_[b.sources[j]];
                sum(b, read_as, out, dsts, n, i >= head);
            }
        }
    }
}

// The block's sums of terms_. One mixture's may be made in groups of sources, whose sums stay in the cache in float32; for more
// mixtures the sources are in the cache already.
void MixtureSum::sum(const Block& b, DType in, DType out, void* const* dsts, std::size_t n, bool past_cache) {
    const auto& kernels = b.count == 1 ? kernels_.one_row[int(in)] : kernels_.row_block[int(in)];
    const std::size_t num = terms_.size();
    std::size_t k = 0;
    const float* before = nullptr;
    if (b.count == 1 && num > most_streams) {
        void* const partial[] = {sums_.get(n)};
        for (; k + most_streams < num; k += most_streams) {
            kernels[int(DType::f32)](before, terms_.data() + k, b.weights.data() + k, int(most_streams), partial, n, false);
            before = sums_.get(n);
        }
    }
    kernels[int(out)](before, terms_.data() + k, b.weights.data() + k, int(num - k), dsts, n, past_cache);
}

}  // namespace demix
