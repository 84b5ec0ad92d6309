#include "cuda/normalize.h"

#include "core/matrices.h"
#include "cuda/normalize.cuh"

namespace fusedopt::cuda {
namespace {

// Slabs are taken whole if they are at least this large and this many: blocks must fill a device and have enough work.
constexpr int64_t kLargeSlab = 1 << 14;  // elements
constexpr int64_t kManySlabs = 128;

// Hands out memory piece by piece, each on a multiple of 16 bytes, so that four floats are one access; without memory,
// it only finds the size.
class Pieces {
 public:
  explicit Pieces(void* memory) : memory_(static_cast<unsigned char*>(memory)) {}

  template <class T>
  T* take(int64_t count) {
    used_ = divided_up(used_, 16) * 16;
    T* piece = memory_ == nullptr ? nullptr : reinterpret_cast<T*>(memory_ + used_);
    used_ += count * static_cast<int64_t>(sizeof(T));
    return piece;
  }
  int64_t used() const { return aligned(used_); }

 private:
  unsigned char* memory_;
  int64_t used_ = 0;
};

// The tensors of a rule and the memory for what is found out about them.
struct Plan {
  Normalization* normalizations;
  std::vector<NormalizedMatrix> slabs, matrices;  // those taken by whole slabs, and the others
  std::vector<NormalizedVector> vectors;
  std::vector<SummedParts> parts;
  std::vector<NormalizeScratch> scratch;  // by place in the list
  int64_t bytes;

  Plan(const Listed& listed, void* memory) : listed_(listed), info_(rules()[listed.rule]), pieces_(memory) {
    normalizations = pieces_.take<Normalization>(static_cast<int64_t>(listed.tensors.size()));
    scratch.resize(listed.tensors.size());
    int64_t slab_count = 0;
    for (const int32_t i : listed.tensors) slab_count += large_slabs(listed.batch.tensors[i]);
    for (size_t i = 0; i < listed.tensors.size(); ++i) {
      const TensorDesc& tensor = listed.batch.tensors[listed.tensors[i]];
      if (tensor.numel == 0) continue;
      if (tensor.factors.exist()) {
        add_matrix(tensor, i, slab_count >= kManySlabs && large_slabs(tensor) > 0);
      } else {
        add_vector(tensor, i);
      }
    }
    bytes = pieces_.used();
  }

 private:
  // How many slabs of a tensor there are, if one block could take each; else 0.
  static int64_t large_slabs(const TensorDesc& tensor) {
    const Factors& factors = tensor.factors;
    if (!factors.exist() || tensor.numel == 0 || factors.column_count > kMaxSlabColumns) return 0;
    const MatrixCut cut = MatrixCut::of(factors, tensor.numel);
    return cut.height * factors.column_count < kLargeSlab ? 0 : cut.all_slabs();
  }

  const GroupDesc& group_of(const TensorDesc& tensor) const { return listed_.batch.groups[tensor.group]; }
  bool reads_weights(const TensorDesc& tensor) const { return info_.reads_weights(group_of(tensor).config); }
  bool is_clamped(const TensorDesc& tensor) const {
    alignas(16) unsigned char hyper[kMaxHyperBytes];
    info_.derive(group_of(tensor).config, 1, {}, hyper);  // the same in every step
    return info_.moments(hyper).is_clamped;
  }

  static void fill(const TensorDesc& tensor, size_t index, NormalizedBuffers& filled) {
    filled.param = tensor.param.data;
    filled.master = tensor.master.data;
    filled.grad = tensor.grad.data;
    filled.index = static_cast<int32_t>(index);
    filled.formats = formats_of(tensor, 0, tensor.numel);
  }

  void add_matrix(const TensorDesc& tensor, size_t index, bool takes_slabs) {
    const MatrixCut cut = MatrixCut::of(tensor.factors, tensor.numel);
    const bool reads = reads_weights(tensor), weighs = !is_clamped(tensor);
    const int64_t updates = weighs ? cut.matrices : cut.units();
    NormalizedMatrix m{};
    fill(tensor, index, m);
    m.rows = tensor.factors.rows;
    m.columns = tensor.factors.columns;
    m.cut = cut;
    if (!takes_slabs || !weighs) m.row_sums = pieces_.take<double>(cut.row_parts());
    if (reads) m.weight_sums = pieces_.take<double>(cut.row_parts());
    m.column_sums = pieces_.take<double>(cut.slab_columns());
    if (weighs) m.weighted_sums = pieces_.take<double>(cut.slab_columns());
    m.chunk_sums = pieces_.take<double>(cut.matrices * chunks_of(cut.row_count));
    if (reads) m.param_sums = pieces_.take<double>(cut.units());
    m.update_sums = pieces_.take<double>(updates);
    m.row_factors = pieces_.take<float>(cut.rows());
    m.column_factors = pieces_.take<float>(cut.columns());
    m.means = pieces_.take<float>(cut.matrices);
    (takes_slabs ? slabs : matrices).push_back(m);
    scratch[index] = {m.row_factors, m.column_factors, cut.rows()};
    parts.push_back({m.param_sums, m.update_sums, cut.units(), updates, m.index, 0});
  }

