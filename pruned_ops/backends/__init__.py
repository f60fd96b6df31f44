"""Ways to run the ops. Importing this package registers every backend, those that cannot run here
included."""

from pruned_ops.backends import cpu as cpu
from pruned_ops.backends import triton as triton
