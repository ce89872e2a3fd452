# nlohmann/json as headers alone: in an include folder, or as PyPI's `nlohmann-json` installs them,
# in nlohmann_json/include of a site-packages that is on CMAKE_PREFIX_PATH.
if(TARGET nlohmann_json::nlohmann_json)
  set(nlohmann_json_FOUND TRUE)
  return()
endif()
find_path(nlohmann_json_INCLUDE_DIR nlohmann/json.hpp PATH_SUFFIXES nlohmann_json/include include)
mark_as_advanced(nlohmann_json_INCLUDE_DIR)
set(version_header "${nlohmann_json_INCLUDE_DIR}/nlohmann/detail/abi_macros.hpp")
if(EXISTS "${version_header}")
  file(STRINGS "${version_header}" version_lines
       REGEX "define NLOHMANN_JSON_VERSION_(MAJOR|MINOR|PATCH) [0-9]+")
  string(REGEX REPLACE "[^0-9]*([0-9]+)[^0-9]+([0-9]+)[^0-9]+([0-9]+).*" "\\1.\\2.\\3"
         nlohmann_json_VERSION "${version_lines}")
endif()
include(FindPackageHandleStandardArgs)
find_package_handle_standard_args(nlohmann_json REQUIRED_VARS nlohmann_json_INCLUDE_DIR
                                  VERSION_VAR nlohmann_json_VERSION)
if(nlohmann_json_FOUND)
  add_library(nlohmann_json::nlohmann_json INTERFACE IMPORTED)
  set_target_properties(nlohmann_json::nlohmann_json PROPERTIES
                        INTERFACE_INCLUDE_DIRECTORIES "${nlohmann_json_INCLUDE_DIR}")
endif()
