"""References: the frozen policy that the student is kept near."""
