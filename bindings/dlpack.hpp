// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

// The part of DLPack's ABI that arrays cross with: the versioned form (1.x), the one before it, and
// the table of functions by which libraries of DLPack 1.3 lend arrays without a call of Python's.
namespace sida::dlpack {

enum DeviceType : std::int32_t { cpu = 1, cuda = 2, cuda_host = 3 };
enum TypeCode : std::uint8_t {
  integer = 0,
  unsigned_integer = 1,
  real = 2,
  brain_real = 4,
  boolean = 6
};
inline constexpr std::uint64_t read_only = 1;

struct Device {
  std::int32_t type;
  std::int32_t id;
};

struct Type {
  std::uint8_t code;
  std::uint8_t bits;
  std::uint16_t lanes;
};

struct Tensor {
  void* data;
  Device device;
  std::int32_t dimensions;
  Type type;
  std::int64_t* shape;
  std::int64_t* strides;
  std::uint64_t byte_offset;
};

struct Managed {
  Tensor tensor;
  void* context;
  void (*deleter)(Managed*);
};

struct Version {
  std::uint32_t major;
  std::uint32_t minor;
};

struct ManagedVersioned {
  Version version;
  void* context;
  void (*deleter)(ManagedVersioned*);
  std::uint64_t flags;
  Tensor tensor;
};

/// What a type's `__dlpack_c_exchange_api__` points to. Functions return 0, or -1 with Python's
/// error set; none of them waits for a stream.
struct Exchange {
  Version version;
  Exchange* older;
  int (*allocate)(Tensor* prototype, ManagedVersioned** out, void* context,
                  void (*set_error)(void* context, const char* kind, const char* message));
  int (*lend)(void* object, ManagedVersioned** out);
  int (*wrap)(ManagedVersioned* tensor, void** out);
  int (*describe)(void* object, Tensor* out);
  int (*current_stream)(DeviceType type, std::int32_t device, void** out);
};

}  // namespace sida::dlpack
