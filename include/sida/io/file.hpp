// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <filesystem>
#include <span>
#include <string>
#include <system_error>
#include <utility>

#include "sida/core/error.hpp"

namespace sida {

/// @cond
namespace detail {

[[noreturn]] inline void throw_io_error(const std::filesystem::path& path, const char* what,
                                        int error) {
  throw IoError(path.string() + ": " + what + ": " + std::generic_category().message(error));
}

/// A file descriptor, closed when it goes; move-only.
class FileDescriptor {
 public:
  explicit FileDescriptor(int descriptor) noexcept : descriptor_(descriptor) {}
  FileDescriptor(FileDescriptor&& other) noexcept
      : descriptor_(std::exchange(other.descriptor_, -1)) {}
  FileDescriptor& operator=(FileDescriptor&& other) noexcept {
    std::swap(descriptor_, other.descriptor_);
    return *this;
  }
  ~FileDescriptor() {
    if (descriptor_ >= 0) ::close(descriptor_);
  }
  int get() const noexcept { return descriptor_; }

 private:
  int descriptor_;
};

}  // namespace detail
/// @endcond

/// A regular file, open for positioned reads. Thread-safe: reads share no position and no buffer.
class InputFile {
 public:
  /// @throws IoError when `path` cannot be opened or is no regular file (a pipe would make readers
  /// wait for ever).
  explicit InputFile(std::filesystem::path path)
      : path_(std::move(path)),
        descriptor_(::open(path_.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK)) {
    if (descriptor_.get() < 0) detail::throw_io_error(path_, "cannot open", errno);
    struct ::stat status {};
    if (::fstat(descriptor_.get(), &status) != 0)
      detail::throw_io_error(path_, "cannot inspect", errno);
    if (!S_ISREG(status.st_mode)) throw IoError(path_.string() + ": expected a regular file");
    size_ = static_cast<std::uint64_t>(status.st_size);
    // Experts are read in no order: the kernel's readahead would bring their neighbours, which
    // doubles what the disk has to do. In vain where the file system takes no advice.
    static_cast<void>(::posix_fadvise(descriptor_.get(), 0, 0, POSIX_FADV_RANDOM));
  }

  const std::filesystem::path& path() const noexcept { return path_; }
  std::uint64_t size() const noexcept { return size_; }  ///< bytes, when it was opened

  /// The kernel begins to bring these bytes to its cache, so that a read of them finds them there;
  /// returns at once. They may lie beyond the end.
  void will_read(std::uint64_t offset, std::uint64_t bytes) const noexcept {
    static_cast<void>(::posix_fadvise(descriptor_.get(), static_cast<::off_t>(offset),
                                      static_cast<::off_t>(bytes), POSIX_FADV_WILLNEED));
  }

  /// Fills `destination` with the bytes that begin at `offset`.
  /// @throws IoError when the file ends before, or cannot be read.
  void read(std::uint64_t offset, std::span<std::byte> destination) const {
    while (!destination.empty()) {
      const ::ssize_t got = ::pread(descriptor_.get(), destination.data(), destination.size(),
                                    static_cast<::off_t>(offset));
      if (got < 0 && errno == EINTR) continue;
      if (got < 0) detail::throw_io_error(path_, "cannot read", errno);
      if (got == 0)
        throw IoError(path_.string() + ": expected " + std::to_string(destination.size()) +
                      " more bytes at " + std::to_string(offset) +
                      ", but the file ends there; it is truncated, or was changed while open");
      offset += static_cast<std::uint64_t>(got);
      destination = destination.subspan(static_cast<std::size_t>(got));
    }
  }

 private:
  std::filesystem::path path_;
  detail::FileDescriptor descriptor_;
  std::uint64_t size_ = 0;
};

/// Writes `pieces`, one behind the other, to `path`: whole or not at all. The bytes go to a
/// temporary file beside `path`, are on the disk before it takes the name, and replace an older
/// file in one step; after a failure the older file stands unchanged.
/// @throws IoError.
inline void write_file(const std::filesystem::path& path,
                       std::span<const std::span<const std::byte>> pieces) {
  static std::atomic<unsigned> files{0};
  std::filesystem::path partial;
  int descriptor = -1;
  do {
    partial = path.parent_path() /
              (".sida-" + std::to_string(::getpid()) + "-" + std::to_string(files++) + ".partial");
    descriptor = ::open(partial.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666);
  } while (descriptor < 0 && errno == EEXIST);  // left behind by a process that was killed
  const detail::FileDescriptor file(descriptor);
  if (file.get() < 0) detail::throw_io_error(partial, "cannot create", errno);
  try {
    for (std::span<const std::byte> piece : pieces) {
      while (!piece.empty()) {
        const ::ssize_t put = ::write(file.get(), piece.data(), piece.size());
        if (put < 0 && errno == EINTR) continue;
        if (put < 0) detail::throw_io_error(path, "cannot write", errno);
        piece = piece.subspan(static_cast<std::size_t>(put));
      }
    }
    if (::fsync(file.get()) != 0) detail::throw_io_error(path, "cannot write", errno);
    if (std::rename(partial.c_str(), path.c_str()) != 0)
      detail::throw_io_error(path, "cannot replace", errno);
  } catch (...) {
    ::unlink(partial.c_str());
    throw;
  }
}

}  // namespace sida
