// The merge core under AddressSanitizer and UndefinedBehaviorSanitizer, without Python: random plans against a plain loop, random
// and mutated bytes into the look at pickles. Every buffer has exactly the size it needs, so that one element too far is seen.
// Usage: sanitized_merge SEED PLANS PICKLES
#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <set>
#include <string>
#include <thread>
#include <vector>

#include "crc32.hpp"
#include "delta_sum.hpp"
#include "kernels.hpp"
#include "merge.hpp"
#include "pickle_scan.hpp"
#include "tensor_statistics.hpp"

using namespace demix;

namespace {

std::mt19937_64 rng;

std::int64_t draw(std::int64_t lo, std::int64_t hi) { return lo + std::int64_t(rng() % std::uint64_t(hi - lo + 1)); }

#define CHECK(condition)                                                        \
    if (!(condition)) {                                                         \
        std::fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #condition);    \
        std::exit(1);                                                           \
    }

#define LITERAL(text) std::string(text, sizeof(text) - 1)

std::uint32_t plain_crc(const unsigned char* p, std::size_t n) {
    std::uint32_t r = ~0u;
    for (std::size_t i = 0; i < n; ++i) {
        r ^= p[i];
        for (int bit = 0; bit < 8; ++bit) r = (r >> 1) ^ (r & 1 ? 0xedb88320u : 0);
    }
    return ~r;
}

double read(const char* at, DType t) {
    if (t == DType::f32) return load_element<DType::f32>(at, 0);
    return t == DType::bf16 ? load_element<DType::bf16>(at, 0) : load_element<DType::f16>(at, 0);
}

struct Bytes {  // exactly n bytes, at an odd address if asked
    std::unique_ptr<char[]> memory;
    std::size_t shift, n;
    Bytes(std::size_t n, bool odd) : memory(new char[n + odd]), shift(odd), n(n) {}
    char* data() { return memory.get() + shift; }
};

// Inner products and order statistics of a plan's one target against plain loops.
template <class Value>
void check_statistics(const MergePlan& plan, const std::string& isa, std::int64_t elements, const Value& value) {
    const int K = plan.num_sources();
    const std::vector<double> products = gram(plan, false, int(draw(1, 3)), kernels(isa));
    double sum = 0;
    for (std::int64_t i = 0; i < elements; ++i) sum += double(value(0, i)) * value(K - 1, i);
    CHECK(std::fabs(products[K - 1] - sum) <= 1e-9 * double(elements) * 1000);
    if (K == 1) return;
    CHECK(gram(plan, true, 2, kernels(isa)).size() == std::size_t(K - 1) * (K - 1));
    std::vector<std::uint32_t> magnitudes;
    for (std::int64_t i = 0; i < elements; ++i) magnitudes.push_back(magnitude_bits(value(0, i) - value(K - 1, i)));
    std::sort(magnitudes.begin(), magnitudes.end());
    const std::int64_t rank = draw(0, elements - 1);
    CHECK(delta_magnitudes(plan, {0, rank}, 2, 2, kernels(isa))[1] == magnitudes[std::size_t(rank)]);
}

// The CRC of staggered sums, put together of pieces, against those of the buffers by themselves.
void random_checksums() {
    const std::size_t num = std::size_t(draw(1, 12)), n = std::size_t(draw(0, 3000));
    std::vector<std::unique_ptr<Bytes>> buffers;
    std::vector<const char*> at;
    std::uint32_t expected = 0, found = 0;
    for (std::size_t j = 0; j < num; ++j) {
        buffers.push_back(std::make_unique<Bytes>(n, draw(0, 1)));
        for (std::size_t i = 0; i < n; ++i) buffers[j]->data()[i] = char(draw(0, 255));
        expected ^= crc32_shift(crc32_raw(0, buffers[j]->data(), n), j);
        at.push_back(buffers[j]->data());
        CHECK(crc32(at[j], n) == plain_crc(reinterpret_cast<const unsigned char*>(at[j]), n));
    }
    for (std::size_t rest = n, count; rest; rest -= count) {
        count = draw(0, 1) ? rest : std::size_t(draw(1, std::int64_t(rest)));
        found = crc32_raw_staggered(found, at.data(), num, count);
        for (const char*& p : at) p += count;
    }
    CHECK(found == expected);
}

void random_plan() {
    const DType out = DType(draw(0, 2));
    const int dims = int(draw(1, 4)), num_sources = int(draw(0, 4) ? draw(1, 5) : draw(6, 20)), num_mixtures = int(draw(1, 5));
    std::vector<std::int64_t> shape;
    std::int64_t elements = 1;
    for (int d = 0; d < dims; ++d) shape.push_back(draw(1, dims == 1 ? 5000 : 17)), elements *= shape[d];
    const std::size_t size_out = item_size(out);
    std::vector<DType> in(num_sources, DType(draw(0, 2)));  // of one type, or of several
    if (draw(0, 2) == 0)
        for (DType& type : in) type = DType(draw(0, 2));

    MergePlan plan(num_sources);
    plan.add_target(shape, in, out);
    // Each source is one record with the whole target, its dimensions permuted; the target is cut into regions by random lines.
    std::vector<std::unique_ptr<Bytes>> sources;
    std::vector<std::vector<std::int64_t>> strides;
    for (int k = 0; k < num_sources; ++k) {
        sources.push_back(std::make_unique<Bytes>(std::size_t(elements) * item_size(in[k]), draw(0, 1)));
        char* p = sources.back()->data();
        for (std::int64_t i = 0; i < elements; ++i) {
            const float value = float(draw(-1000, 1000)) / 64;
            if (in[k] == DType::f32) store_element<DType::f32>(p, i, value);
            if (in[k] == DType::bf16) store_element<DType::bf16>(p, i, value);
            if (in[k] == DType::f16) store_element<DType::f16>(p, i, value);
        }
        std::vector<int> order;
        for (int d = 0; d < dims; ++d) order.push_back(d);
        if (draw(0, 2) == 0) std::shuffle(order.begin(), order.end(), rng);
        std::vector<std::int64_t> view(dims);
        std::int64_t step = 1;
        for (int i = dims - 1; i >= 0; --i) view[order[i]] = step, step *= shape[order[i]];
        strides.push_back(view);
        plan.add_record(p, sources.back()->n, plain_crc(reinterpret_cast<unsigned char*>(p), sources.back()->n));
    }
    // Bytes that are not those whose CRC was promised, at one place of any sources, and the same damage in each.
    std::vector<bool> damaged(num_sources, false);
    const std::size_t place = std::size_t(draw(0, elements - 1));
    const char damage = char(draw(1, 7));
    for (int k = 0; k < num_sources; ++k)
        if (draw(0, 3) == 0) damaged[k] = true, sources[k]->data()[place * item_size(in[k])] ^= damage;
    std::vector<std::vector<std::int64_t>> edges(dims);
    for (int d = 0; d < dims; ++d) {
        std::set<std::int64_t> cuts = {0, shape[d]};
        for (std::int64_t i = draw(0, 2); i > 0; --i) cuts.insert(draw(0, shape[d]));
        edges[d].assign(cuts.begin(), cuts.end());
    }
    // Regions have weights of their own, or all the same.
    const int num_sets = draw(0, 1) ? 1 : int(draw(2, 4));
    std::vector<int> set_of(elements, 0);
    std::vector<std::size_t> cell(dims, 0);
    for (;;) {
        std::vector<std::int64_t> lo, hi, flat;
        std::vector<std::uint64_t> offsets;
        std::vector<std::int32_t> records;
        for (int d = 0; d < dims; ++d) lo.push_back(edges[d][cell[d]]), hi.push_back(edges[d][cell[d] + 1]);
        for (int k = 0; k < num_sources; ++k) {
            std::int64_t from = 0;
            for (int d = 0; d < dims; ++d) from += lo[d] * strides[k][d];
            offsets.push_back(std::uint64_t(from) * item_size(in[k]));
            records.push_back(k);
            flat.insert(flat.end(), strides[k].begin(), strides[k].end());
        }
        std::int64_t index = 0;
        std::vector<std::int64_t> index_strides(dims, 1);
        for (int d = dims - 2; d >= 0; --d) index_strides[d] = index_strides[d + 1] * shape[d + 1];
        for (int d = 0; d < dims; ++d) index += lo[d] * index_strides[d];
        const int set = int(draw(0, num_sets - 1));
        for (std::int64_t i = 0; set && i < elements; ++i) {
            std::int64_t rest = i;
            bool inside = true;
            for (int d = dims - 1; d >= 0; --d) inside = inside && rest % shape[d] >= lo[d] && rest % shape[d] < hi[d], rest /= shape[d];
            if (inside) set_of[i] = set;
        }
        plan.add_region(0, lo, hi, set, records, offsets, flat, index, index_strides);
        int d = dims - 1;
        while (d >= 0 && ++cell[d] + 1 == edges[d].size()) cell[d] = 0, --d;
        if (d < 0) break;
    }

    std::vector<float> weights;
    for (int i = 0; i < num_sets * num_mixtures * num_sources; ++i) weights.push_back(draw(0, 3) ? float(draw(-8, 8)) / 8 : 0.0f);
    Settings settings;
    settings.num_sets = num_sets;
    settings.num_mixtures = num_mixtures;
    settings.weights = weights.data();
    settings.threads = int(draw(1, 3));
    settings.tile_bytes = std::size_t(draw(1, 40000));
    settings.check_sources = draw(0, 1);
    const std::vector<const Kernels*> sets = available_kernels();
    settings.isa = sets[draw(0, std::int64_t(sets.size()) - 1)]->isa;

    const std::string isa = settings.isa;
    const auto value = [&](int k, std::int64_t i) {  // of element i of the target, in its order
        std::int64_t from = 0;
        for (int d = dims - 1; d >= 0; --d) from += i % shape[d] * strides[k][d], i /= shape[d];
        return float(read(sources[k]->data() + from * item_size(in[k]), in[k]));
    };
    check_statistics(plan, isa, elements, value);
    DeltaRules rules;
    const bool thinned = num_sources > 1 && num_sets == 1 && draw(0, 1);
    if (thinned) {
        rules.keep = DeltaRules::Keep(draw(0, 2));
        rules.elect = draw(0, 1), rules.average = draw(0, 1);
        rules.density = 0.5, rules.epsilon = 0.25;
        for (int k = 0; k + 1 < num_sources; ++k) {
            rules.streams.push_back(rng());
            rules.windows.push_back(bits_of(1.0f)), rules.windows.push_back(bits_of(20.0f));
        }
        rules.tensors = &plan, rules.target = {0};
        rules.check(1, plan);
        for (int m = 0; m < num_mixtures; ++m) weights[(m + 1) * num_sources - 1] = 1.0f;
        settings.deltas = &rules;
    }
    const auto thin = [&](int k, std::int64_t i) {
        const float d = value(k, i) - value(num_sources - 1, i);
        if (rules.keep == DeltaRules::Keep::window) return std::fabs(d) >= 1.0f && std::fabs(d) <= 20.0f ? d : 0.0f;
        return random_bits(rules.streams[k], std::uint64_t(i)) < 0x80000000u ? 2 * d : 0.0f;
    };

    // A tensor without elements, which writes nothing anywhere.
    const bool with_empty = draw(0, 1);
    if (with_empty) plan.add_target({draw(0, 3), 0, draw(0, 3)}, in, out);
    const bool to_files = draw(0, 1), direct = to_files && draw(0, 1);
    Destinations to;
    std::vector<std::unique_ptr<Bytes>> outs;
    for (int m = 0; m < num_mixtures; ++m) {
        outs.push_back(std::make_unique<Bytes>(std::size_t(elements) * size_out, draw(0, 1)));
        if (to_files) {
            char path[] = "/var/tmp/sanitized_merge_XXXXXX";  // /tmp may be a file system without direct writes
            to.descriptors.push_back(::mkstemp(path));
            CHECK(to.descriptors.back() >= 0);
            if (direct) to.direct_descriptors.push_back(::open(path, O_WRONLY | O_DIRECT));
            ::unlink(path);
        } else {
            to.addresses.push_back(outs.back()->data());
        }
    }
    to.offsets = {std::uint64_t(draw(0, 1) ? draw(0, 100) : 4096 * draw(0, 3))};
    if (with_empty) {
        for (auto* list : {&to.descriptors, &to.direct_descriptors}) list->insert(list->end(), list->begin(), list->end());
        if (!to_files) to.addresses.insert(to.addresses.end(), num_mixtures, nullptr);
        to.offsets.push_back(to.offsets[0]);
    }
    const Outcome outcome = plan.run(settings, to);
    CHECK(outcome.error == 0);
    for (int k = 0; settings.check_sources && k < num_sources; ++k) {
        bool read = false;
        for (int i = k; i < int(weights.size()); i += num_sources) read = read || weights[i] != 0.0f;
        CHECK(outcome.damaged[k] == (read && damaged[k]));
    }
    for (int m = 0; m < num_mixtures; ++m) {
        char* got = outs[m]->data();
        if (to_files) {
            CHECK(::pread(to.descriptors[m], got, outs[m]->n, off_t(to.offsets[0])) == ssize_t(outs[m]->n));
            CHECK(outcome.crcs[m] == plain_crc(reinterpret_cast<unsigned char*>(got), outs[m]->n));
            if (with_empty) CHECK(outcome.crcs[num_mixtures + m] == plain_crc(nullptr, 0));
            ::close(to.descriptors[m]);
            if (direct && to.direct_descriptors[m] >= 0) ::close(to.direct_descriptors[m]);
        }
        if (thinned && (rules.elect || rules.keep == DeltaRules::Keep::row_rank)) continue;  // the Python tests know what is right
        for (std::int64_t i = 0; i < elements; ++i) {
            double sum = 0, size = 0;
            for (int k = 0; k < num_sources; ++k) {
                const double x = thinned && k + 1 < num_sources ? thin(k, i) : value(k, i);
                const double term = double(weights[(set_of[i] * num_mixtures + m) * num_sources + k]) * x;
                sum += term, size += std::fabs(term);
            }
            const double unit = out == DType::f32 ? 0x1p-24 : out == DType::bf16 ? 0x1p-8 : 0x1p-11;
            CHECK(std::fabs(read(got + i * size_out, out) - sum) <= (std::fabs(sum) + size * 1e-6) * unit * 1.001 + size * 1e-6 + 0x1p-25);
        }
    }
}

#if !defined(__SANITIZE_THREAD__)  // the race is meant
// Order statistics take two passes. A file that is changed between them has other counts, and may give any number, but no more.
void changing_source() {
    constexpr std::int64_t n = 1 << 16;
    std::vector<float> values(n, 1.0f), base(n, 0.0f);
    MergePlan plan(2);
    plan.add_record(values.data(), n * sizeof(float), 0);
    plan.add_record(base.data(), n * sizeof(float), 0);
    plan.add_target({n}, {DType::f32, DType::f32}, DType::f32);
    plan.add_region(0, {0}, {n}, 0, {0, 1}, {0, 0}, {1, 1});
    std::atomic<bool> done{false};
    std::thread changes([&] {
        for (float value = 0; !done.load(); value = 1 - value)
            for (volatile float& v : values) v = value;
    });
    for (int i = 0; i < 500; ++i) delta_magnitudes(plan, {n - 1}, 1, 1, kernels(""));
    done.store(true);
    changes.join();
}
#endif

void random_pickle(const std::vector<std::string>& seeds) {
    std::string data = seeds[draw(0, std::int64_t(seeds.size()) - 1)];
    for (std::int64_t i = draw(0, 6); i > 0 && !data.empty(); --i) {
        const std::size_t at = std::size_t(draw(0, std::int64_t(data.size()) - 1));
        switch (draw(0, 3)) {
            case 0: data[at] = char(draw(0, 255)); break;
            case 1: data.erase(at, std::size_t(draw(1, 8))); break;
            case 2: data.insert(at, std::string(std::size_t(draw(1, 8)), char(draw(0, 255)))); break;
            default: data.resize(at);
        }
    }
    const std::unique_ptr<unsigned char[]> exact(new unsigned char[data.size()]);
    std::memcpy(exact.get(), data.data(), data.size());
    const std::int64_t found = pickle_scan(exact.get(), data.size());
    CHECK(found >= -1 && found <= std::int64_t(data.size()));
}

}  // namespace

int main(int argc, char** argv) {
    CHECK(argc == 4);
    rng.seed(std::strtoull(argv[1], nullptr, 10));
    const long plans = std::atol(argv[2]), pickles = std::atol(argv[3]);
    for (long i = 0; i < plans; ++i) random_plan(), random_checksums();
#if !defined(__SANITIZE_THREAD__)
    changing_source();
#endif
    const std::vector<std::string> seeds = {
        LITERAL("\x80\x02}q\x00(X\x01\x00\x00\x00" "aq\x01K\x01X\x01\x00\x00\x00" "bq\x02" "ctorch\nSize\nq\x03u."),
        LITERAL("\x80\x04\x95\x20\x00\x00\x00\x00\x00\x00\x00}\x94(\x8c\x01" "a\x94]\x94(K\x01" "G?\xf0\x00\x00\x00\x00\x00\x00" "eu."),
        "(dp0\nS'a'\np1\nI1\nsF2.5\nL3L\n.",
    };
    for (long i = 0; i < pickles; ++i) random_pickle(seeds);
    std::printf("%ld plans, %ld pickles: no error\n", plans, pickles);
}
