include(GNUInstallDirs)
include(CMakePackageConfigHelpers)

install(TARGETS sida EXPORT sidaTargets FILE_SET HEADERS
        DESTINATION "${CMAKE_INSTALL_INCLUDEDIR}")
set(sida_cmake_dir "${CMAKE_INSTALL_DATADIR}/cmake/sida") # headers only: no library folder
install(EXPORT sidaTargets NAMESPACE sida:: DESTINATION "${sida_cmake_dir}")
configure_package_config_file(cmake/sidaConfig.cmake.in "${PROJECT_BINARY_DIR}/sidaConfig.cmake"
                              INSTALL_DESTINATION "${sida_cmake_dir}")
write_basic_package_version_file("${PROJECT_BINARY_DIR}/sidaConfigVersion.cmake"
                                 COMPATIBILITY SameMinorVersion ARCH_INDEPENDENT)
install(FILES "${PROJECT_BINARY_DIR}/sidaConfig.cmake"
              "${PROJECT_BINARY_DIR}/sidaConfigVersion.cmake"
              "${PROJECT_SOURCE_DIR}/cmake/Findnlohmann_json.cmake"
        DESTINATION "${sida_cmake_dir}")
