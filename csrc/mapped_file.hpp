// Files that are read where they lie in the page cache.
#pragma once

#include <cstddef>
#include <string>
#include <vector>

namespace demix {

// A file, mapped for reading. It may be cut short, or its disk may fail, while it is read: it then becomes zeros from there on, and
// lost(), and what was computed from it does not count. The kernel says so by SIGBUS: the first file installs a handler of it, which
// passes on what is not about a mapped file.
class MappedFile {
public:
    // Throws std::system_error, for all but regular files too. An empty file has no bytes and no data.
    // place: files that are read side by side at the same positions should have different ones, modulo `places`. keep_open: for
    // copy(), as long as the process may open many more files.
    explicit MappedFile(const std::string& path, unsigned place = 0, bool keep_open = false);
    ~MappedFile();
    MappedFile(const MappedFile&) = delete;
    MappedFile& operator=(const MappedFile&) = delete;

    const char* data() const { return data_; }
    std::size_t bytes() const { return bytes_; }
    bool lost() const;

    // How the map reads from the disk: a page that is touched by itself, or what follows it, too.
    void expect_scattered_reads(bool scattered) const;
    // Have bytes read into the page cache soon.
    void want(std::size_t at, std::size_t n) const;
    // Have the pages of these bytes in memory on return, as many at a time as there are threads: each of them waits for the disk.
    void touch(const std::vector<std::size_t>& at, int threads) const;

    // What is known of a file by the addresses it is mapped at.
    struct Watch;
    // The open file that an address is mapped from, or null. Valid as long as the map is there.
    static Watch* open_at(const void* at);
    // n bytes from an address on, which is mapped from `file`: the way to read what is read once, since the first touch of a map's
    // pages costs more than copying them to a near cache. What cannot be read is zeros, and the file lost.
    static void copy(Watch* file, const char* at, std::size_t n, char* to);

    static constexpr unsigned places = 128;

private:
    const char* data_ = nullptr;
    std::size_t bytes_ = 0;
    Watch* watch_ = nullptr;
};

}  // namespace demix
