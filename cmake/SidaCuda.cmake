# Whether the CUDA backend is built, and for which GPUs. Of SIDA_CUDA=AUTO it makes ON where there is
# a toolkit that works, and OFF elsewhere; CMAKE_CUDA_ARCHITECTURES are by default those of the GPUs
# that are there, and sm_80 and sm_90a where there are none.
set(sida_toolkit "nvcc of CUDA 12 or later")
find_package(CUDAToolkit 12.0 QUIET)
if(CUDAToolkit_FOUND AND NOT CMAKE_CUDA_COMPILER AND NOT DEFINED ENV{CUDACXX})
  set(ENV{CUDACXX} "${CUDAToolkit_NVCC_EXECUTABLE}") # nvcc need not be on PATH
endif()
if(SIDA_CUDA STREQUAL "AUTO")
  set(SIDA_CUDA OFF)
  if(CUDAToolkit_FOUND)
    include(CheckLanguage)
    check_language(CUDA)
    if(CMAKE_CUDA_COMPILER)
      set(SIDA_CUDA ON)
    endif()
  endif()
  if(NOT SIDA_CUDA)
    message(NOTICE "sida: without the CUDA backend, since no ${sida_toolkit} works here")
  endif()
elseif(NOT CUDAToolkit_FOUND)
  message(FATAL_ERROR "SIDA_CUDA=ON needs ${sida_toolkit}: set CUDAToolkit_ROOT to its folder, or "
                      "SIDA_CUDA=OFF")
endif()

if(SIDA_CUDA)
  set(sida_why "as asked for")
  if(NOT CMAKE_CUDA_ARCHITECTURES)
    execute_process(COMMAND nvidia-smi --query-gpu=compute_cap --format=csv,noheader
                    OUTPUT_VARIABLE capabilities ERROR_QUIET)
    string(REGEX MATCHALL "[0-9]+\\.[0-9]" CMAKE_CUDA_ARCHITECTURES "${capabilities}")
    list(REMOVE_DUPLICATES CMAKE_CUDA_ARCHITECTURES)
    list(TRANSFORM CMAKE_CUDA_ARCHITECTURES REPLACE "\\." "")
    list(TRANSFORM CMAKE_CUDA_ARCHITECTURES REPLACE "^90$" "90a")
    list(FILTER CMAKE_CUDA_ARCHITECTURES EXCLUDE REGEX "^[1-7].$") # too old for the kernels
    set(sida_why "the GPUs of this machine")
    if(NOT CMAKE_CUDA_ARCHITECTURES)
      set(CMAKE_CUDA_ARCHITECTURES 80 90a)
      set(sida_why "there is no GPU here to go by")
    endif()
  endif()
  list(JOIN CMAKE_CUDA_ARCHITECTURES ", sm_" sida_architectures)
  message(NOTICE "sida: with the CUDA backend, by CUDA ${CUDAToolkit_VERSION}, for "
                 "sm_${sida_architectures} (${sida_why}; CMAKE_CUDA_ARCHITECTURES sets others)")
  enable_language(CUDA)
endif()
