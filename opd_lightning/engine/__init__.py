"""What generates tokens."""
