# sida::sida, the headers, and the settings that sida's own programs are compiled with.
file(GLOB_RECURSE sida_headers CONFIGURE_DEPENDS "${PROJECT_SOURCE_DIR}/include/sida/*.hpp")
add_library(sida INTERFACE)
add_library(sida::sida ALIAS sida)
target_sources(sida INTERFACE FILE_SET HEADERS BASE_DIRS "${PROJECT_SOURCE_DIR}/include"
                              FILES ${sida_headers})
target_compile_features(sida INTERFACE cxx_std_20)
target_link_libraries(sida INTERFACE Eigen3::Eigen nlohmann_json::nlohmann_json Threads::Threads)

# Warnings and sanitizers for a target of sida's own; never passed on to users.
function(sida_own_target target)
  target_link_libraries(${target} PRIVATE sida::sida)
  target_compile_options(${target} PRIVATE -Wall -Wextra -Wconversion
                                           $<$<BOOL:${SIDA_WARNINGS_ARE_ERRORS}>:-Werror>
                                           "-ffile-prefix-map=${PROJECT_SOURCE_DIR}/=")
  if(CMAKE_CXX_COMPILER_ID STREQUAL "GNU" AND CMAKE_CXX_COMPILER_VERSION VERSION_LESS 13)
    target_compile_options(${target} PRIVATE -Wno-restrict) # false for std::string's operator+
  endif()
  set_target_properties(${target} PROPERTIES CXX_EXTENSIONS OFF)
  if(SIDA_SANITIZE)
    target_compile_options(${target} PRIVATE -fsanitize=${SIDA_SANITIZE} -fno-omit-frame-pointer
                                             -fno-sanitize-recover=all)
    target_link_options(${target} PRIVATE -fsanitize=${SIDA_SANITIZE})
    if(CMAKE_CXX_COMPILER_ID STREQUAL "GNU") # false for an empty std::optional once it is instrumented
      target_compile_options(${target} PRIVATE -Wno-maybe-uninitialized)
    endif()
  endif()
endfunction()
