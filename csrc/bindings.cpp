// What Python calls of the library: to make workspaces and to look into them, for plans, and to register the ops. In
// one unit, as most of what it takes to compile goes to pybind11's headers.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cerrno>
#include <cstddef>
#include <cstdio>
#include <cstring>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <variant>
#include <vector>

#include "plan/card.h"
#include "plan/prologue.h"
#include "plan/quantized.h"
#include "protocol.h"
#include "team.h"
#include "torch_ops.h"
#include "tp_fused.h"

namespace py = pybind11;

namespace {

using tpf::Address, tpf::at, tpf::Caller, tpf::checked, tpf::Input, tpf::Team;

void check(tpf_status status, const std::string& what) {
  if (status == TPF_OK) return;
  const std::string message = what + ": " + std::strerror(errno);
  if (status == TPF_NO_SPACE) {
    PyErr_SetString(PyExc_MemoryError, message.c_str());
  } else {
    PyErr_SetString(PyExc_OSError, message.c_str());
  }
  throw py::error_already_set();
}

// Why a segment is not the one that is meant, with both numbers as people write them.
std::string words_of(const tpf_refusal& refusal) {
  const char* format = refusal.base == 8    ? "its %s is %#llo, expected %#llo"
                       : refusal.base == 10 ? "its %s is %llu, expected %llu"
                                            : "its %s is %#llx, expected %#llx";
  char words[160];
  std::snprintf(words, sizeof words, format, refusal.check, static_cast<unsigned long long>(refusal.found),
                static_cast<unsigned long long>(refusal.expected));
  return words;
}

class Segment {
 public:
  Segment(const py::int_& bytes, bool create, const std::string& name, uint64_t token) {
    if (name.find('\0') != std::string::npos) throw py::value_error("a segment's name must not contain NUL");
    int overflow = 0;
    const int64_t size = PyLong_AsLongLongAndOverflow(bytes.ptr(), &overflow);
    const std::string what = (create ? "cannot create shared memory " : "cannot map shared memory ") + name + " of " +
                             std::string(py::str(bytes)) + " bytes";
    if (overflow > 0) {
      errno = EFBIG;
      check(TPF_NO_SPACE, what);
    }
    if (overflow < 0 || size <= 0) throw py::value_error(what);
    tpf_refusal refusal = {};
    const tpf_status status = create ? tpf_segment_create(&segment_, name.c_str(), size, token)
                                     : tpf_segment_open(&segment_, name.c_str(), size, token, &refusal);
    if (status == TPF_REFUSED) {
      PyErr_SetString(PyExc_OSError, (what + ": " + words_of(refusal)).c_str());
      throw py::error_already_set();
    }
    check(status, what);
  }
  Segment(const Segment&) = delete;
  Segment& operator=(const Segment&) = delete;
  ~Segment() { tpf_segment_close(&segment_); }

  Address base() const { return reinterpret_cast<Address>(segment_.base); }
  int fd() const { return segment_.fd; }
  // False where the file system knows no locks: peers then find a dead rank by the deadline alone.
  bool hold(int rank) { return tpf_segment_hold(&segment_, rank) == TPF_OK; }
  py::buffer_info buffer() {
    return py::buffer_info(static_cast<uint8_t*>(segment_.base), static_cast<py::ssize_t>(segment_.bytes));
  }

