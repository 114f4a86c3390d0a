// The CUDA merge on the CPU: the lines that run on a GPU (csrc/cuda/pack_sum.hpp, launches.hpp), block by block and thread by thread,
// against the portable kernels. Loads and stores check the alignment a GPU insists on; AddressSanitizer checks where they lead.
// Usage: cuda_on_host SEED CASES FLOATS   (FLOATS: of 2^32, how many are narrowed; 4294967296 is every one)
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <random>
#include <vector>

#include "cuda/launches.hpp"
#include "kernels.hpp"

using namespace demix;

namespace {

std::mt19937_64 rng;

std::int64_t draw(std::int64_t lo, std::int64_t hi) { return lo + std::int64_t(rng() % std::uint64_t(hi - lo + 1)); }

#define CHECK(condition)                                                     \
    if (!(condition)) {                                                      \
        std::fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #condition); \
        std::exit(1);                                                        \
    }

struct HostMemory {
    template <int bytes>
    static void load(const void* from, Pack& to) {
        CHECK(reinterpret_cast<std::uintptr_t>(from) % bytes == 0);
        std::memset(&to, 0, sizeof(to));
        std::memcpy(to.words, from, bytes);
    }
    template <int bytes>
    static void store(void* to, const std::uint32_t* words) {
        CHECK(reinterpret_cast<std::uintptr_t>(to) % (bytes < 16 ? bytes : 16) == 0);
        std::memcpy(to, words, bytes);
    }
};

// A device whose blocks run one after the other.
struct Host {
    long long launches = 0, copies = 0;

    int copy(void* to, const void* from, std::size_t bytes) {
        ++copies;
        std::memcpy(to, from, bytes);
        return 0;
    }
    int zero(void* to, std::size_t bytes) {
        std::memset(to, 0, bytes);
        return 0;
    }
    int launch(const Operands& op, DType in, DType out, int group, int tile, unsigned num_blocks) {
        ++launches;
        CHECK(num_blocks % unsigned(op.num_groups) == 0 && num_blocks > 0);
        const auto shared = std::make_unique<Operands>(op);
        with_kernel(in, out, group, tile, [&](auto i, auto o, auto g, auto t) {
            for (unsigned block = 0; block < num_blocks; ++block)
                for (unsigned thread = 0; thread < block_threads; ++thread)
                    thread_work<i(), o(), g(), t(), HostMemory>(*shared, block, num_blocks, thread);
        });
        return 0;
    }
};

struct Elements {  // exactly n elements, `shift` elements off 16-byte alignment
    std::unique_ptr<char, decltype(&std::free)> memory;
    char* data;
    Elements(std::size_t n, std::size_t item, std::size_t shift) : memory(nullptr, &std::free) {
        void* p = nullptr;
        CHECK(posix_memalign(&p, 64, (n + shift) * item + (n + shift == 0)) == 0);
        memory.reset(static_cast<char*>(p));
        data = memory.get() + shift * item;
    }
};

const float edges[] = {0.0f, -0.0f, INFINITY, -INFINITY, NAN, 1e-40f, -1e-40f, 6e-8f, 65519.0f, 65520.0f, 3.39e38f, -3.4e38f, 1.0f};

void store_as(void* base, std::size_t i, DType t, float f) {
    if (t == DType::f32) store_element<DType::f32>(base, i, f);
    if (t == DType::bf16) store_element<DType::bf16>(base, i, f);
    if (t == DType::f16) store_element<DType::f16>(base, i, f);
}

void random_case() {
    const DType in = DType(draw(0, 2)), out = DType(draw(0, 2));
    const std::size_t item_in = item_size(in), item_out = item_size(out);
    const int num_sources = int(draw(0, 9) ? draw(1, 18) : draw(19, max_sources)), num_mixtures = int(draw(0, 3) ? draw(0, 12) : draw(13, 70));
    const std::size_t n = std::size_t(draw(0, 4) ? draw(0, 300) : draw(300, 5000));
    const bool aligned = draw(0, 2);
    std::vector<std::unique_ptr<Elements>> sources, outs;
    std::vector<const void*> from;
    std::vector<void*> to;
    for (int k = 0; k < num_sources; ++k) {
        sources.push_back(std::make_unique<Elements>(n, item_in, aligned ? 0 : std::size_t(draw(0, 3))));
        from.push_back(sources.back()->data);
        for (std::size_t i = 0; i < n; ++i)
            store_as(sources.back()->data, i, in, draw(0, 15) ? float(draw(-100000, 100000)) / 777 : edges[draw(0, 12)]);
        // Payloads of NaNs: what a lone weight of 1 must keep.
        if (n && draw(0, 1)) std::memset(sources.back()->data + (n - 1) * item_in, 0xff, item_in);
    }
    std::vector<float> weights;
    const int zeros = int(draw(0, 2));
    for (int m = 0; m < num_mixtures; ++m) {
        const int kind = int(draw(0, 7)), lone = int(draw(0, num_sources - 1));
        for (int k = 0; k < num_sources; ++k)
            weights.push_back(kind == 0 ? float(k == lone) : kind == 1 ? 0.0f : zeros && draw(0, 2) < zeros ? 0.0f : float(draw(-999, 999)) / 512);
        outs.push_back(std::make_unique<Elements>(n, item_out, aligned ? 0 : std::size_t(draw(0, 3))));
        to.push_back(outs.back()->data);
        if (n) std::memset(outs.back()->data, 0xa5, n * item_out);
    }
    Host host;
    CHECK(launch_all(host, from.data(), to.data(), weights.data(), num_sources, num_mixtures, n, in, out, std::size_t(draw(1, 40) * 4)) == 0);

    const Elements expected(n, item_out, 0);
    for (int m = 0; m < num_mixtures; ++m) {
        std::vector<const void*> terms;
        std::vector<float> factors;
        for (int k = 0; k < num_sources; ++k)
            if (const float w = weights[std::size_t(m) * num_sources + k]; w != 0.0f) terms.push_back(from[k]), factors.push_back(w);
        if (n == 0) continue;
        if (terms.empty())
            std::memset(expected.data, 0, n * item_out);
        else if (terms.size() == 1 && factors[0] == 1.0f && in == out)
            std::memcpy(expected.data, terms[0], n * item_in);
        else {
            void* const to_expected[] = {expected.data};
            scalar_kernels().one_row[int(in)][int(out)](nullptr, terms.data(), factors.data(), int(terms.size()), to_expected, n, false);
        }
        CHECK(std::memcmp(expected.data, to[m], n * item_out) == 0);
    }
}

// Of two neighbouring half-precision numbers the nearer one, the even one of a tie; found by comparing, not by shifting.
std::uint16_t nearest(float f, float (*widen)(std::uint16_t), std::uint16_t infinity, std::uint16_t nan) {
    if (f != f) return nan;
    const std::uint16_t sign = bits_of(f) >> 31 ? 0x8000 : 0;
    const double x = std::fabs(double(f));
    std::uint16_t lo = 0, hi = infinity;  // widen(lo) <= x < widen(hi), or x is infinite
    if (std::isinf(x)) return std::uint16_t(sign | infinity);
    while (hi - lo > 1) {
        const std::uint16_t middle = std::uint16_t((lo + hi) / 2);
        (double(widen(middle)) <= x ? lo : hi) = middle;
    }
    // Infinity stands where the next number would be.
    const double below = widen(lo), above = hi == infinity ? 2 * below - double(widen(std::uint16_t(lo - 1))) : double(widen(hi));
    const bool up = x - below > above - x || (x - below == above - x && (lo & 1));
    return std::uint16_t(sign | (up ? hi : lo));
}

void check_narrowing(std::uint32_t bits) {
    const float f = float_from_bits(bits);
    CHECK(narrow_bits<DType::bf16>(f) == nearest(f, bf16_to_float, 0x7f80, 0x7fc0));
    CHECK(narrow_bits<DType::f16>(f) == nearest(f, f16_to_float, 0x7c00, 0x7e00));
    CHECK(narrow_bits<DType::f32>(f) == (f != f ? 0x7fc00000u : bits));
}

}  // namespace

