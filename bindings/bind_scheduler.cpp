// SPDX-License-Identifier: Apache-2.0
#include <pybind11/functional.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <pybind11/stl/filesystem.h>

#include <algorithm>
#include <chrono>
#include <filesystem>
#include <future>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "array.hpp"
#include "bind.hpp"
#include "budget.hpp"
#include "engine.hpp"
#include "gil.hpp"
#include "sida/io/trace_json.hpp"
#include "stats.hpp"

namespace sida::bindings {
namespace {

// For a source that is at work. It is Python's, which keeps alive what it refers to.
constexpr std::chrono::seconds patience{5};

// At interpreter exit threads that wait for the GIL would never get it: all schedulers are closed
// before. A source that does not return is waited for a little only: exit does not hang.
class LiveSchedulers {
 public:
  void add(const std::shared_ptr<AnyScheduler>& scheduler) {
    const std::lock_guard lock(mutex_);
    std::erase_if(schedulers_, [](const auto& other) { return other.expired(); });
    schedulers_.push_back(scheduler);
  }
  /// In a process that was forked off: none is ever destroyed, which would wait for its threads.
  void leave() {
    for (const auto& weak : schedulers_)
      if (auto scheduler = weak.lock()) static_cast<void>(new auto(std::move(scheduler)));
    schedulers_.clear();
  }
  void close() {
    std::vector<std::weak_ptr<AnyScheduler>> all;
    {
      const std::lock_guard lock(mutex_);
      all.swap(schedulers_);
    }
    std::promise<void> done;
    const std::future<void> closed = done.get_future();
    std::thread closing([all = std::move(all), done = std::move(done)]() mutable {
      for (const auto& weak : all)
        if (const auto scheduler = weak.lock()) scheduler->close();
      done.set_value();
    });
    if (closed.wait_for(patience) == std::future_status::ready) {
      closing.join();
    } else {
      closing.detach();
    }
  }

