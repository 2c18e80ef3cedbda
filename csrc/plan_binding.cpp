#include "plan_binding.h"

#include <pybind11/stl.h>

#include <stdexcept>
#include <string>
#include <variant>

#include "plan/prologue.h"
#include "protocol.h"

namespace py = pybind11;

namespace tpf {
namespace {

using CardName = std::variant<int, std::string>;  // the ordinal of one that is there, or a name

tpf_card card_of(const CardName& which) {
  tpf_card card = {};
  const std::string* const name = std::get_if<std::string>(&which);
  const tpf_status status =
      name != nullptr ? tpf_card_named(&card, name->c_str()) : tpf_card_of(&card, std::get<int>(which));
  if (status == TPF_OK) return card;
  if (name != nullptr) throw py::value_error("no card is known as " + *name + ": A100, H20, H100, H200 and B200 are");
  throw std::runtime_error(tpf_cuda_error_string());
}

py::dict describe(const CardName& which) {
  const tpf_card card = card_of(which);
  py::dict out;
  out["architecture"] = card.architecture;
  out["sm_count"] = card.sm_count;
  out["cluster_sms"] = card.cluster_sms;
  out["shared_bytes"] = card.shared_bytes;
  out["has_wgmma"] = card.has_wgmma != 0;
  return out;
}

py::dict to_dict(const tpf_plan& plan) {
  static constexpr const char* kBodies[] = {"all threads", "one row", "bulk", "tiles", "all rows", "columns"};
  py::dict out;
  out["body"] = kBodies[plan.body];
  out["blocks"] = plan.blocks;
  out["threads"] = plan.threads;
  out["cluster"] = plan.cluster;
  out["vectors"] = plan.vectors;
  out["chunk_rows"] = plan.chunk_rows;
  out["chunks"] = plan.chunks;
  out["stages"] = plan.stages;
  out["shared_bytes"] = plan.shared_bytes;
  out["in_place"] = plan.source >= 0;
  out["tile_columns"] = plan.tile_columns;
  out["few_rows"] = plan.few_rows != 0;
  return out;
}

py::dict plan(int op, int dtype, int64_t num_tokens, int hidden_size, int columns, bool in_place, bool complete,
              int world_size, int max_ctas, int free_sms, int free_cluster_sms, int64_t slot_bytes,
              const CardName& card) {
  tpf_call call =
      projection_call(static_cast<tpf_op>(op), static_cast<tpf_dtype>(dtype), num_tokens, hidden_size, columns);
  call.source = in_place ? 0 : -1;
  call.variant = complete ? TPF_COMPLETE : 0;
  tpf_team team = {};
  team.world_size = world_size;
  team.max_ctas = max_ctas;
  team.free_sms = free_sms;
  team.free_cluster_sms = free_cluster_sms;
  team.slot_bytes = slot_bytes;
  const tpf_card on = card_of(card);
  tpf_plan made = {};
  if (tpf_plan_call(&made, &call, &team, &on) != TPF_OK) throw py::value_error("no kernel serves such a call");
  return to_dict(made);
}

}  // namespace

void bind_plan(py::module_& m) {
  m.def("card", &describe);
  m.def("gathers_normed_rows", &gathers_normed_rows);
  m.def("plan", &plan, py::arg("op"), py::arg("dtype"), py::arg("num_tokens"), py::arg("hidden_size"), py::kw_only(),
        py::arg("columns") = 0, py::arg("in_place") = false, py::arg("complete") = false, py::arg("world_size"),
        py::arg("max_ctas"), py::arg("free_sms"), py::arg("free_cluster_sms"), py::arg("slot_bytes"), py::arg("card"));
}

}  // namespace tpf
