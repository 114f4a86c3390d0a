// Mutates sound inputs of the three parsers that read files from elsewhere, and follows whatever they accept. Built with
// AddressSanitizer and UBSan: a read outside a buffer ends the process.  fuzz_formats EXECUTIONS SEED
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "index_file.hpp"
#include "json_lines.hpp"
#include "pickle_scan.hpp"

using Bytes = std::vector<std::uint8_t>;

namespace {

template <class T>
void put(Bytes& b, T value) {
    const auto* p = reinterpret_cast<const std::uint8_t*>(&value);
    b.insert(b.end(), p, p + sizeof value);
}

Bytes index_file(std::mt19937_64& random, std::uint64_t& bin_bytes) {
    Bytes b(9, 0);
    std::memcpy(b.data(), "MMIDIDX", 7);
    const std::uint64_t n = random() % 6;
    put<std::uint64_t>(b, 1);
    put<std::uint8_t>(b, static_cast<std::uint8_t>(1 + random() % 8));
    put<std::uint64_t>(b, n);
    put<std::uint64_t>(b, n + 1);
    for (std::uint64_t i = 0; i < n; ++i) put<std::int32_t>(b, static_cast<std::int32_t>(random() % 9));
    for (std::uint64_t i = 0; i < n; ++i) put<std::int64_t>(b, static_cast<std::int64_t>(random() % 9));
    for (std::uint64_t i = 0; i <= n; ++i) put<std::int64_t>(b, static_cast<std::int64_t>(i));
    bin_bytes = random() % 200;
    return b;
}

Bytes json_file(std::mt19937_64& random) {
    static const char* const lines[] = {
        R"({"text": "plain", "id": 1})", R"({"meta": {"a": [1, -2.5e3, null, true]}, "text": "x\n\u00e9\ud83d\ude00"})",
        R"({"text": ""})", "", "  ", R"({"a": [[[[{}]]]], "text": "\\\"\/\b\f\r\t"})", "{\"text\": \"\xc3\xa9\xf0\x9f\x99\x82\"}"};
    std::string s;
    for (auto n = random() % 5; n-- > 0;) s += lines[random() % 7], s += '\n';
    return {s.begin(), s.end()};
}

Bytes pickle_file(std::mt19937_64& random) {
    // One of each kind of argument: none, fixed, counted, a line, two lines, a place in the memo.
    static const std::string pieces[] = {"(", "}", "t", "N", "\x88", std::string("K\x05", 2), std::string("M\x01\x02", 3),
                                         std::string("G\0\0\0\0\0\0\0\0", 9), std::string("X\x03\0\0\0abc", 8), std::string("U\x02xy", 4),
                                         std::string("\x8c\x01z", 3), std::string("\x8d\x02\0\0\0\0\0\0\0uv", 11), "I12\n", "p3\n",
                                         "cos\nsystem\n", std::string("q\x01", 2), std::string("r\x02\0\0\0", 5), "h\x01"};
    std::string s("\x80\x02", 2);
    for (auto n = random() % 12; n-- > 0;) s += pieces[random() % (sizeof pieces / sizeof *pieces)];
    s += '.';
    return {s.begin(), s.end()};
}

void mutate(Bytes& b, std::mt19937_64& random) {
    static const std::int64_t extremes[] = {0, -1, 1, INT64_MAX, INT64_MIN, INT32_MAX, INT32_MIN, 1ll << 40, UINT32_MAX};
    for (auto times = random() % 4; times-- > 0 && !b.empty();) {
        const auto at = random() % b.size();
        switch (random() % 6) {
            case 0: b[at] ^= static_cast<std::uint8_t>(1u << random() % 8); break;
            case 1: b[at] = static_cast<std::uint8_t>(random()); break;
            case 2: b.resize(at); break;
            case 3: b.insert(b.begin() + static_cast<std::ptrdiff_t>(at), static_cast<std::uint8_t>(random())); break;
            case 4: b.insert(b.end(), random() % 9, static_cast<std::uint8_t>(random())); break;
            default:
                if (b.size() >= at + 8) std::memcpy(b.data() + at, &extremes[random() % 9], 8);
        }
    }
}

// The parsers get exactly-sized heap blocks, so that one byte too far is seen.
bool try_index(const Bytes& b, std::uint64_t bin_bytes) {
    const std::unique_ptr<std::uint8_t[]> data(new std::uint8_t[b.size()]);
    std::memcpy(data.get(), b.data(), b.size());
    const auto c = demix::check_index(data.get(), b.size(), bin_bytes);
    if (c.problem != demix::IndexProblem::none) return false;
    const std::unique_ptr<std::uint8_t[]> bin(new std::uint8_t[bin_bytes]());
    static const int item[] = {0, 1, 1, 2, 4, 8, 8, 4, 2};
    volatile std::uint8_t sink = 0;
    for (std::int64_t i = 0; i < c.sequences; ++i) {
        std::int32_t length;
        std::int64_t pointer;
        std::memcpy(&length, data.get() + 34 + 4 * i, 4);
        std::memcpy(&pointer, data.get() + 34 + 4 * c.sequences + 8 * i, 8);
        for (std::int64_t j = 0; j < static_cast<std::int64_t>(length) * item[c.dtype_code]; ++j) sink = bin[pointer + j];
    }
    (void)sink;
    return true;
}

bool try_json(const Bytes& b) {
    std::size_t lines = 1;
    for (const auto c : b) lines += c == '\n';
    const std::unique_ptr<char[]> data(new char[b.size()]);
    if (!b.empty()) std::memcpy(data.get(), b.data(), b.size());
    const std::unique_ptr<std::uint8_t[]> content(new std::uint8_t[b.size()]);
    const std::unique_ptr<std::int64_t[]> offsets(new std::int64_t[lines + 1]), numbers(new std::int64_t[lines]);
    return demix::scan_json_lines(data.get(), b.size(), "text", 4, content.get(), offsets.get(), numbers.get()).plain;
}

bool try_pickle(const Bytes& b) {
    const std::unique_ptr<std::uint8_t[]> data(new std::uint8_t[b.size()]);
    if (!b.empty()) std::memcpy(data.get(), b.data(), b.size());
    const std::int64_t at = demix::pickle_scan(data.get(), b.size());
    if (at < -1 || at > std::int64_t(b.size())) std::abort();
    return at == -1;
}

}  // namespace

int main(int, char** arguments) {
    const auto executions = std::atoll(arguments[1]);
    std::mt19937_64 random(static_cast<std::uint64_t>(std::atoll(arguments[2]))), random_pickles = random;
    long long accepted_indexes = 0, accepted_lines = 0, accepted_pickles = 0;
    for (long long i = 0; i < executions; ++i) {
        std::uint64_t bin_bytes;
        Bytes index = index_file(random, bin_bytes), lines = json_file(random), pickled = pickle_file(random_pickles);
        mutate(index, random);
        mutate(lines, random);
        mutate(pickled, random_pickles);
        accepted_indexes += try_index(index, bin_bytes);
        accepted_lines += try_json(lines);
        accepted_pickles += try_pickle(pickled);
    }
    std::printf("%lld %lld %lld %lld\n", executions, accepted_indexes, accepted_lines, accepted_pickles);
}
