// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <vector>

#include "sida/backend/cpu/isa.hpp"

namespace sida::test {

/// Every instruction set that this machine runs.
inline std::vector<Isa> machine_isas() {
  std::vector<Isa> isas;
  for (const Isa isa : {Isa::portable, Isa::avx2, Isa::avx512, Isa::avx512_bf16, Isa::amx_bf16})
    if (isa <= best_isa()) isas.push_back(isa);
  return isas;
}

}  // namespace sida::test
