"""What several solvers of others need."""
