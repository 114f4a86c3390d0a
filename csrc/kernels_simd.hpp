// The vector kernels, written once. Included by one kernels_<isa>.cpp each, inside its anonymous namespace, after it has defined
// TARGET (the function attribute that turns the instruction set on) and `struct V`: lanes, rows and columns (results that are summed
// together, and vectors of each: what fits the registers), rows_past and columns_past (the same for results that are written past the
// caches), Float, load<In>, store<Out, PastCache>, splat, mul, fma (fma(a, b, c) =
// a * b + c), store_raw; and converts_pairs: whether it has store_pair<PastCache>, which writes two vectors as bf16 unless they hold
// what its Watch sees.

template <DType In, int Rows, int Columns>
struct Sums {
    typename V::Float of[Rows][Columns];

    // weights: of this source in the first row, and num_sources further in each other one.
    inline __attribute__((always_inline)) TARGET void add(const void* source, const float* weights, int num_sources, std::size_t i) {
        typename V::Float x[Columns];
#pragma GCC unroll 8
        for (int c = 0; c < Columns; ++c) x[c] = V::template load<In>(source, i + c * V::lanes);
#pragma GCC unroll 8
        for (int r = 0; r < Rows; ++r) {
            const typename V::Float w = V::splat(weights[r * num_sources]);
#pragma GCC unroll 8
            for (int c = 0; c < Columns; ++c) of[r][c] = V::fma(x[c], w, of[r][c]);
        }
    }

    static inline __attribute__((always_inline)) TARGET Sums at(const float* before, const void* const* sources, const float* weights,
                                                                int num_sources, std::size_t i) {
        constexpr std::size_t L = V::lanes;
        Sums sums;
        typename V::Float x[Columns];
        int k = 0;
        if (Rows == 1 && before) {
#pragma GCC unroll 8
            for (int c = 0; c < Columns; ++c) sums.of[0][c] = V::template load<DType::f32>(before, i + c * L);
        } else {
#pragma GCC unroll 8
            for (int c = 0; c < Columns; ++c) x[c] = V::template load<In>(sources[0], i + c * L);
#pragma GCC unroll 8
            for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 8
                for (int c = 0; c < Columns; ++c) sums.of[r][c] = V::mul(x[c], V::splat(weights[r * num_sources]));
            k = 1;
        }
        // One result's sources come from the memory: load instructions of its own for each (streams.hpp).
        if constexpr (Rows == 1) {
#pragma GCC unroll 8
            for (; k < num_sources; ++k) sums.add(sources[k], weights + k, num_sources, i);
        } else {
            for (; k < num_sources; ++k) sums.add(sources[k], weights + k, num_sources, i);
        }
        return sums;
    }
};

// n elements from i on of `Rows` results, as many columns of vectors at a time as fit. Returns how far it came.
template <DType In, DType Out, int Rows, int Columns, bool PastCache>
TARGET std::size_t sum_columns(const float* before, const void* const* sources, const float* weights, int num_sources,
                               void* const* dsts, std::size_t i, std::size_t n) {
    constexpr std::size_t L = V::lanes;
    for (; i + Columns * L <= n; i += Columns * L) {
        const auto sums = Sums<In, Rows, Columns>::at(before, sources, weights, num_sources, i);
#pragma GCC unroll 8
        for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 8
            for (int c = 0; c < Columns; ++c) V::template store<Out, PastCache>(dsts[r], i + c * L, sums.of[r][c]);
    }
    return i;
}

// The same to bf16 with the processor's own convert. Returns 0 if that has met a number it does not treat as the other instruction
// sets do: then none of the results counts.
template <DType In, int Rows, int Columns, bool PastCache, class Pairs = V>
TARGET std::size_t convert_columns(const float* before, const void* const* sources, const float* weights, int num_sources,
                                   void* const* dsts, std::size_t n) {
    constexpr std::size_t L = V::lanes;
    typename Pairs::Watch watch = Pairs::Watch::begin();
    std::size_t i = 0;
    for (; i + Columns * L <= n; i += Columns * L) {
        const auto sums = Sums<In, Rows, Columns>::at(before, sources, weights, num_sources, i);
#pragma GCC unroll 8
        for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 8
            for (int c = 0; c < Columns; c += 2) {
                Pairs::Watch::see(watch, sums.of[r][c], sums.of[r][c + 1]);
                Pairs::template store_pair<PastCache>(dsts[r], i + c * L, sums.of[r][c], sums.of[r][c + 1]);
            }
    }
    return Pairs::Watch::saw(watch) ? 0 : i;
}

template <DType In, DType Out, int Rows, int Columns, bool PastCache>
TARGET void sum_rows(const float* before, const void* const* sources, const float* weights, int num_sources, void* const* dsts,
                     std::size_t n) {
    std::size_t i = 0;
    if constexpr (V::converts_pairs && Out == DType::bf16)
        i = convert_columns<In, Rows, Columns, PastCache>(before, sources, weights, num_sources, dsts, n);
    i = sum_columns<In, Out, Rows, Columns, PastCache>(before, sources, weights, num_sources, dsts, i, n);
    i = sum_columns<In, Out, Rows, 1, false>(before, sources, weights, num_sources, dsts, i, n);
    for (int r = 0; r < Rows; ++r, weights += num_sources)
        for (std::size_t j = i; j < n; ++j) {
            float sum = before ? before[j] : weights[0] * load_element<In>(sources[0], j);
            for (int k = before ? 0 : 1; k < num_sources; ++k) sum = std::fma(weights[k], load_element<In>(sources[k], j), sum);
            store_element<Out>(dsts[r], j, sum);
        }
}

template <DType In, DType Out, int Rows>
TARGET void weighted_sum(const float* before, const void* const* sources, const float* weights, int num_sources, void* const* dsts,
                         std::size_t n, bool past_cache) {
    // One result by itself: several sums in flight hide the latency of the multiply-add.
    constexpr int rows = std::min(Rows, V::rows), columns = Rows == 1 ? std::max(V::columns, 4) : V::columns;
    constexpr int rows_past = std::min(Rows, V::rows_past), columns_past = V::columns_past;
    const int together = past_cache ? rows_past : rows;
    const auto sum = past_cache ? sum_rows<In, Out, rows_past, columns_past, true> : sum_rows<In, Out, rows, columns, false>;
    for (int r = 0; r < Rows; r += together) sum(before, sources, weights + r * num_sources, num_sources, dsts + r, n);
}

template <DType In>
TARGET void widen(const void* src, float* dst, std::size_t n) {
    std::size_t i = 0;
    for (; i + V::lanes <= n; i += V::lanes) V::store_raw(dst, i, V::template load<In>(src, i));
    for (; i < n; ++i) dst[i] = load_element<In>(src, i);
}

template <DType In>
TARGET bool not_finite(const void* src, std::size_t n) {
    return any_not_finite<In>(src, n);
}

const Kernels& table(const char* isa) {
    using D = DType;
    static const Kernels kernels = {isa, DEMIX_IN_OUT(weighted_sum, 1), DEMIX_IN_OUT(weighted_sum, row_block),
                                    {widen<D::f32>, widen<D::bf16>, widen<D::f16>},
                                    {not_finite<D::f32>, not_finite<D::bf16>, not_finite<D::f16>}};
    return kernels;
}
