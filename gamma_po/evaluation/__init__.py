"""What changed: pair metrics, sampled completions, gold rewards and the final report."""