 private:
  tpf_segment segment_ = {nullptr, 0, -1, -1};
};

py::dict to_dict(const tpf_call& call) {
  py::dict out;
  out["op"] = call.op;
  out["num_tokens"] = call.num_tokens;
  out["hidden_size"] = call.hidden_size;
  out["dtype"] = call.dtype;
  out["columns"] = call.columns;
  out["group_size"] = call.group_size;
  out["q_columns"] = call.q_columns;
  out["kv_columns"] = call.kv_columns;
  out["variant"] = call.variant;
  out["eps"] = call.eps;
  out["weight_offset"] = call.weight_offset;
  out["source"] = py::make_tuple(call.buffer, call.source);
  return out;
}

py::dict to_dict(const tpf_fault& fault) {
  py::dict out;
  out["status"] = fault.status;
  out["rank"] = fault.rank;
  out["peer"] = fault.peer;
  out["step"] = fault.step;
  out["epoch"] = fault.epoch;
  out["seen_epoch"] = fault.seen_epoch;
  out["call_number"] = fault.call_number;
  out["waited_s"] = static_cast<double>(fault.waited_ns) * 1e-9;
  out["expected"] = to_dict(fault.expected);
  out["seen"] = to_dict(fault.seen);
  return out;
}

// How far a rank has come, from its region, which it may be writing into meanwhile; None on CUDA, where that takes the
// GPU. `in_call`: its peers have heard that it has entered the call.
std::optional<py::dict> progress(const Team& team, int rank) {
  if (team.on_cuda()) return std::nullopt;
  const tpf_team& mine = *team.get();
  tpf::Control* owner = tpf::control(mine.region[rank]);
  const int peer = rank != mine.rank ? mine.rank : (rank + 1) % mine.world_size;
  const uint32_t entered = tpf::epoch_of(tpf::observe(tpf::signal(mine.region[peer], 0, 0, rank)));
  const uint32_t finished = tpf::shared_ref<uint32_t>(owner->progress[0].epoch).load(tpf::order::memory_order_acquire);
  const uint32_t calls = tpf::shared_ref<uint32_t>(owner->progress[0].calls).load(tpf::order::memory_order_acquire);
  const bool in_call = entered == finished + 1;
  py::dict out;
  out["calls"] = calls;
  out["in_call"] = in_call;
  out["closed"] = tpf::shared_ref<uint32_t>(owner->closed).load(tpf::order::memory_order_acquire) != 0;
  if (calls != 0) out["call"] = to_dict(owner->announced[(finished + in_call) & 1]);
  return out;
}

// A rank's record as far as the host can read it: on CUDA the own one, from the mailbox.
tpf_fault fault_on_host(const Team& team, int rank) {
  if (!team.on_cuda()) return tpf_team_fault_cpu(team.get(), rank);
  return rank == team.get()->rank && team.fault_status() != TPF_OK ? *team.get()->mailbox : tpf_fault{};
}

// Whether a signal has come of which Python makes an exception, Ctrl-C for one. It is left to be raised.
int32_t interrupted() {
  const py::gil_scoped_acquire locked;
  return PyErr_CheckSignals() != 0;
}

// ---- what is planned for a card, which need not be there ----

using CardName = std::variant<int, std::string>;  // the ordinal of one that is there, or a name

tpf_card card_of(const CardName& which) {
  tpf_card card = {};
  const std::string* const name = std::get_if<std::string>(&which);
  const tpf_status status =
      name != nullptr ? tpf_card_named(&card, name->c_str()) : tpf_card_of(&card, std::get<int>(which));
  if (status == TPF_OK) return card;
  if (name != nullptr)
    throw py::value_error("no card is known as " + *name + ": A100, H20, H100, H200, B200 and RTX PRO 6000 are");
  throw std::runtime_error(tpf_cuda_error_string());
}

py::dict describe(const CardName& which) {
  const tpf_card card = card_of(which);
  py::dict out;
  out["architecture"] = card.architecture;
  out["sm_count"] = card.sm_count;
  out["cluster_sms"] = card.cluster_sms;
  out["most_gpcs"] = tpf::most_gpcs(card.architecture);
  out["shared_bytes"] = card.shared_bytes;
  out["has_wgmma"] = card.has_wgmma != 0;
  return out;
}

py::dict to_dict(const tpf_plan& plan) {
  static constexpr const char* kBodies[] = {"direct", "one row", "bulk", "tiles", "all rows", "columns"};
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
  out["rounds"] = plan.rounds;
  out["ranks"] = plan.ranks;
  return out;
}

py::dict plan(int op, int dtype, int64_t num_tokens, int hidden_size, int columns, bool in_place, bool complete,
              bool gathered, int world_size, int max_ctas, int free_sms, int free_cluster_sms, int64_t slot_bytes,
              const CardName& card) {
  tpf_call call =
      tpf::projection_call(static_cast<tpf_op>(op), static_cast<tpf_dtype>(dtype), num_tokens, hidden_size, columns);
  call.source = in_place ? 0 : -1;
  call.variant = (complete ? TPF_COMPLETE : 0) | (gathered ? TPF_GATHERED : 0);
  tpf_team team = {};
  team.world_size = world_size;
  team.max_ctas = max_ctas;
  team.free_sms = free_sms;
  team.free_cluster_sms = free_cluster_sms;
  team.slot_bytes = slot_bytes;
  const tpf_card on = card_of(card);
  tpf_plan made = {};
  if (tpf_plan_call(&made, &call, &team, &on) != TPF_OK) throw py::value_error("no kernel serves such a call");
  py::dict out = to_dict(made);
  // Of an rs_rmsnorm_ag: whether rs_rmsnorm_ag_fp8 of the same rows is this and a quantisation.
  out["quantized_by_all"] =
      op == TPF_RS_RMSNORM_AG && tpf::quantized_by_all(made, dtype, tpf::kQuantizedColumns, false);
  return out;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.def("cuda_compiled", [] { return tpf_cuda_compiled() != 0; });
  m.attr("CUDA_ARCHITECTURES") = tpf_cuda_compiled() != 0 ? TPF_ARCHITECTURES : "";
  m.def("cuda_has_code", [](int device) { return tpf_cuda_has_code(device) != 0; });
  m.def("cpu_supported", [] { return tpf_cpu_supported() != 0; });
  m.def("region_bytes", &tpf_region_bytes, py::arg("slot_bytes"), py::arg("on_cuda") = false);
  m.def("rows_of", [](int64_t num_tokens, int rank, int world_size) {
    int64_t start, count;
    tpf_rows_of(&start, &count, num_tokens, rank, world_size);
    return std::pair(start, count);
  });
  // For tests that set the stage for a round: where a region keeps its signals and how far its owner has come.
  m.attr("CONTROL_BYTES") = tpf::kControlBytes;
  m.attr("EPOCH_OFFSET") = offsetof(tpf::Control, progress) + offsetof(tpf::Progress, epoch);
  m.attr("SEGMENT_HEADER_BYTES") = TPF_SEGMENT_HEADER_BYTES;
  m.attr("FAULT_BYTES") = sizeof(tpf_fault);
  m.attr("COMPLETE") = TPF_COMPLETE;
  m.attr("RESIDUAL") = TPF_RESIDUAL;
  m.attr("QKV_A_PROJ_AG") = static_cast<int>(TPF_QKV_A_PROJ_AG);
  m.attr("QKV_A_PROJ_AG_FP8") = static_cast<int>(TPF_QKV_A_PROJ_AG_FP8);
  m.attr("QKV_A_PROJ_AG_NORM") = static_cast<int>(TPF_QKV_A_PROJ_AG_NORM);
  m.attr("BARRIER") = static_cast<int>(TPF_BARRIER);
  m.attr("MAX_RANKS") = TPF_MAX_RANKS;
  m.attr("MAX_CTAS") = TPF_MAX_CTAS;
  m.attr("MAX_HIDDEN_SIZE") = TPF_MAX_HIDDEN_SIZE;

  py::class_<Segment, std::shared_ptr<Segment>>(m, "Segment", py::buffer_protocol())
      .def(py::init<const py::int_&, bool, const std::string&, uint64_t>(), py::arg("bytes"), py::arg("create"),
           py::arg("name"), py::arg("token") = 0)
      .def_property_readonly("base", &Segment::base)
      .def_property_readonly("fd", &Segment::fd)
      .def("hold", &Segment::hold)
      .def_static("unlink",
                  [](const std::string& name) { check(tpf_segment_unlink(name.c_str()), "cannot unlink " + name); })
      .def_buffer(&Segment::buffer);

  py::class_<Caller, std::shared_ptr<Caller>>(m, "Caller")
      .def(py::init<>())
      .def("admit", &Caller::admit, py::arg("patience_ms") = 100)
      .def("attach", &Caller::attach)
      .def_property_readonly("thread_id", &Caller::thread_id);

  py::class_<Team, std::shared_ptr<Team>>(m, "Team")
      .def(py::init<int, const std::vector<Address>&, int64_t, int64_t, int, int, int, Address, int, int>(),
           py::arg("rank"), py::arg("regions"), py::arg("slot_bytes"), py::arg("timeout_ns"), py::arg("max_ctas") = 0,
           py::arg("liveness_fd") = -1, py::arg("device") = -1, py::arg("mailbox") = 0, py::arg("free_sms") = 0,
           py::arg("free_cluster_sms") = 0)
      .def("captured", &Team::captured)
      .def("keep", [](Team& team, std::shared_ptr<Segment> segment) { team.keep(std::move(segment)); })
      .def("add_symmetric_buffer", &Team::add_symmetric_buffer)
      .def("is_symmetric",
           [](const Team& team, Address input) {
             tpf_symm symm;
             return team.find(at(input), &symm);
           })
      .def("fault",
           [](const Team& team, int rank) {
             return to_dict(team.on_cuda() ? tpf_team_fault_cuda(team.get(), rank)
                                           : tpf_team_fault_cpu(team.get(), rank));
           })
      .def("fault_on_host", [](const Team& team, int rank) { return to_dict(fault_on_host(team, rank)); })
      .def("progress", &progress)
      .def("next_slot",
           [](const Team& team, py::ssize_t bytes) {
             return py::memoryview::from_memory(tpf_next_slot_cpu(team.get()), bytes);
           })
      .def("serve",
           [](const std::shared_ptr<Team>& team, const std::shared_ptr<Caller>& caller, const std::string& group_name,
              int64_t max_num_tokens, int64_t row_bytes) {
             team->set_interrupted(interrupted);
             tpf::serve(group_name, {team, caller, max_num_tokens, row_bytes});
           })
      .def("close", [](const Team& team) {
        tpf::forget(team);
        team.on_cuda() ? tpf_team_close_cuda(team.get()) : tpf_team_close_cpu(team.get());
      });

  m.def("card", &describe);
  m.def("gathers_normed_rows", &tpf::gathers_normed_rows);
  m.def("plan", &plan, py::arg("op"), py::arg("dtype"), py::arg("num_tokens"), py::arg("hidden_size"), py::kw_only(),
        py::arg("columns") = 0, py::arg("in_place") = false, py::arg("complete") = false, py::arg("gathered") = false,
        py::arg("world_size"), py::arg("max_ctas"), py::arg("free_sms"), py::arg("free_cluster_sms"),
        py::arg("slot_bytes"), py::arg("card"));

  m.attr("OPS") = tpf::op_names();
  m.def("register_kernel", &tpf::register_kernel);

  // A round without rows, on CUDA: the least that any op costs. For benchmarks.
  m.def("barrier", [](const Team& team, Address stream) -> int {
    if (const int status = team.fault_status()) return status;
    checked(team.follow_stream(at(stream)));
    return checked(tpf_barrier_cuda(team.get(), at(stream)));
  });
}
