#include "mapped_file.hpp"

#include <fcntl.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <cstring>
#include <iterator>
#include <map>
#include <mutex>
#include <system_error>

namespace demix {

// What a signal handler may look at. Never freed, since one may be looking; used again.
struct MappedFile::Watch {
    std::atomic<std::uintptr_t> begin{0}, end{0};
    std::atomic<bool> lost{false};
    bool used = true;
    Watch* next = nullptr;
};

namespace {

using Watch = MappedFile::Watch;

std::atomic<Watch*> all{nullptr};
std::mutex changing;  // the watches, and:
std::map<const char*, const MappedFile*> mapped;  // by their first byte
struct sigaction others;
std::uintptr_t page_bytes;

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
    page_bytes = std::uintptr_t(::sysconf(_SC_PAGESIZE));
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
    Watch* map = all.load();
    while (map && map->used) map = map->next;
    if (!map) {
        map = new Watch;
        map->next = all.load();
        all.store(map, std::memory_order_release);
    }
    mapped[file->data()] = file;
    map->used = true;
    map->lost.store(false);
    const auto begin = reinterpret_cast<std::uintptr_t>(file->data());
    map->begin.store(begin);
    map->end.store((begin + file->bytes() + page_bytes - 1) / page_bytes * page_bytes, std::memory_order_release);
    return map;
}

[[noreturn]] void fail(int descriptor, const std::string& path) {
    const int error = errno;
    if (descriptor >= 0) ::close(descriptor);
    throw std::system_error(error, std::generic_category(), path);
}

}  // namespace

MappedFile::MappedFile(const std::string& path) {
    descriptor_ = ::open(path.c_str(), O_RDONLY | O_CLOEXEC);
    struct stat status;
    if (descriptor_ < 0 || ::fstat(descriptor_, &status)) fail(descriptor_, path);
    bytes_ = std::size_t(status.st_size);
    if (!bytes_) return;
    void* const data = ::mmap(nullptr, bytes_, PROT_READ, MAP_SHARED, descriptor_, 0);
    if (data == MAP_FAILED) fail(descriptor_, path);
    data_ = static_cast<const char*>(data);
    watch_ = watch(this);
}

MappedFile::~MappedFile() {
    if (watch_) {
        const std::lock_guard<std::mutex> lock(changing);
        mapped.erase(data_);
        watch_->end.store(0);
        watch_->used = false;
    }
    if (data_) ::munmap(const_cast<char*>(data_), bytes_);
    ::close(descriptor_);
}

bool MappedFile::lost() const { return watch_ && watch_->lost.load(); }

void MappedFile::expect_scattered_reads(bool scattered) const {
    if (data_) ::madvise(const_cast<char*>(data_), bytes_, scattered ? MADV_RANDOM : MADV_NORMAL);
}

void MappedFile::want(std::size_t at, std::size_t n) const { ::posix_fadvise(descriptor_, off_t(at), off_t(n), POSIX_FADV_WILLNEED); }

void MappedFile::copy(std::size_t at, char* to, std::size_t n) const {
    while (n) {
        const ssize_t got = ::pread(descriptor_, to, n, off_t(at));
        if (got < 0 && errno == EINTR) continue;
        if (got <= 0) {
            watch_->lost.store(true);
            std::memset(to, 0, n);
            return;
        }
        at += std::size_t(got), to += got, n -= std::size_t(got);
    }
}

const MappedFile* MappedFile::holding(const void* address) {
    const char* const at = static_cast<const char*>(address);
    const std::lock_guard<std::mutex> lock(changing);
    const auto after = mapped.upper_bound(at);
    if (after == mapped.begin()) return nullptr;
    const MappedFile* const file = std::prev(after)->second;
    return at < file->data() + file->bytes() ? file : nullptr;
}

}  // namespace demix
