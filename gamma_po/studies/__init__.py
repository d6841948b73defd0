"""Studies: does a target margin help? Controlled testbeds, protocols, verdicts."""
