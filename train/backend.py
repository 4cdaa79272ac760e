"""Devices and processes: what has to be said before JAX starts its backend, so by programs only."""

import jax


def start(
    *,
    devices: int | None = None,
    coordinator: str | None = None,
    num_processes: int = 1,
    process_id: int = 0,
) -> None:
    """Ask for `devices` virtual CPU devices in this process, and join the other processes, if any.

    The number of devices changes the order of sums, so checkpoints record it. Raises ValueError for sizes that
    make no sense and when the backend is already running.
    """
    if devices is not None and devices < 1:
        raise ValueError(f"devices: expected 1 or more, got {devices}")
    if not 0 <= process_id < num_processes:
        raise ValueError(f"process_id: expected 0 <= id < num_processes={num_processes}, got {process_id}")
    if num_processes > 1 and coordinator is None:
        raise ValueError(f"coordinator: expected host:port for {num_processes} processes, got None")
    try:
        if devices is not None:
            jax.config.update("jax_num_cpu_devices", devices)
        if coordinator is not None:
            # The CPU client has no collectives between processes of its own.
            jax.config.update("jax_cpu_collectives_implementation", "gloo")
            jax.distributed.initialize(coordinator, num_processes, process_id)
    except RuntimeError as error:
        raise ValueError(f"devices, coordinator: expected before JAX starts, got: {error}") from error
