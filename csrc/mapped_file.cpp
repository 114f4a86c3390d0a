#include "mapped_file.hpp"

#include <signal.h>
#include <sys/mman.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <cstdint>
#include <mutex>

namespace demix {

// Never freed, since a handler may be looking at it; used again.
struct WatchedMap {
    std::atomic<std::uintptr_t> begin{0}, end{0};
    std::atomic<bool> lost{false};
    bool used = true;
    WatchedMap* next = nullptr;
};

namespace {

std::atomic<WatchedMap*> all{nullptr};
std::mutex changing;
struct sigaction others;
std::uintptr_t page_bytes;

void on_bus_error(int signal, siginfo_t* info, void* context) {
    const int saved = errno;
    const auto at = reinterpret_cast<std::uintptr_t>(info->si_addr);
    for (WatchedMap* map = all.load(std::memory_order_acquire); map; map = map->next) {
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

}  // namespace

WatchedMap* watch_map(const void* address, std::size_t bytes) {
    const std::lock_guard<std::mutex> lock(changing);
    static const bool installed = (install_handler(), true);
    (void)installed;
    WatchedMap* map = all.load();
    while (map && map->used) map = map->next;
    if (!map) {
        map = new WatchedMap;
        map->next = all.load();
        all.store(map, std::memory_order_release);
    }
    map->used = true;
    map->lost.store(false);
    map->begin.store(reinterpret_cast<std::uintptr_t>(address));
    map->end.store((reinterpret_cast<std::uintptr_t>(address) + bytes + page_bytes - 1) / page_bytes * page_bytes,
                   std::memory_order_release);
    return map;
}

bool is_lost(const WatchedMap* map) { return map->lost.load(); }

void unwatch_map(WatchedMap* map) {
    const std::lock_guard<std::mutex> lock(changing);
    map->end.store(0);
    map->used = false;
}

}  // namespace demix
