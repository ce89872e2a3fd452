// SPDX-License-Identifier: Apache-2.0
#include "sida/io/safetensors.hpp"

#include <sys/stat.h>

#include <atomic>
#include <string>
#include <thread>
#include <vector>

#include "io/raw_safetensors.hpp"
#include "support/catch.hpp"
#include "support/temporary_folder.hpp"

using Catch::Matchers::ContainsSubstring;
using sida::IoError;
using sida::SafetensorsFile;

namespace {

std::string text_of(const SafetensorsFile& file, std::uint64_t begin, std::size_t bytes) {
  std::string text(bytes, '?');
  file.read(begin, std::as_writable_bytes(std::span(text)));
  return text;
}

void check_refused(std::string_view header, std::string_view data, const std::string& reason) {
  const TemporaryFolder folder;
  const auto path = folder.write("bad.safetensors", raw_safetensors(header, data));
  INFO(header.substr(0, 300));
  CHECK_THROWS_AS(SafetensorsFile::open(path), IoError);
  CHECK_THROWS_WITH(SafetensorsFile::open(path),
                    ContainsSubstring(reason) && ContainsSubstring("bad.safetensors"));
}

}  // namespace

TEST_CASE("A safetensors file gives its tensors, their places and its metadata") {
  const TemporaryFolder folder;
  const std::string header =
      R"({"__metadata__":{"format":"pt"},"b":{"dtype":"F32","shape":[1,2],"data_offsets":[3,11]},)"
      R"("a":{"dtype":"U8","shape":[3],"data_offsets":[0,3]},)"
      R"("none":{"dtype":"BF16","shape":[0,7],"data_offsets":[3,3]}}  )";
  const auto path = folder.write("x.safetensors", raw_safetensors(header, "abc12345678"));
  const SafetensorsFile file = SafetensorsFile::open(path);
  CHECK(file.metadata() == std::map<std::string, std::string>{{"format", "pt"}});
  REQUIRE(file.tensors().size() == 3);
  CHECK(file.tensor("a").dtype == "U8");
  CHECK(file.tensor("b").shape == std::vector<std::int64_t>{1, 2});
  CHECK(file.tensor("b").begin == 8 + header.size() + 3);
  CHECK(file.tensor("b").end == file.tensor("b").begin + 8);
  CHECK(text_of(file, file.tensor("a").begin, 3) == "abc");
  CHECK(text_of(file, file.tensor("b").begin + 2, 5) == "34567");
  CHECK_THROWS_WITH(file.tensor("c"), ContainsSubstring("'c'"));
  CHECK_THROWS_AS(text_of(file, file.tensor("b").begin, 9), IoError);
}

TEST_CASE("A header that does not describe the file is refused") {
  SECTION("no JSON") { check_refused("{\"a\":", "", "not valid JSON"); }
  SECTION("no object") { check_refused("[]", "", "JSON object"); }
  SECTION("invalid UTF-8") { check_refused("{\"\xff\":1}", "", "not valid JSON"); }
  SECTION("not a tensor") { check_refused(R"({"a":1})", "", "'a'"); }
  SECTION("metadata that is no string") {
    check_refused(R"({"__metadata__":{"a":1}})", "", "to be a string");
  }
  SECTION("a name twice") {
    check_refused(R"({"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},)"
                  R"("a":{"dtype":"U8","shape":[1],"data_offsets":[1,2]}})",
                  "xy", "twice");
  }
  SECTION("nested a hundred thousand deep") {
    check_refused(std::string(100000, '['), "", "nested");
    std::string objects;
    for (int i = 0; i < 1000; ++i) objects += R"({"a":)";
    check_refused(objects, "", "nested");
  }
  struct Case {
    const char *entry, *data, *reason;
  };
  for (const Case& bad : std::vector<Case>{
           {R"("dtype":"F33","shape":[1],"data_offsets":[0,4])", "1234", "dtype"},
           {R"("dtype":7,"shape":[1],"data_offsets":[0,4])", "1234", "dtype"},
           {R"("dtype":"F32","shape":[1])", "", "data_offsets"},
           {R"("dtype":"F32","shape":1,"data_offsets":[0,4])", "1234", "shape"},
           {R"("dtype":"F32","shape":[-1],"data_offsets":[0,4])", "1234", "non-negative"},
           {R"("dtype":"F32","shape":[1.0],"data_offsets":[0,4])", "1234", "non-negative"},
           {R"("dtype":"F32","shape":[18446744073709551615],"data_offsets":[0,4])", "1234",
            "non-negative"},
           {R"("dtype":"F32","shape":[1],"data_offsets":[0,4,4])", "1234", "two"},
           {R"("dtype":"F32","shape":[1],"data_offsets":[4,0])", "1234", "data_offsets"},
           {R"("dtype":"F32","shape":[2],"data_offsets":[0,8])", "1234", "truncated"},
           {R"("dtype":"F32","shape":[2],"data_offsets":[0,4])", "1234", "8 bytes"},
           {R"("dtype":"F4","shape":[1],"data_offsets":[0,0])", "", "bytes"},
           // 2^32 * 2^32 elements: the product is 0 where it wraps around.
           {R"("dtype":"U8","shape":[4294967296,4294967296],"data_offsets":[0,0])", "",
            "more elements"},
           {R"("dtype":"F32","shape":[4611686018427387905],"data_offsets":[0,4])", "1234",
            "more elements"},
           {R"("dtype":"F32","shape":[1],"data_offsets":[0,4])", "12345", "left over"},
           {R"("dtype":"F32","shape":[1],"data_offsets":[1,5])", "12345", "hole"}}) {
    check_refused("{\"a\":{" + std::string(bad.entry) + "}}", bad.data, bad.reason);
  }
  SECTION("overlap") {
    check_refused(R"({"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2]},)"
                  R"("b":{"dtype":"U8","shape":[2],"data_offsets":[1,3]}})",
                  "xyz", "overlap");
  }
}

