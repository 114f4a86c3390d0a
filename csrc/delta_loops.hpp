// Plain loops for compilers to vectorise. Included once for each instruction set, in a namespace of its own, with TARGET defined as
// the function attribute that turns the set on. Products and sums must not be fused: setup.py compiles with -ffp-contract=off.

TARGET void subtract(float* d, const float* base, std::size_t n) {
    for (std::size_t i = 0; i < n; ++i) d[i] -= base[i];
}

TARGET void keep_window(float* d, std::size_t n, std::uint32_t lowest, std::uint32_t highest) {
    for (std::size_t i = 0; i < n; ++i) {
        const std::uint32_t u = magnitude_bits(d[i]);
        d[i] = (u >= lowest) & (u <= highest) ? d[i] : 0.0f;
    }
}

TARGET void keep_random(float* d, std::size_t n, std::uint64_t stream, std::uint64_t index, std::uint64_t threshold, float factor) {
    for (std::size_t i = 0; i < n; ++i) d[i] = random_bits(stream, index + i) < threshold ? d[i] * factor : 0.0f;
}

TARGET void add(const float* d, float weight, float* total, std::size_t n) {
    for (std::size_t i = 0; i < n; ++i) {
        const float term = weight * d[i];
        total[i] += term;
    }
}

TARGET void add_agreeing(const float* d, float weight, const float* total, float* sum, float* used, std::size_t n) {
    for (std::size_t i = 0; i < n; ++i) {
        const float term = weight * d[i];
        const bool positive = total[i] >= 0.0f;
        const bool agrees = (positive & (term > 0.0f)) | (!positive & (term < 0.0f)) | (term != term);
        sum[i] += agrees ? term : 0.0f;
        used[i] += agrees ? weight : 0.0f;
    }
}

TARGET void divide(float* sum, const float* used, std::size_t n) {
    for (std::size_t i = 0; i < n; ++i) sum[i] /= used[i] != 0.0f ? used[i] : 1.0f;
}

TARGET double dot(const double* a, const double* b, std::size_t n) {
    double sums[8] = {};
    for (std::size_t i = 0; i < n; i += 8)
        for (std::size_t lane = 0; lane < 8; ++lane) {
            const double product = a[i + lane] * b[i + lane];
            sums[lane] += product;
        }
    return ((sums[0] + sums[1]) + (sums[2] + sums[3])) + ((sums[4] + sums[5]) + (sums[6] + sums[7]));
}

const DeltaKernels table = {subtract, keep_window, keep_random, add, add_agreeing, divide, dot};
