// SPDX-License-Identifier: Apache-2.0
#include "sida/io/safetensors_writer.hpp"

#include <fstream>
#include <iterator>
#include <string>
#include <vector>

#include "support/catch.hpp"
#include "support/temporary_folder.hpp"

using Catch::Matchers::ContainsSubstring;

namespace {

std::string content(const std::filesystem::path& path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), {}};
}

std::ptrdiff_t files_in(const std::filesystem::path& folder) {
  return std::distance(std::filesystem::directory_iterator(folder), {});
}

}  // namespace

TEST_CASE("What is written is a safetensors file, byte by byte") {
  const TemporaryFolder folder;
  const std::vector<float> values{1, 2};
  const std::string letters = "abc";
  sida::write_safetensors(
      folder / "x.safetensors",
      {{"letters", sida::DataType::u8, {3}, std::as_bytes(std::span(letters))},
       {"values", sida::DataType::f32, {2, 1}, std::as_bytes(std::span(values))}},
      {{"format", "test \"quoted\""}});
  std::string header = R"({"__metadata__":{"format":"test \"quoted\""},)"
                       R"("letters":{"data_offsets":[8,11],"dtype":"U8","shape":[3]},)"
                       R"("values":{"data_offsets":[0,8],"dtype":"F32","shape":[2,1]}})";
  header.resize((header.size() + 7) / 8 * 8, ' ');
  const std::string length{static_cast<char>(header.size()), 0, 0, 0, 0, 0, 0, 0};
  const std::string floats("\0\0\x80\x3f\0\0\0\x40", 8);
  CHECK(content(folder / "x.safetensors") == length + header + floats + "abc");
  CHECK(files_in(folder.path()) == 1);
}

TEST_CASE("What is written can be opened, an empty file too") {
  const TemporaryFolder folder;
  sida::write_safetensors(folder / "none.safetensors", {});
  CHECK(sida::SafetensorsFile::open(folder / "none.safetensors").tensors().empty());
  sida::write_safetensors(folder / "x.safetensors", {{"a", sida::DataType::bf16, {0, 3}, {}}});
  const auto file = sida::SafetensorsFile::open(folder / "x.safetensors");
  CHECK(file.tensor("a").dtype == "BF16");
  CHECK(file.tensor("a").shape == std::vector<std::int64_t>{0, 3});
}

TEST_CASE("A write that fails leaves the older file and nothing else") {
  const TemporaryFolder folder;
  const auto path = folder.write("x.safetensors", "old");
  const std::string letters = "abc";
  const auto data = std::as_bytes(std::span(letters));
  using sida::DataType;
  CHECK_THROWS_AS(sida::write_safetensors(path, {{"a", DataType::u8, {4}, data}}),
                  sida::InvalidArgument);
  CHECK_THROWS_WITH(sida::write_safetensors(
                        path, {{"a", DataType::u8, {3}, data}, {"a", DataType::u8, {3}, data}}),
                    ContainsSubstring("once"));
  CHECK_THROWS_WITH(sida::write_safetensors(path, {{"\xff", DataType::u8, {3}, data}}),
                    ContainsSubstring("UTF-8"));
  CHECK(content(path) == "old");
  std::filesystem::create_directory(folder / "folder");
  CHECK_THROWS_AS(sida::write_safetensors(folder / "folder", {}), sida::IoError);
  CHECK_THROWS_AS(sida::write_safetensors(folder / "none" / "x", {}), sida::IoError);
  CHECK(files_in(folder.path()) == 2);
}
