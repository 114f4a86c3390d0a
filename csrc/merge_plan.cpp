// Building a plan: every address a source may be read at is checked here, so that executing it needs no checks.
#include <algorithm>
#include <stdexcept>

#include "merge.hpp"

namespace demix {

std::uint64_t Target::elements() const {
    std::uint64_t n = 1;
    for (int d = 0; d < dims; ++d) n *= std::uint64_t(shape[d]);
    return n;
}

int MergePlan::add_record(const void* base, std::uint64_t bytes, std::uint32_t crc) {
    records_.push_back({static_cast<const char*>(base), bytes, crc});
    return int(records_.size()) - 1;
}

int MergePlan::add_target(const std::vector<std::int64_t>& shape, const std::vector<DType>& stored, DType out) {
    if (shape.empty() || shape.size() > max_dims) throw std::invalid_argument("a target has 1 to 8 dimensions");
    if (stored.empty() || stored.size() != std::size_t(num_sources_)) throw std::invalid_argument("a target has a type for each source");
    const bool alike = std::all_of(stored.begin(), stored.end(), [&](DType t) { return t == stored[0]; });
    Target t{int(shape.size()), {}, alike ? stored[0] : DType::f32, out, stored, {}};
    for (int d = 0; d < t.dims; ++d) {
        if (shape[d] < 0) throw std::invalid_argument("a target has a negative size");
        t.shape[d] = shape[d];
    }
    targets_.push_back(std::move(t));
    return int(targets_.size()) - 1;
}

void MergePlan::add_region(int target, const std::vector<std::int64_t>& lo, const std::vector<std::int64_t>& hi, int weight_set,
                           const std::vector<std::int32_t>& records, const std::vector<std::uint64_t>& byte_offsets,
                           const std::vector<std::int64_t>& strides, std::int64_t index,
                           const std::vector<std::int64_t>& index_strides) {
    Target& t = targets_.at(target);
    const std::size_t dims = t.dims, num_sources = num_sources_;
    if (lo.size() != dims || hi.size() != dims || records.size() != num_sources || byte_offsets.size() != num_sources ||
        strides.size() != num_sources * dims || weight_set < 0)
        throw std::invalid_argument("a region's arrays do not have the sizes of its target and sources");
    const bool numbered = !index_strides.empty();
    if (numbered && (index_strides.size() != dims || index_strides[dims - 1] != 1))
        throw std::invalid_argument("a region's elements must be numbered one by one along its last dimension");
    Region r{};
    r.weight_set = weight_set;
    r.index = index;
    for (std::size_t d = 0; numbered && d < dims; ++d) r.index_strides[d] = index_strides[d];
    for (std::size_t d = 0; d < dims; ++d) {
        if (lo[d] < 0 || lo[d] >= hi[d] || hi[d] > t.shape[d]) throw std::invalid_argument("a region leaves its target");
        r.lo[d] = lo[d], r.hi[d] = hi[d];
    }
    for (std::size_t k = 0; k < num_sources; ++k) {
        const Record& record = records_.at(records[k]);
        std::uint64_t last = 0;  // elements from the first to the last one
        for (std::size_t d = 0; d < dims; ++d) {
            const std::int64_t stride = strides[k * dims + d];
            if (stride < 0) throw std::invalid_argument("a source has a negative stride");
            std::uint64_t extent = 0;
            if (__builtin_mul_overflow(std::uint64_t(stride), std::uint64_t(hi[d] - lo[d] - 1), &extent) ||
                __builtin_add_overflow(last, extent, &last) || last > record.bytes)
                throw std::invalid_argument("a source leaves its record");
        }
        const std::uint64_t item = item_size(t.stored[k]);
        if (byte_offsets[k] > record.bytes || (last + 1) * item > record.bytes - byte_offsets[k])
            throw std::invalid_argument("a source leaves its record");
        r.sources.push_back(record.base + byte_offsets[k]);
    }
    r.records = records;
    r.strides = strides;
    r.run_dims = 1;
    for (std::size_t d = dims - 1; d > 0; --d) {
        bool joins = lo[d] == 0 && hi[d] == t.shape[d];
        joins = joins && (!numbered || r.index_strides[d - 1] == r.index_strides[d] * t.shape[d]);
        for (std::size_t k = 0; k < num_sources; ++k) {
            const std::int64_t* s = &strides[k * dims];
            joins = joins && s[dims - 1] == 1 && s[d - 1] == s[d] * t.shape[d];
        }
        if (!joins) break;
        ++r.run_dims;
    }
    t.regions.push_back(std::move(r));
}
}  // namespace demix
