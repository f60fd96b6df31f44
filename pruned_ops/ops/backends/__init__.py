"""Ways to run the ops; importing this registers all of them, in the order in which they are asked."""

from pruned_ops.ops.backends import cpu as cpu
from pruned_ops.ops.backends import triton as triton

# isort: split
# It is asked after Triton: at no shape measured so far are its kernels faster.
from pruned_ops.ops.backends import cuda as cuda
