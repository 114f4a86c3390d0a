// Python's view of the merge plan, the CRC, mapped and reserved files, the look at pickles, and the processor.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <fcntl.h>

#include <cerrno>
#include <memory>
#include <system_error>

#include "crc32.hpp"
#include "delta_sum.hpp"
#include "kernels.hpp"
#include "mapped_file.hpp"
#include "merge.hpp"
#include "pickle_scan.hpp"

namespace py = pybind11;

namespace demix {
namespace {

using Weights = py::array_t<float, py::array::c_style>;

// weights_SMK; to_addresses: [T * M] addresses, or [] with descriptors [T * M], direct [T * M] or [], and offsets [T].
py::dict run(MergePlan& plan, const Weights& weights, const std::vector<std::uintptr_t>& to_addresses, std::vector<int> descriptors,
             std::vector<int> direct, std::vector<std::uint64_t> offsets, int threads, const std::string& isa, std::size_t tile_bytes,
             bool check_sources, bool shows_cached, const DeltaRules* deltas) {
    if (weights.ndim() != 3 || weights.shape(2) != plan.num_sources()) throw std::invalid_argument("weights must be [sets, M, K]");
    Settings settings;
    settings.num_sets = int(weights.shape(0));
    settings.num_mixtures = int(weights.shape(1));
    settings.weights = weights.data();
    settings.threads = threads;
    settings.isa = isa;
    settings.tile_bytes = tile_bytes;
    settings.check_sources = check_sources;
    settings.shows_cached = shows_cached;
    settings.deltas = deltas;
    if (deltas) deltas->check(settings.num_sets, plan);
    Destinations to;
    for (const std::uintptr_t address : to_addresses) to.addresses.push_back(reinterpret_cast<char*>(address));
    to.descriptors = std::move(descriptors);
    to.direct_descriptors = std::move(direct);
    to.offsets = std::move(offsets);
    Outcome outcome;
    {
        py::gil_scoped_release release;
        const MergePlan::Call call(plan);
        outcome = plan.run(settings, to);
    }
    py::list damaged, not_finite;
    for (std::size_t i = 0; i < outcome.damaged.size(); ++i)
        if (outcome.damaged[i]) damaged.append(i);
    for (std::size_t i = 0; i < outcome.not_finite.size(); ++i)
        if (outcome.not_finite[i]) not_finite.append(i);
    py::dict result;
    result["crcs"] = outcome.crcs;
    result["damaged"] = damaged;
    result["not_finite"] = not_finite;
    result["error"] = outcome.error;
    result["failed_target"] = outcome.failed_target;
    return result;
}

}  // namespace
}  // namespace demix

void bind_merge(py::module_& m) {
    using namespace demix;
    py::enum_<DType>(m, "DType")
        .value("f32", DType::f32)
        .value("bf16", DType::bf16)
        .value("f16", DType::f16);
    py::class_<MergePlan>(m, "MergePlan")
        .def(py::init<int>(), py::arg("num_sources"))
        .def("add_record",
             [](MergePlan& plan, std::uintptr_t base, std::uint64_t bytes, std::uint32_t crc) {
                 return plan.add_record(reinterpret_cast<const void*>(base), bytes, crc);
             },
             py::arg("address"), py::arg("bytes"), py::arg("crc"))
        .def("add_target", &MergePlan::add_target, py::arg("shape"), py::arg("dtypes_in"), py::arg("dtype_out"))
        .def("add_region", &MergePlan::add_region, py::arg("target"), py::arg("lo"), py::arg("hi"), py::arg("weight_set"),
             py::arg("records"), py::arg("byte_offsets"), py::arg("strides"), py::arg("index"), py::arg("index_strides"))
        .def("run", &run, py::arg("weights"), py::arg("to_addresses"), py::arg("descriptors"), py::arg("direct"),
             py::arg("offsets"), py::arg("threads"), py::arg("isa"), py::arg("tile_bytes"),
             py::arg("check_sources"), py::arg("shows_cached"), py::arg("deltas"))
        .def("done_bytes", &MergePlan::done_bytes)
        .def("begin", &MergePlan::begin)
        .def("end", &MergePlan::end, py::call_guard<py::gil_scoped_release>());
    m.attr("buffers_per_thread") = buffers_per_thread;
    m.def("crc32",
          [](const py::buffer& buffer) {
              const py::buffer_info info = buffer.request();
              const std::size_t n = std::size_t(info.size) * std::size_t(info.itemsize);
              py::gil_scoped_release release;
              return crc32(info.ptr, n);
          },
          py::arg("contiguous_buffer"));
    py::class_<MappedFile>(m, "MappedFile", py::buffer_protocol())
        .def(py::init([](const std::string& path, unsigned place) {
                 try {
                     return std::make_unique<MappedFile>(path, place);
                 } catch (const std::system_error& e) {
                     errno = e.code().value();
                     PyErr_SetFromErrnoWithFilename(PyExc_OSError, path.c_str());
                     throw py::error_already_set();
                 }
             }),
             py::arg("path"), py::arg("place"))
        .def_buffer([](MappedFile& file) {
            return py::buffer_info(const_cast<char*>(file.data()), 1, py::format_descriptor<std::uint8_t>::format(), 1,
                                   {py::ssize_t(file.bytes())}, {1}, true);
        })
        .def("expect_scattered_reads", &MappedFile::expect_scattered_reads, py::arg("scattered"))
        .def("want", &MappedFile::want, py::arg("at"), py::arg("bytes"))
        .def("touch", &MappedFile::touch, py::arg("at"), py::arg("threads"), py::call_guard<py::gil_scoped_release>())
        .def_static("leave_pages", &MappedFile::leave_pages, py::arg("files"), py::arg("threads"), py::call_guard<py::gil_scoped_release>())
        .def_property_readonly("lost", &MappedFile::lost);
    // An errno, 0 or EOPNOTSUPP. The system call itself: posix_fallocate writes, where a file system has no such call.
    m.def("fallocate",
          [](int descriptor, std::int64_t bytes) {
              const py::gil_scoped_release release;
#ifdef __linux__
              while (::fallocate(descriptor, 0, 0, bytes))
                  if (errno != EINTR) return errno;
              return 0;
#else
              return EOPNOTSUPP;
#endif
          },
          py::arg("descriptor"), py::arg("bytes"));
    m.def("pickle_scan",
          [](const py::bytes& data) {
              const std::string_view view = data;
              return pickle_scan(reinterpret_cast<const unsigned char*>(view.data()), view.size());
          },
          py::arg("data"));
    m.def("instruction_sets", [] {
        std::vector<std::string> names;
        for (const Kernels* one : available_kernels()) names.emplace_back(one->isa);
        return names;
    });
}
