#include "json_lines.hpp"

#include <algorithm>
#include <cstring>

namespace demix {
namespace {

constexpr int kDepth = 64;

// A cursor over one line. Every function returns false where the slow path must decide.
class Line {
  public:
    Line(const char* begin, const char* end) : p_(begin), end_(end) {}

    // The object's string under `key`, unescaped, to `out`; `out` is moved past it.
    bool text(const char* key, std::size_t key_size, std::uint8_t*& out) {
        bool found = false;
        if (!open('{')) return false;
        blank();
        if (p_ != end_ && *p_ == '}') return false;
        while (true) {
            blank();
            const char* name = p_ + 1;
            bool escaped = false;
            if (!skip_string(escaped) || escaped) return false;
            const bool wanted = static_cast<std::size_t>(p_ - 1 - name) == key_size && std::memcmp(name, key, key_size) == 0;
            blank();
            if (p_ == end_ || *p_++ != ':') return false;
            blank();
            if (wanted) {
                if (found || !unescape(out)) return false;
                found = true;
            } else if (!skip_value(0)) {
                return false;
            }
            blank();
            if (p_ == end_) return false;
            const char c = *p_++;
            if (c == '}') break;
            if (c != ',') return false;
        }
        blank();
        return found && p_ == end_;
    }

  private:
    void blank() {
        while (p_ != end_ && (*p_ == ' ' || *p_ == '\t' || *p_ == '\r')) ++p_;
    }

    // The high bit of the first byte, and perhaps of later ones, that is a quote, a backslash or a control character.
    static std::uint64_t specials(std::uint64_t word) {
        constexpr std::uint64_t kOnes = 0x0101010101010101ull, kHigh = 0x8080808080808080ull;
        const auto zero_byte = [](std::uint64_t x) { return (x - kOnes) & ~x; };
        return (zero_byte(word ^ kOnes * '"') | zero_byte(word ^ kOnes * '\\') | ((word - kOnes * 0x20) & ~word)) & kHigh;
    }

    static bool is_special(char c) { return c == '"' || c == '\\' || static_cast<unsigned char>(c) < 0x20; }

    // To the next special character, eight bytes at a time.
    void skip_plain() {
        while (end_ - p_ >= 8) {
            std::uint64_t word;
            std::memcpy(&word, p_, 8);
            const std::uint64_t found = specials(word);
            if (found) {
                p_ += __builtin_ctzll(found) / 8;
                return;
            }
            p_ += 8;
        }
        while (p_ != end_ && !is_special(*p_)) ++p_;
    }

    // The same, copying. Up to seven bytes too many are written, which is safe: the output never is ahead of the input, and has
    // room for all of it.
    void copy_plain(std::uint8_t*& out) {
        while (end_ - p_ >= 8) {
            std::uint64_t word;
            std::memcpy(&word, p_, 8);
            std::memcpy(out, &word, 8);
            const std::uint64_t found = specials(word);
            const int plain = found ? __builtin_ctzll(found) / 8 : 8;
            p_ += plain;
            out += plain;
            if (found) return;
        }
        while (p_ != end_ && !is_special(*p_)) *out++ = static_cast<std::uint8_t>(*p_++);
    }

    bool open(char c) {
        blank();
        return p_ != end_ && *p_++ == c;
    }

    bool skip_string(bool& escaped) {
        if (p_ == end_ || *p_++ != '"') return false;
        while (skip_plain(), p_ != end_) {
            const auto c = static_cast<unsigned char>(*p_++);
            if (c == '"') return true;
            if (c < 0x20) return false;
            if (c == '\\') {
                escaped = true;
                if (p_ == end_) return false;
                const char e = *p_++;
                std::uint32_t unit;
                if (e == 'u' ? !hex(unit) : std::memchr("\"\\/bfnrt", e, 8) == nullptr) return false;
            }
        }
        return false;
    }

    bool skip_value(int depth) {
        if (p_ == end_ || depth > kDepth) return false;
        bool escaped = false;
        switch (*p_) {
            case '"': return skip_string(escaped);
            case '{': return skip_members('}', depth);
            case '[': return skip_members(']', depth);
            case 't': return literal("true", 4);
            case 'f': return literal("false", 5);
            case 'n': return literal("null", 4);
            default: return number();
        }
    }

    bool skip_members(char close, int depth) {
        ++p_;
        blank();
        if (p_ != end_ && *p_ == close) return ++p_, true;
        while (true) {
            blank();
            bool escaped = false;
            if (close == '}') {
                if (!skip_string(escaped)) return false;
                blank();
                if (p_ == end_ || *p_++ != ':') return false;
                blank();
            }
            if (!skip_value(depth + 1)) return false;
            blank();
            if (p_ == end_) return false;
            const char c = *p_++;
            if (c == close) return true;
            if (c != ',') return false;
        }
    }

    bool literal(const char* word, std::ptrdiff_t size) {
        if (end_ - p_ < size || std::memcmp(p_, word, static_cast<std::size_t>(size)) != 0) return false;
        p_ += size;
        return true;
    }

    bool digits() {
        const char* from = p_;
        while (p_ != end_ && *p_ >= '0' && *p_ <= '9') ++p_;
        return p_ != from;
    }

