// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <span>

#include "sida/schedule/trace.hpp"

namespace sida {

/// What computation took in a run, waits for experts left out; 0 where nothing is known. What a
/// replay takes for granted.
struct RunTimes {
  double layer_seconds = 0;   ///< between the experts of one MoE layer and those of the next
  double expert_seconds = 0;  ///< of one expert in one layer call
};

/// The means over the passes in `events`, the first of several left out: it warms up, and its
/// events may have made way.
inline RunTimes run_times(std::span<const TraceEvent> events, std::int32_t layers,
                          std::size_t slab_bytes) {
  std::int64_t passes = 0;
  double from = 0, pass_seconds = 0;
  for (const TraceEvent& event : events) {
    if (event.kind != TraceKind::pass) continue;
    if (passes++ == 1) pass_seconds = 0;
    if (passes <= 2) from = event.begin;
    pass_seconds += event.end - event.begin;
  }
  if (passes > 1) --passes;
  double computing = 0, waiting = 0, experts = 0;
  for (const TraceEvent& event : events) {
    if (event.begin < from) continue;
    if (event.kind == TraceKind::stall) waiting += event.end - event.begin;
    if (event.kind != TraceKind::compute) continue;
    computing += event.end - event.begin;
    experts += static_cast<double>(event.bytes) / static_cast<double>(slab_bytes);
  }
  RunTimes times;
  if (experts > 0) times.expert_seconds = computing / experts;
  if (passes > 0)
    times.layer_seconds = std::max(0.0, pass_seconds - computing - waiting) /
                          static_cast<double>(passes * std::int64_t{layers});
  return times;
}

}  // namespace sida
