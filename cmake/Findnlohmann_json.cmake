# nlohmann/json from its own CMake config where there is one (Debian, a source build), else from
# the headers that PyPI's `nlohmann-json` installs as nlohmann_json/include in site-packages.
find_package(nlohmann_json ${nlohmann_json_FIND_VERSION} CONFIG QUIET)
if(NOT TARGET nlohmann_json::nlohmann_json)
  find_path(nlohmann_json_INCLUDE_DIR nlohmann/json.hpp PATH_SUFFIXES nlohmann_json/include)
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
endif()
