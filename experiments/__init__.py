"""What we learn: comparisons of samplers, their metrics, results and pictures."""
