"""Lightning callbacks: progress, samples, evaluation history."""