    bool number() {
        if (p_ != end_ && *p_ == '-') ++p_;
        if (p_ != end_ && *p_ == '0')
            ++p_;
        else if (!digits())
            return false;
        if (p_ != end_ && *p_ == '.' && (++p_, !digits())) return false;
        if (p_ != end_ && (*p_ == 'e' || *p_ == 'E')) {
            ++p_;
            if (p_ != end_ && (*p_ == '+' || *p_ == '-')) ++p_;
            return digits();
        }
        return true;
    }

    bool hex(std::uint32_t& unit) {
        if (end_ - p_ < 4) return false;
        unit = 0;
        for (int i = 0; i < 4; ++i) {
            const char c = *p_++;
            unit <<= 4;
            if (c >= '0' && c <= '9')
                unit |= static_cast<std::uint32_t>(c - '0');
            else if ((c | 32) >= 'a' && (c | 32) <= 'f')
                unit |= static_cast<std::uint32_t>((c | 32) - 'a' + 10);
            else
                return false;
        }
        return true;
    }

    bool unescape(std::uint8_t*& out) {
        if (p_ == end_ || *p_++ != '"') return false;
        while (true) {
            copy_plain(out);
            if (p_ == end_ || static_cast<unsigned char>(*p_) < 0x20) return false;
            if (*p_++ == '"') return true;
            if (p_ == end_) return false;
            switch (*p_++) {
                case '"': *out++ = '"'; break;
                case '\\': *out++ = '\\'; break;
                case '/': *out++ = '/'; break;
                case 'b': *out++ = '\b'; break;
                case 'f': *out++ = '\f'; break;
                case 'n': *out++ = '\n'; break;
                case 'r': *out++ = '\r'; break;
                case 't': *out++ = '\t'; break;
                case 'u':
                    if (!code_point(out)) return false;
                    break;
                default: return false;
            }
        }
    }

    bool code_point(std::uint8_t*& out) {
        std::uint32_t c, low;
        if (!hex(c)) return false;
        if (c >= 0xdc00 && c < 0xe000) return false;
        if (c >= 0xd800 && c < 0xdc00) {
            if (end_ - p_ < 2 || p_[0] != '\\' || p_[1] != 'u') return false;
            p_ += 2;
            if (!hex(low) || low < 0xdc00 || low >= 0xe000) return false;
            c = 0x10000 + ((c - 0xd800) << 10) + (low - 0xdc00);
        }
        const auto put = [&](std::uint32_t byte) { *out++ = static_cast<std::uint8_t>(byte); };
        if (c < 0x80) {
            put(c);
        } else if (c < 0x800) {
            put(0xc0 | c >> 6);
            put(0x80 | (c & 63));
        } else if (c < 0x10000) {
            put(0xe0 | c >> 12);
            put(0x80 | (c >> 6 & 63));
            put(0x80 | (c & 63));
        } else {
            put(0xf0 | c >> 18);
            put(0x80 | (c >> 12 & 63));
            put(0x80 | (c >> 6 & 63));
            put(0x80 | (c & 63));
        }
        return true;
    }

    const char *p_, *end_;
};

// Shortest forms only, no surrogates, nothing above U+10FFFF (Unicode 15, table 3-7).
bool is_utf8(const char* data, std::size_t size) {
    const auto* p = reinterpret_cast<const unsigned char*>(data);
    const auto* end = p + size;
    while (p != end) {
        std::uint64_t word;
        while (end - p >= 8 && (std::memcpy(&word, p, 8), (word & 0x8080808080808080ull) == 0)) p += 8;
        if (p == end) break;
        const unsigned char c = *p++;
        if (c < 0x80) continue;
        unsigned char low = 0x80, high = 0xbf;
        int more;
        if (c >= 0xc2 && c <= 0xdf) {
            more = 1;
        } else if ((c & 0xf0) == 0xe0) {
            more = 2;
            if (c == 0xe0) low = 0xa0;
            if (c == 0xed) high = 0x9f;
        } else if (c >= 0xf0 && c <= 0xf4) {
            more = 3;
            if (c == 0xf0) low = 0x90;
            if (c == 0xf4) high = 0x8f;
        } else {
            return false;
        }
        if (end - p < more || *p < low || *p > high) return false;
        for (int i = 1; i < more; ++i)
            if ((p[i] & 0xc0) != 0x80) return false;
        p += more;
    }
    return true;
}

}  // namespace

JsonLines scan_json_lines(const char* data, std::size_t size, const char* key, std::size_t key_size, std::uint8_t* content,
                          std::int64_t* offsets, std::int64_t* lines) {
    JsonLines result;
    offsets[0] = 0;
    if (!is_utf8(data, size)) {
        result.plain = false;
        return result;
    }
    std::uint8_t* out = content;
    const char* end = data + size;
    for (std::int64_t number = 0; data < end; ++number) {
        const auto* stop = static_cast<const char*>(std::memchr(data, '\n', static_cast<std::size_t>(end - data)));
        if (!stop) stop = end;
        const char* first = data;
        while (first != stop && (*first == ' ' || (*first >= '\t' && *first <= '\r'))) ++first;
        if (first != stop) {
            if (!Line(data, stop).text(key, key_size, out)) {
                result.plain = false;
                return result;
            }
            lines[result.documents++] = number;
            offsets[result.documents] = out - content;
        }
        data = stop + 1;
    }
    result.bytes = out - content;
    return result;
}

std::int64_t count_newlines(const char* data, std::size_t size) {
    return std::count(data, data + size, '\n');
}

}  // namespace demix
