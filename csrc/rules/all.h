// The only list of rules: X(name, type). `name` is what Python asks for.
#pragma once

#include "rules/adamw.h"

#define FUSEDOPT_RULES(X)        \
  X(adamw, AdamW)                \
  X(adamw_amsgrad, AdamWAmsgrad) \
  X(adam, AdamL2)                \
  X(adam_amsgrad, AdamL2Amsgrad)
