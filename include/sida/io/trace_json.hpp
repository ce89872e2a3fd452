// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "sida/io/file.hpp"
#include "sida/schedule/trace.hpp"

namespace sida {

/// Name of a kind of event, as it stands in trace files.
inline const char* name_of(TraceKind kind) noexcept {
  switch (kind) {
    case TraceKind::prefetch:
      return "prefetch";
    case TraceKind::demand_load:
      return "demand load";
    case TraceKind::compute:
      return "compute";
    case TraceKind::stall:
      return "stall";
    case TraceKind::hash_building:
      return "hash building";
  }
  return "?";
}

/// Writes events as Chrome trace JSON, which Perfetto opens: one track for hash building, one for
/// each transfer thread, one for the inference thread. Whole or not at all. @throws IoError.
inline void write_trace_json(const std::filesystem::path& path,
                             const std::vector<TraceEvent>& events) {
  using nlohmann::json;
  const auto track = [](const TraceEvent& event) -> std::pair<int, std::string> {
    if (event.kind == TraceKind::hash_building) return {0, "hash building"};
    if (event.kind == TraceKind::compute || event.kind == TraceKind::stall) return {1, "inference"};
    return {2 + event.lane, "transfer " + std::to_string(event.lane)};
  };
  json list = json::array();
  std::vector<bool> named;
  const double start = events.empty() ? 0 : events.front().begin;
  for (const TraceEvent& event : events) {
    const auto [id, name] = track(event);
    if (named.size() <= static_cast<std::size_t>(id))
      named.resize(static_cast<std::size_t>(id) + 1);
    if (!named[static_cast<std::size_t>(id)]) {
      named[static_cast<std::size_t>(id)] = true;
      list.push_back({{"ph", "M"},
                      {"pid", 1},
                      {"tid", id},
                      {"name", "thread_name"},
                      {"args", {{"name", name}}}});
    }
    list.push_back(
        {{"ph", "X"},
         {"pid", 1},
         {"tid", id},
         {"name", name_of(event.kind)},
         {"ts", (event.begin - start) * 1e6},
         {"dur", (event.end - event.begin) * 1e6},
         {"args",
          {{"layer", event.id.layer}, {"expert", event.id.expert}, {"bytes", event.bytes}}}});
  }
  const std::string text = json{{"traceEvents", list}, {"displayTimeUnit", "ms"}}.dump();
  const std::span<const std::byte> piece = std::as_bytes(std::span(text));
  write_file(path, {&piece, 1});
}

}  // namespace sida
