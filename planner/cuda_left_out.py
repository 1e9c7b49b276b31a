"""What a run for CUDA does not know of CUDA's kernels, by the ops that it met: what `Memory.left_out` says then.

The sizes are those of libraries, which find them when they run (cuDNN's heuristics and benchmarks), or follow from the device's
number of processors. Where none of these ops is in a run, nothing is left out.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

LEFT_OUT: Mapping[str, tuple[str, ...]] = {
    "workspaces of cuDNN's convolutions": ("convolution", "convolution_backward"),
    "cuDNN's recurrent layers, which keep otherwise than the CPU's": ("mkldnn_rnn_layer", "lstm", "gru"),
    "workspaces of cuDNN's attention": ("_scaled_dot_product_cudnn_attention", "_scaled_dot_product_cudnn_attention_backward"),
    "workspaces of memory-efficient attention's backward": ("_scaled_dot_product_efficient_attention_backward",),
    "what cuDNN keeps of a batch norm": ("native_batch_norm",),
    "what torch's fused transformer layers need": ("_native_multi_head_attention", "_transformer_encoder_layer_fwd"),
    "temporaries of sorting": ("sort", "topk", "_unique2", "index_put_", "_index_put_impl_"),
    "workspaces of cuSOLVER and cuFFT": ("_fft_r2c", "_fft_c2c", "_fft_c2r", "linalg_qr", "_linalg_svd", "_linalg_eigh"),
}
"""What is not known, and the ops (as `Allocation.op` names them) that it is of.

Convolutions: aten/src/ATen/native/cudnn/Conv_v8.cpp `run_conv_plan`; recurrent layers: cudnn/RNN.cpp `_cudnn_rnn` (`reserve`);
attention: cudnn/MHA.cpp, and cuda/attention_backward.cu `_efficient_attention_backward` (`workspace`); batch norms:
cudnn/BatchNorm.cpp `cudnn_batch_norm` (`reserve`); sorting: cuda/Sort.cu, cuda/Indexing.cu `index_put_with_sort_kernel`, and
cub's temporary storage.
"""


def left_out_of(ops: Iterable[str]) -> tuple[str, ...]:
    """What is not counted of a run on CUDA that met these ops.

    >>> left_out_of(["mm", "convolution"]), left_out_of(["mm"])
    (("workspaces of cuDNN's convolutions",), ())
    """
    met = set(ops)
    return tuple(what for what, known in LEFT_OUT.items() if met.intersection(known))
