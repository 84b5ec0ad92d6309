#include "cpu/normalize.h"

#include <algorithm>
#include <utility>

#include "cpu/normalize_member.h"
#include "cpu/parallel.h"

namespace fusedopt::cpu {
namespace {

// Tensors are taken in waves of about this many elements, so that each pass finds in cache what the last one read.
constexpr int64_t kWave = 1 << 20;
constexpr size_t kMembers = 512;   // of a wave, to begin with
constexpr int64_t kLateSteps = 4;  // that a thread keeps for the end: about a unit's time

// Tensors that go through the passes together.
struct Wave {
  std::vector<Member> members;
  Items small, units, second, elements, steps;  // small ones are in no other

  void settle(Workspace& workspace) {
    workspace.doubles.settle();
    workspace.floats.settle();
    for (Member& member : members) {
      member.settle();
      if (member.is_small()) {
        small.add(member, 1);
        continue;
      }
      if (member.is_matrix()) {
        units.add(member, member.units());
        if (member.needs_second_pass()) second.add(member, member.units());
      } else {
        elements.add(member, member.items());
      }
      steps.add(member, member.items());
    }
  }
};

}  // namespace

void step_normalizing(const std::vector<TensorDesc>& tensors, const std::vector<int32_t>& listed,
                      const std::vector<GroupDesc>& groups, const Kernels& kernels, int threads,
                      const Recording& recording) {
  const IeeeMode ieee;  // scalars are derived here, too
  static thread_local Workspace workspaces[2];
  // The step of one wave runs together with the first pass of the next, so that threads wait less often for the last
  // one. Each goes back through what it has read, the last first, as that is still in its cache, and keeps some steps
  // for the end.
  const auto step_and_sum = [&](const Wave& last, const Wave& next) {
    const int64_t items = last.steps.size() + next.units.size() + next.elements.size() + next.small.size();
    const int team = team_for(items, threads);
    Shares steps(last.steps.size(), team, Shares::Order::kBackwards), late_steps = steps.keep_back(kLateSteps);
    Shares units(next.units.size(), team), elements(next.elements.size(), team), small(next.small.size(), team);
    const auto step = [&](int64_t i) {
      const auto [member, item] = last.steps.at(i);
      member->step(kernels, item, recording);
    };
    parallel_team(team, [&](int thread) {
      steps.take(thread, step);
      units.take(thread, [&](int64_t i) {
        const auto [member, unit] = next.units.at(i);
        member->sum_unit(kernels, unit);
      });
      elements.take(thread, [&](int64_t i) {
        const auto [member, item] = next.elements.at(i);
        member->sum_elements(kernels, item);
      });
      small.take(thread, [&](int64_t i) { next.small.at(i).first->take_whole(kernels, recording); });
      late_steps.take(thread, step);
    });
  };

  Wave last;
  size_t taken = 0;
  for (int turn = 0; taken < listed.size() || !last.members.empty(); turn = 1 - turn) {
    Workspace& workspace = workspaces[turn];
    workspace.doubles.forget();
    workspace.floats.forget();
    Wave wave;
    wave.members.reserve(std::min<size_t>(listed.size() - taken, kMembers));
    for (int64_t held = 0; taken < listed.size() && held < kWave; ++taken) {
      const TensorDesc& tensor = tensors[listed[taken]];
      if (tensor.numel == 0) continue;
      wave.members.emplace_back(tensor, listed[taken], groups[tensor.group], workspace);
      held += tensor.numel;
    }
    wave.settle(workspace);
    step_and_sum(last, wave);
    parallel_items(wave.second.size(), threads, [&](int64_t i) {
      const auto [member, unit] = wave.second.at(i);
      member->sum_updates(kernels, unit);
    });
    for (Member& member : wave.members) {
      if (!member.is_small()) member.finish_sums();
    }
    last = std::move(wave);
  }
}

}  // namespace fusedopt::cpu
