// The library as tp_fused/native.py calls it: pointers arrive as integers, which it takes from tensors.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cerrno>
#include <cstddef>
#include <cstdio>
#include <cstring>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "plan/binding.h"
#include "protocol.h"
#include "team.h"
#include "torch_ops.h"
#include "tp_fused.h"

namespace py = pybind11;

namespace {

using tpf::Address, tpf::at, tpf::Caller, tpf::Input, tpf::projection_call, tpf::Team;

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

int checked(tpf_status status) {
  if (status == TPF_CUDA_ERROR) throw std::runtime_error(std::string("CUDA: ") + tpf_cuda_error_string());
  if (status == TPF_UNSUPPORTED) throw std::runtime_error("this build of tp_fused cannot run that");
  return status;
}

// Whether a signal has come of which Python makes an exception, Ctrl-C for one. It is left to be raised.
int32_t interrupted() {
  const py::gil_scoped_acquire locked;
  return PyErr_CheckSignals() != 0;
}

// Launches for `team`, unless it has faulted. Without the interpreter's lock where the call itself waits for peers:
// ranks may be threads of one process.
template <typename Cuda, typename Cpu>
int run(const Team& team, Address stream, Cuda&& cuda, Cpu&& cpu) {
  if (const int status = team.fault_status()) return status;
  if (team.on_cuda()) {
    checked(team.follow_stream(at(stream)));
    return checked(cuda());
  }
  int status = TPF_OK;
  {
    py::gil_scoped_release release;
    status = cpu();
  }
  if (PyErr_Occurred()) throw py::error_already_set();
  return status;
}

int gather_latent(Address latent, Address rows, const Team& team, const tpf_call& call, Address stream) {
  return run(
      team, stream, [&] { return tpf_gather_latent_cuda(at(latent), at(rows), team.get(), &call, at(stream)); },
      [&] { return tpf_qkv_a_proj_ag_cpu(at(latent), team.get(), &call); });
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  tpf::bind_plan(m);
  m.def("cuda_compiled", [] { return tpf_cuda_compiled() != 0; });
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
  m.attr("COLUMN_SCALES") = TPF_COLUMN_SCALES;
  m.attr("KEEP_OUTPUT") = TPF_KEEP_OUTPUT;
  m.attr("QKV_A_PROJ_AG") = static_cast<int>(TPF_QKV_A_PROJ_AG);
  m.attr("QKV_A_PROJ_AG_FP8") = static_cast<int>(TPF_QKV_A_PROJ_AG_FP8);
  m.attr("QKV_A_PROJ_AG_NORM") = static_cast<int>(TPF_QKV_A_PROJ_AG_NORM);
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
      .def("admit", [](Caller& caller) { return caller.admit(); })
      .def("attach", &Caller::attach)
      .def_property_readonly("thread_id", &Caller::thread_id);

  py::class_<Team, std::shared_ptr<Team>>(m, "Team")
      .def(py::init<int, const std::vector<Address>&, int64_t, int64_t, int, int, int, Address, int>(), py::arg("rank"),
           py::arg("regions"), py::arg("slot_bytes"), py::arg("timeout_ns"), py::arg("max_ctas") = 0,
           py::arg("liveness_fd") = -1, py::arg("device") = -1, py::arg("mailbox") = 0, py::arg("free_sms") = 0)
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

  m.def("register_kernel", &tpf::register_kernel);

  m.def("rs_rmsnorm",
        [](Address output, Address residual_out, Address input, Address residual, Address weight, const Team& team,
           int64_t num_tokens, int hidden_size, int dtype, float eps, uint32_t variant, Address stream) {
          const Input symm(team, at(input));
          const auto launch = [&](auto op, auto... last) {
            return op(at(output), at(residual_out), at(input), symm.get(), at(residual), at(weight), team.get(),
                      num_tokens, hidden_size, static_cast<tpf_dtype>(dtype), eps, variant, last...);
          };
          return run(
              team, stream, [&] { return launch(tpf_rs_rmsnorm_cuda, at(stream)); },
              [&] { return launch(tpf_rs_rmsnorm_cpu); });
        });

  m.def("rs_rmsnorm_fp8",
        [](Address q, Address scale, Address residual_out, Address output, Address input, Address residual,
           Address weight, const Team& team, int64_t num_tokens, int hidden_size, int dtype, float eps, int group_size,
           int64_t scale_row_stride, int64_t scale_group_stride, uint32_t variant, Address stream) {
          const Input symm(team, at(input));
          const auto launch = [&](auto op, auto... last) {
            return op(at(q), at<float>(scale), at(residual_out), at(output), at(input), symm.get(), at(residual),
                      at(weight), team.get(), num_tokens, hidden_size, static_cast<tpf_dtype>(dtype), eps, group_size,
                      scale_row_stride, scale_group_stride, variant, last...);
          };
          return run(
              team, stream, [&] { return launch(tpf_rs_rmsnorm_fp8_cuda, at(stream)); },
              [&] { return launch(tpf_rs_rmsnorm_fp8_cpu); });
        });

  m.def("rs_rmsnorm_ag",
        [](Address output, Address residual_out, Address input, Address residual, Address weight, const Team& team,
           int64_t num_tokens, int hidden_size, int dtype, float eps, uint32_t variant, Address stream) {
          const Input symm(team, at(input));
          const auto launch = [&](auto op, auto... last) {
            return op(at(output), at(residual_out), at(input), symm.get(), at(residual), at(weight), team.get(),
                      num_tokens, hidden_size, static_cast<tpf_dtype>(dtype), eps, variant, last...);
          };
          return run(
              team, stream, [&] { return launch(tpf_rs_rmsnorm_ag_cuda, at(stream)); },
              [&] { return launch(tpf_rs_rmsnorm_ag_cpu); });
        });

  m.def("reduce_scatter_rows", [](Address output, Address input, const Team& team, int64_t num_tokens, int hidden_size,
                                  int dtype, Address stream) {
    const Input symm(team, at(input));
    const auto launch = [&](auto op, auto... last) {
      return op(at(output), at(input), symm.get(), team.get(), num_tokens, hidden_size, static_cast<tpf_dtype>(dtype),
                last...);
    };
    return run(
        team, stream, [&] { return launch(tpf_reduce_scatter_rows_cuda, at(stream)); },
        [&] { return launch(tpf_reduce_scatter_rows_cpu); });
  });

  m.def("all_gather_rows", [](Address output, Address input, const Team& team, int64_t num_tokens, int hidden_size,
                              int dtype, Address stream) {
    const auto launch = [&](auto op, auto... last) {
      return op(at(output), at(input), team.get(), num_tokens, hidden_size, static_cast<tpf_dtype>(dtype), last...);
    };
    return run(
        team, stream, [&] { return launch(tpf_all_gather_rows_cuda, at(stream)); },
        [&] { return launch(tpf_all_gather_rows_cpu); });
  });

  // A round without rows, on CUDA: the least that any op costs. For benchmarks.
  m.def("barrier", [](const Team& team, Address stream) {
    if (const int status = team.fault_status()) return status;
    checked(team.follow_stream(at(stream)));
    return checked(tpf_barrier_cuda(team.get(), at(stream)));
  });

  // The projections in one kernel; None, and nothing launched, where that does not serve: then project and gather.
  m.def("project_and_gather",
        [](int op, const std::array<Address, 3>& outputs, Address input, Address scale, int64_t scale_row_stride,
           int64_t scale_group_stride, Address weight, Address weight_scale, Address bias, Address q_a_weight,
           Address kv_a_weight, const Team& team, int64_t num_tokens, int hidden_size, int columns, int dtype,
           int q_columns, int kv_columns, float eps, Address stream) -> std::optional<int> {
          const tpf_call call = projection_call(static_cast<tpf_op>(op), static_cast<tpf_dtype>(dtype), num_tokens,
                                                hidden_size, columns, bias != 0, q_columns, kv_columns);
          const tpf_projection projection = {at(input),        static_cast<const float*>(at(scale)),
                                             scale_row_stride, scale_group_stride,
                                             at(weight),       static_cast<const float*>(at(weight_scale)),
                                             at(bias),         at(q_a_weight),
                                             at(kv_a_weight),  q_columns,
                                             kv_columns,       eps};
          void* const pointers[3] = {at(outputs[0]), at(outputs[1]), at(outputs[2])};
          if (const int status = team.fault_status()) return status;
          checked(team.follow_stream(at(stream)));
          const tpf_status status = tpf_qkv_a_proj_ag_cuda(pointers, &projection, team.get(), &call, at(stream));
          if (status == TPF_UNSUPPORTED) return std::nullopt;
          return checked(status);
        });

  // The gathering halves of the projections, after the product. On the CPU that has been written into the next slot,
  // and `rows` is not looked at.
  m.def("qkv_a_proj_ag", [](Address latent, Address rows, const Team& team, int64_t num_tokens, int hidden_size,
                            int columns, int dtype, bool bias, Address stream) {
    const tpf_call call =
        projection_call(TPF_QKV_A_PROJ_AG, static_cast<tpf_dtype>(dtype), num_tokens, hidden_size, columns, bias);
    return gather_latent(latent, rows, team, call, stream);
  });

  m.def("qkv_a_proj_ag_fp8", [](Address latent, Address rows, const Team& team, int64_t num_tokens, int hidden_size,
                                int columns, Address stream) {
    const tpf_call call = projection_call(TPF_QKV_A_PROJ_AG_FP8, TPF_E4M3, num_tokens, hidden_size, columns);
    return gather_latent(latent, rows, team, call, stream);
  });

  m.def("qkv_a_proj_ag_norm", [](Address q_a, Address kv_a, Address k_pe, Address rows, Address q_a_weight,
                                 Address kv_a_weight, const Team& team, int64_t num_tokens, int hidden_size,
                                 int columns, int dtype, int q_columns, int kv_columns, float eps, Address stream) {
    const tpf_call call = projection_call(TPF_QKV_A_PROJ_AG_NORM, static_cast<tpf_dtype>(dtype), num_tokens,
                                          hidden_size, columns, false, q_columns, kv_columns);
    return run(
        team, stream,
        [&] {
          return tpf_gather_latent_norm_cuda(at(q_a), at(kv_a), at(k_pe), at(rows), at(q_a_weight), at(kv_a_weight),
                                             team.get(), &call, q_columns, kv_columns, eps, at(stream));
        },
        [&] {
          return tpf_qkv_a_proj_ag_norm_cpu(at(q_a), at(kv_a), at(k_pe), at(q_a_weight), at(kv_a_weight), team.get(),
                                            &call, q_columns, kv_columns, eps);
        });
  });
}
