"""Linear recurrences: gated delta rule, Kimi delta attention, Mamba2, as functions of one call's inputs."""
