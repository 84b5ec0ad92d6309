// Accesses through plain pointers to misaligned addresses, which are an error on a device and none on x86-64. What is
// compiled with -fsanitize=alignment asks before every access; where the answer is bad it calls this, in place of
// libubsan, which is not linked.
#pragma once

#include <cstdint>
#include <string>

#include "failures.h"

namespace cuda_on_cpu {

// As the compiler lays them out: the interface of its sanitizer (type mismatch, version 1).
struct CheckedType {
  uint16_t kind, info;
  char name[1];  // and more, quoted
};
struct CheckedAccess {
  const char* file;
  uint32_t line, column;
  const CheckedType* type;
  unsigned char log_of_alignment;
  unsigned char kind;
};

[[noreturn]] inline void fail_of_alignment(const CheckedAccess& access) {
  const std::string who = block.running < 0 ? std::string("the host") : name_of(block.running);
  fail(who + " accesses " + access.type->name + " at a misaligned address at " +
       text_of(Site{access.file, static_cast<int>(access.line)}));
}

}  // namespace cuda_on_cpu

extern "C" {
// The first continues after a report, which neither does.
__attribute__((weak, visibility("hidden"))) void __ubsan_handle_type_mismatch_v1(cuda_on_cpu::CheckedAccess* access,
                                                                                 void*) {
  cuda_on_cpu::fail_of_alignment(*access);
}
__attribute__((weak, visibility("hidden"))) void __ubsan_handle_type_mismatch_v1_abort(
    cuda_on_cpu::CheckedAccess* access, void*) {
  cuda_on_cpu::fail_of_alignment(*access);
}
}
