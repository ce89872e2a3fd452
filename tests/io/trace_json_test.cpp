// SPDX-License-Identifier: Apache-2.0
#include "sida/io/trace_json.hpp"

#include <fstream>
#include <nlohmann/json.hpp>
#include <vector>

#include "support/catch.hpp"
#include "support/temporary_folder.hpp"

using namespace sida;

TEST_CASE("A trace becomes JSON that a timeline viewer opens", "[trace]") {
  const std::vector<TraceEvent> events = {
      {TraceKind::prefetch, {2, 7}, 10.001, 10.003, 4096, 1},
      {TraceKind::compute, {1, -1}, 10.0, 10.002, 0, 0},
      {TraceKind::hash_building, {-1, -1}, 10.0005, 10.001, 0, 0},
  };
  const auto json = nlohmann::json::parse(trace_json(events));

  std::vector<nlohmann::json> shown;
  for (const auto& event : json.at("traceEvents"))
    if (event.at("ph") == "X") shown.push_back(event);
  REQUIRE(shown.size() == 3);
  CHECK(shown[0].at("name") == "prefetch layer 2 expert 7");
  CHECK(shown[0].at("ts").get<double>() == Approx(1000));  // microseconds since the earliest
  CHECK(shown[0].at("dur").get<double>() == Approx(2000));
  CHECK(shown[0].at("args").at("bytes") == 4096);
  CHECK(shown[1].at("name") == "compute layer 1");
  CHECK(shown[1].at("ts").get<double>() == Approx(0));
  CHECK(shown[2].at("name") == "hash building");
  CHECK(shown[0].at("tid") != shown[1].at("tid"));
}

TEST_CASE("A trace without events is valid JSON too", "[trace]") {
  CHECK_NOTHROW(nlohmann::json::parse(trace_json({})));
}

TEST_CASE("A trace is saved whole, and a folder that is missing is an IoError", "[trace]") {
  const TemporaryFolder folder;
  const std::vector<TraceEvent> events = {{TraceKind::stall, {0, -1}, 1, 2, 0, 0}};
  save_trace(folder.path() / "trace.json", events);
  std::ifstream file(folder.path() / "trace.json");
  CHECK(nlohmann::json::parse(file).at("traceEvents").size() > 1);
  CHECK_THROWS_AS(save_trace(folder.path() / "missing" / "trace.json", events), IoError);
}
