"""What the Triton kernels become for real GPUs, and what a GPU would measure."""
