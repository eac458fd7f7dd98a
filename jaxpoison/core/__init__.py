"""The ground floor: trees, batches, loops, devices, processes, checks and files. Needs JAX only."""
