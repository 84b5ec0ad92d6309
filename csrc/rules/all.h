// The only list of rules: X(name, type). `name` is what Python asks for.
#pragma once

#include "rules/adafactor.h"
#include "rules/adagrad.h"
#include "rules/adamw.h"
#include "rules/ademamix.h"
#include "rules/lion.h"
#include "rules/rmsprop.h"
#include "rules/schedule_free.h"
#include "rules/sgd.h"
#include "rules/stable_adamw.h"

#define FUSEDOPT_RULES(X)                               \
  X(adamw, AdamW)                                       \
  X(adamw_amsgrad, AdamWAmsgrad)                        \
  X(adam, AdamL2)                                       \
  X(adam_amsgrad, AdamL2Amsgrad)                        \
  X(lion, Lion)                                         \
  X(ademamix, AdEMAMix)                                 \
  X(rmsprop, RMSprop)                                   \
  X(rmsprop_momentum, RMSpropMomentum)                  \
  X(rmsprop_centered, RMSpropCentered)                  \
  X(rmsprop_centered_momentum, RMSpropCenteredMomentum) \
  X(adagrad, Adagrad)                                   \
  X(sgd, SGD)                                           \
  X(sgd_momentum, SGDMomentum)                          \
  X(sgd_nesterov, SGDNesterov)                          \
  X(schedule_free_sgd, ScheduleFreeSGD)                 \
  X(schedule_free_adam, ScheduleFreeAdam)               \
  X(stable_adamw, StableAdamW)                          \
  X(adafactor_matrix, AdafactorMatrix)                  \
  X(adafactor_momentum_matrix, AdafactorMatrixMomentum) \
  X(adafactor_vector, AdafactorVector)                  \
  X(adafactor_momentum_vector, AdafactorVectorMomentum)