  void add_vector(const TensorDesc& tensor, size_t index) {
    const int64_t chunks = chunks_of(tensor.numel);
    NormalizedVector v{};
    fill(tensor, index, v);
    const Buffer& second = tensor.states[info_.second_moment];
    v.second = second.data;
    v.scales = second.scales;
    v.row = tensor.row;
    v.second_dtype = second.dtype;
    v.takes_quotient = info_.takes_quotient;
    v.numel = tensor.numel;
    if (reads_weights(tensor)) v.param_sums = pieces_.take<double>(chunks);
    v.update_sums = pieces_.take<double>(chunks);
    vectors.push_back(v);
    parts.push_back({v.param_sums, v.update_sums, chunks, chunks, v.index, 0});
  }

  const Listed& listed_;
  const RuleInfo& info_;
  Pieces pieces_;
};

// Launches a kernel for tensors, with blocks_of(tensor) blocks for each.
template <class Tensor, class Blocks>
void launch_over(void (*kernel)(NormalizeParams<Tensor>), const std::vector<Tensor>& tensors, int threads,
                 const Plan& plan, cudaStream_t stream, const Blocks& blocks_of) {
  static_assert(sizeof(NormalizeParams<Tensor>) <= kParameterBytes);
  Packed<NormalizeParams<Tensor>> packed(kernel, threads, stream);
  packed.params->normalizations = plan.normalizations;
  for (const Tensor& tensor : tensors) packed.add(tensor, blocks_of(tensor));
  packed.flush();
}

void sum_matrices(const Plan& plan, cudaStream_t stream) {
  using Matrix = NormalizedMatrix;
  std::vector<Matrix> all = plan.slabs;
  all.insert(all.end(), plan.matrices.begin(), plan.matrices.end());
  const auto launch_on = [&](void (*kernel)(MatrixParams), const std::vector<Matrix>& matrices, const auto& blocks_of) {
    launch_over(kernel, matrices, kSumThreads, plan, stream, blocks_of);
  };
  const auto rows = [](const Matrix& m) { return divided_up(m.cut.rows(), kSumThreads); };
  const auto row_chunks = [](const Matrix& m) { return divided_up(m.cut.row_parts(), kBlockChunks); };

  launch_over(slab_kernel, plan.slabs, kSlabThreads, plan, stream, [](const Matrix& m) { return m.cut.all_slabs(); });
  launch_on(row_sum_kernel, plan.matrices, row_chunks);
  launch_on(row_average_kernel, plan.matrices, [&](const Matrix& m) { return m.cut.panels > 1 ? rows(m) : 0; });
  launch_on(column_sum_kernel, plan.matrices,
            [](const Matrix& m) { return divided_up(m.cut.slab_columns(), kSumThreads); });

  launch_on(column_average_kernel, all, [](const Matrix& m) { return divided_up(m.cut.columns(), kSumThreads); });
  launch_on(mean_kernel, all, [](const Matrix& m) { return m.cut.matrices; });
  launch_on(row_factor_kernel, all, rows);

  launch_on(weight_sum_kernel, all, [&](const Matrix& m) { return m.weight_sums != nullptr ? row_chunks(m) : 0; });
  const auto is_clamped = [](const Matrix& m) { return m.weighted_sums == nullptr; };
  launch_on(update_sum_kernel, all, [&](const Matrix& m) { return is_clamped(m) ? row_chunks(m) : 0; });
  launch_on(unit_sum_kernel, all, [&](const Matrix& m) {
    return m.weight_sums != nullptr || is_clamped(m) ? divided_up(m.cut.units(), kUnitsAtOnce) : 0;
  });
}

}  // namespace

int64_t normalization_bytes(const Listed& listed) { return Plan(listed, nullptr).bytes; }

void prepare_normalizing(Listed& listed, const std::vector<DeviceLr>& lrs, const Scaling& scaling, void* workspace,
                         cudaStream_t stream) {
  const Plan plan(listed, workspace);
  kPrepare[listed.rule](listed, lrs, scaling, plan.normalizations, true, stream);
  sum_matrices(plan, stream);
  launch_over(vector_kernel, plan.vectors, kSumThreads, plan, stream,
              [](const NormalizedVector& v) { return divided_up(v.numel, kReductionChunk * kBlockChunks); });
  launch_over(part_kernel, plan.parts, kSumThreads, plan, stream, [](const SummedParts&) { return int64_t{1}; });
  kPrepare[listed.rule](listed, lrs, scaling, plan.normalizations, false, stream);
  listed.scratch = plan.scratch;
}

}  // namespace fusedopt::cuda