int main(int argc, char** argv) {
    CHECK(argc == 4);
    rng.seed(std::strtoull(argv[1], nullptr, 10));
    const long cases = std::atol(argv[2]);
    const std::uint64_t floats = std::strtoull(argv[3], nullptr, 10);
    for (std::uint32_t h = 0; h < 1u << 16; ++h) {  // every 16-bit pattern, in both halves of a word
        const std::uint32_t words[1] = {h | h << 16};
        const float b = bf16_to_float(std::uint16_t(h)), f = f16_to_float(std::uint16_t(h));
        for (int e = 0; e < 2; ++e) {
            CHECK(bits_of(widen_element<DType::bf16>(words, e)) == bits_of(b));
            CHECK(bits_of(widen_element<DType::f16>(words, e)) == bits_of(f));
        }
        if (b == b) CHECK(narrow_bits<DType::bf16>(b) == h);
        if (f == f) CHECK(narrow_bits<DType::f16>(f) == h);
    }
    const std::uint64_t step = (1ull << 32) / floats;
    for (std::uint64_t i = 0; i < floats; ++i) check_narrowing(std::uint32_t(i * step + (step > 1 ? rng() % step : 0)));
    // Where rounding turns over: every upper half with the lower halves around ties of both types.
    if (step > 1)
        for (std::uint32_t upper = 0; upper < 1u << 16; upper += 3)
            for (const std::uint32_t lower : {0u, 1u, 0xfffu, 0x1000u, 0x1001u, 0x7fffu, 0x8000u, 0x8001u, 0xf000u, 0xffffu})
                check_narrowing(upper << 16 | lower);
    for (long i = 0; i < cases; ++i) random_case();
    std::printf("%ld cases, %llu floats: the same bits\n", cases, static_cast<unsigned long long>(floats));
}
