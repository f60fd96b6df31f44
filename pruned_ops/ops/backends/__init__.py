"""Ways to run the ops. Importing this package registers every backend, those that cannot run here
included, in the order in which they are asked."""

from pruned_ops.ops.backends import cpu as cpu
from pruned_ops.ops.backends import triton as triton

# isort: split
# After Triton: no shape has been measured yet at which its kernels are faster.
from pruned_ops.ops.backends import cuda as cuda
