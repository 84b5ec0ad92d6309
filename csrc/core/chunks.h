// The planner: tensors -> chunks of bounded length -> work items of about equal size.
//
// A chunk is a run of one tensor. An item is a run of chunks that one thread takes at a time: a large
// tensor spreads over many items, many small tensors share one. Empty tensors make no chunk. Neither
// cut changes a bit of the result: rules are element-wise and random bits depend on the element's index.
#pragma once

#include <cstdint>
#include <vector>

namespace fusedopt {

struct Chunk {
  int64_t begin;   // first element, within its tensor
  int32_t length;  // elements
  int32_t tensor;  // index into the list
};

struct ChunkPlan {
  std::vector<Chunk> chunks;
  std::vector<int64_t> item_ends;  // item i holds chunks [item_ends[i-1], item_ends[i])
};

// Lists the chunks of tensors whose sizes `numel_of(i)` gives, about `chunk_length` long, in order,
// and closes an item as soon as it holds at least `item_length` elements. Tensor i may be cut at
// `cut_of(i, position)`, which is `position` or less than a chunk before it.
template <class NumelOf, class CutOf>
ChunkPlan plan_chunks(int64_t tensors, NumelOf numel_of, CutOf cut_of, int64_t chunk_length, int64_t item_length) {
  ChunkPlan plan;
  int64_t held = 0;
  for (int64_t i = 0; i < tensors; ++i) {
    const int64_t numel = numel_of(i);
    for (int64_t begin = 0, end; begin < numel; begin = end) {
      end = begin + chunk_length < numel ? cut_of(i, begin + chunk_length) : numel;
      const int64_t length = end - begin;
      plan.chunks.push_back({begin, static_cast<int32_t>(length), static_cast<int32_t>(i)});
      held += length;
      if (held >= item_length) {
        plan.item_ends.push_back(static_cast<int64_t>(plan.chunks.size()));
        held = 0;
      }
    }
  }
  if (held > 0) plan.item_ends.push_back(static_cast<int64_t>(plan.chunks.size()));
  return plan;
}

}  // namespace fusedopt
