// How M mixtures become launches: copies, zeros, and groups of 8, 4, 2 or 1 mixtures that share one read of their sources.
#pragma once

#include <algorithm>
#include <cstring>
#include <type_traits>
#include <vector>

#include "pack_sum.hpp"

namespace demix {

template <DType T>
using DTypeOf = std::integral_constant<DType, T>;
template <int N>
using Int = std::integral_constant<int, N>;

// Calls f(in, out, group, tile) with the four as types, so that f can choose a kernel.
template <class F>
void with_kernel(DType in, DType out, int group, int tile, const F& f) {
    const auto by_tile = [&](auto i, auto o, auto g) {
        tile == 2 ? f(i, o, g, Int<2>{}) : tile == 4 ? f(i, o, g, Int<4>{}) : f(i, o, g, Int<8>{});
    };
    const auto by_group = [&](auto i, auto o) {
        group == 1 ? by_tile(i, o, Int<1>{}) : group == 2 ? by_tile(i, o, Int<2>{}) : group == 4 ? by_tile(i, o, Int<4>{}) : by_tile(i, o, Int<8>{});
    };
    const auto by_out = [&](auto i) {
        out == DType::f32 ? by_group(i, DTypeOf<DType::f32>{}) : out == DType::bf16 ? by_group(i, DTypeOf<DType::bf16>{}) : by_group(i, DTypeOf<DType::f16>{});
    };
    in == DType::f32 ? by_out(DTypeOf<DType::f32>{}) : in == DType::bf16 ? by_out(DTypeOf<DType::bf16>{}) : by_out(DTypeOf<DType::f16>{});
}

// outs[m][i] = round(sum_k weights[m * K + k] * sources[k][i]) for i < n; all addresses are multiples of their item's size.
// Device: copy(to, from, bytes), zero(to, bytes), and launch(operands, in, out, group, tile, num_blocks); each returns 0 or an error,
// which ends the work and is passed on. most_blocks: of one launch.
template <class Device>
int launch_all(Device& device, const void* const* sources, void* const* outs, const float* weights, int num_sources, int num_mixtures,
               std::size_t n, DType in, DType out, std::size_t most_blocks) {
    const std::size_t in_bytes = item_size(in), out_bytes = item_size(out), width = 16 / in_bytes;
    std::vector<int> pending;
    for (int m = 0; m < num_mixtures; ++m) {
        const float* const w = weights + std::size_t(m) * num_sources;
        const int used = int(std::count_if(w, w + num_sources, [](float x) { return x != 0.0f; }));
        const int last = int(std::find_if(w, w + num_sources, [](float x) { return x != 0.0f; }) - w);
        int error = 0;
        if (used == 0)
            error = device.zero(outs[m], n * out_bytes);
        else if (used == 1 && in == out && w[last] == 1.0f)  // copies bits, as on the CPU: NaNs keep their payload
            error = device.copy(outs[m], sources[last], n * in_bytes);
        else
            pending.push_back(m);
        if (error) return error;
    }
    for (std::size_t done = 0; done < pending.size();) {
        const int left = int(pending.size() - done);
        const int group = left >= 8 ? 8 : left >= 4 ? 4 : left >= 2 ? 2 : 1;
        const int num_groups = group < max_group ? 1 : std::min({left / group, max_mixtures / group, max_weights / (group * num_sources)});
        Operands op{};
        op.num_groups = num_groups;
        op.n = n;
        std::vector<int> read;
        for (int k = 0; k < num_sources; ++k) {
            std::uint32_t used = 0;
            for (int m = 0; m < group * num_groups; ++m)
                if (weights[std::size_t(pending[done + m]) * num_sources + k] != 0.0f) used |= 1u << m;
            if (!used) continue;
            op.sources[read.size()] = sources[k];
            op.used[read.size()] = used;
            read.push_back(k);
        }
        op.num_sources = int(read.size());
        bool aligned = true;
        for (int k = 0; k < op.num_sources; ++k) aligned = aligned && reinterpret_cast<std::uintptr_t>(op.sources[k]) % 16 == 0;
        for (int m = 0; m < group * num_groups; ++m) {
            const int mixture = pending[done + m];
            op.outs[m] = outs[mixture];
            aligned = aligned && reinterpret_cast<std::uintptr_t>(outs[mixture]) % std::min<std::size_t>(16, width * out_bytes) == 0;
            for (int k = 0; k < op.num_sources; ++k)
                op.weights[((m / group) * op.num_sources + k) * group + m % group] =
                    weights[std::size_t(mixture) * num_sources + read[k]];
        }
        op.num_packs = aligned ? n / width : 0;
        const std::size_t items = std::max(op.num_packs, n - op.num_packs * width);
        const std::size_t positions = std::max<std::size_t>(1, std::min((items + block_threads - 1) / block_threads, most_blocks / num_groups));
        const int tile = op.num_sources <= 2 ? 2 : op.num_sources <= 4 ? 4 : 8;
        if (const int error = device.launch(op, in, out, group, tile, unsigned(positions * num_groups))) return error;
        done += std::size_t(group) * num_groups;
    }
    return 0;
}

}  // namespace demix
