// The vector kernels, written once. Included by one kernels_<isa>.cpp each, inside its anonymous namespace, after it has defined
// TARGET (the function attribute that turns the instruction set on) and `struct V`: lanes, Float, load<In>, store<Out>, splat,
// mul, fma (fma(a, b, c) = a * b + c).

template <DType In, DType Out>
TARGET void weighted_sum(const void* const* sources, const float* weights, int num_sources, void* dst, std::size_t n) {
    constexpr std::size_t L = V::lanes, step = 4 * L;  // four sums in flight hide the latency of the multiply-add
    std::size_t i = 0;
    for (; i + step <= n; i += step) {
        typename V::Float w = V::splat(weights[0]);
        typename V::Float a = V::mul(V::template load<In>(sources[0], i), w);
        typename V::Float b = V::mul(V::template load<In>(sources[0], i + L), w);
        typename V::Float c = V::mul(V::template load<In>(sources[0], i + 2 * L), w);
        typename V::Float d = V::mul(V::template load<In>(sources[0], i + 3 * L), w);
        for (int k = 1; k < num_sources; ++k) {
            const void* source = sources[k];
            w = V::splat(weights[k]);
            a = V::fma(V::template load<In>(source, i), w, a);
            b = V::fma(V::template load<In>(source, i + L), w, b);
            c = V::fma(V::template load<In>(source, i + 2 * L), w, c);
            d = V::fma(V::template load<In>(source, i + 3 * L), w, d);
        }
        V::template store<Out>(dst, i, a);
        V::template store<Out>(dst, i + L, b);
        V::template store<Out>(dst, i + 2 * L, c);
        V::template store<Out>(dst, i + 3 * L, d);
    }
    for (; i + L <= n; i += L) {
        typename V::Float a = V::mul(V::template load<In>(sources[0], i), V::splat(weights[0]));
        for (int k = 1; k < num_sources; ++k) a = V::fma(V::template load<In>(sources[k], i), V::splat(weights[k]), a);
        V::template store<Out>(dst, i, a);
    }
    for (; i < n; ++i) {
        float sum = weights[0] * load_element<In>(sources[0], i);
        for (int k = 1; k < num_sources; ++k) sum = std::fma(weights[k], load_element<In>(sources[k], i), sum);
        store_element<Out>(dst, i, sum);
    }
}

template <DType In>
TARGET void widen(const void* src, float* dst, std::size_t n) {
    std::size_t i = 0;
    for (; i + V::lanes <= n; i += V::lanes) V::store_raw(dst, i, V::template load<In>(src, i));
    for (; i < n; ++i) dst[i] = load_element<In>(src, i);
}

const Kernels& table(const char* isa) {
    using D = DType;
    static const Kernels kernels = {
        isa,
        {{weighted_sum<D::f32, D::f32>, weighted_sum<D::f32, D::bf16>, weighted_sum<D::f32, D::f16>},
         {weighted_sum<D::bf16, D::f32>, weighted_sum<D::bf16, D::bf16>, weighted_sum<D::bf16, D::f16>},
         {weighted_sum<D::f16, D::f32>, weighted_sum<D::f16, D::bf16>, weighted_sum<D::f16, D::f16>}},
        {widen<D::f32>, widen<D::bf16>, widen<D::f16>}};
    return kernels;
}
