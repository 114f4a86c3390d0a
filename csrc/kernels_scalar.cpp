// The portable kernels, and the choice between instruction sets.
#include <cmath>
#include <stdexcept>

#include "kernels.hpp"

namespace demix {
namespace {

template <DType In, DType Out, int Rows>
void weighted_sum(const float* before, const void* const* sources, const float* weights, int num_sources, void* const* dsts,
                  std::size_t n, bool /* past_cache */) {
    for (int r = 0; r < Rows; ++r, weights += num_sources)
        for (std::size_t i = 0; i < n; ++i) {
            float sum = before ? before[i] : weights[0] * load_element<In>(sources[0], i);
            for (int k = before ? 0 : 1; k < num_sources; ++k) sum = std::fma(weights[k], load_element<In>(sources[k], i), sum);
            store_element<Out>(dsts[r], i, sum);
        }
}

template <DType In>
void widen(const void* src, float* dst, std::size_t n) {
    for (std::size_t i = 0; i < n; ++i) dst[i] = load_element<In>(src, i);
}

template <DType In>
bool not_finite(const void* src, std::size_t n) {
    return any_not_finite<In>(src, n);
}

}  // namespace

const Kernels& scalar_kernels() {
    using D = DType;
    static const Kernels table = {"scalar", DEMIX_IN_OUT(weighted_sum, 1), DEMIX_IN_OUT(weighted_sum, row_block),
                                  {widen<D::f32>, widen<D::bf16>, widen<D::f16>},
                                  {not_finite<D::f32>, not_finite<D::bf16>, not_finite<D::f16>}};
    return table;
}

std::vector<const Kernels*> available_kernels() {
    std::vector<const Kernels*> found = {&scalar_kernels()};
    for (const Kernels* one : {avx2_kernels(), avx512_kernels(), avx512bf16_kernels()})
        if (one) found.push_back(one);
    return found;
}

const Kernels& kernels(const std::string& isa) {
    const std::vector<const Kernels*> found = available_kernels();
    if (isa == "") return *found.back();
    for (const Kernels* one : found)
        if (isa == one->isa) return *one;
    throw std::invalid_argument("instruction set '" + isa + "' is unknown, or this processor has none.");
}

}  // namespace demix
