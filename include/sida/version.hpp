// SPDX-License-Identifier: Apache-2.0
#pragma once

// The only place where the version is written; CMake and the wheel read it from here.
#define SIDA_VERSION_MAJOR 0
#define SIDA_VERSION_MINOR 1
#define SIDA_VERSION_PATCH 0
