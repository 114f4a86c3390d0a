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
    // place: files that are read side by side at the same positions should have different ones, modulo `places`.
    explicit MappedFile(const std::string& path, unsigned place = 0);
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
    // Take the pages of these files out of the maps; they stay in the page cache. Ending a map does it, too, but on one thread.
    static void leave_pages(const std::vector<const MappedFile*>& files, int threads);

    struct Watch;
    static constexpr unsigned places = 128;

private:
    const char* data_ = nullptr;
    std::size_t bytes_ = 0;
    Watch* watch_ = nullptr;
};

}  // namespace demix
