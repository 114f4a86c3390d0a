#include "row_reader.hpp"

#include <algorithm>
#include <stdexcept>

namespace demix {
namespace {

void widen_strided(DType in, const char* from, std::int64_t stride, std::int64_t n, float* out) {
    for (std::int64_t i = 0; i < n; ++i) {
        const std::size_t at = std::size_t(i * stride);
        out[i] = in == DType::f32    ? load_element<DType::f32>(from, at)
                 : in == DType::bf16 ? load_element<DType::bf16>(from, at)
                                     : load_element<DType::f16>(from, at);
    }
}

}  // namespace

void RowReader::read(const Target& t, int k, std::int64_t row, std::int64_t begin, std::int64_t end, float* out) {
    const int last = t.dims - 1;
    std::int64_t at[max_dims];
    for (int d = last - 1; d >= 0; --d) at[d] = row % t.shape[d], row /= t.shape[d];
    std::int64_t missing = end - begin;
    for (std::size_t tried = 0; missing > 0; ++tried) {
        if (tried == t.regions.size()) throw std::invalid_argument("a target's regions do not cover it");
        if (last_ >= t.regions.size()) last_ = 0;
        const Region& r = t.regions[last_];
        const std::int64_t lo = std::max(begin, r.lo[last]), hi = std::min(end, r.hi[last]);
        bool here = lo < hi;
        for (int d = 0; here && d < last; ++d) here = r.lo[d] <= at[d] && at[d] < r.hi[d];
        if (here) {
            const std::int64_t* strides = &r.strides[std::size_t(k) * t.dims];
            std::int64_t from = (lo - r.lo[last]) * strides[last];
            for (int d = 0; d < last; ++d) from += (at[d] - r.lo[d]) * strides[d];
            const DType stored = t.stored[std::size_t(k)];
            const char* source = r.sources[k] + from * std::int64_t(item_size(stored));
            if (strides[last] == 1) {
                kernels_.widen[int(stored)](source, out + (lo - begin), std::size_t(hi - lo));
            } else {
                widen_strided(stored, source, strides[last], hi - lo, out + (lo - begin));
            }
            missing -= hi - lo;
        }
        if (missing > 0) ++last_;
    }
}

}  // namespace demix
