"""What ``setup`` and ``init_module`` do to a model, whatever its mode: forwards, islands, buffers, layers."""
