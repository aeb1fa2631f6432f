#include "common.h"
#include "operators.h"

namespace sk {

static InstructionSet detect() {
#if defined(__x86_64__)
  InstructionSet best = InstructionSet::base;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) best = InstructionSet::avx2;
  if (best == InstructionSet::avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
    best = InstructionSet::avx512;
  if (const char* name = std::getenv("SK_FUSED_ISA")) {
    const std::string wanted = name;
    TORCH_CHECK_VALUE(wanted == "base" || wanted == "avx2" || wanted == "avx512", "SK_FUSED_ISA: expected base, avx2 or avx512, got ",
                      wanted);
    const auto limit = wanted == "base" ? InstructionSet::base : wanted == "avx2" ? InstructionSet::avx2 : InstructionSet::avx512;
    best = std::min(best, limit);
  }
  return best;
#else
  return InstructionSet::base;
#endif
}

InstructionSet instruction_set() {
  static const InstructionSet value = detect();
  return value;
}

std::string instruction_set_name() {
  switch (instruction_set()) {
    case InstructionSet::avx512: return "avx512";
    case InstructionSet::avx2: return "avx2";
    default: return "base";
  }
}

}  // namespace sk
