// The portable kernels, and the choice between instruction sets.
#include <cmath>
#include <stdexcept>

#include "kernels.hpp"

namespace demix {
namespace {

template <DType In, DType Out>
void weighted_sum(const void* const* sources, const float* weights, int num_sources, void* dst, std::size_t n) {
    for (std::size_t i = 0; i < n; ++i) {
        float sum = weights[0] * load_element<In>(sources[0], i);
        for (int k = 1; k < num_sources; ++k) sum = std::fma(weights[k], load_element<In>(sources[k], i), sum);
        store_element<Out>(dst, i, sum);
    }
}

template <DType In>
void widen(const void* src, float* dst, std::size_t n) {
    for (std::size_t i = 0; i < n; ++i) dst[i] = load_element<In>(src, i);
}

}  // namespace

const Kernels& scalar_kernels() {
    using D = DType;
    static const Kernels table = {
        "scalar",
        {{weighted_sum<D::f32, D::f32>, weighted_sum<D::f32, D::bf16>, weighted_sum<D::f32, D::f16>},
         {weighted_sum<D::bf16, D::f32>, weighted_sum<D::bf16, D::bf16>, weighted_sum<D::bf16, D::f16>},
         {weighted_sum<D::f16, D::f32>, weighted_sum<D::f16, D::bf16>, weighted_sum<D::f16, D::f16>}},
        {widen<D::f32>, widen<D::bf16>, widen<D::f16>}};
    return table;
}

const Kernels& kernels(const std::string& isa) {
    if (isa == "scalar") return scalar_kernels();
    if (isa != "" && isa != "avx2" && isa != "avx512")
        throw std::invalid_argument("instruction set '" + isa + "' is unknown, expected scalar, avx2 or avx512.");
    const Kernels* found = isa == "avx2" ? nullptr : avx512_kernels();
    if (!found && isa != "avx512") found = avx2_kernels();
    if (!found && isa == "") found = &scalar_kernels();
    if (!found) throw std::invalid_argument("instruction set '" + isa + "' is not available on this processor.");
    return *found;
}

}  // namespace demix
