"""Search backends: each proposes compression policies for a problem, one method a file."""
