// SPDX-License-Identifier: Apache-2.0
#pragma once

// Files: checkpoints, predictors, hash tables, configs. The only door that needs nlohmann/json.
#include "sida/io/checkpoint.hpp"
#include "sida/io/checkpoint_experts.hpp"
#include "sida/io/checkpoint_store.hpp"
#include "sida/io/config_json.hpp"
#include "sida/io/hash_table_file.hpp"
#include "sida/io/kernel_table_file.hpp"
#include "sida/io/model_config.hpp"
#include "sida/io/predictor_file.hpp"
#include "sida/io/safetensors.hpp"
#include "sida/io/safetensors_writer.hpp"
