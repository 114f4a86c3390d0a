#include "delta_sum.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <stdexcept>

namespace demix {
namespace {

constexpr std::size_t step = 1024;  // elements in work at a time: ten deltas of them stay in a first-level cache

// 32 random bits below this have probability p.
std::uint64_t threshold_of(double p) { return std::uint64_t(std::llround(p * 4294967296.0)); }

// Sorts by the upper 32 bits (of which the highest is 0), stably, `bits` at a time. All digits are counted in one reading, and one
// that is the same everywhere takes no pass: differences of half-precision numbers end in zeros.
template <int bits>
void radix_sort(std::vector<std::uint64_t>& keys, std::vector<std::uint64_t>& scratch) {
    constexpr int digits = (32 + bits - 1) / bits;
    constexpr std::uint64_t mask = (1u << bits) - 1;
    scratch.resize(keys.size());
    std::uint32_t starts[digits][mask + 1] = {};
    for (const std::uint64_t key : keys)
        for (int d = 0; d < digits; ++d) ++starts[d][key >> (32 + d * bits) & mask];
    for (int d = 0; d < digits; ++d) {
        const int shift = 32 + d * bits;
        if (starts[d][keys[0] >> shift & mask] == keys.size()) continue;
        std::uint32_t sum = 0;
        for (std::uint32_t& start : starts[d]) sum += start, start = sum - start;
        for (const std::uint64_t key : keys) scratch[starts[d][key >> shift & mask]++] = key;
        keys.swap(scratch);
    }
}

void sort_row(std::vector<std::uint64_t>& keys, std::vector<std::uint64_t>& scratch) {
    if (keys.size() < 128) {
        std::sort(keys.begin(), keys.end());  // the lower bits are positions: the same order
    } else if (keys.size() < 8192) {
        radix_sort<8>(keys, scratch);
    } else {
        radix_sort<11>(keys, scratch);
    }
}

}  // namespace

void DeltaRules::check(int num_sets, const MergePlan& plan) const {
    const std::size_t S = std::size_t(num_sets), K = std::size_t(std::max(0, plan.num_sources() - 1));
    bool fits = K > 0 && density > 0 && (keep == Keep::window ? windows.size() == 2 * S * K : streams.size() == S * K);
    if (keep == Keep::row_rank) {
        fits = fits && tensors && tensors->num_sources() == plan.num_sources() && target.size() == S;
        for (std::size_t s = 0; fits && s < S; ++s) fits = target[s] < std::int32_t(tensors->targets().size());
        // A region's elements must be elements of its set's tensor.
        for (const Target& t : plan.targets())
            for (const Region& r : t.regions) {
                if (!fits || r.weight_set >= num_sets || target[r.weight_set] < 0) throw std::invalid_argument("a region has no tensor");
                std::int64_t last = r.index;
                for (int d = 0; d < t.dims; ++d) last += (r.hi[d] - 1 - r.lo[d]) * r.index_strides[d];
                fits = r.index >= 0 && last < std::int64_t(tensors->targets()[target[r.weight_set]].elements());
            }
    }
    if (!fits) throw std::invalid_argument("the rules do not fit the plan");
}

DeltaSum::DeltaSum(const DeltaRules& rules, const Kernels& kernels)
    : rules_(rules), kernels_(kernels), loops_(delta_kernels(kernels.isa)), rows_(kernels) {}

void DeltaSum::operator()(int s, const WeightSet& set, DType in, DType out, const std::vector<const char*>& views, std::int64_t index,
                          const std::vector<char*>& outs, std::size_t count, bool past_cache) {
    const std::size_t num_parts = views.size() - 1, in_size = item_size(in), out_size = item_size(out);
    float* const floats = floats_.get((num_parts + 4) * step);
    deltas_.assign(num_parts, nullptr);
    base_ = floats + num_parts * step;
    const std::size_t head = past_cache ? unaligned_head(outs, out_size, count) : count;
    for (std::size_t i = 0, n; i < count; i += n) {
        n = std::min(step, (i < head ? head : count) - i);
        kernels_.widen[int(in)](views[num_parts] + i * in_size, base_, n);
        for (const int k : set.read) {
            if (k == int(num_parts)) continue;
            float* const d = floats + std::size_t(k) * step;
            kernels_.widen[int(in)](views[k] + i * in_size, d, n);
            loops_.subtract(d, base_, n);
            thin(s, k, index + std::int64_t(i), d, n);
            deltas_[k] = d;
        }
        for (const Block& b : set.blocks)
            for (int r = 0; r < b.count; ++r)
                mix(b, b.weights.data() + std::size_t(r) * b.sources.size(), out, outs[b.first + r] + i * out_size, n, i >= head);
    }
}

void DeltaSum::thin(int s, int k, std::int64_t index, float* d, std::size_t n) {
    const std::size_t at = std::size_t(s) * deltas_.size() + std::size_t(k);
    switch (rules_.keep) {
        case DeltaRules::Keep::window:
            loops_.keep_window(d, n, rules_.windows[2 * at], rules_.windows[2 * at + 1]);
            break;
        case DeltaRules::Keep::random:
            loops_.keep_random(d, n, rules_.streams[at], std::uint64_t(index), threshold_of(rules_.density),
                               float(1.0 / rules_.density));
            break;
        case DeltaRules::Keep::row_rank:
            thin_by_rank(s, k, index, d, n);
    }
}

void DeltaSum::thin_by_rank(int s, int k, std::int64_t index, float* d, std::size_t n) {
    const std::uint64_t stream = rules_.streams[std::size_t(s) * deltas_.size() + std::size_t(k)];
    const std::int64_t columns = RowReader::columns(rules_.tensors->targets()[rules_.target[s]]);
    if (chances_.size() != std::size_t(2 * columns - 1)) tabulate(columns);
    for (std::size_t i = 0; i < n;) {
        const std::int64_t row = (index + std::int64_t(i)) / columns, column = (index + std::int64_t(i)) % columns;
        rank_row(s, k, row);
        const std::uint32_t* const doubled = &ranks_[k].doubled[column];
        const std::size_t here = std::min(n - i, std::size_t(columns - column));
        for (std::size_t j = 0; j < here; ++j, ++i) {
            const Chance& chance = chances_[doubled[j]];
            const float scaled = d[i] * chance.factor;
            d[i] = random_bits(stream, std::uint64_t(index) + i) < chance.threshold ? scaled : 0.0f;
        }
    }
}

void DeltaSum::tabulate(std::int64_t columns) {
    chances_.resize(std::size_t(2 * columns - 1));
    for (std::size_t i = 0; i < chances_.size(); ++i) {
        const double rank = columns > 1 ? double(i) / double(2 * (columns - 1)) : 0.5;
        const double p = (rules_.density - rules_.epsilon) + 2 * rules_.epsilon * rank;
        chances_[i] = {threshold_of(p), float(1.0 / p)};
    }
}

void DeltaSum::rank_row(int s, int k, std::int64_t row) {
    if (ranks_.size() < deltas_.size()) ranks_.resize(deltas_.size());
    Ranks& ranks = ranks_[k];
    if (ranks.set == s && ranks.row == row) return;
    const Target& t = rules_.tensors->targets()[rules_.target[s]];
    const std::size_t columns = std::size_t(RowReader::columns(t));
    row_.resize(columns), base_row_.resize(columns), sorted_.resize(columns), ranks.doubled.resize(columns);
    rows_.read(t, k, row, 0, std::int64_t(columns), row_.data());
    rows_.read(t, rules_.tensors->num_sources() - 1, row, 0, std::int64_t(columns), base_row_.data());
    loops_.subtract(row_.data(), base_row_.data(), columns);
    for (std::size_t c = 0; c < columns; ++c) sorted_[c] = std::uint64_t(magnitude_bits(row_[c])) << 32 | c;
    sort_row(sorted_, scratch_);
    for (std::size_t first = 0, end; first < columns; first = end) {
        for (end = first + 1; end < columns && sorted_[end] >> 32 == sorted_[first] >> 32;) ++end;
        for (std::size_t i = first; i < end; ++i) ranks.doubled[sorted_[i] & 0xffffffffu] = std::uint32_t(first + end - 1);
    }
    ranks.set = s, ranks.row = row;
}

void DeltaSum::mix(const Block& b, const float* weights, DType out, char* dst, std::size_t n, bool past_cache) {
    float* const sum = base_ + step;
    const int num_parts = int(deltas_.size());
    terms_.clear(), weights_.clear();
    for (std::size_t j = 0; j < b.sources.size(); ++j)
        if (b.sources[j] < num_parts) terms_.push_back(deltas_[b.sources[j]]), weights_.push_back(weights[j]);
    if (terms_.empty()) {
        std::memset(sum, 0, n * sizeof(float));
    } else if (!rules_.elect) {
        void* const to_sum[] = {sum};
        kernels_.one_row[int(DType::f32)][int(DType::f32)](nullptr, terms_.data(), weights_.data(), int(terms_.size()), to_sum, n, false);
    } else {
        float *const total = sum + step, *const used = total + step;
        std::memset(sum, 0, 3 * step * sizeof(float));
        for (std::size_t j = 0; j < terms_.size(); ++j) loops_.add(static_cast<const float*>(terms_[j]), weights_[j], total, n);
        for (std::size_t j = 0; j < terms_.size(); ++j)
            loops_.add_agreeing(static_cast<const float*>(terms_[j]), weights_[j], total, sum, used, n);
        if (rules_.average) loops_.divide(sum, used, n);
    }
    const void* const sources[] = {base_, sum};
    const float scales[] = {1.0f, rules_.scale};
    void* const to[] = {dst};
    kernels_.one_row[int(DType::f32)][int(out)](nullptr, sources, scales, 2, to, n, past_cache);
}

}  // namespace demix
