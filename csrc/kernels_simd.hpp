// The vector kernels, written once. Included by one kernels_<isa>.cpp each, inside its anonymous namespace, after it has defined
// TARGET (the function attribute that turns the instruction set on) and `struct V`: lanes, columns (vectors of one result that fit
// the registers beside those of row_block - 1 others), Float, load<In>, store<Out>, splat, mul, fma (fma(a, b, c) = a * b + c),
// store_raw, stream (64 bytes to an aligned address).

// n elements from i on of `Rows` results, as many columns of vectors at a time as fit. Returns how far it came.
template <DType In, DType Out, int Rows, int Columns>
TARGET std::size_t sum_columns(const void* const* sources, const float* weights, int num_sources, void* const* dsts, std::size_t i,
                               std::size_t n) {
    constexpr std::size_t L = V::lanes;
    for (; i + Columns * L <= n; i += Columns * L) {
        typename V::Float sums[Rows][Columns], x[Columns];
#pragma GCC unroll 8
        for (int c = 0; c < Columns; ++c) x[c] = V::template load<In>(sources[0], i + c * L);
#pragma GCC unroll 8
        for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 8
            for (int c = 0; c < Columns; ++c) sums[r][c] = V::mul(x[c], V::splat(weights[r * num_sources]));
        for (int k = 1; k < num_sources; ++k) {
#pragma GCC unroll 8
            for (int c = 0; c < Columns; ++c) x[c] = V::template load<In>(sources[k], i + c * L);
#pragma GCC unroll 8
            for (int r = 0; r < Rows; ++r) {
                const typename V::Float w = V::splat(weights[r * num_sources + k]);
#pragma GCC unroll 8
                for (int c = 0; c < Columns; ++c) sums[r][c] = V::fma(x[c], w, sums[r][c]);
            }
        }
#pragma GCC unroll 8
        for (int r = 0; r < Rows; ++r) V::template store<Out, Columns>(dsts[r], i, sums[r]);
    }
    return i;
}

template <DType In, DType Out, int Rows>
TARGET void weighted_sum(const void* const* sources, const float* weights, int num_sources, void* const* dsts, std::size_t n) {
    // Several sums in flight hide the latency of the multiply-add.
    std::size_t i = sum_columns<In, Out, Rows, Rows == 1 ? 4 : V::columns>(sources, weights, num_sources, dsts, 0, n);
    i = sum_columns<In, Out, Rows, 1>(sources, weights, num_sources, dsts, i, n);
    for (int r = 0; r < Rows; ++r, weights += num_sources)
        for (std::size_t j = i; j < n; ++j) {
            float sum = weights[0] * load_element<In>(sources[0], j);
            for (int k = 1; k < num_sources; ++k) sum = std::fma(weights[k], load_element<In>(sources[k], j), sum);
            store_element<Out>(dsts[r], j, sum);
        }
}

template <DType In>
TARGET void widen(const void* src, float* dst, std::size_t n) {
    std::size_t i = 0;
    for (; i + V::lanes <= n; i += V::lanes) V::store_raw(dst, i, V::template load<In>(src, i));
    for (; i < n; ++i) dst[i] = load_element<In>(src, i);
}

TARGET void stream_copy(char* to, const char* from, std::size_t n) {
    const std::size_t head = std::min(n, std::size_t(-reinterpret_cast<std::uintptr_t>(to) % 64));
    std::memcpy(to, from, head);
    to += head, from += head, n -= head;
    for (; n >= 64; to += 64, from += 64, n -= 64) V::stream(to, from);
    std::memcpy(to, from, n);
}

const Kernels& table(const char* isa) {
    using D = DType;
    static const Kernels kernels = {isa, DEMIX_IN_OUT(weighted_sum, 1), DEMIX_IN_OUT(weighted_sum, row_block),
                                    {widen<D::f32>, widen<D::bf16>, widen<D::f16>}, stream_copy};
    return kernels;
}
