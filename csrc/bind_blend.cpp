// Bindings of all that handles text, tokens, indexed data and blends. As in bindings.cpp, arguments are addresses that native/ has checked.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <tuple>

#include "content_hash.hpp"
#include "document_stream.hpp"
#include "gather.hpp"
#include "index_file.hpp"
#include "interleave.hpp"
#include "json_lines.hpp"
#include "pack_tokens.hpp"

namespace py = pybind11;
using Address = std::uintptr_t;

namespace {

template <class T>
T* at(Address address) {
    return reinterpret_cast<T*>(address);
}

// lengths, pointers, documents, base, item_shift
using SourceTuple = std::tuple<Address, Address, std::int64_t, std::int64_t, int>;
using PartTuple = std::tuple<const demix::Stream*, std::int64_t, std::int64_t, std::int64_t>;  // stream, begin, documents, tokens
using SpanTuple = std::tuple<Address, std::int64_t>;  // data, base

}  // namespace

void bind_blend(py::module_& m) {
    m.def("check_index", [](Address data, std::size_t size, std::uint64_t bin_bytes) {
        demix::IndexCheck c;
        {
            py::gil_scoped_release nogil;
            c = demix::check_index(at<const std::uint8_t>(data), size, bin_bytes);
        }
        return py::make_tuple(static_cast<int>(c.problem), c.at, c.seen, c.expected, c.dtype_code, c.sequences, c.boundaries,
                              c.tokens, c.end_to_end);
    });
    py::class_<demix::Stream>(m, "Stream")
        .def(py::init([](const std::vector<SourceTuple>& sources, std::uint64_t seed) {
            std::vector<demix::Source> list;
            for (const auto& [lengths, pointers, documents, base, item_shift] : sources)
                list.push_back({at<const std::uint8_t>(lengths), at<const std::uint8_t>(pointers), documents, base, item_shift});
            return demix::Stream(std::move(list), seed);
        }))
        .def_property_readonly("documents", &demix::Stream::documents)
        .def("fill", [](const demix::Stream& s, std::int64_t begin, std::int64_t count, Address lengths, Address pointers,
                        int threads) {
            py::gil_scoped_release nogil;
            s.fill(begin, count, at<std::int32_t>(lengths), at<std::int64_t>(pointers), threads);
        })
        .def("advance", [](const demix::Stream& s, std::int64_t begin, std::int64_t budget, std::int64_t epoch_tokens,
                           int threads) {
            demix::Advance a;
            {
                py::gil_scoped_release nogil;
                a = demix::advance(s, begin, budget, epoch_tokens, threads);
            }
            return py::make_tuple(a.documents, a.tokens, a.next_length);
        });
    py::class_<demix::Interleaver>(m, "Interleaver")
        .def(py::init([](const std::vector<PartTuple>& parts) {
            std::vector<demix::Part> list;
            for (const auto& [stream, begin, documents, tokens] : parts) list.push_back({stream, begin, documents, tokens});
            return demix::Interleaver(list);
        }))
        .def("next", [](demix::Interleaver& w, std::int64_t count, Address lengths, Address pointers, Address part_of, int threads) {
            py::gil_scoped_release nogil;
            w.next(count, at<std::int32_t>(lengths), at<std::int64_t>(pointers), at<std::uint16_t>(part_of), threads);
        })
        .def_property_readonly("left", &demix::Interleaver::left)
        .def("ahead", &demix::Interleaver::ahead)
        .def("behind", &demix::Interleaver::behind);
    m.def("gather", [](Address lengths, Address pointers, std::int64_t begin, std::int64_t end, int item_bytes,
                       const std::vector<SpanTuple>& spans, int descriptor, std::int64_t offset, int threads) {
        std::vector<demix::Span> list;
        for (const auto& [data, base] : spans) list.push_back({at<const std::uint8_t>(data), base});
        demix::Gathered g;
        {
            py::gil_scoped_release nogil;
            g = demix::gather(at<const std::uint8_t>(lengths), at<const std::uint8_t>(pointers), begin, end, item_bytes, list,
                              descriptor, offset, threads);
        }
        return py::make_tuple(g.error, g.content);
    });
    m.def("hash_documents", [](Address content, Address offsets, std::int64_t documents, std::uint64_t seed,
                               std::uint64_t step, Address out) {
        py::gil_scoped_release nogil;
        demix::hash_documents(at<const std::uint8_t>(content), at<const std::int64_t>(offsets), documents, seed, step,
                              at<std::uint64_t>(out));
    });
    m.def("hash_file", [](int descriptor, std::int64_t begin, std::int64_t end, std::int64_t base, int threads) {
        demix::FileHash h;
        {
            py::gil_scoped_release nogil;
            h = demix::hash_file(descriptor, begin, end, base, threads);
        }
        return py::make_tuple(h.error, h.hash);
    });
    m.attr("HASH_BLOCK") = demix::kHashBlock;
    m.def("pack_tokens", [](Address ids, Address offsets, std::int64_t documents, Address route, std::uint8_t which,
                            std::int64_t eod, int item_bytes, Address out) {
        py::gil_scoped_release nogil;
        demix::pack_tokens(at<const std::uint32_t>(ids), at<const std::int64_t>(offsets), documents,
                           at<const std::uint8_t>(route), which, eod, item_bytes, at<std::uint8_t>(out));
    });
    m.def("count_newlines", [](Address data, std::size_t size) {
        py::gil_scoped_release nogil;
        return demix::count_newlines(at<const char>(data), size);
    });
    m.def("scan_json_lines", [](Address data, std::size_t size, const std::string& key, Address content, Address offsets,
                                Address lines) {
        demix::JsonLines r;
        {
            py::gil_scoped_release nogil;
            r = demix::scan_json_lines(at<const char>(data), size, key.data(), key.size(), at<std::uint8_t>(content),
                                       at<std::int64_t>(offsets), at<std::int64_t>(lines));
        }
        return py::make_tuple(r.documents, r.bytes, r.plain);
    });
}
