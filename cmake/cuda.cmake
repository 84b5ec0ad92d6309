# Whether the CUDA kernels can be built, and for what. Sets FUSEDOPT_HAS_CUDA; if it is on, the language is enabled and
# FUSEDOPT_CUDA_ARCHITECTURES is a list of what to compile for. A toolkit that does not work is no error, as the rest
# does without: a line says what was wrong with it.

set(FUSEDOPT_HAS_CUDA OFF)

function(fusedopt_without_cuda reason)
  message(STATUS "fusedopt: building without CUDA kernels: ${reason}")
endfunction()

# Looked for anew each time: another build may have had another PATH.
unset(FUSEDOPT_NVCC CACHE)
if(DEFINED ENV{CUDACXX})
  find_program(FUSEDOPT_NVCC NAMES "$ENV{CUDACXX}")
else()
  find_program(FUSEDOPT_NVCC NAMES nvcc HINTS ENV CUDA_HOME ENV CUDA_PATH PATH_SUFFIXES bin)
endif()
if(NOT FUSEDOPT_NVCC)
  fusedopt_without_cuda("nvcc not found; put nvcc 12 or later on the PATH to have them")
  return()
endif()

execute_process(COMMAND ${FUSEDOPT_NVCC} --version OUTPUT_VARIABLE version ERROR_VARIABLE version RESULT_VARIABLE failed)
if(NOT failed EQUAL 0 OR NOT version MATCHES "release ([0-9.]+)")
  string(STRIP "${version}" version)
  fusedopt_without_cuda("${FUSEDOPT_NVCC} --version fails (${failed}) ${version}")
  return()
endif()
set(version ${CMAKE_MATCH_1})
if(version VERSION_LESS 12)
  fusedopt_without_cuda("nvcc ${version} is too old, 12 is needed")
  return()
endif()

# A trial with nothing of ours in it. Its error is worth more than what CMake says of a compiler that fails, which also
# would end the build.
set(trial ${CMAKE_CURRENT_BINARY_DIR}/cuda_trial)
file(MAKE_DIRECTORY ${trial})
file(WRITE ${trial}/trial.cu "#include <cuda_runtime.h>\n#include <vector>\n__global__ void nothing() {}\n"
  "int main() { nothing<<<1, 1>>>(); return cudaDeviceSynchronize(); }\n")
set(host_compiler)
if(DEFINED ENV{CUDAHOSTCXX})
  set(host_compiler -ccbin $ENV{CUDAHOSTCXX})
elseif(CMAKE_CUDA_HOST_COMPILER)
  set(host_compiler -ccbin ${CMAKE_CUDA_HOST_COMPILER})
endif()
execute_process(
  COMMAND ${FUSEDOPT_NVCC} -std=c++17 -cudart static ${host_compiler} trial.cu -o trial
  WORKING_DIRECTORY ${trial}
  OUTPUT_VARIABLE output
  ERROR_VARIABLE output
  RESULT_VARIABLE failed)
if(NOT failed EQUAL 0)
  # The first line that says something, or else the first.
  string(REPLACE ";" "," output "${output}")
  string(REGEX MATCH "[^\n]*([Ee]rror|cannot find|not found|unsupported)[^\n]*" reason "${output}")
  if(NOT reason)
    string(REGEX MATCH "[^\n]+" reason "${output}")
  endif()
  fusedopt_without_cuda("nvcc ${version} does not compile a program: ${reason}; another host compiler may help, in CUDAHOSTCXX")
  return()
endif()

set(CMAKE_CUDA_COMPILER ${FUSEDOPT_NVCC} CACHE FILEPATH "nvcc" FORCE)
if(NOT CMAKE_CUDA_ARCHITECTURES)
  set(CMAKE_CUDA_ARCHITECTURES OFF)  # given per target
endif()
enable_language(CUDA)

# What this nvcc can make code for: "compute_90" and the like.
execute_process(COMMAND ${FUSEDOPT_NVCC} --list-gpu-arch OUTPUT_VARIABLE known)
string(REGEX REPLACE "[ ,]+" ";" FUSEDOPT_CUDA_ARCHITECTURES "${FUSEDOPT_CUDA_ARCHITECTURES}")
if(NOT FUSEDOPT_CUDA_ARCHITECTURES)
  # Those of the GPUs that are here, each written as in 9.0. An nvidia-smi that fails, or is too old to know, says none.
  set(visible)
  set(wanted)
  unset(FUSEDOPT_NVIDIA_SMI CACHE)
  find_program(FUSEDOPT_NVIDIA_SMI NAMES nvidia-smi)
  if(FUSEDOPT_NVIDIA_SMI)
    execute_process(
      COMMAND ${FUSEDOPT_NVIDIA_SMI} --query-gpu=compute_cap --format=csv,noheader
      OUTPUT_VARIABLE said
      ERROR_QUIET
      RESULT_VARIABLE failed
      TIMEOUT 20)
    if(failed EQUAL 0)
      string(REGEX MATCHALL "[0-9]+\\.[0-9]" visible "${said}")
      list(TRANSFORM visible REPLACE "\\." "")
      list(REMOVE_DUPLICATES visible)
      list(SORT visible COMPARE NATURAL)
      set(wanted ${visible})
    endif()
  endif()
  # Also where one of them is nothing that this nvcc knows: the last has PTX, which a later GPU takes.
  foreach(architecture ${visible})
    if(NOT known MATCHES "compute_${architecture}[^0-9]")
      set(wanted)
    endif()
  endforeach()
  # Machine code for 80 runs on 86 and 89, too.
  if(NOT wanted)
    foreach(architecture 75 80 90 100 120)
      if(known MATCHES "compute_${architecture}[^0-9]")
        list(APPEND wanted ${architecture})
      endif()
    endforeach()
  endif()
  set(FUSEDOPT_CUDA_ARCHITECTURES ${wanted})
endif()
foreach(architecture ${FUSEDOPT_CUDA_ARCHITECTURES})
  if(NOT architecture MATCHES "^[0-9]+$" OR NOT known MATCHES "compute_${architecture}[^0-9]")
    string(REGEX REPLACE "[\n ]+" ", " known "${known}")
    message(FATAL_ERROR "FUSEDOPT_CUDA_ARCHITECTURES: '${architecture}' is nothing that nvcc ${version} makes code for; "
      "write compute capabilities as in 80,90 and choose from ${known}")
  endif()
endforeach()
set(FUSEDOPT_HAS_CUDA ON)
message(STATUS "fusedopt: CUDA kernels by nvcc ${version} for ${FUSEDOPT_CUDA_ARCHITECTURES}")
