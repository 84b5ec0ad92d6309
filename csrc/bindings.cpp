// fusedopt._core: registration only.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "core/matrices.h"
#include "cpu/dispatch.h"
#include "python/read_tensor.h"
#include "python/shard_objects.h"
#include "python/tensor_table.h"

namespace py = pybind11;
using namespace pybind11::literals;
using fusedopt::TensorTable;

namespace {

template <class Names>
py::tuple listed(const Names& names) {
  py::list all;
  for (const char* name : names) all.append(name);
  return py::tuple(all);
}

template <std::vector<int64_t> (TensorTable::*numbers)()>
py::bytes bytes_of(TensorTable& table) {
  const std::vector<int64_t> words = (table.*numbers)();
  return py::bytes(reinterpret_cast<const char*>(words.data()), words.size() * sizeof(int64_t));
}

}  // namespace

PYBIND11_MODULE(_core, module) {
  module.doc() = "The compiled core of fusedopt: rules, formats and tile loops. It does not link torch.";

  module.attr("layout") = fusedopt::layout_of_lists();  // fusedopt._cuda must have the same
  // A function that takes one of these takes its position here.
  module.attr("dtypes") = listed(fusedopt::kDTypeNames);
  module.attr("roundings") = listed(fusedopt::kRoundingNames);
  module.attr("masters") = listed(fusedopt::kMasterNames);
  std::vector<const char*> counts;
  for (const fusedopt::HealthCount& each : fusedopt::kHealthCounts) counts.push_back(each.name);
  module.attr("health_counts") = listed(counts);
  // The order of additions, for kernels that are not compiled here.
  module.attr("reduction_chunk") = fusedopt::kReductionChunk;
  module.attr("sum_lanes") = fusedopt::kSumLanes;
  module.attr("max_slabs") = fusedopt::kMaxSlabs;
  module.attr("weighed_rows") = fusedopt::kWeighedRows;
  module.def("bind_torch", &fusedopt::bind_torch, py::kw_only(), "tensor_types"_a, "dtypes"_a, "is_neg"_a, "data_ptr"_a,
             "exchange_api"_a, "probes"_a, "increment_version"_a);
  module.def("bind_shards", &fusedopt::bind_shards, py::kw_only(), "type"_a, "place_of"_a);
  module.def("available_isas", &fusedopt::cpu::available_isas);
  module.def("selected_isa", &fusedopt::cpu::selected_isa);
  module.def("rules", [] {
    py::dict states_of;
    for (const fusedopt::RuleInfo& rule : fusedopt::rules()) {
      py::list names;
      for (int k = 0; k < rule.states; ++k) names.append(rule.state_names[k]);
      if (rule.row_name != nullptr) {
        names.append(rule.row_name);
        names.append(rule.column_name);
      }
      states_of[rule.name] = py::tuple(names);
    }
    return states_of;
  });
  module.def(
      "zero",
      [](uintptr_t data, int64_t bytes, int threads) {
        const py::gil_scoped_release released;
        fusedopt::cpu::zero(reinterpret_cast<void*>(data), bytes, threads);
      },
      py::kw_only(), "data"_a, "bytes"_a, "threads"_a);

  py::class_<TensorTable>(module, "TensorTable")
      .def(
          py::init([](const std::string& type, int index) { return TensorTable(fusedopt::device_named(type, index)); }),
          py::kw_only(), "device_type"_a = "cpu", "device_index"_a = 0)
      .def("__len__", &TensorTable::size)
      .def("clear", &TensorTable::clear)
      .def("add_group", &TensorTable::add_group, py::kw_only(), "rule"_a, "config"_a, "seed"_a, "roundings"_a,
           "rounding"_a, "master"_a, "master_key"_a, "skips_blocks"_a = false, "param_group"_a = 0,
           "positions"_a = std::vector<int64_t>())
      .def("collect", &TensorTable::collect, py::kw_only(), "group"_a, "params"_a, "state"_a, "whole_of"_a = py::none())
      .def("add", &TensorTable::add, py::kw_only(), "group"_a, "position"_a, "param"_a, "grad"_a, "states"_a,
           "master"_a, "step"_a, "first_index"_a, "segment"_a = 0, "segment_stride"_a = 0, "whole"_a = py::none(),
           "channels"_a = std::array<int32_t, 3>())
      .def("count_versions", &TensorTable::count_versions)
      .def("batch", &TensorTable::batch, py::kw_only(), "grad_multipliers"_a)
      .def("rows", &bytes_of<&TensorTable::rows>)
      .def("cuts", &bytes_of<&TensorTable::cuts>)
      .def("count_square_sums", &TensorTable::count_square_sums)
      .def("square_sums", &TensorTable::square_sums, py::kw_only(), "sums"_a, "threads"_a)
      .def("step", &TensorTable::step, py::kw_only(), "grad_multipliers"_a, "threads"_a, "counts_health"_a,
           "square_sums"_a = py::none())
      .def("begin_shards", &TensorTable::begin_shards, py::kw_only(), "grad_multipliers"_a, "channels"_a)
      .def("sum_shards", &TensorTable::sum_shards, py::kw_only(), "round"_a, "totals"_a, "sums"_a, "threads"_a)
      .def("step_shards", &TensorTable::step_shards, py::kw_only(), "totals"_a, "threads"_a, "counts_health"_a,
           "square_sums"_a = py::none());
}
