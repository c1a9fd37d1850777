"""Speed of attention kernels and of a whole model's prefill."""
