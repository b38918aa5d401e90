"""Teachers: who scores the student's tokens."""
