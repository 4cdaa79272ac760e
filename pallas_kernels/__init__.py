"""Hot loops as Pallas kernels: one folder per operation, no knowledge of any method."""
