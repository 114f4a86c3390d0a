// Python's view of the statistics and rules that merge methods beyond weighted sums need.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "delta_sum.hpp"
#include "tensor_statistics.hpp"

namespace py = pybind11;

void bind_methods(py::module_& m) {
    using namespace demix;
    py::class_<DeltaRules> rules(m, "DeltaRules");
    py::enum_<DeltaRules::Keep>(rules, "Keep")
        .value("window", DeltaRules::Keep::window)
        .value("random", DeltaRules::Keep::random)
        .value("row_rank", DeltaRules::Keep::row_rank);
    rules.def(py::init<>())
        .def_readwrite("keep", &DeltaRules::keep)
        .def_readwrite("elect", &DeltaRules::elect)
        .def_readwrite("average", &DeltaRules::average)
        .def_readwrite("scale", &DeltaRules::scale)
        .def_readwrite("density", &DeltaRules::density)
        .def_readwrite("epsilon", &DeltaRules::epsilon)
        .def_readwrite("windows", &DeltaRules::windows)
        .def_readwrite("streams", &DeltaRules::streams)
        .def_readwrite("target", &DeltaRules::target)
        .def("set_tensors", [](DeltaRules& r, const MergePlan& plan) { r.tensors = &plan; }, py::keep_alive<1, 2>());
    m.def("gram",
          [](MergePlan& plan, bool from_base, int threads, const std::string& isa) {
              py::gil_scoped_release release;
              const MergePlan::Call call(plan);
              return gram(plan, from_base, threads, kernels(isa));
          },
          py::arg("plan"), py::arg("from_base"), py::arg("threads"), py::arg("isa"));
    m.def("delta_magnitudes",
          [](MergePlan& plan, const std::vector<std::int64_t>& ranks, int num_ranks, int threads, const std::string& isa) {
              py::gil_scoped_release release;
              const MergePlan::Call call(plan);
              return delta_magnitudes(plan, ranks, num_ranks, threads, kernels(isa));
          },
          py::arg("plan"), py::arg("ranks"), py::arg("num_ranks"), py::arg("threads"), py::arg("isa"));
}