 private:
  std::mutex mutex_;
  std::vector<std::weak_ptr<AnyScheduler>> schedulers_;
};

LiveSchedulers& live() {
  static auto* const schedulers = new LiveSchedulers;  // outlives what is left running at exit
  return *schedulers;
}

py::object call(const py::function& function) {
  PyObject* const result = or_stand_still([&] { return PyObject_CallNoArgs(function.ptr()); });
  if (!result) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(result);
}

// `source` is called, and in the end let go, on threads that do not hold the GIL.
HashBuilder::Source source_of(py::function function) {
  const auto let_go = [](py::function* held) {
    const Locked locked;
    delete held;
  };
  const std::shared_ptr<py::function> held(new py::function(std::move(function)), let_go);
  return [held]() -> std::optional<HashTable> {
    const Locked locked;
    const py::object result = call(*held);
    if (result.is_none()) return std::nullopt;
    if (!py::isinstance<HashTable>(result))
      throw py::type_error("source: expected a HashTable, or None at the end; got " +
                           py::str(py::type::of(result)).cast<std::string>());
    return result.cast<HashTable>();
  };
}

// Waits for the next batch such that Ctrl-C ends the wait.
bool next_batch(AnyScheduler& scheduler) {
  constexpr std::chrono::milliseconds between_signals{50};
  for (;;) {
    {
      const Unlocked unlocked;
      if (scheduler.wait_for_batch(between_signals)) return scheduler.next_batch();
    }
    if (PyErr_CheckSignals() != 0) throw py::error_already_set();
  }
}

std::shared_ptr<AnyScheduler> make_scheduler(AnyCache& cache, int transfer_threads,
                                             std::size_t chunk_bytes, std::int64_t uses_ahead,
                                             double threshold) {
  SchedulerOptions options;
  options.transfers = {transfer_threads, chunk_bytes, uses_ahead, threshold};
  options.source_patience = patience;
  auto scheduler = cache.make_scheduler(options);
  live().add(scheduler);
  return scheduler;
}

}  // namespace

void bind_scheduler(py::module_& module) {
  const SchedulerOptions defaults;
  py::class_<AnyScheduler, std::shared_ptr<AnyScheduler>>(
      module, "OffloadScheduler", py::release_gil_before_calling_cpp_dtor(),
      "Brings experts to fast memory ahead of use. Passes and layer calls come one after the "
      "other; stats(), trace() and close() may be called from any thread at any time.")
      .def(py::init(&make_scheduler), py::arg("cache"), py::kw_only(),
           py::arg("transfer_threads") = defaults.transfers.threads,
           py::arg("chunk_bytes") = defaults.transfers.chunk_bytes,
           py::arg("uses_ahead") = defaults.transfers.uses_ahead,
           py::arg("threshold") = defaults.transfers.threshold,
           "transfer_threads: loads under way at once; chunk_bytes: what a demand waits for at "
           "most, "
           "a thread; uses_ahead: how far prefetch reaches where slots are short; threshold: "
           "experts "
           "wanted less surely are not brought early.")
      .def(
          "start",
          [](const std::shared_ptr<AnyScheduler>& self, py::function source, std::size_t ahead) {
            auto callable = source_of(std::move(source));
            const Unlocked unlocked;
            self->start(std::move(callable), ahead);
          },
          py::arg("source"), py::kw_only(), py::arg("ahead") = 16,
          "Starts the hash-building thread: it calls source() for one HashTable after the other, "
          "None at the end.\n\n"
          "At most `ahead` tables wait. What source() raises comes from next_batch().")
      .def("next_batch", &next_batch,
           "Begins the pass of the oldest table that was built ahead, waiting for it; False at the "
           "end.")
      .def("stop", &AnyScheduler::stop, py::call_guard<Unlocked>(),
           "Ends the hash-building thread and forgets its tables.\n\n"
           "A source that is at work is waited for, 5 seconds at most; then its thread is left "
           "behind, to end when the source returns.")
      .def(
          "begin_pass",
          [](AnyScheduler& self, std::optional<HashTable> table, std::uint64_t key,
             const py::object& mask) {
            const auto flags = mask_of(mask);
            const Unlocked unlocked;
            self.begin_pass(std::move(table), key, flags);
          },
          py::arg("table") = py::none(), py::kw_only(), py::arg("key") = 0,
          py::arg("mask") = py::none(), "Begins a pass with a table of the caller's, or none.")
      .def(
          "set_mask",
          [](AnyScheduler& self, const py::object& mask) {
            const auto flags = mask_of(mask);
            const Unlocked unlocked;
            self.set_mask(flags);
          },
          py::arg("mask"), "Gives the pass at hand its mask (nonzero: token).")
      .def("set_key", &AnyScheduler::set_key, py::arg("key"), py::call_guard<Unlocked>(),
           "Names the batch of the pass at hand, which began without its key.")
      .def("end_pass", &AnyScheduler::end_pass, py::call_guard<Unlocked>(),
           "Ends the pass: its table is forgotten.")
      .def(
          "current_table",
          [](const AnyScheduler& self) {
            return self.table() ? std::optional(*self.table()) : std::nullopt;
          },
          "A copy of the hash table of the pass at hand, or None.")
      .def("current_key", &AnyScheduler::key, "Key of the batch of the pass at hand.")
      .def(
          "stats", [](const AnyScheduler& self) { return dict_of(self.stats()); },
          "Counts since reset_stats(), in all and by layer; hits + late + misses = uses.")
      .def("reset_stats", &AnyScheduler::reset_stats, py::call_guard<Unlocked>(),
           "Statistics, trace and recorded routing begin anew.")
      .def(
          "trace",
          [](AnyScheduler& self, const std::filesystem::path& path) {
            save_trace(path, self.trace());
          },
          py::arg("path"), py::call_guard<Unlocked>(),
          "Writes what happened since reset_stats() as a trace for Perfetto.")
      .def("record", &AnyScheduler::recorded, py::call_guard<Unlocked>(),
           "The routing since reset_stats() as a HashTable. Where an expert's probability is 0, "
           "padding needs it.")
      .def(
          "times",
          [](AnyScheduler& self) {
            RunTimes times;
            {
              const Unlocked unlocked;
              times = self.times();
            }
            py::dict dict;
            dict["layer_seconds"] = times.layer_seconds;
            dict["expert_seconds"] = times.expert_seconds;
            return dict;
          },
          "What computation took since reset_stats(), waits left out: from one MoE layer's experts "
          "to the next's, and for one expert in one call; 0 where nothing is known.")
      .def(
          "resize",
          [](AnyScheduler& self, const py::object& memory) {
            const Budget budget = budget_of(memory);
            const Unlocked unlocked;
            self.resize(budget);
          },
          py::arg("memory"), "Replaces the cache's arena, between two layer calls.")
      .def("close", &AnyScheduler::close, py::call_guard<Unlocked>(),
           "Ends all threads, the hash-building one as stop() does. Idempotent.");
  module.def(
      "_close_all", [] { live().close(); }, py::call_guard<Unlocked>());
  py::module_::import("atexit").attr("register")(module.attr("_close_all"));
  py::module_::import("os").attr("register_at_fork")(py::arg("after_in_child") =
                                                         py::cpp_function([] { live().leave(); }));
}

}  // namespace sida::bindings
