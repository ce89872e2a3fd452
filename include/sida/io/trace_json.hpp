// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <cstdio>
#include <filesystem>
#include <span>
#include <string>
#include <string_view>

#include "sida/io/file.hpp"
#include "sida/schedule/trace.hpp"

namespace sida {

/// @cond
namespace detail {

/// The rows of the timeline: what the layers do, batches, hash building, then one row a transfer
/// thread.
inline int trace_row(const TraceEvent& event) {
  switch (event.kind) {
    case TraceKind::compute:
    case TraceKind::stall:
      return 1;
    case TraceKind::pass:
      return 2;
    case TraceKind::hash_building:
      return 3;
    case TraceKind::prefetch:
    case TraceKind::demand_load:
      return 4 + event.lane;
  }
  return 0;
}

inline std::string trace_row_name(int row) {
  constexpr std::string_view fixed[] = {"", "layers", "batches", "hash building"};
  if (row < 4) return std::string(fixed[row]);
  return "transfer " + std::to_string(row - 4);
}

}  // namespace detail
/// @endcond

/// The events as JSON that Perfetto (ui.perfetto.dev) and chrome://tracing open: one row for the
/// layers, one each for batches and hash building, one for each transfer thread, and one for loads
/// that layers begin themselves. Times are microseconds since the earliest event.
inline std::string trace_json(std::span<const TraceEvent> events) {
  double origin = events.empty() ? 0 : events[0].begin;
  int rows = 4;
  for (const TraceEvent& event : events) {
    origin = std::min(origin, event.begin);
    rows = std::max(rows, detail::trace_row(event) + 1);
  }
  std::string json = "{\"displayTimeUnit\": \"ms\", \"traceEvents\": [\n";
  json += "{\"ph\": \"M\", \"pid\": 1, \"name\": \"process_name\", \"args\": {\"name\": \"sida\"}}";
  for (int row = 1; row < rows; ++row)
    json += ",\n{\"ph\": \"M\", \"pid\": 1, \"tid\": " + std::to_string(row) +
            ", \"name\": \"thread_name\", \"args\": {\"name\": \"" + detail::trace_row_name(row) +
            "\"}}";
  for (const TraceEvent& event : events) {
    const std::string kind(name_of(event.kind));
    std::string name = kind;
    if (event.id.layer >= 0) name += " layer " + std::to_string(event.id.layer);
    if (event.id.expert >= 0) name += " expert " + std::to_string(event.id.expert);
    char text[512];
    std::snprintf(text, sizeof text,
                  ",\n{\"ph\": \"X\", \"pid\": 1, \"tid\": %d, \"name\": \"%s\", \"cat\": \"%s\", "
                  "\"ts\": %.3f, \"dur\": %.3f, \"args\": {\"layer\": %d, \"expert\": %d, "
                  "\"bytes\": %lld}}",
                  detail::trace_row(event), name.c_str(), kind.c_str(),
                  (event.begin - origin) * 1e6, (event.end - event.begin) * 1e6, event.id.layer,
                  event.id.expert, static_cast<long long>(event.bytes));
    json += text;
  }
  return json + "\n]}\n";
}

/// Writes the events to `path` as trace_json has them, whole or not at all. @throws IoError.
inline void save_trace(const std::filesystem::path& path, std::span<const TraceEvent> events) {
  const std::string json = trace_json(events);
  const std::span<const std::byte> piece = std::as_bytes(std::span(json));
  write_file(path, {&piece, 1});
}

}  // namespace sida
