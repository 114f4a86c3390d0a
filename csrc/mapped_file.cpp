#include "mapped_file.hpp"

#include <fcntl.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <mutex>
#include <system_error>
#include <utility>

#include "parallel.hpp"

namespace demix {

// What a signal handler may look at. Never freed, since one may be looking; used again.
struct MappedFile::Watch {
    std::atomic<std::uintptr_t> begin{0}, end{0};
    std::atomic<bool> lost{false};
    Watch* next = nullptr;
    Watch* next_unused = nullptr;
};

namespace {

using Watch = MappedFile::Watch;

std::atomic<Watch*> all{nullptr};
Watch* unused = nullptr;  // under `changing`
std::mutex changing;
struct sigaction others;
const std::uintptr_t page_bytes = std::uintptr_t(::sysconf(_SC_PAGESIZE));

void on_bus_error(int signal, siginfo_t* info, void* context) {
    const int saved = errno;
    const auto at = reinterpret_cast<std::uintptr_t>(info->si_addr);
    for (Watch* map = all.load(std::memory_order_acquire); map; map = map->next) {
        const std::uintptr_t end = map->end.load(std::memory_order_acquire);
        if (at < map->begin.load(std::memory_order_relaxed) || at >= end) continue;
        map->lost.store(true);
        const std::uintptr_t page = at / page_bytes * page_bytes;
        void* const zeros = ::mmap(reinterpret_cast<void*>(page), end - page, PROT_READ,
                                   MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED | MAP_NORESERVE, -1, 0);
        errno = saved;
        if (zeros != MAP_FAILED) return;
        break;
    }
    if ((others.sa_flags & SA_SIGINFO) && others.sa_sigaction) {
        others.sa_sigaction(signal, info, context);
    } else if (others.sa_handler != SIG_DFL && others.sa_handler != SIG_IGN) {
        others.sa_handler(signal);
    } else {
        ::sigaction(signal, &others, nullptr);  // the access is tried again, and ends the process as it would have
    }
}

void install_handler() {
    struct sigaction ours {};
    ours.sa_sigaction = on_bus_error;
    ours.sa_flags = SA_SIGINFO | SA_ONSTACK;
    sigemptyset(&ours.sa_mask);
    ::sigaction(SIGBUS, &ours, &others);
}

Watch* watch(const MappedFile* file) {
    const std::lock_guard<std::mutex> lock(changing);
    static const bool installed = (install_handler(), true);
    (void)installed;
    Watch* map = unused;
    if (map) {
        unused = map->next_unused;
    } else {
        map = new Watch;
        map->next = all.load();
        all.store(map, std::memory_order_release);
    }
    map->lost.store(false);
    const auto begin = reinterpret_cast<std::uintptr_t>(file->data());
    map->begin.store(begin);
    map->end.store((begin + file->bytes() + page_bytes - 1) / page_bytes * page_bytes, std::memory_order_release);
    return map;
}

// A map of a file that begins at a place of its own modulo 256 MiB, in steps of the 2 MiB that pages of that size need. Zen finds
// lines in its first-level cache by a hash of an address's bits 12 to 27: of files that lie at equal bits, the same positions get
// into one another's way, and a sum over them takes twice as long.
void* map_at_place(int descriptor, std::size_t bytes, unsigned place) {
    constexpr std::uintptr_t step = 2 << 20, span = step * MappedFile::places;
    const std::size_t whole = (bytes + page_bytes - 1) / page_bytes * page_bytes;
    void* const reserved = ::mmap(nullptr, whole + span, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (reserved == MAP_FAILED) return ::mmap(nullptr, bytes, PROT_READ, MAP_SHARED, descriptor, 0);  // a limit on address space
    const auto begin = reinterpret_cast<std::uintptr_t>(reserved);
    const std::uintptr_t before = (std::uintptr_t(place) * step - begin) % span;
    void* const data = ::mmap(reinterpret_cast<void*>(begin + before), bytes, PROT_READ, MAP_SHARED | MAP_FIXED, descriptor, 0);
    const int error = errno;
    if (data == MAP_FAILED) {
        ::munmap(reserved, whole + span);
    } else {
        if (before) ::munmap(reserved, before);
        ::munmap(reinterpret_cast<void*>(begin + before + whole), span - before);
    }
    errno = error;
    return data;
}

[[noreturn]] void fail(int error, const std::string& path) { throw std::system_error(error, std::generic_category(), path); }

}  // namespace

MappedFile::MappedFile(const std::string& path, unsigned place) {
    // Not blocking: a pipe that nobody writes to would be waited for.
    const int descriptor = ::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);
    if (descriptor < 0) fail(errno, path);
    struct stat status;
    void* data = nullptr;
    int error = ::fstat(descriptor, &status) ? errno : 0;
    if (!error && !S_ISREG(status.st_mode)) error = S_ISDIR(status.st_mode) ? EISDIR : EINVAL;
    if (!error && status.st_size) {
        data = map_at_place(descriptor, std::size_t(status.st_size), place % places);
        if (data == MAP_FAILED) error = errno;
    }
    ::close(descriptor);  // the map keeps the file
    if (error) fail(error, path);
    if (!data) return;
    data_ = static_cast<const char*>(data);
    bytes_ = std::size_t(status.st_size);
    watch_ = watch(this);
}

MappedFile::~MappedFile() {
    if (watch_) {
        const std::lock_guard<std::mutex> lock(changing);
        watch_->end.store(0);
        watch_->next_unused = unused;
        unused = watch_;
    }
    if (data_) ::munmap(const_cast<char*>(data_), bytes_);
}

void MappedFile::leave_pages(const std::vector<const MappedFile*>& files, int threads) {
    constexpr std::size_t piece = 64 << 20;
    std::vector<std::pair<const MappedFile*, std::size_t>> pieces;
    for (const MappedFile* file : files)
        for (std::size_t at = 0; at < file->bytes_; at += piece) pieces.emplace_back(file, at);
    parallel(std::int64_t(pieces.size()), threads, 1, [&](std::int64_t begin, std::int64_t end) {
        for (std::int64_t i = begin; i < end; ++i) {
            const auto [file, at] = pieces[std::size_t(i)];
            ::madvise(const_cast<char*>(file->data_) + at, std::min(piece, file->bytes_ - at), MADV_DONTNEED);
        }
    });
}

bool MappedFile::lost() const { return watch_ && watch_->lost.load(); }

void MappedFile::expect_scattered_reads(bool scattered) const {
    if (data_) ::madvise(const_cast<char*>(data_), bytes_, scattered ? MADV_RANDOM : MADV_NORMAL);
}

void MappedFile::want(std::size_t at, std::size_t n) const {
    if (!data_) return;
    const std::size_t begin = at / page_bytes * page_bytes;
    ::madvise(const_cast<char*>(data_) + begin, at + n - begin, MADV_WILLNEED);
}

void MappedFile::touch(const std::vector<std::size_t>& at, int threads) const {
    parallel(std::int64_t(at.size()), threads, 16, [&](std::int64_t begin, std::int64_t end) {
        for (std::int64_t i = begin; i < end; ++i)
            if (at[i] < bytes_) static_cast<void>(static_cast<const volatile char*>(data_)[at[i]]);
    });
}

}  // namespace demix
