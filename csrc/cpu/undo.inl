// Leaves elements as they were whose step would not be finite (TensorDesc::skips_blocks): a tile is stepped like any
// other, and what was spoilt is put back, byte by byte. Where it is not asked for, it costs nothing. None of it is
// inlined, as it would be for each rule.
#pragma once

#include "cpu/formats.inl"

namespace fusedopt {
namespace {

// The bytes of one tile before its step.
class Undo {
 public:
  __attribute__((noinline)) Undo(const TensorDesc& tensor, int states, int64_t begin, int n)
      : tensor_(tensor), states_(states), begin_(begin), n_(n) {
    for_each_buffer([&](const Buffer& buffer, auto& kept) {
      memcpy(kept.numbers, bytes(buffer, 0), static_cast<size_t>(n_ * size_of(buffer.dtype)));
      if (buffer.is_blockwise()) memcpy(kept.scales, scales(buffer), static_cast<size_t>(blocks()));
    });
  }

  // Notes which elements the new numbers spoil, of weights or of a state.
  __attribute__((noinline)) void judge(const float* x) {
    for (int i = 0; i < n_; ++i) spoilt_[i] |= (bits_of(x[i]) & ~kSignBit) >= kTooLarge;
  }

  // Once everything is stored. Returns how many elements were put back: those of a block together.
  __attribute__((noinline)) int64_t put_back() {
    bool has_blocks = false;
    for (int k = 0; k < states_; ++k) has_blocks |= tensor_.states[k].is_blockwise();
    const int length = has_blocks ? kBlock : 1;
    int64_t count = 0;
    for (int i = 0; i < n_; i += length) {
      const int run = n_ - i < length ? n_ - i : length;
      bool any = false;
      for (int j = i; j < i + run; ++j) any |= spoilt_[j] != 0;
      if (!any) continue;
      count += run;
      for_each_buffer([&](const Buffer& buffer, const auto& kept) {
        const int64_t size = size_of(buffer.dtype);
        memcpy(bytes(buffer, i), kept.numbers + i * size, static_cast<size_t>(run * size));
        if (buffer.is_blockwise()) scales(buffer)[i / kBlock] = kept.scales[i / kBlock];
      });
    }
    return count;
  }

 private:
  struct Kept {
    uint8_t numbers[kTile * sizeof(float)];
    uint8_t scales[kTile / kBlock];
  };

  int blocks() const { return (n_ + kBlock - 1) / kBlock; }
  uint8_t* bytes(const Buffer& buffer, int i) const {
    return static_cast<uint8_t*>(buffer.data) + (begin_ + i) * size_of(buffer.dtype);
  }
  uint8_t* scales(const Buffer& buffer) const { return buffer.scales + block_index(tensor_.row, begin_); }

  template <class Use>
  void for_each_buffer(const Use& use) {
    use(tensor_.param, kept_[0]);
    if (tensor_.master_format != Master::kNone) use(tensor_.master, kept_[1]);
    for (int k = 0; k < states_; ++k) use(tensor_.states[k], kept_[2 + k]);
  }

  const TensorDesc& tensor_;
  int states_;
  int64_t begin_;
  int n_;
  uint8_t spoilt_[kTile] = {};
  Kept kept_[2 + kMaxStates];
};

}  // namespace
}  // namespace fusedopt