TEST_CASE("A file that is no safetensors file is refused") {
  const TemporaryFolder folder;
  CHECK_THROWS_WITH(SafetensorsFile::open(folder / "none"), ContainsSubstring("cannot open"));
  CHECK_THROWS_WITH(SafetensorsFile::open(folder.path()), ContainsSubstring("regular file"));
  CHECK_THROWS_WITH(SafetensorsFile::open(folder.write("short", "1234567")),
                    ContainsSubstring("at least 8 bytes"));
  CHECK_THROWS_AS(SafetensorsFile::open(folder.write("long", "\xff\xff\xff\xff\xff\xff\xff\xff{}")),
                  IoError);
  const std::string whole =
      RawSafetensors().add("a", "F32", "[2]", std::vector<float>{1, 2}).bytes();
  for (std::size_t length = 0; length < whole.size(); ++length)
    CHECK_THROWS_AS(SafetensorsFile::open(folder.write("cut", whole.substr(0, length))), IoError);
  CHECK_NOTHROW(SafetensorsFile::open(folder.write("whole", whole)));
}

TEST_CASE("A pipe is refused at once instead of waited for") {
  const TemporaryFolder folder;
  REQUIRE(::mkfifo((folder / "pipe").c_str(), 0600) == 0);
  CHECK_THROWS_WITH(SafetensorsFile::open(folder / "pipe"), ContainsSubstring("regular file"));
}

TEST_CASE("A file that shrinks while it is open gives an error, not old or foreign bytes") {
  const TemporaryFolder folder;
  const auto path =
      folder.write("x.safetensors",
                   RawSafetensors().add("a", "F32", "[4]", std::vector<float>{1, 2, 3, 4}).bytes());
  const SafetensorsFile file = SafetensorsFile::open(path);
  std::filesystem::resize_file(path, file.tensor("a").begin + 10);
  CHECK(text_of(file, file.tensor("a").begin, 10).size() == 10);
  CHECK_THROWS_WITH(text_of(file, file.tensor("a").begin, 11), ContainsSubstring("the file ends"));
}

TEST_CASE("Threads read one file at once and each gets its own bytes") {
  const TemporaryFolder folder;
  std::vector<std::uint32_t> values(1 << 16);
  for (std::uint32_t i = 0; i < values.size(); ++i) values[i] = i * 2654435761u;
  const auto path =
      folder.write("x.safetensors", RawSafetensors().add("a", "U32", "[65536]", values).bytes());
  const SafetensorsFile file = SafetensorsFile::open(path);
  const std::uint64_t begin = file.tensor("a").begin;
  std::atomic<int> wrong{0};
  std::vector<std::thread> threads;
  for (std::uint32_t t = 0; t < 8; ++t) {
    threads.emplace_back([&, t] {
      std::vector<std::uint32_t> part(997);
      for (std::uint32_t i = t; i + part.size() < values.size(); i += 1013) {
        file.read(begin + 4 * i, std::as_writable_bytes(std::span(part)));
        if (!std::equal(part.begin(), part.end(), values.begin() + i)) ++wrong;
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  CHECK(wrong == 0);
}
